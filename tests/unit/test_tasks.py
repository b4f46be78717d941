"""Rows, prompts and segments: what is read from files and the hub, and what is said about bad ones."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingraft.config import CustomTask, ReferenceConfig, validated
from lingraft.errors import BackboneError, DataError, LingraftError, UserError
from lingraft.tasks.choice import ChoiceTask
from lingraft.tasks.items import Example, subset
from lingraft.tasks.reference import segments, text_path
from lingraft.tasks.sources import BUNDLED, FileSource, HubSource, bundled_or, hub_commit, read_lines
from lingraft.tasks.table import TASKS, find_task

FILES = {"train": "{language}/train.tsv", "test": "{language}/test.tsv"}
TSV = "id\ttext\tlabel\n1\tone\ta\n2\ttwo\tb\n"


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(path: Path, rows: Iterable[Any]) -> Path:
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def task(**changes: Any) -> ChoiceTask:
    tree = {"files": FILES, "prompt": "Q: {text}\nA:", "labels": ["a", "b"], "id_field": "id"} | changes
    found = find_task("mine", {"mine": validated(CustomTask, tree)})
    assert isinstance(found, ChoiceTask)
    return found


def values(path: Path) -> list[dict[str, str]]:
    return [dict(row.fields) for row in FileSource(path).rows()]


def refused(action: Callable[[], object], match: str) -> LingraftError:
    with pytest.raises(LingraftError, match=match) as caught:
        action()
    assert isinstance(caught.value, UserError)
    return caught.value


# Files.


def test_tsv_is_read_without_quoting(tmp_path: Path):
    path = write(tmp_path / "x.tsv", 'id\ttext\r\n1\t"open, and\r\n2\ta "b" c\r\n')
    assert values(path) == [{"id": "1", "text": '"open, and'}, {"id": "2", "text": 'a "b" c'}]


def test_csv_is_read_with_quoting(tmp_path: Path):
    path = write(tmp_path / "x.csv", 'id,text\n1,"a, ""b""\nc"\n\n2,d\n')
    assert values(path) == [{"id": "1", "text": 'a, "b"\nc'}, {"id": "2", "text": "d"}]


def test_jsonl_is_read_as_text(tmp_path: Path):
    path = write(
        tmp_path / "x.jsonl", '{"id": 1, "text": "é", "ok": true}\n\n{"id": "2", "text": null, "ok": [1, "é"]}'
    )
    assert values(path) == [{"id": "1", "text": "é", "ok": "true"}, {"id": "2", "text": "null", "ok": '[1, "é"]'}]


def test_a_byte_order_mark_is_no_part_of_the_first_field(tmp_path: Path):
    assert values(write(tmp_path / "x.tsv", b"\xef\xbb\xbfid\ttext\n1\ta\n")) == [{"id": "1", "text": "a"}]


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl"])
def test_an_unusual_line_separator_inside_a_value_ends_no_row(tmp_path: Path, suffix: str):
    text = "one\u2028two\x85three"
    lines = {".jsonl": json.dumps({"text": text}, ensure_ascii=False)}.get(suffix, f"text\n{text}")
    assert values(write(tmp_path / f"x{suffix}", lines)) == [{"text": text}]


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl"])
@pytest.mark.parametrize("content", ["", " \n\n"])
def test_an_empty_file_is_named(tmp_path: Path, suffix: str, content: str):
    path = write(tmp_path / f"x{suffix}", content)
    assert refused(FileSource(path).rows, "empty").where == str(path)


def test_a_file_with_a_header_alone_is_named(tmp_path: Path):
    refused(FileSource(write(tmp_path / "x.tsv", "id\ttext\n")).rows, "a header and no rows")


def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path: Path):
    path = write(tmp_path / "x.tsv", b"id\ttext\n1\tok\n2\t\xff\n")
    assert refused(FileSource(path).rows, "not UTF-8").where == f"{path}:3"


@pytest.mark.parametrize(("line", "says"), [('{"id": 1', "not JSON"), ("[1]", "not a JSON object"), ("x", "not JSON")])
def test_malformed_json_is_named_with_its_line(tmp_path: Path, line: str, says: str):
    path = write(tmp_path / "x.jsonl", '{"id": 1}\n\n' + line + "\n")
    assert refused(FileSource(path).rows, says).where == f"{path}:3"


@pytest.mark.parametrize(("suffix", "row"), [(".tsv", "2"), (".tsv", "2\tb\tc"), (".csv", "2"), (".csv", "2,b,c")])
def test_a_wrong_number_of_columns_is_named_with_its_line(tmp_path: Path, suffix: str, row: str):
    sep = "\t" if suffix == ".tsv" else ","
    path = write(tmp_path / f"x{suffix}", f"id{sep}text\n1{sep}a\n{row}\n")
    count = row.count(sep) + 1
    error = refused(FileSource(path).rows, f"this line has {count} columns, the header 2")
    assert error.where == f"{path}:3"


def test_an_open_quote_in_csv_is_named_with_its_line(tmp_path: Path):
    path = write(tmp_path / "x.csv", 'id,text\n1,"a" b\n')
    assert refused(FileSource(path).rows, "malformed").where == f"{path}:2"


def test_a_file_of_another_type_or_no_file_is_named(tmp_path: Path):
    refused(FileSource(write(tmp_path / "x.xlsx", "x")).rows, "unknown file type '.xlsx'")
    refused(FileSource(tmp_path / "none.tsv").rows, "cannot be read")


def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path: Path):
    one, two = (FileSource(write(tmp_path / name, TSV)).digest() for name in ("a.tsv", "b.tsv"))
    assert one == two
    assert FileSource(write(tmp_path / "a.tsv", TSV + "3\tx\ta\n")).digest() != one


# Tasks.


def test_a_users_task_with_a_list_of_labels(tmp_path: Path):
    write(tmp_path / "sw/test.tsv", TSV)
    mine = task()
    assert mine.examples(mine.sources("sw", "test", tmp_path)) == [
        Example("1", "Q: one\nA:", (" a", " b"), 0, references=("a",), parts=("one",)),
        Example("2", "Q: two\nA:", (" a", " b"), 1, references=("b",), parts=("two",)),
    ]


def test_a_users_task_with_labels_mapped_to_answers(tmp_path: Path):
    write(tmp_path / "sw/test.tsv", TSV)
    mine = task(labels={"b": "bad", "a": "good"})
    found = mine.examples(mine.sources("sw", "test", tmp_path))
    assert [(e.candidates, e.gold) for e in found] == [((" bad", " good"), 1), ((" bad", " good"), 0)]


@pytest.mark.parametrize(
    ("prompt", "head", "parts"),
    [
        ("{text}?", "classification", ("one",)),
        ("{text} {id} {text}?", "classification", ("one", "1")),
        ("{text} {id} {more}?", None, ()),
        ("Which?", None, ()),
    ],
)
def test_an_encoder_reads_the_one_or_two_fields_of_a_users_prompt(
    tmp_path: Path, prompt: str, head: str | None, parts: tuple[str, ...]
):
    write(tmp_path / "sw/test.tsv", "id\ttext\tlabel\tmore\n1\tone\ta\tm\n")
    mine = task(prompt=prompt)
    (item,) = mine.examples(mine.sources("sw", "test", tmp_path))
    assert (mine.head, item.parts) == (head, parts)


def test_a_users_task_has_one_wording_and_may_name_the_language(tmp_path: Path):
    write(tmp_path / "sw/test.tsv", "id\ttext\tlabel\n1\tone\ta\n")
    mine = task(prompt="In {language_name}: {text}")
    (item,) = mine.examples(mine.sources("sw", "test", tmp_path), language="sw")
    assert item.prompt == "In Swahili: one"
    refused(lambda: mine.examples([], prompt="xlt"), "the task 'mine' has no prompt 'xlt'")
    assert mine.rule() == {"kind": "label", "marker": None, "labels": {"a": ["a"], "b": ["b"]}}


def test_without_an_id_field_the_row_number_is_the_id(tmp_path: Path):
    write(tmp_path / "sw/test.tsv", TSV)
    mine = task(id_field=None)
    assert [e.id for e in mine.examples(mine.sources("sw", "test", tmp_path))] == ["0", "1"]


def test_a_users_task_goes_before_one_of_the_table(tmp_path: Path):
    own = validated(CustomTask, {"files": FILES, "prompt": "x", "labels": ["a", "b"]})
    assert find_task("topics", {"topics": own}).prompt().template == "x"


def test_an_unknown_task_suggests_the_nearest(tmp_path: Path):
    own = validated(CustomTask, {"files": FILES, "prompt": "x", "labels": ["a", "b"]})
    assert refused(lambda: find_task("topic"), "unknown task 'topic'").remedy == "did you mean 'topics'?"
    assert refused(lambda: find_task("sentimnt", {"sentiment": own}), "unknown").remedy == "did you mean 'sentiment'?"


@pytest.mark.parametrize("path", ["/etc/passwd", "../{language}.tsv", "a/../../{language}.tsv"])
def test_a_task_cannot_lead_out_of_the_data_folder(path: str):
    refused(lambda: task(files={"test": path}), "leads out of the data folder")


def test_an_unknown_label_suggests_the_nearest(tmp_path: Path):
    path = write(tmp_path / "sw/test.tsv", "id\ttext\tlabel\n1\tone\tpolitic\n")
    mine = task(labels=["politics", "sports"])
    error = refused(lambda: mine.examples(mine.sources("sw", "test", tmp_path)), "unknown label 'politic'")
    assert error.where == f"{path}:2"
    assert error.remedy == "did you mean 'politics'?"


def test_an_id_that_stands_twice_is_named_with_both_places(tmp_path: Path):
    path = write(tmp_path / "sw/test.tsv", TSV + "1\tthree\ta\n")
    mine = task()
    error = refused(lambda: mine.examples(mine.sources("sw", "test", tmp_path)), f"the id '1' .* at {path}:2")
    assert error.where == f"{path}:4"


@pytest.mark.parametrize(
    ("changes", "says", "remedy"),
    [
        ({"label_field": "labels"}, "no field 'labels'", "did you mean 'label'?"),
        ({"id_field": "idd"}, "no field 'idd'", "did you mean 'id'?"),
        ({"prompt": "{txt}"}, "asks for 'txt'", "correct the prompt template or the file"),
    ],
)
def test_a_missing_field_is_named_with_its_line(tmp_path: Path, changes: dict[str, Any], says: str, remedy: str):
    path = write(tmp_path / "sw/test.tsv", TSV)
    mine = task(**changes)
    error = refused(lambda: mine.examples(mine.sources("sw", "test", tmp_path)), says)
    assert (error.where, error.remedy) == (f"{path}:2", remedy)


def test_a_language_without_data_lists_those_that_have_some(tmp_path: Path):
    for language in ("vi", "sw"):
        write(tmp_path / language / "test.tsv", TSV)
    error = refused(lambda: task().source("de", "test", tmp_path), "no 'test' data for 'de'")
    assert error.where == str(tmp_path / "de/test.tsv")
    assert error.remedy is not None
    assert error.remedy.endswith("data are here for: sw, vi")


def test_unknown_splits_and_splits_a_task_lacks_are_named(tmp_path: Path):
    assert refused(lambda: task().source("sw", "tset", tmp_path), "unknown split").remedy == "did you mean 'test'?"
    refused(lambda: task().source("sw", "validation", tmp_path), "has no 'validation' split")


def test_a_task_without_a_place_on_the_hub_asks_for_a_folder():
    assert refused(lambda: task().source("sw", "test", None), "on the hub").remedy == "give --data-dir"
    refused(lambda: TASKS["xcopa"].source("sw", "train", None), "no 'train' data for 'sw' on the hub")


def test_the_hub_is_asked_in_its_own_codes():
    source = TASKS["topics"].source("sw", "validation", None, "abc")
    assert source == HubSource("Davlan/sib200", "swh_Latn", "validation", "abc")
    assert source.digest() == "hub:Davlan/sib200@abc:swh_Latn:validation"
    assert TASKS["xcopa"].source("en", "train", None) == HubSource("aps/super_glue", "copa", "train")


def test_the_first_layout_that_exists_is_read(tmp_path: Path):
    rows = "index_id\tcategory\ttext\n1\ttravel\tx\n"
    bundled = write(tmp_path / "topics/sw/validation.tsv", rows)
    assert TASKS["topics"].source("sw", "validation", tmp_path) == FileSource(bundled)
    upstream = write(tmp_path / "data/annotated/swh_Latn/dev.tsv", rows)
    assert TASKS["topics"].source("sw", "validation", tmp_path) == FileSource(upstream)


def test_a_language_unknown_to_the_table_is_no_crash(tmp_path: Path):
    refused(lambda: TASKS["topics"].source("xx", "test", tmp_path), "no 'test' data for 'xx'")


def test_the_spec_holds_what_can_change_a_result():
    spec = task().spec()
    for changes in ({"prompt": "x"}, {"labels": ["a", "c"]}, {"label_field": "l"}, {"id_field": None}):
        assert task(**changes).spec() != spec
    assert task(licence="CC0").spec() == spec


def test_data_folders_are_bundled_given_or_none(tmp_path: Path):
    assert bundled_or(None) is None
    assert bundled_or("bundled") == BUNDLED
    assert bundled_or(str(tmp_path)) == tmp_path
    refused(lambda: bundled_or(tmp_path / "none"), "no such data folder")


# XCOPA.


def xcopa(folder: Path) -> Path:
    row = {"premise": "p", "choice1": "x", "choice2": "y", "changed": False}
    for split in ("val", "test"):
        wrong = [row | {"idx": i, "label": i % 2, "question": "cause"} for i in (0, 1, 2)]
        jsonl(folder / f"xcopa/data/sw/{split}.sw.jsonl", wrong)
    right = [row | {"idx": i, "label": 0, "question": q} for i, q in ((1, "effect"), (0, "effect"))]
    jsonl(folder / "copa_en/val.jsonl", right)
    return folder


def asked(name: str, split: str, folder: Path) -> list[tuple[str, int]]:
    row = TASKS[name]
    found = row.examples(row.sources("sw", split, folder))
    return [(e.prompt.split("What is the ")[1].split("?")[0], e.gold) for e in found]


def test_xcopas_question_is_taken_from_the_english_item_of_the_same_index(tmp_path: Path):
    # Item 2 has no English counterpart here, and keeps its own; labels are never taken over.
    assert asked("xcopa", "validation", xcopa(tmp_path)) == [("effect", 0), ("effect", 1), ("cause", 0)]


def test_xcopas_raw_question_and_its_test_stay_as_they_are(tmp_path: Path):
    folder = xcopa(tmp_path)
    assert asked("xcopa-raw", "validation", folder) == asked("xcopa", "test", folder)
    assert asked("xcopa", "test", folder) == [("cause", 0), ("cause", 1), ("cause", 0)]


def test_xcopa_without_the_english_file_is_read_as_it_is(tmp_path: Path):
    folder = xcopa(tmp_path)
    (folder / "copa_en/val.jsonl").unlink()
    assert len(TASKS["xcopa"].sources("sw", "validation", folder)) == 1
    assert asked("xcopa", "validation", folder)[0] == ("cause", 0)


def test_xcopas_question_is_repaired_from_the_hub_too():
    sources = TASKS["xcopa"].sources("sw", "validation", None, "abc")
    assert sources == [
        HubSource("cambridgeltl/xcopa", "sw", "validation", "abc"),
        HubSource("aps/super_glue", "copa", "validation"),
    ]
    assert len(TASKS["xcopa"].sources("sw", "test", None)) == 1
    assert len(TASKS["xcopa-raw"].sources("sw", "validation", None)) == 1


def test_xcopas_prompt_and_answers(tmp_path: Path):
    row = TASKS["xcopa"]
    first = row.examples(row.sources("sw", "validation", xcopa(tmp_path)))[0]
    assert first.prompt == (
        "Here is a premise and a question. Help me pick the more plausible option. Premise: p "
        "Question: What is the effect? (A) x (B) y\nAnswer:"
    )
    assert first.candidates == (" (A)", " (B)")


# Samples.


def examples(names: Iterable[object], prompt: str = "") -> list[Example]:
    return [Example(str(n), f"{prompt}{n}", (" a", " b"), 0) for n in names]


@given(st.lists(st.integers(), unique=True, min_size=1), st.integers(1, 30), st.randoms())
def test_a_sample_holds_the_same_items_in_every_language(names: list[int], limit: int, random: Any):
    shuffled = list(names)
    random.shuffle(shuffled)
    one, two = subset(examples(names), limit), subset(examples(shuffled, "translated "), limit)
    assert {e.id for e in one} == {e.id for e in two}
    assert len(one) == min(limit, len(names))
    kept = {e.id for e in one}
    assert [e.id for e in one] == [str(n) for n in names if str(n) in kept]


@given(st.integers(1, 50), st.integers(1, 50))
def test_a_larger_sample_holds_the_smaller(few: int, many: int):
    few, many = sorted((few, many))
    items = examples(range(50))
    assert {e.id for e in subset(items, few)} <= {e.id for e in subset(items, many)}


def test_no_limit_is_everything():
    items = examples(range(5))
    assert subset(items, None) == items


# Reference text.


def encode(text: str) -> list[int]:
    return list(text.encode())


def config(**changes: Any) -> ReferenceConfig:
    return ReferenceConfig(**({"text": "{language}.txt", "segment_tokens": 8} | changes))


LINES = st.lists(st.text(st.characters(exclude_characters="\r\n", codec="utf-8"), min_size=1), min_size=1)


@given(LINES, st.integers(8, 40), st.lists(st.integers(1000, 1010), max_size=2))
def test_packed_pieces_put_together_are_the_encoded_text(lines: list[str], size: int, prefix: list[int]):
    found = segments(lines, encode, config(segment_tokens=size), prefix)
    assert all(s[: len(prefix)] == prefix for s in found)
    assert all(len(s) == size for s in found[:-1])
    assert all(2 <= len(s) <= size for s in found)
    text = encode("".join(line + "\n" for line in lines))
    together = [i for s in found for i in s[len(prefix) :]]
    # Without a prefix a last piece of one id teaches nothing and is left out.
    assert together == text or (not prefix and together == text[:-1] and len(text) % size == 1)


@given(LINES, st.integers(8, 40), st.integers(1, 5))
def test_a_line_is_a_segment_and_keeps_its_place_after_a_prefix(lines: list[str], size: int, limit: int):
    found = segments(lines, encode, config(unit="line", segment_tokens=size, max_segments=limit), [1000])
    assert found == [[1000, *encode(line)][:size] for line in lines[:limit]]


def test_parallel_lines_stay_parallel_however_short_they_are():
    other = ["a", "b", "c", "d"]
    one, two = (segments(t, encode, config(unit="line"), [1]) for t in (["a long line", "x", "y", "one more"], other))
    assert len(one) == len(two) == 4
    assert two == [[1, *encode(t)] for t in other]


def test_a_rest_of_running_text_shorter_than_two_ids_is_left_out():
    length = config().segment_tokens
    whole = segments(["x" * length], encode, config(), [])
    assert [len(piece) for piece in whole] == [length]  # the line's end alone would be one id more


def test_no_more_segments_than_asked():
    assert len(segments(["x" * 100], encode, config(max_segments=3), [1])) == 3


def test_empty_lines_keep_their_places_and_those_at_the_end_do_not(tmp_path: Path):
    text = "one\r\n\r\n  two \n\t\nthree\rfour\n\n \n"
    assert read_lines(write(tmp_path / "x.txt", text)) == ["one", "", "two", "", "three", "four"]


def test_parallel_lines_stay_parallel_whatever_is_in_them():
    lines, empty = ["ab", "c", "", "def"], ["", "", "x", "y"]
    for prefix in ([1], []):
        ours, theirs = (segments(text, encode, config(unit="line"), prefix) for text in (lines, empty))
        assert len(ours) == len(theirs) == 4
        assert ours[3] == [*prefix, *encode("def")] and theirs[3] == [*prefix, *encode("y")]


def test_running_text_knows_no_empty_lines():
    assert segments(["ab", "", "c"], encode, config(), []) == segments(["ab", "c"], encode, config(), [])


def test_only_line_ends_end_a_line(tmp_path: Path):
    # Otherwise a U+2028 in one language would shift every following line against its translation.
    line = "a\u2028b\x85c\x0bd\x1ce"
    assert read_lines(write(tmp_path / "x.txt", f"{line}\nf\n")) == [line, "f"]


def test_reference_text_is_found_or_the_languages_that_have_it_are_listed(tmp_path: Path):
    path = write(tmp_path / "text/sw.txt", "x")
    assert text_path("text/{language}.txt", "sw", tmp_path) == path
    error = refused(lambda: text_path("text/{language}.txt", "vi", tmp_path), "no reference text for 'vi'")
    assert error.where == str(tmp_path / "text/vi.txt")
    assert error.remedy is not None
    assert error.remedy.endswith("text is here for: sw")


@pytest.mark.parametrize("pattern", ["../{language}.txt", "/tmp/{language}.txt", "text.txt"])
def test_reference_text_has_a_language_and_stays_in_the_data_folder(tmp_path: Path, pattern: str):
    refused(lambda: text_path(pattern, "sw", tmp_path), "reference text")


# The hub, without a connection.


def test_a_repository_of_the_hubs_layout_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    repository = tmp_path / "sib200"
    files = "".join(
        f"  - split: {s}\n    path: data/swh_Latn/{f}.tsv\n" for s, f in (("train", "train"), ("test", "test"))
    )
    write(repository / "README.md", f"---\nconfigs:\n- config_name: swh_Latn\n  data_files:\n{files}---\n")
    for split, first in (("train", 10), ("test", 20)):
        rows = f"index_id\tcategory\ttext\n{first}\tpolitics\tMoja\n{first + 1}\ttravel\tMbili\n"
        write(repository / f"data/swh_Latn/{split}.tsv", rows)
    source = HubSource(str(repository), "swh_Latn", "test")
    assert source.digest() == f"hub:{repository}@local:swh_Latn:test"
    found = TASKS["topics"].examples([source])
    assert [(e.id, e.prompt, e.candidates[e.gold]) for e in found] == [
        ("20", "Text: Moja\nTopic:", " politics"),
        ("21", "Text: Mbili\nTopic:", " travel"),
    ]
    error = refused(HubSource(str(repository), "tha_Thai", "test").rows, "cannot be loaded")
    assert error.where == f"hub data set {repository}, tha_Thai, test"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_offline_the_commit_is_the_caches(hub_cache: Path):
    write(hub_cache / "datasets--Davlan--sib200/refs/main", "0123abcd\n")
    write(hub_cache / "models--some--model/refs/main", "4567cdef")
    assert hub_commit("Davlan/sib200", "dataset") == "0123abcd"
    assert hub_commit("some/model", "model") == "4567cdef"
    assert HubSource("Davlan/sib200", "x", "test").digest() == "hub:Davlan/sib200@0123abcd:x:test"
    assert HubSource("Davlan/sib200", "x", "test", "fedc").pinned() == "fedc"
    write(hub_cache / "datasets--Davlan--sib200/refs/v1", "89ab")
    assert HubSource("Davlan/sib200", "x", "test", "v1").pinned() == "89ab", "a branch or tag moves"


def test_offline_what_the_cache_lacks_is_an_error_of_the_right_kind(hub_cache: Path):
    with pytest.raises(DataError, match=r"'Davlan/sib200' was not found \(HF_HUB_OFFLINE is set\)"):
        hub_commit("Davlan/sib200", "dataset")
    with pytest.raises(BackboneError, match="hub's model"):
        hub_commit("some/model", "model")


def test_when_the_hub_does_not_answer_the_cache_does(hub_cache: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", unreachable)
    with pytest.raises(DataError, match=r"not found \(ConnectionError\)"):
        hub_commit("Davlan/sib200", "dataset")
    write(hub_cache / "datasets--Davlan--sib200/refs/main", "0123abcd")
    assert hub_commit("Davlan/sib200", "dataset") == "0123abcd"
