"""Model cards: what a hub reads of them, what a person reads, and what hostile names cannot do to either."""

import json
import os
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from lingraft.adapter import Adapter
from lingraft.cards import CARD, Facts, Score, base_model, card, is_hub_id, metadata
from lingraft.commands.collecting import collect_adapters
from lingraft.divergence import Divergence
from lingraft.stacks import write_note
from lingraft.store import RECORD, Store, read_json, verify
from lingraft.tensors import TensorFile
from tests.unit.adapters import FEW, updates_of, write_adapter, write_structure

BASE = {"backbone": {"name": "google/gemma-3-270m", "digest": "hub:google/gemma-3-270m@" + "0" * 40}}
TASK = {"how": "train", "task": "topics", "language": "en", "seed": 0, "lingraft": "0.1"}
TEXT = {"how": "train", "reference": {"task": "clm"}, "language": "sw", "seed": 0}
PARTS = [
    {"structure": "lora", "language": "en", "task": "topics", "digest": "a" * 64, "datasets": ["Davlan/sib200"]},
    {"structure": "lora", "language": "sw", "task": "clm", "digest": "b" * 64},
    {"structure": "lora", "language": "en", "task": "clm", "digest": "c" * 64},
]
MERGED = {
    "how": "transfer",
    "weight": 0.5,
    "space": "factors",
    "modules": "all",
    "rules": [["feed_forward", 0.0]],
    "out_rank": None,
    "inputs": {"task": "a" * 64, "target_ref": "b" * 64, "source_ref": "c" * 64},
    "lingraft": "0.1",
}
CONFIG = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "google/gemma-3-270m"}
GRAFT = {"format": 1, "kind": "adapter", "family": "lora", **BASE, "provenance": MERGED, "made_of": PARTS}
SCORE = Score("topics", "Davlan/sib200", "sw", "test", "accuracy", 0.51234, (0.4, 0.6), (0.02, -0.01, 0.05, 0.2), 204)


def front_of(text: str) -> dict[str, Any]:
    """The front matter, read strictly: every key once."""

    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        keys = [loader.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys))
        return dict(zip(keys, (loader.construct_object(v, deep=True) for _, v in node.value), strict=True))

    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    opening, front, _ = text.split("---\n", 2)
    assert opening == ""
    return yaml.load(front, Strict)


def hub_reads(text: str) -> ModelCard:
    """As the hub's own library reads it, without its network."""
    found = ModelCard(text)
    assert front_of(str(found)) == front_of(text)  # Its own writing of it loses nothing, the model index included.
    return found


def test_the_hub_reads_back_what_was_written():
    facts = Facts(CONFIG, GRAFT, scores=[SCORE])
    found = hub_reads(card(facts)).data
    assert found.base_model == "google/gemma-3-270m" and found.to_dict()["base_model_relation"] == "adapter"
    assert (found.library_name, found.language, found.datasets) == ("peft", ["sw", "en"], ["Davlan/sib200"])
    assert found.pipeline_tag == "text-generation" and found.license is None
    assert found.tags == ["lingraft", "lora", "adamergex", "cross-lingual"]
    (result,) = found.eval_results or []
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == ("Davlan/sib200", "sw", "test")
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.5123)
    assert front_of(card(facts)) == metadata(facts)


@pytest.mark.parametrize(
    ("space", "formula"),
    [("ratio", "`T ⊙ (1 + λ · (R_t ⊘ R_s − 1))` with λ = 0.5"), ("layer", "`(I + λ · (R_t R_s⁺ − I)) T` with λ = 0.5")],
)
def test_a_merge_that_is_no_sum_is_not_called_one(space: str, formula: str):
    notes = {**GRAFT, "provenance": {**GRAFT["provenance"], "space": space}}
    said = card(Facts(CONFIG, notes))
    assert f"Merged: {formula}, {space} space" in said and "T + λ" not in said


def test_a_graft_says_what_it_is_made_of():
    said = card(Facts(CONFIG, GRAFT, scores=[SCORE]))
    assert "# Topics, in Swahili, LoRA adapter" in said
    assert "`T + λ · (R_t − R_s)` with λ = 0.5, factors space, modules: all, λ of its own for feed_forward 0." in said
    for digest in "abc":
        assert f"`{digest * 64}`" in said
    assert "R_t, the target language's reference: language modelling on plain text, Swahili (sw)" in said
    assert "| topics | Swahili (sw) | test | accuracy | 51.2 | [40.0, 60.0] | +2.0 [-1.0, +5.0], p = 0.200 |" in said
    assert "https://arxiv.org/abs/2402.18913" in said
    assert "CC BY-SA 4.0" in said and "Gemma Terms of Use" in said
    compile(re.findall(r"```python\n(.*?)```", said, re.DOTALL)[0], "card", "exec")


def test_at_zero_the_card_says_that_nothing_was_added():
    notes = {**GRAFT, "provenance": {**MERGED, "weight": 0.0}}
    assert "this is the task's adapter itself" in card(Facts(CONFIG, notes))
    assert "this is the task's adapter itself" not in card(Facts(CONFIG, GRAFT))


@pytest.mark.parametrize(
    ("name", "digest", "known"),
    [
        ("google/gemma-3-270m", "hub:google/gemma-3-270m@0", True),
        ("gpt2", "hub:gpt2@0", True),
        ("google/gemma-3-270m", "gguf-to-bf16-safetensors-1:0", True),
        ("models/gemma", "folder:0", False),
        ("models/gemma.gguf", "gguf-to-bf16-safetensors-1:0", False),
        ("/home/ann/gemma", "folder:0", False),
        ("a/b/c", "hub:0", False),
        ("owner/name\n---", None, False),
        ("owner/name", None, True),
        ("gpt2", None, False),
        ("../models", None, False),
        ("~/models", None, False),
    ],
)
def test_a_base_model_is_named_only_where_it_is_one_of_the_hub(name: str, digest: str | None, known: bool):
    config = {**CONFIG, "base_model_name_or_path": name}
    notes = {"backbone": {"name": name, "digest": digest}} if digest else {}
    assert base_model(config, notes) == (name if known else None)
    said = card(Facts(config, notes))
    assert known or (name not in said and "base_model" not in front_of(said))


@pytest.mark.parametrize("structure", ["lora", "ia3", "prefix", "bottleneck", "sparse"])
def test_saved_adapters_and_divergences_carry_a_card(tmp_path: Path, structure: str):
    notes = [{**BASE, "init_sha256": "i", "provenance": made} for made in (TASK, TEXT, {**TEXT, "language": "en"})]
    task, target, source = (
        Adapter.load(
            Adapter.load(write_structure(tmp_path / f"in{n}", structure, n, sidecar=note)).save(tmp_path / f"{n}")
        )
        for n, note in enumerate(notes)
    )
    (target - source).save(tmp_path / "divergence", {"how": "divergence"})
    (task + 0.5 * (target - source)).save(tmp_path / "graft")
    for name in ("divergence", "graft"):
        hub_reads((tmp_path / name / CARD).read_text(encoding="utf-8"))
        assert verify(tmp_path / name) is None
    graft = (tmp_path / "graft" / CARD).read_text(encoding="utf-8")
    assert front_of(graft)["language"] == ["sw", "en"] and "λ = 0.5" in graft
    assert ("import lingraft" in graft) == (structure in ("bottleneck", "sparse"))
    divergence = (tmp_path / "divergence" / CARD).read_text(encoding="utf-8")
    assert "# From English to Swahili: a divergence" in divergence and "pipeline_tag" not in front_of(divergence)
    # What it is made of is still known when it comes back from the disk.
    again = task + 0.5 * Divergence.load(tmp_path / "divergence")
    again.save(tmp_path / "again")
    assert (tmp_path / "again" / CARD).read_text(encoding="utf-8") == graft


def test_an_adapter_that_is_saved_again_has_its_own_card(tmp_path: Path):
    first = write_adapter(tmp_path / "a", 1, shapes=FEW, sidecar={**BASE, "provenance": TASK})
    (first / CARD).write_text("# Something else entirely")
    Adapter.load(first).save(tmp_path / "b", {**TASK, "task": "another"})
    said = (tmp_path / "b" / CARD).read_text(encoding="utf-8")
    assert "# Another, in English" in said and "Something else" not in said


def test_cards_of_a_stack_name_its_parts(tmp_path: Path):
    write_note(tmp_path, ["invertible", "bottleneck"], {**BASE, "family": "madx", "provenance": TEXT})
    said = (tmp_path / CARD).read_text(encoding="utf-8")
    hub_reads(said)
    assert "invertible, bottleneck" in said and front_of(said)["library_name"] == "lingraft"
    assert "lingraft evaluate" in said and "mad-x" in front_of(said)["tags"]


def test_second_stages_and_heads_say_how_they_are_put_on():
    second = {"kind": "fused", "language": "sw", "source": "en", "stage1": "d" * 64, "fusion": {"function": "add_relu"}}
    notes = {"family": "lora", **BASE, "second": second, "head": {"kind": "classification", "labels": 7}}
    said = card(Facts({**CONFIG, "task_type": "SEQ_CLS"}, notes))
    assert 'subfolder="stage1").merge_and_unload()' in said and "num_labels=7" in said and "add_relu" in said
    assert front_of(said)["tags"] == ["lingraft", "lora", "flare", "cross-lingual"]
    assert front_of(said)["language"] == ["sw", "en"]
    below = {**notes, "second": None, "beneath": [{"structure": "invertible", "language": "sw", "digest": "e" * 64}]}
    assert "--adapter BENEATH" in card(Facts(CONFIG, below))


# What others wrote

ANY = st.text(st.characters(), max_size=40)
NASTY = st.sampled_from(
    [
        "---\nlicense: mit\n---\n",
        "\n# Heading",
        "a\n\n```\ncode",
        "| a | b |\n|---|---|",
        "<script>alert(1)</script>",
        "![](http://x) [a](javascript:b)",
        "`` ` ``",
        "!!python/object:os.system x",
        "*anchor &a",
        "{a: b}",
        "- - -",
        "\x1b[31m",
        "\u202etxt",
        "\u2028---\u2028",
        "\x85---\x85",
        "\ud800",
        "yes",
        "0x10",
        "null",
        "@x",
    ]
)
TEXTS = st.one_of(ANY, NASTY)
VALUES = st.recursive(
    st.one_of(
        TEXTS,
        st.integers(),
        st.just(10**400),
        st.just(-(10**310)),
        st.floats(allow_nan=False),
        st.booleans(),
        st.none(),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
KEYS = ("kind", "family", "backbone", "provenance", "made_of", "second", "beneath", "head", "parts", "init_sha256")
MADE = st.fixed_dictionaries(
    {"how": st.sampled_from(["train", "transfer", "arimerge", "divergence", "linear", 3])},
    optional=dict.fromkeys(("weight", "rules", "modules", "space", "inputs", "training", "seed", "out_rank"), VALUES),
)
NOTES = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=len(KEYS)) | st.fixed_dictionaries(
    {"provenance": MADE, "made_of": st.lists(VALUES, max_size=3)},
    optional={"second": VALUES, "family": st.sampled_from(["lora", "sparse", 1]), "head": VALUES},
)


def structure_of(said: str) -> list[str]:
    """The lines of a card that Markdown reads as more than text."""
    body = said.split("---\n", 2)[2]
    return [line for line in body.split("\n") if re.match(r"\s*(#|```|~~~|---|===|\|?-{3})", line)]


@settings(deadline=None, max_examples=60)
@given(TEXTS, TEXTS, TEXTS, TEXTS)
def test_hostile_names_stay_names(task: str, language: str, method: str, part: str):
    parts = [{**PARTS[0], "task": part, "language": language}, *PARTS[1:]]
    notes = {**GRAFT, "made_of": parts, "provenance": {**MERGED, "space": part, "rules": [[part, 1.0]]}}
    score = replace(SCORE, task=task, language=language, metric=method, split=part)
    facts = Facts(CONFIG, notes, [score], {part: part}, method, (language,), task, part)
    plain = Facts(CONFIG, GRAFT, [SCORE], {"x": "y"}, "m", ("sw",), "topics", "w")
    said = card(facts)
    said.encode()
    assert front_of(said) == metadata(facts)
    hub_reads(said)
    assert len(structure_of(said)) == len(structure_of(card(plain)))
    body = said.split("---\n", 2)[2]
    assert not re.search(r"<(script|img|a)\b|\]\(javascript", body)
    assert all(sign in "\n\t" or sign.isprintable() or not sign.isascii() for sign in body)


@settings(deadline=None, max_examples=60)
@given(st.one_of(st.none(), st.dictionaries(st.sampled_from([*CONFIG]), VALUES)), NOTES)
def test_whatever_the_notes_hold_there_is_a_card(config: Any, notes: dict[str, Any]):
    facts = Facts(config, notes)
    said = card(facts)
    said.encode()
    assert front_of(said) == metadata(facts)
    assert said == card(facts)


@given(TEXTS)
def test_ids_of_the_hub_have_nothing_to_escape(name: str):
    if is_hub_id(name):
        assert re.fullmatch(r"[\w./-]+", name, re.ASCII)


# Cards with a run's scores


def a_run(tmp_path: Path, seeds: int = 1) -> dict[str, Any]:
    """Results as `report.results` gives them, of grafts in a store."""
    store, adapters = Store(tmp_path / "store"), []
    for seed in range(seeds):
        made = write_adapter(tmp_path / f"a{seed}", seed, shapes=FEW, sidecar={**BASE, "provenance": TASK})
        with store.making("merge", f"ab{seed}", {"what": seed}) as work:
            Adapter.load(made).write(work, MERGED)
        path = str(store.path("merge", f"ab{seed}"))
        adapters.append({"method": "adamergex", "language": "sw", "seed": seed, "path": path})
    cell = {"value": 0.5, "by_seed": [0.5 + s / 10 for s in range(seeds)], "interval": [0.4, 0.6]}
    cell |= {"difference": 0.1, "difference_interval": [0.0, 0.2], "p": 0.04}
    return {
        "adapters": adapters,
        "seeds": list(range(seeds)),
        "source": "en",
        "metric": "accuracy",
        "items": {"sw": 105},
        "experiment": {"task": "topics", "data_dir": None, "evaluation": {"split": "test"}},
        "methods": {"adamergex": {"title": "AdaMergeX", "says": "T + λ(R_t − R_s)", "languages": {"sw": cell}}},
    }


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def test_a_runs_adapter_has_its_scores_and_a_record_that_is_whole(tmp_path: Path):
    found, target = a_run(tmp_path), tmp_path / "run"
    collect_adapters(found, target)
    copy, source = target / "adamergex-sw", Path(found["adapters"][0]["path"])
    assert verify(copy) is None and verify(source) is None
    said = (copy / CARD).read_text(encoding="utf-8")
    (result,) = hub_reads(said).data.eval_results or []
    assert (result.metric_value, result.dataset_type, result.dataset_config) == (0.5, "Davlan/sib200", "sw")
    assert "+10.0 [+0.0, +20.0], p = 0.040" in said and str(tmp_path) not in said
    assert read_json(source / RECORD)["files"]["adapter_model.safetensors"] in said
    for name in ("adapter_config.json", "adapter_model.safetensors", "lingraft.json"):
        assert (copy / name).read_bytes() == (source / name).read_bytes()


def test_a_second_report_copies_only_what_changed(tmp_path: Path):
    found, target = a_run(tmp_path), tmp_path / "run"
    collect_adapters(found, target)
    before = state(target)
    collect_adapters(found, target)
    assert state(target) == before
    found["methods"]["adamergex"]["languages"]["sw"]["by_seed"] = [0.75]
    collect_adapters(found, target)
    assert "75.0" in (target / "adamergex-sw" / CARD).read_text(encoding="utf-8")
    assert verify(target / "adamergex-sw") is None
    assert [p.name for p in target.iterdir()] == ["adamergex-sw"]


def test_every_seeds_adapter_has_its_own_value(tmp_path: Path):
    collect_adapters(a_run(tmp_path, 2), tmp_path / "run")
    said = [(tmp_path / "run" / f"adamergex-sw-seed{n}" / CARD).read_text(encoding="utf-8") for n in (0, 1)]
    assert "| 50.0 |" in said[0] and "| 60.0 |" in said[1] and "mean over 2 seeds" in said[0]


def test_what_a_user_wrote_into_a_card_is_kept(tmp_path: Path):
    found, target = a_run(tmp_path), tmp_path / "run"
    collect_adapters(found, target)
    place = target / "adamergex-sw" / CARD
    mine = place.read_text(encoding="utf-8").replace("library_name: peft", "library_name: peft\nlicense: mit")
    place.write_text(mine, encoding="utf-8")
    found["methods"]["adamergex"]["languages"]["sw"]["by_seed"] = [0.75]
    collect_adapters(found, target)
    assert place.read_text(encoding="utf-8") == mine
    # Another adapter under the same name has another card; the words stay beside it.
    other = write_adapter(tmp_path / "other", 7, shapes=FEW, sidecar={**BASE, "provenance": TASK})
    with Store(tmp_path / "store").making("merge", "cd", {"what": "other"}) as work:
        Adapter.load(other).write(work, MERGED)
    found["adapters"][0]["path"] = str(tmp_path / "store/merge/cd")
    for _ in range(2):
        collect_adapters(found, target)
        assert "75.0" in place.read_text(encoding="utf-8")
        (words,) = place.parent.glob("README.*.md")
        assert words.read_text(encoding="utf-8") == mine and verify(place.parent) is None


def test_a_report_that_is_killed_loses_nobodys_words_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    found, target = a_run(tmp_path), tmp_path / "run"
    collect_adapters(found, target)
    place = target / "adamergex-sw" / CARD
    place.write_text("my own words", encoding="utf-8")
    other = write_adapter(tmp_path / "other", 7, shapes=FEW, sidecar={**BASE, "provenance": TASK})
    with Store(tmp_path / "store").making("merge", "cd", {"what": "other"}) as work:
        Adapter.load(other).write(work, MERGED)
    found["adapters"][0]["path"] = str(tmp_path / "store/merge/cd")
    rename, many = Path.rename, []

    def killed(path: Path, to: Path) -> Path:
        if path.name.startswith(".adamergex") and to.name == "adamergex-sw":
            many.append(path)
            raise SystemExit
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(SystemExit):
        collect_adapters(found, target)
    monkeypatch.undo()
    assert len(many) == 1
    for path in target.rglob("*"):
        os.utime(path, (1, 1))
    for path in target.iterdir():
        os.utime(path, (1, 1))
    collect_adapters(found, target)
    (words,) = place.parent.glob("README.*.md")
    assert words.read_text(encoding="utf-8") == "my own words" and verify(place.parent) is None
    assert [p.name for p in target.iterdir()] == ["adamergex-sw"]


def test_reports_at_the_same_time_leave_one_whole_copy(tmp_path: Path):
    from concurrent.futures import ThreadPoolExecutor

    found, target = a_run(tmp_path), tmp_path / "run"
    cell = found["methods"]["adamergex"]["languages"]["sw"]
    for turn in range(5):
        cell["by_seed"] = [turn / 10]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: collect_adapters(found, target), range(4)))
        assert verify(target / "adamergex-sw") is None
        assert [p.name for p in target.iterdir()] == ["adamergex-sw"]


def test_copies_made_before_there_were_cards_get_one(tmp_path: Path):
    import shutil

    found, target = a_run(tmp_path), tmp_path / "run"
    source = Path(found["adapters"][0]["path"])
    target.mkdir()
    shutil.copytree(source, target / "adamergex-sw")
    collect_adapters(found, target)
    assert "## Scores" in (target / "adamergex-sw" / CARD).read_text(encoding="utf-8")


@pytest.mark.parametrize("where", ["copytree", "rmtree", "write_json"])
def test_a_report_that_is_killed_leaves_a_whole_copy_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    import shutil

    from lingraft.commands import collecting

    found, target = a_run(tmp_path), tmp_path / "run"
    collect_adapters(found, target)
    found["methods"]["adamergex"]["languages"]["sw"]["by_seed"] = [0.75]

    def killed(*_: Any, **__: Any) -> None:
        raise SystemExit

    monkeypatch.setattr(collecting if where == "write_json" else shutil, where, killed)
    with pytest.raises(SystemExit):
        collect_adapters(found, target)
    monkeypatch.undo()
    whole = [p for p in target.iterdir() if not p.name.startswith(".")]
    assert all(verify(path) is None for path in whole)
    collect_adapters(found, target)
    assert "75.0" in (target / "adamergex-sw" / CARD).read_text(encoding="utf-8")


def test_plain_peft_does_not_mind_the_card(tmp_path: Path):
    from peft import PeftModel

    from tests.unit.adapters import tiny_llama

    adapter = Adapter.load(write_adapter(tmp_path / "a", 1, sidecar={**BASE, "provenance": TASK}))
    folder = adapter.save(tmp_path / "b")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(tiny_llama(), str(folder)).merge_and_unload()
    plain = tiny_llama()
    module = "model.layers.0.self_attn.q_proj"
    moved = (model.get_submodule(module).weight - plain.get_submodule(module).weight).detach().numpy()
    assert np.allclose(moved, updates_of(folder)[module], atol=1e-5)
    assert TensorFile(folder / "adapter_model.safetensors").names
    assert json.loads((folder / RECORD).read_text())["files"].keys() >= {CARD}


def test_data_sets_are_named_where_they_were_read_from_the_hub():
    from lingraft.cards import hub_datasets

    rows = ["hub:Davlan/sib200@abc:swh_Latn:train", "0123", "hub:aps/super_glue@x:copa:train+hub:Davlan/sib200@abc:x:y"]
    assert hub_datasets(rows) == ["Davlan/sib200", "aps/super_glue"]
    assert hub_datasets(["0123", "folder:x"]) == []


def test_a_second_stages_card_has_code_that_loads_it(tmp_path: Path):
    from peft import PeftModel

    from lingraft.fusion.stages import SecondStage
    from tests.unit.adapters import tiny_llama

    first = Adapter.load(write_adapter(tmp_path / "first", 1))
    stage = SecondStage(first, "lora", language="sw")
    folder = write_adapter(tmp_path / "second", 2, sidecar={**BASE, "second": stage.notes()})
    stage.write(folder, {})
    own = (folder / "stage1" / CARD).read_text("utf-8")
    assert own == card(Facts(first.config, first.sidecar)) and own.startswith("---\n")
    said = card(Facts(CONFIG, json.loads((folder / "lingraft.json").read_text())))
    lines = [line.partition(" = ")[2] for line in said.splitlines() if line.startswith("model = PeftModel")]
    model = tiny_llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for line in lines:
            model = eval(line.replace("THIS_FOLDER", str(folder)), {"PeftModel": PeftModel, "model": model})  # noqa: S307 - our own card
    merged, module = model.merge_and_unload(), "model.layers.0.self_attn.q_proj"
    moved = merged.get_submodule(module).weight - tiny_llama().get_submodule(module).weight
    both = updates_of(tmp_path / "first")[module] + updates_of(folder)[module]
    assert len(lines) == 2 and np.allclose(moved.detach().numpy(), both, atol=1e-5)
