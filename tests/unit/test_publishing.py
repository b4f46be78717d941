"""`lingraft push`: what is looked at before anything is sent, and what a hub receives."""

import base64
import json
import shutil
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

from lingraft.adapter import Adapter
from lingraft.cards import CARD
from lingraft.cli import main
from lingraft.commands.packing_up import parcel_of
from lingraft.fusion.stages import SecondStage, second_stage
from tests.unit.adapters import FEW, rewrite, snapshot, tiny_llama, updates_of, write_adapter, write_structure

TOKEN = "hf_aSecretThatIsNeverShown"
BASE = {"backbone": {"name": "owner/base", "digest": "hub:owner/base@" + "0" * 40}}
MADE = {"how": "train", "task": "topics", "language": "sw", "seed": 0, "lingraft": "0.1"}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter as lingraft saves it, with a licence in its card."""
    base = {"sidecar": {**BASE, "provenance": MADE}, "base_model_name_or_path": "owner/base"}
    folder = Adapter.load(write_adapter(tmp_path / "made", 1, **base)).save(tmp_path / "adapter", MADE)
    card = folder / CARD
    card.write_text(card.read_text("utf-8").replace("library_name: peft", "library_name: peft\nlicense: apache-2.0"))
    return folder


def push(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["push", *map(str, arguments)], catch_exceptions=False)


def looked_at(folder: Path, *options: str) -> dict[str, Any]:
    result = push(folder, "owner/name", "--dry-run", "--json", *options)
    found = json.loads(result.stdout)
    assert result.exit_code == (2 if found["refused"] else 0), result.output
    return found


def whats(found: dict[str, Any], kind: str = "refused") -> str:
    return "\n".join(said["what"] for said in found[kind])


# What is looked at


def test_a_dry_run_says_every_file_and_the_card(adapter: Path):
    before = snapshot(adapter)
    found = looked_at(adapter)
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "lingraft.json"]
    assert [(f["path"], f["bytes"]) for f in found["files"]] == [(n, (adapter / n).stat().st_size) for n in names]
    assert (found["refused"], found["warnings"], found["pushed"]) == ([], [], False)
    assert found["card"]["base_model"] == "owner/base" and found["card"]["license"] == "apache-2.0"
    assert found["left_out"] == ["step.json (the store's own record)"]
    said = push(adapter, "owner/name", "--dry-run").stdout
    for text in (*names, "license: apache-2.0", "private"):
        assert text in said
    assert snapshot(adapter) == before


def test_a_dry_run_needs_neither_network_nor_the_hubs_library(adapter: Path):
    script = (
        "import sys, socket\nsys.modules['huggingface_hub'] = None\n"
        "def closed(*a, **k): raise SystemExit('a socket was opened')\n"
        "socket.socket = socket.create_connection = socket.getaddrinfo = closed\n"
        "from lingraft.cli import main\nmain(sys.argv[1:], standalone_mode=False)\n"
        "sys.exit(str([m for m in ('torch', 'transformers', 'peft') if m in sys.modules]))"
    )
    arguments = [sys.executable, "-c", script, "push", str(adapter), "owner/name"]
    found = subprocess.run([*arguments, "--dry-run"], capture_output=True, text=True, check=False)
    assert found.stderr.strip() == "[]" and "adapter_model.safetensors" in found.stdout
    # And a real one says what is missing, before it needs it.
    found = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert found.returncode == 2 and "pip install 'lingraft[hub]'" in found.stderr


@pytest.mark.parametrize(
    "name", ["name", "a/b/c", "/name", "owner/", "../x", "o wner/name", "owner/na..me", "owner/x\n"]
)
def test_a_repository_is_owner_and_name(adapter: Path, name: str):
    assert "no OWNER/NAME" in "".join(said.what for said in parcel_of(adapter, name).refused)
    result = push(adapter, name)
    assert result.exit_code == 2 and "OWNER/NAME" in result.stderr


def spoil_numbers(folder: Path) -> None:
    rewrite(folder, lambda name, tensor: tensor * np.nan)
    (folder / "step.json").unlink()


def spoil_tensors(folder: Path) -> None:
    rewrite(folder, lambda name, tensor: tensor * 2)


def leave(name: str, folder_too: bool = False) -> Callable[[Path], None]:
    def leaving(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(b"x")

    return leaving


def link(folder: Path) -> None:
    (folder / "config.json").symlink_to("/etc/hostname")


def link_a_part(folder: Path) -> None:
    (folder / "stage1").symlink_to("/etc")


def link_weights(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def name_a_place(folder: Path) -> None:
    path = folder / "lingraft.json"
    notes = json.loads(path.read_text())
    path.write_text(json.dumps({**notes, "provenance": {"data": "/home/ann/secret/rows.csv"}}))


def no_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


REFUSED = {
    "NaN": (spoil_numbers, "NaN or infinite"),
    "other tensors": (spoil_tensors, "not what it was"),
    "a pickle": (leave("optimizer.pt"), "pickle"),
    "a pickle in capitals": (leave("X.BIN"), "pickle"),
    "a checkpoint": (leave("checkpoint.safetensors"), "not ended"),
    "half a training": (leave(".x.partial/a"), "not ended"),
    "a link": (link, "is a link"),
    "a linked part": (link_a_part, "is a link"),
    "linked weights": (link_weights, "is a link"),
    "a place": (name_a_place, "a place of this machine"),
    "no adapter": (no_config, "cannot be opened"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_speaks_against_it_stops_it_before_anything_is_sent(
    adapter: Path, case: str, monkeypatch: pytest.MonkeyPatch
):
    spoil, said = REFUSED[case]
    spoil(adapter)
    assert said in whats(looked_at(adapter))

    def closed(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", closed)
    for options in ((), ("--dry-run",)):
        result = push(adapter, "owner/name", *options)
        assert result.exit_code == 2 and said in result.stderr and "to do:" in result.stderr


def test_what_does_not_belong_is_left_out_with_a_word(adapter: Path):
    for name in (".git/config", ".env", "notes.txt", "trackers/events", "metrics.jsonl"):
        leave(name)(adapter)
    found = looked_at(adapter)
    said = "\n".join(found["left_out"])
    for name in (".git/ (hidden)", ".env (hidden)", "notes.txt", "trackers/", "metrics.jsonl"):
        assert name in said
    assert len(found["files"]) == 4 and not found["refused"]


def test_a_folder_without_card_gets_one_and_is_told(adapter: Path):
    (adapter / CARD).unlink()
    found = looked_at(adapter)
    assert "no README.md" in whats(found, "warnings") and "no licence" in whats(found, "warnings")
    assert found["card"]["language"] == ["sw"] and not (adapter / CARD).exists()
    assert next(f for f in found["files"] if f["path"] == CARD)["changed"]


@pytest.mark.parametrize(
    "text", ["", "# no front", "---\n: [\n---\n", "---\n- a\n---\n", "---\n" + "[" * 1500 + "\n---\n"]
)
def test_a_card_that_the_hub_cannot_read_is_said(adapter: Path, text: str):
    (adapter / CARD).write_text(text)
    assert "no front matter" in whats(looked_at(adapter), "warnings")


def test_a_base_model_in_a_folder_is_named_and_its_path_stays_here(tmp_path: Path):
    place = "/home/ann/models/tiny-llama"
    notes = {"backbone": {"name": place, "digest": "folder:1"}, "provenance": MADE}
    folder = write_adapter(tmp_path / "a", 1, shapes=FEW, sidecar=notes, base_model_name_or_path=place)
    before = snapshot(folder)
    found = looked_at(folder)
    assert not found["refused"] and "published as 'tiny-llama'" in whats(found, "warnings")
    sent = {f.name: f.content for f in parcel_of(folder, "owner/name").files}
    for name in ("adapter_config.json", "lingraft.json"):
        assert isinstance(sent[name], bytes) and b"ann" not in sent[name] and b"tiny-llama" in sent[name]
    assert b"ann" not in sent[CARD]
    assert snapshot(folder) == before


def test_a_first_stage_whose_base_is_renamed_still_belongs(tmp_path: Path):
    place = "/home/ann/models/tiny-llama"
    first = write_adapter(tmp_path / "first", 1, base_model_name_or_path=place)
    notes = SecondStage(Adapter.load(first), "lora", language="sw").notes()
    folder = write_adapter(tmp_path / "b", 2, base_model_name_or_path=place, sidecar={"second": notes})
    SecondStage(Adapter.load(first), "lora", language="sw").write(folder, {})
    parcel = parcel_of(folder, "owner/name")
    assert not parcel.refused
    for file in parcel.files:
        path = tmp_path / "pushed" / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.content.read_bytes() if isinstance(file.content, Path) else file.content)
    stage = second_stage(Adapter.load(tmp_path / "pushed"))
    assert stage is not None and stage.kind == "lora"
    assert "README.md" in {p.name for p in (tmp_path / "pushed" / "stage1").iterdir()}
    # A first stage that was another one before is not made to fit.
    rewrite(folder / "stage1", lambda name, tensor: tensor * 2)
    assert "cannot be opened" in "".join(said.what for said in parcel_of(folder, "owner/name").refused)


def test_a_path_in_the_card_of_a_part_is_said(adapter: Path):
    SecondStage(Adapter.load(adapter), "lora", language="sw").write(adapter, {})
    assert "names a place" not in whats(looked_at(adapter), "warnings")
    (adapter / "stage1" / CARD).write_text("trained on /home/ann/rows.csv")
    assert "stage1/README.md names a place" in whats(looked_at(adapter), "warnings")


@pytest.mark.parametrize("structure", ["lora", "ia3", "sparse"])
def test_divergences_are_published_with_their_parts(tmp_path: Path, structure: str):
    a, b = (Adapter.load(write_structure(tmp_path / n, structure, s, sidecar=BASE)) for s, n in enumerate("ab"))
    (a - b).save(tmp_path / "d")
    names = {f.name for f in parcel_of(tmp_path / "d", "owner/name").files}
    assert ("target_ref/adapter_model.safetensors" in names) == (structure != "lora")
    assert not parcel_of(tmp_path / "d", "owner/name").refused


# What a hub receives


class Hub(ThreadingHTTPServer):
    """As much of the hub as a push asks for: it keeps what is committed, and can refuse."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.requests: list[tuple[str, str]] = []
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[list[dict[str, Any]]] = []
        self.private: bool | None = None
        self.tokens: set[tuple[str | None, str]] = set()
        self.fails: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _begin(self) -> bytes | None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, self.path))
        if not self.path.startswith("/upload/"):
            self.server.tokens.add((self.headers.get("Authorization"), self.path))
        if self.path.startswith("/api/") and self.headers.get("Authorization") is None:
            self.answer({"error": "who?"}, 401)
            return None
        for part, status in self.server.fails.items():
            if part in self.path:
                self.answer({"error": "no"}, status)
                return None
        return body

    def do_POST(self) -> None:
        body = self._begin()
        if body is None:
            return
        hub, path = self.server, self.path
        if path == "/api/repos/create":
            hub.private = json.loads(body).get("private", json.loads(body).get("visibility") == "private")
            self.answer({"url": f"{hub.url}/owner/name", "name": "owner/name"})
        elif "/preupload/" in path:
            asked = json.loads(body)["files"]
            modes = {f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular" for f in asked}
            self.answer({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**{k: o[k] for k in ("oid", "size")}, "actions": {"upload": {"href": f"{hub.url}/upload/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/branch/" in path:
            self.answer({})
        elif "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines() if line]
            hub.commits.append(lines)
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.objects[value["oid"]]
            self.answer({"commitUrl": f"{hub.url}/owner/name/commit/{'1' * 40}", "commitOid": "1" * 40})
        else:
            self.answer({})

    def do_PUT(self) -> None:
        body = self._begin()
        if body is not None:
            self.server.objects[self.path.rpartition("/")[2]] = body
            self.answer({})

    def do_GET(self) -> None:
        if self._begin() is not None:
            self.answer({"id": "owner/name", "sha": "0" * 40})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", server.url, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def test_a_push_is_one_commit_and_opens_in_plain_peft(adapter: Path, tmp_path: Path, hub: Hub):
    from peft import PeftModel

    result = push(adapter, "owner/name", "--json", "--message", "the first", "--revision", "try")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["pushed"] and found["commit"] == "1" * 40
    assert len(hub.commits) == 1 and hub.commits[0][0]["value"]["summary"] == "the first"
    assert hub.private is True and any("/branch/try" in path for _, path in hub.requests)
    assert {token for token, _ in hub.tokens} == {f"Bearer {TOKEN}"}
    assert TOKEN not in result.output and TOKEN not in json.dumps(found)
    assert set(hub.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "lingraft.json"}
    assert len(hub.objects) == 1  # The tensors went as a large file, the rest with the commit.
    for name, received in hub.files.items():
        assert received == (adapter / name).read_bytes()
        (tmp_path / "hub").mkdir(exist_ok=True)
        (tmp_path / "hub" / name).write_bytes(received)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "hub")).merge_and_unload()
    for module, update in updates_of(adapter).items():
        weights = [m.get_submodule(module).weight.detach().numpy() for m in (model, tiny_llama())]
        assert np.allclose(weights[0] - weights[1], update, atol=1e-5)


def test_a_public_push_for_people(adapter: Path, hub: Hub):
    result = push(adapter, "owner/name", "--public")
    assert result.exit_code == 0, result.output
    assert hub.private is False and "pushed: " in result.stderr and TOKEN not in result.output
    assert not any("/branch/" in path for _, path in hub.requests)


@pytest.mark.parametrize(
    ("fails", "said", "code"),
    [
        ({"/api/": 401}, "does not know who is asking", 2),
        ({"/api/": 403}, "may not write there", 2),
        ({"/preupload/": 404}, "no such repository or branch", 2),
        ({"/commit/": 429}, "asks to wait", 1),
        ({"/commit/": 507}, "nothing was published", 1),
    ],
)
def test_what_the_hub_refuses_is_one_message(
    adapter: Path, hub: Hub, fails: dict[str, int], said: str, code: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fails = fails
    result = push(adapter, "owner/name", "--json")
    assert result.exit_code == code
    found = json.loads(result.stdout)
    assert said in found["error"] and found["remedy"] and TOKEN not in result.output
    assert hub.commits == [] and hub.files == {}


def test_a_hub_that_cannot_be_reached_is_said(adapter: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", nobody, raising=False)
    result = push(adapter, "owner/name")
    assert result.exit_code == 1 and "cannot be reached" in result.stderr and TOKEN not in result.output


def test_who_is_not_logged_in_is_told_how(adapter: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    result = push(adapter, "owner/name")
    assert result.exit_code == 2 and "hf auth login" in result.stderr and hub.commits == []


def test_offline_is_said(adapter: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.utils._http.constants.HF_HUB_OFFLINE", True)
    result = push(adapter, "owner/name")
    assert result.exit_code == 2 and "offline" in result.stderr
    assert push(adapter, "owner/name", "--dry-run").exit_code == 0


def test_the_front_matter_that_is_pushed_is_the_cards(adapter: Path):
    found = looked_at(adapter)
    text = (adapter / CARD).read_text(encoding="utf-8")
    assert found["card"] == yaml.safe_load(text.split("---\n")[1])


def test_a_collected_adapter_can_be_pushed(tmp_path: Path):
    from lingraft.commands.collecting import collect_adapters
    from tests.unit.test_cards import a_run

    collect_adapters(a_run(tmp_path), tmp_path / "run")
    found = looked_at(tmp_path / "run" / "adamergex-sw")
    assert not found["refused"] and found["card"]["model-index"]
    shutil.rmtree(tmp_path / "store")
    assert looked_at(tmp_path / "run" / "adamergex-sw") == found


@pytest.mark.parametrize("token", [TOKEN, TOKEN + "\x01x", TOKEN + "é", TOKEN + " x", "\t" + TOKEN])
@pytest.mark.parametrize("fails", [{}, {"/api/": 403}])
def test_a_traceback_shows_no_token(
    adapter: Path, hub: Hub, token: str, fails: dict[str, int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", token)
    hub.fails = fails
    result = push(adapter, "owner/name", "--debug")
    assert TOKEN not in result.output and "unexpected" not in result.output, result.output
    if "é" in token:  # It cannot even be sent.
        assert result.exit_code == 2 and "hf auth login" in result.stderr
