"""Files that somebody else wrote, to do harm: nothing of them is executed, leaves its folder, or is more than text."""

import ast
import copy
import csv
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from tools.audit import UNREACHABLE, judged

from lingraft import Adapter, bounded
from lingraft.backbones import Backbone
from lingraft.config import BackboneConfig, Experiment, load_experiment, parse_yaml
from lingraft.errors import AdapterError, BackboneError, ConfigError, DataError, LingraftError
from lingraft.escaping import in_csv, in_html, in_markdown, one_line, printable
from lingraft.locating import locate
from lingraft.prompts import fill
from lingraft.replacing import write_text
from lingraft.report.tables import markdown
from lingraft.report.terminal import lines
from lingraft.tasks.formats import exemplar_rows
from lingraft.tasks.sources import FileSource, HubSource
from lingraft.tensors import TensorFile
from tests.unit.damage import CONFIG, WEIGHTS, set_texts, write_any
from tests.unit.test_backbones import write_gguf
from tests.unit.test_report import make_run, plain, results

SOURCES = Path(__file__).parents[2] / "src/lingraft"


class Harm:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What a hostile pickle makes; that it would is shown first."""
    shown = tmp_path / "shown"
    pickle.loads(pickle.dumps(Harm(shown)))  # noqa: S301
    assert shown.is_dir()
    return tmp_path / "harm"


class TooSlow(BaseException):
    """Nothing may catch it."""


@contextmanager
def in_time(seconds: int = 10) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def load(folder: Path) -> Backbone:
    return Backbone(locate(BackboneConfig(model=str(folder), dtype="float32", device="cpu")))


def configured(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# What the sources call.


def called(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


FORBIDDEN = re.compile(
    r"(.*\.)?(eval|exec|compile|__import__)|os\.(system|popen|exec.*|spawn.*)|(cloud)?pickle\..*|dill\..*|joblib\..*|marshal\..*"
    r"|shelve\..*|torch\.(load|hub.*)|(np|numpy)\.(load|fromfile)|jinja2\..*|.*\.apply_chat_template|.*\.(format|format_map)"
    r"|yaml\.(unsafe_load|full_load|load_all)|.*\.extractall|pd\..*|pandas\..*"
)
ALLOWED = {"re.compile", "torch.compile"}


def test_the_library_calls_nothing_that_executes_what_it_reads() -> None:
    found = []
    for path in SOURCES.rglob("*.py"):
        for name, node in called(ast.parse(path.read_text())):
            ours = name.endswith(".eval") and not node.args  # A model's.
            compiled = name in ALLOWED or (name.endswith(".compile") and "model" in name)
            shell = any(k.arg == "shell" for k in node.keywords)
            # The page's own template, which no data become part of, and which escapes whatever is put into it.
            template = (
                path.name == "rendering.py" and name == "jinja2.Environment" and "autoescape=True" in ast.unparse(node)
            )
            if (FORBIDDEN.fullmatch(name) and not ours and not compiled and not template) or shell:
                found.append(f"{path.name}:{node.lineno}: {name}")
            if name == "yaml.load":
                assert [ast.unparse(k.value) for k in node.keywords] == ["_Loader"]
    assert not found


def test_models_and_tokenizers_are_opened_from_disk_as_safetensors_and_without_their_code() -> None:
    count = 0
    for path in SOURCES.rglob("*.py"):
        for name, node in called(ast.parse(path.read_text())):
            if not name.endswith(".from_pretrained"):
                continue
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert options["local_files_only"] == "True", f"{path.name}:{node.lineno}"
            assert options["trust_remote_code"] in ("False", "remote", "config.trust_remote_code")
            if "Tokenizer" not in name and "gguf_file" not in options:
                assert options["use_safetensors"] == "True", f"{path.name}:{node.lineno}"
            count += 1
    assert count >= 7


def test_data_sets_are_asked_for_at_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or [{"id": "1"}])
    monkeypatch.setattr("lingraft.tasks.sources.hub_commit", lambda *_: "c" * 40)
    for revision in (None, "main", "v1.0", "d" * 40):
        HubSource("some/set", "config", "test", revision).rows()
    assert [k["revision"] for _, k in asked] == ["c" * 40] * 3 + ["d" * 40]
    HubSource("some/set", "config", "test", "main", export=True).rows()
    assert asked[-1][1]["data_files"] == {"test": f"hf://datasets/some/set@{'c' * 40}/config/test/*.parquet"}
    assert not any("trust_remote_code" in k for _, k in asked)


def test_a_hub_model_is_fetched_at_a_commit_without_code_and_pickles(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("lingraft.locating.hub_commit", lambda *_: "c" * 40)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *a, **k: asked.append(k) or str(tiny_folder / "config.json")
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append(k) or str(tiny_folder))
    Backbone(locate(BackboneConfig(model="some/model", dtype="float32", device="cpu")))
    assert {k["revision"] for k in asked} == {"c" * 40}
    (patterns,) = [k["allow_patterns"] for k in asked if "allow_patterns" in k]
    assert not [p for p in patterns if p.endswith((".py", ".bin", ".pt", ".pkl"))] and "*" not in patterns


def test_forty_letters_are_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lingraft.locating._named_commit", lambda config: "c" * 40)
    found = locate(BackboneConfig(model="some/model", revision="release".ljust(40, "x")))
    assert found.digest == f"hub:some/model@{'c' * 40}"


# Pickles.


def test_an_adapter_that_is_a_pickle_is_not_opened(tmp_path: Path, mark: Path) -> None:
    for name in ("adapter_model.bin", WEIGHTS):
        folder = write_any(tmp_path / name, "lora", 0, np.float32, True)
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(pickle.dumps(Harm(mark)))
        with pytest.raises(AdapterError):
            Adapter.load(folder)
    assert not mark.exists()


def _only_pickles(folder: Path, harm: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(harm)


def _another_safetensors(folder: Path, harm: bytes) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "pytorch_model.bin").write_bytes(harm)


def _named_in_the_configuration(folder: Path, harm: bytes) -> None:
    (folder / "adapter_model.bin").write_bytes(harm)
    configured(folder, transformers_weights="adapter_model.bin")


def _indexed(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    weights = dict.fromkeys(TensorFile(folder / "other.safetensors").names, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _named_in_the_index(folder: Path, harm: bytes) -> None:
    (folder / "weights.bin").write_bytes(harm)
    _indexed(folder, "weights.bin")


def _as_safetensors(folder: Path, harm: bytes) -> None:
    (folder / "model.safetensors").write_bytes(harm)


PICKLED = (_only_pickles, _another_safetensors, _named_in_the_configuration, _named_in_the_index, _as_safetensors)


@pytest.mark.parametrize("spoil", PICKLED)
def test_a_base_model_whose_weights_are_pickles_is_not_opened(
    tiny_folder: Path, tmp_path: Path, mark: Path, spoil: Callable[[Path, bytes], None]
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    spoil(folder, pickle.dumps(Harm(mark)))
    with pytest.raises(LingraftError):
        load(folder)
    assert not mark.exists()


def test_pickles_and_code_beside_a_checkpoint_are_left_alone(tiny_folder: Path, tmp_path: Path, mark: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    for name in ("optimizer.pt", "training_args.bin", "pytorch_model.bin", "vocab.pkl", "x.npy", "scheduler.joblib"):
        (folder / name).write_bytes(pickle.dumps(Harm(mark)))
    code = f"import os\nos.mkdir({str(mark)!r})\ndef generate(model, **k): ...\nclass T: ...\n"
    (folder / "custom_generate").mkdir()
    for name in ("custom_generate/generate.py", "evil.py"):
        (folder / name).write_text(code)
    tokenizer = folder / "tokenizer_config.json"
    notes = json.loads(tokenizer.read_text()) | {"chat_template": f"{{{{ ''.__class__.mro() }}}}{mark}"}
    tokenizer.write_text(json.dumps(notes))
    assert load(folder).decode(load(folder).encode("a b")) == "a b"
    tokenizer.write_text(json.dumps({**notes, "tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", None]}}))
    with pytest.raises(BackboneError):
        load(folder)
    assert not mark.exists()


def test_what_a_training_goes_on_from_is_not_unpickled(tmp_path: Path, mark: Path) -> None:
    from lingraft.fusion.cache import INDEX, STATES, StateCache
    from lingraft.journal import JOURNAL, Journal
    from lingraft.predictions import PREDICTIONS, read_generated, read_predictions
    from lingraft.store import RECORD, Store

    harm = pickle.dumps(Harm(mark))
    checkpoint = tmp_path / "checkpoint.safetensors"
    for name in (checkpoint.name, STATES, INDEX, JOURNAL, PREDICTIONS):
        (tmp_path / name).write_bytes(harm)
    store = Store(tmp_path / "store")
    store.path("train", "ab").mkdir(parents=True)
    (store.path("train", "ab") / RECORD).write_bytes(harm)
    readers: list[Callable[[], Any]] = [
        lambda: TensorFile(checkpoint),
        lambda: StateCache.open(tmp_path, "digest"),
        lambda: read_predictions(tmp_path),
        lambda: read_generated(tmp_path),
        lambda: store.record("train", "ab"),
        lambda: store.folder("train", "ab"),
    ]
    for read in readers:
        with pytest.raises(LingraftError):
            read()
    assert Journal(tmp_path / JOURNAL, "about").known("") == {}
    assert not mark.exists()


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.tsv", "x.csv", "x.npy", "x.pkl", "x.parquet"])
def test_data_files_are_not_unpickled(tmp_path: Path, mark: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Harm(mark)))
    if name == "x.npy":
        np.save(path, np.array([Harm(mark)], object), allow_pickle=True)
    with pytest.raises(DataError):
        FileSource(path).rows()
    path.write_bytes(pickle.dumps(Harm(mark), 0))  # Of letters alone, which may well be a table.
    with suppress(DataError):
        FileSource(path).rows()
    assert not mark.exists()


def test_a_folder_given_as_a_hub_data_set_is_not_unpickled(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "test.pkl").write_bytes(pickle.dumps(Harm(mark)))
    np.save(folder / "test.npy", np.array([Harm(mark)], object), allow_pickle=True)
    (folder / "set.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    with pytest.raises(DataError):
        HubSource(str(folder), "default", "test").rows()
    assert not mark.exists()


# Checkpoints that lead elsewhere.


def _with_an_adapter(folder: Path) -> None:
    write_any(folder / "a", "lora", 0, np.float32, False)
    for path in (folder / "a").iterdir():
        path.rename(folder / path.name)


ELSEWHERE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an adapter in it": (_with_an_adapter, "an adapter lies"),
    "shards above it": (lambda folder: _indexed(folder, "../base/model.safetensors"), "said to be in"),
    "shards at the root": (lambda folder: _indexed(folder, "/etc/model.safetensors"), "said to be in"),
    "shards below it": (lambda folder: _indexed(folder, "sub/model.safetensors"), "said to be in"),
    "a shard without a name": (lambda folder: _indexed(folder, [1]), "said to be in"),  # pyright: ignore
    "weights above it": (lambda folder: configured(folder, transformers_weights="../x.safetensors"), "said to be in"),
    "an index that is none": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "no index"),
    "attention of others": (lambda folder: configured(folder, _attn_implementation="some/kernel"), "code of others"),
    "attention of others, below": (
        lambda folder: configured(folder, text_config={"attn_implementation": "some/kernel@main"}),
        "code of others",
    ),
    "a thousand million layers": (lambda folder: configured(folder, num_hidden_layers=10**9), "layers"),
    "a type that is a table": (lambda folder: configured(folder, model_type={"a": 1}), "type is no name"),
    "weights cut short": (lambda folder: os.truncate(folder / "model.safetensors", 1000), "cannot be read"),
    "a header of 2^64 bytes": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64),
        "header too large",
    ),
    "classes that are a number": (lambda folder: configured(folder, architectures=5), "type is no name"),
    "a deep configuration": (lambda f: (f / "config.json").write_text("[" * 100_000), "nested too deeply"),
    "a number of 5000 digits": (lambda f: (f / "config.json").write_text("9" * 5000), "cannot be read"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "not a model's"),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_checkpoint_that_leads_elsewhere_is_refused(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    spoil, said = ELSEWHERE[name]
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    assert locate(BackboneConfig(model=str(folder)))
    spoil(folder)
    with in_time(), pytest.raises(BackboneError, match=said):
        load(folder)


def test_a_sharded_checkpoint_is_opened(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    _indexed(folder, "other.safetensors")
    assert load(folder).encode("ab")


def test_a_pipe_in_a_models_folder_is_not_waited_for(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    whole = locate(BackboneConfig(model=str(folder))).digest
    for name in ("pipe.json", "pipe.safetensors"):
        os.mkfifo(folder / name)
    with in_time():
        assert locate(BackboneConfig(model=str(folder))).digest == whole


def test_nothing_beside_a_gguf_file_counts(tiny_folder: Path, tmp_path: Path, mark: Path) -> None:
    path = write_gguf(tiny_folder, tmp_path / "tiny.gguf")
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass T: ...\n")
    notes = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", None], "AutoConfig": "evil.T"}}
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        (tmp_path / name).write_text(json.dumps(notes))
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/nowhere", "peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Harm(mark)))
    assert load(path).encode("ab")
    assert not mark.exists()


# Adapters.

SLOW = "(.*.*.*.*.*.*.*.*.*.*.*.*)*X"


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": f"{SLOW}|.*proj"},
        {"exclude_modules": SLOW},
        {"layers_pattern": [SLOW], "layers_to_transform": [0, 1]},
        {"r": 10**9, "rank_pattern": {SLOW: 10**9}},
        {"init_lora_weights": "eva", "eva_config": {"rho": 1}, "runtime_config": {"x": 1}},
        {"auto_mapping": {"parent_library": "antigravity", "base_model_class": "x"}},
    ],
)
def test_what_an_adapter_says_of_itself_is_not_what_is_put_on_a_model(
    tiny: Backbone, tmp_path: Path, values: dict[str, Any]
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.folder)
    get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2)).save_pretrained(tmp_path)
    set_texts(tmp_path / CONFIG, {name: json.dumps(value) for name, value in values.items()})
    adapter = Adapter.load(tmp_path)
    asked = adapter.peft_config
    assert asked["r"] == 2 and asked["rank_pattern"] == {}
    assert not {"init_lora_weights", "eva_config", "runtime_config", "auto_mapping"} & set(asked)
    with in_time(), tiny.with_adapter(adapter):
        pass


@pytest.mark.parametrize(
    "values",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
        {"lora_dropout": "x"},
        {"task_type": "EVIL"},
        {"modules_to_save": ["x" * 1_000_000]},
        {"modules_to_save": {"a": 1}},
        {"base_model_name_or_path": ["/etc"]},
    ],
)
def test_configurations_that_peft_should_not_see_are_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    folder = write_any(tmp_path / "a", "lora", 0, np.float32, True)
    set_texts(folder / CONFIG, {name: json.dumps(value) for name, value in values.items()})
    with pytest.raises(AdapterError):
        Adapter.load(folder)


def test_a_module_is_not_called_by_a_pattern(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = write_any(tmp_path / "a", "lora", 0, np.float32, True)
    tensors = load_file(folder / WEIGHTS)
    save_file({name.replace("layers", "(a|a)*"): value for name, value in tensors.items()}, folder / WEIGHTS)
    with pytest.raises(AdapterError, match="no name"):
        Adapter.load(folder)


def test_a_huge_configuration_is_not_read(tmp_path: Path) -> None:
    folder = write_any(tmp_path / "a", "lora", 0, np.float32, True)
    os.truncate(folder / CONFIG, 1 << 40)  # A file of a terabyte that takes no room.
    with in_time(), pytest.raises(AdapterError, match="out of all proportion"):
        Adapter.load(folder)


# Data.

HOSTILE = (
    "{language_name} {0.__class__} {text}",
    "{{ 7*7 }} {% import os %}",
    "%s %(x)s",
    "$(touch x) `touch x` ; rm -rf x",
    "\x1b]0;title\x07\x1b[31m \x9b2J",
    "[link=http://x]a[/link] [bold]",
    "a\nb\0c",
    "=cmd|' /C calc'!A0",
    "$\\frac{1}{2}$ $x",
    "<script>x</script> <img src=x onerror=y> &lt;",
    "](http://x) ![](http://x) https://x.example",
    "| --- |\n# h",
    "\u202etxt.exe\u2066",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_what_stands_in_a_row_is_text_in_its_prompt(text: str) -> None:
    fields = {"text": text, "language_name": "Swahili"}
    assert fill("A {text} in {language_name}: {text}", fields) == f"A {text} in Swahili: {text}"


BAD_LINES = {
    "deep": "[" * 100_000,
    "a deep object": '{"a":' * 100_000,
    "a number of 5000 digits": '{"a": ' + "9" * 5000 + "}",
    "half a character": '{"a": "\\ud800"}',
    "half a character in a key": '{"\\udfff": 1}',
}


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("name", BAD_LINES)
def test_json_that_no_row_has_is_one_error(tmp_path: Path, name: str, suffix: str) -> None:
    line, path = BAD_LINES[name], tmp_path / f"x.{suffix}"
    path.write_text(f"[{line}]" if suffix == "json" else f'{{"a": 1}}\n{line}\n')
    with in_time(), pytest.raises(DataError) as caught:
        FileSource(path).rows()
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
def test_a_cell_of_ten_megabytes_is_one_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("a\n" + "x" * (10 << 20) + "\n")
    with in_time(), pytest.raises(DataError, match="field larger"):
        FileSource(tmp_path / name).rows()


@pytest.mark.parametrize("text", ["a = " + "-" * 50_000 + "1", "a = " + "(" * 50_000, "a = __import__('os')", "a\0"])
def test_literals_are_not_run_and_do_not_nest_without_end(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.py").write_text(text)
    with in_time(), pytest.raises(DataError):
        exemplar_rows(tmp_path / "x.py")


@given(st.text(st.characters(codec="utf-8")) | st.sampled_from(HOSTILE))
def test_bounded_json_is_json(text: str) -> None:
    assert bounded.parse(json.dumps({text: [text]})) == {text: [text]}


NAMES = ("../x", "/x", "a/b", "..", "", "a\\b", "a\0", "a\n", "-x", ".x", "a" * 65, "$(x)", "`x`", "a b", "é")


@pytest.mark.parametrize("name", NAMES)
def test_names_that_become_paths_are_plain(name: str) -> None:
    base = {"name": "x", "backbone": "demo", "task": "topics", "targets": ["sw"]}
    assert Experiment.model_validate(base)
    languages = [] if name in ("a" * 65,) else [{"targets": [name]}, {"source": name}, {"development": [name]}]
    for change in ({"name": name}, {"groups": {name: ["sw"]}}, {"tasks": {name: {}}}, *languages):
        with pytest.raises(ValueError):
            Experiment.model_validate({**base, **change})


# Text that is shown.

anything = st.text() | st.sampled_from(HOSTILE)


@given(anything)
@example("\ud800")
def test_a_terminal_gets_no_control_characters(text: str) -> None:
    shown = printable(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown)
    shown.encode()
    if text.isprintable():
        assert shown == text
    assert len(one_line(text).splitlines()) <= 1


def test_joiners_of_persian_and_hindi_stay() -> None:
    assert printable("می\u200cخواهم क्\u200dष") == "می\u200cخواهم क्\u200dष"


@given(anything)
def test_a_cell_of_markdown_is_one_cell_without_html_links_and_images(text: str) -> None:
    found = in_markdown(text)
    bare = re.sub(r"\\.", "·", found)  # Less what is escaped.
    assert "\n" not in found and not set(bare) & set("|`")
    assert not re.search(r"<[A-Za-z/!?]|\]\(|\]\[|!\[", bare)
    if not set(text) & set("\\`|<&[]!:") and text.isprintable():
        assert found == text


@given(anything)
def test_html_is_read_back_as_the_text(text: str) -> None:
    found = in_html(text)
    assert not set(found) & set("<>\"'")
    tree = ET.fromstring(f'<p t="{found}">{found}</p>')
    assert (tree.text or "") == printable(text)


@given(anything)
def test_a_spreadsheet_computes_nothing(text: str) -> None:
    out = io.StringIO()
    csv.writer(out).writerow([in_csv(text)])
    (row,) = csv.reader(io.StringIO(out.getvalue(), newline=""))
    assert not row[0].lstrip().startswith(("=", "+", "-", "@"))


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return results(make_run(tmp_path_factory.mktemp("run")))


@pytest.mark.parametrize("text", HOSTILE)
def test_a_report_of_hostile_names_is_text(figures: dict[str, Any], text: str) -> None:
    found = copy.deepcopy(figures)
    found |= {"name": text, "absent": [["eng-ft", text, text]], "chance_and_size_warning": text}
    found["backbone"] = {"name": text}
    found["methods"]["eng-ft"]["title"] = text
    report = re.sub(r"`[^`\n]*`", "", markdown(found))  # Less what stands in code, where nothing means anything.
    assert not re.search(r"(?<!\\)!\[|<(script|img)|[\x00-\x08\x0b-\x1f\x9b\u202e]", report)
    tables = [line for line in report.split("\n") if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in tables[:6]}) == 1
    assert not re.search("[\x00-\x08\x0b-\x1f\x9b\u202e]", plain(found))
    lines([text], [[text]], Console(file=(out := io.StringIO()), force_terminal=True, color_system=None))
    assert not re.search("[\x00-\x08\x0b-\x1a\x1c-\x1f\x9b\u202e]|\x1b\\]", out.getvalue())


@pytest.mark.parametrize("text", [HOSTILE[4], "$ ".join(HOSTILE)])
def test_a_drawing_of_hostile_names_is_text(tmp_path: Path, figures: dict[str, Any], text: str) -> None:
    pytest.importorskip("altair")
    from lingraft.report.figures import draw_curves

    found = copy.deepcopy(figures)
    found["methods"]["adamergex"]["title"] = text
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "lambda.svg").symlink_to(precious)
    draw_curves(found, tmp_path / "lambda.svg")
    tree = ET.parse(tmp_path / "lambda.svg")
    assert not [node for node in tree.iter() if node.tag.endswith(("script", "image", "foreignObject"))]
    assert precious.read_text() == "mine", "a link in a run's folder is replaced, not followed"


def test_a_file_is_put_in_the_place_of_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "x").symlink_to("precious")
    write_text(tmp_path / "x", "new")
    assert (tmp_path / "precious").read_text() == "mine" and (tmp_path / "x").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["precious", "x"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_text(tmp_path / "folder", "new")
    assert len(list(tmp_path.iterdir())) == 3


# The audit of what is installed.

FINDING = {"name": "x", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}
CLEAN = {"name": "y", "version": "1", "vulns": []}
UNKNOWN = {"name": "z", "skip_reason": "Dependency not found on PyPI and could not be audited: z (1)"}
OFFLINE = (
    "requests.exceptions.ConnectionError: HTTPSConnectionPool(host='index.example', port=443): Max retries exceeded"
)


@pytest.mark.parametrize(
    ("packages", "said", "code", "line"),
    [
        ([FINDING, CLEAN], "", 1, "x 1: CVE-1, mended in 2"),
        ([FINDING, UNKNOWN], OFFLINE, 1, "CVE-1"),
        ([CLEAN, UNKNOWN], "", 0, "1 packages, no known vulnerability"),
        ([UNKNOWN], "No known vulnerabilities found", 0, UNREACHABLE),
        (None, OFFLINE, 0, UNREACHABLE),
        (None, "No module named pip_audit", 2, "did not work"),
    ],
)
def test_findings_fail_and_silence_is_said(packages: Any, said: str, code: int, line: str) -> None:
    answer = "" if packages is None else json.dumps({"dependencies": packages, "fixes": []})
    found, lines_said = judged(answer, said)
    assert found == code and line in "\n".join(lines_said)


# Experiments and run folders of others.

MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 10))
BAD_YAML = (MERGES, "[" * 5000, "a: " + "9" * 5000, "a: 2001-99-99", "a: !!python/object/apply:os.mkdir [x]")


@pytest.mark.parametrize("text", BAD_YAML, ids=range(len(BAD_YAML)))
def test_yaml_that_is_none_is_one_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with in_time(), pytest.raises(ConfigError) as caught:
        load_experiment(tmp_path / "x.yaml")
    assert len(str(caught.value)) < 1000


def test_a_merge_of_a_few_keys_is_one(tmp_path: Path) -> None:
    found = parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")
    assert found["b"] == {"x": 1, "y": 3}


def test_an_experiment_alone_does_not_have_a_models_code_run(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("{name: x, backbone: {model: demo, trust_remote_code: true}, task: topics, targets: [sw]}")
    with pytest.raises(ConfigError, match="Python code"):
        load_experiment(path)
    assert load_experiment(path, ["backbone.trust_remote_code=true"]).backbone.trust_remote_code
    assert not load_experiment(path, ["backbone.trust_remote_code=false"]).backbone.trust_remote_code


@pytest.mark.parametrize("text", HOSTILE)
def test_an_error_has_no_control_characters(text: str) -> None:
    said = str(DataError(text, where=text, remedy=text))
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", said)


@pytest.mark.parametrize("change", [{"language": "x/../../../victim"}, {"seed": "/../../victim"}])
def test_a_report_removes_and_writes_nothing_outside_of_the_run(tmp_path: Path, change: dict[str, Any]) -> None:
    from lingraft.commands.collecting import collect_adapters

    victim, source = tmp_path / "victim", tmp_path / "source"
    for folder in (victim, source, tmp_path / "run/adapters/adamergex-x", tmp_path / "run/adapters/adamergex-sw-seed"):
        folder.mkdir(parents=True)
    (victim / "mine").write_text("mine")
    entry = {"method": "adamergex", "language": "sw", "seed": 0, "path": str(source)} | change
    with pytest.raises(LingraftError):
        collect_adapters({"adapters": [entry], "seeds": [0, 1]}, tmp_path / "run/adapters")
    assert [p.name for p in victim.iterdir()] == ["mine"]


def test_a_report_does_not_write_through_links(tmp_path: Path) -> None:
    from lingraft.commands.reporting import show_report

    run = make_run(tmp_path / "run")
    (tmp_path / "precious").write_text("mine")
    for name in ("report.md", "results.csv", "lambda.svg"):
        (run / name).symlink_to(tmp_path / "precious")
    show_report(run, as_json=True)
    assert (tmp_path / "precious").read_text() == "mine"
    assert (run / "report.md").read_text().startswith("# by-hand")


def test_a_path_that_is_no_text_is_said_and_stays_readable_elsewhere(tmp_path: Path) -> None:
    name = "no\udcff-ภาษา-\u200fعربي\U0001f600.yaml"  # As Python reads a name that is not UTF-8.
    script = "import sys; from lingraft.cli import main; sys.argv[0] = 'lingraft'; main()"
    command = [sys.executable, "-c", script, "run", str(tmp_path / name)]
    said = subprocess.run([*command, "--json"], capture_output=True, check=False, env={**os.environ, "PYTHONUTF8": "1"})
    assert said.returncode == 2 and json.loads(said.stdout)["where"] == str(tmp_path / name)
    assert "ภาษา-\u200fعربي\U0001f600" in said.stdout.decode() and b"\\udcff" in said.stdout
    shown = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "PYTHONUTF8": "1"})
    assert shown.returncode == 2 and "no\\udcff-ภาษา-\u200fعربي\U0001f600.yaml" in shown.stderr.decode()
