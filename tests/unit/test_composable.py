"""Files of the method's authors: every form of them gives the differences it holds, and none is executed."""

import collections
import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._utils import _rebuild_tensor_v2

from lingraft import Adapter
from lingraft.commands.converting import convert_difference
from lingraft.composable import FILE, Difference, read_difference, to_adapter
from lingraft.errors import AdapterError
from tests.conftest import save_tiny_model

FORMS = ("steps", "plain steps", "array of steps", "coordinates", "sparse", "uncoalesced", "dense")
"""How one difference may be written."""


def dense_of(shape: tuple[int, ...], seed: int, share: float = 0.3) -> np.ndarray:
    random = np.random.default_rng(seed)
    # Multiples of 1/64: exact in every type.
    values = random.integers(1, 100, shape) * random.choice([-1, 1], shape) / 64
    return (values * (random.random(shape) < share)).astype(np.float32)


def entry_of(dense: np.ndarray, form: str, dtype: torch.dtype = torch.float32) -> Any:
    """A difference as one of the forms; steps count along columns, the first index fastest."""
    tensor = torch.from_numpy(dense).to(dtype)
    coordinates = np.argwhere(dense.T)[:, ::-1]
    values = tensor[tuple(coordinates.T)]
    flat: Any = np.ravel_multi_index(tuple(coordinates.T), dense.shape, order="F")
    if form == "dense":
        return tensor
    if form in ("sparse", "uncoalesced"):
        if form == "sparse":
            return tensor.to_sparse().coalesce()
        shuffled = np.random.default_rng(0).permutation(len(coordinates))
        places = torch.from_numpy(coordinates[shuffled].T.copy())
        twice, halves = torch.cat([places, places], 1), values[shuffled] / 2
        return torch.sparse_coo_tensor(twice, torch.cat([halves, halves]), dense.shape, check_invariants=True)
    if form == "coordinates":
        return {"size": tensor.size(), "indices": coordinates.T.tolist(), "values": values.tolist()}
    steps = np.diff(flat, prepend=0)
    if form == "array of steps":
        return {"size": list(dense.shape), "index_steps": steps, "values": values.float().numpy()}
    first = [flat[0]] if len(flat) and form == "steps" else steps[:1].tolist()
    assert form != "steps" or not len(flat) or type(first[0]) is np.int64
    return {"size": tensor.size(), "index_steps": first + steps[1:].tolist(), "values": values}


def written(path: Path, value: Any, protocol: int = 2) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, path, pickle_protocol=protocol)
    return path


def restored(found: Difference) -> dict[str, np.ndarray]:
    """The differences as dense arrays, once it is sure that they are in the order of rows."""
    result = {}
    for name, diff in found.diffs.items():
        assert diff.indices.dtype == np.int64 and diff.values.dtype == np.float32
        assert (np.diff(diff.indices) > 0).all()
        dense = np.zeros(int(np.prod(diff.shape)), np.float32)
        dense[diff.indices] = diff.values
        result[name] = dense.reshape(diff.shape)
    return result


SHAPES = {"encoder.layer.0.dense.weight": (5, 7), "encoder.layer.0.dense.bias": (9,), "encoder.conv.weight": (2, 3, 4)}
HEAD = {"classifier.weight": torch.arange(6.0).reshape(2, 3), "classifier.bias": torch.tensor([1.5, -2.0])}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_form_gives_the_difference_it_holds(form: str, dtype: torch.dtype, protocol: int, tmp_path: Path) -> None:
    if form == "array of steps":
        protocol = min(protocol, 4)  # In 5 numpy writes arrays in another way, which no such file has.
    dense = {name: dense_of(shape, n) for n, (name, shape) in enumerate(SHAPES.items())}
    entries = {name: entry_of(value, form, dtype) for name, value in dense.items()}
    found = read_difference(written(tmp_path / FILE, {"diffs": entries, "abs": {}}, protocol))
    assert list(found.diffs) == sorted(dense) and not found.head
    for name, value in restored(found).items():
        np.testing.assert_array_equal(value, dense[name])


def test_column_by_column_worked_by_hand(tmp_path: Path) -> None:
    # Of a 2 × 3 matrix the entries 1, 2 and 5 counted down its columns are (1, 0), (0, 1) and (1, 2).
    entry = {"size": torch.Size([2, 3]), "index_steps": [np.int64(1), 1, 3], "values": torch.tensor([10.0, 20.0, 30.0])}
    found = read_difference(written(tmp_path / FILE, {"diffs": {"a.weight": entry}})).diffs["a.weight"]
    assert found.shape == (2, 3)
    assert found.indices.tolist() == [1, 3, 5]
    assert found.values.tolist() == [20, 10, 30]


@pytest.mark.parametrize("form", ["diffs", "body", "nothing"])
def test_the_tables_under_every_name_they_have_had(form: str, tmp_path: Path) -> None:
    dense = {name: dense_of(shape, n) for n, (name, shape) in enumerate(SHAPES.items())}
    body = {name: entry_of(value, "steps") for name, value in dense.items()}
    whole: dict[str, Any] = {name: torch.nn.Parameter(value) for name, value in HEAD.items()}
    tables = {
        "diffs": {"diffs": body, "abs": whole, "block_sparses": {}},
        "body": {"body": collections.OrderedDict(body), "head": collections.OrderedDict(whole)},
        "nothing": body,
    }
    found = read_difference(written(tmp_path / FILE, tables[form]))
    assert set(found.diffs) == set(dense)
    for name, value in restored(found).items():
        np.testing.assert_array_equal(value, dense[name])
    assert sorted(found.head) == ([] if form == "nothing" else sorted(HEAD))
    for name, value in found.head.items():
        np.testing.assert_array_equal(value, HEAD[name].numpy())
    assert not read_difference(written(tmp_path / FILE, {"body": body, "head": None})).head
    assert not read_difference(written(tmp_path / FILE, {"body": body})).head


def test_a_head_keeps_its_type_its_strides_and_what_it_notes(tmp_path: Path) -> None:
    state = torch.nn.Linear(3, 2).to(torch.bfloat16).state_dict()  # An ordered table with notes of its own.
    whole = {
        "a.weight": torch.arange(6.0).reshape(2, 3).T,
        "b.weight": torch.arange(9.0)[4:7],
        "c.bias": torch.zeros(0),
    }
    sparse = {"d.weight": entry_of(dense_of((3, 4), 0), "steps")}
    entries = {"e.weight": entry_of(dense_of((2, 2), 1, 1), "steps")}
    found = read_difference(written(tmp_path / FILE, {"diffs": entries, "abs": {**whole, **sparse}})).head
    for name, tensor in whole.items():
        np.testing.assert_array_equal(found[name], tensor.numpy())
        assert found[name].flags.c_contiguous and found[name].shape == tuple(tensor.shape)
    np.testing.assert_array_equal(found["d.weight"], dense_of((3, 4), 0))
    found = read_difference(written(tmp_path / FILE, {"diffs": entries, "abs": state})).head
    assert {str(value.dtype) for value in found.values()} == {"bfloat16"}
    np.testing.assert_array_equal(found["weight"].astype(np.float32), state["weight"].float().numpy())


def test_indices_beyond_32_bits_do_not_wrap(tmp_path: Path) -> None:
    entry = {
        "size": torch.Size([3, 1 << 31]),
        "index_steps": [np.int64(4), 5 << 30],
        "values": torch.tensor([1.0, 2.0]),
    }
    found = read_difference(written(tmp_path / FILE, {"diffs": {"a.weight": entry}})).diffs["a.weight"]
    flat = [4, 4 + (5 << 30)]
    assert found.indices.tolist() == sorted((i % 3) * (1 << 31) + i // 3 for i in flat)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple),
    share=st.sampled_from([0, 0.1, 0.5, 1]),
    form=st.sampled_from(FORMS),
    seed=st.integers(0, 1000),
)
def test_what_is_written_is_read(shape: tuple[int, ...], share: float, form: str, seed: int) -> None:
    dense = dense_of(shape, seed, share)
    path = written(Path(os.environ["LINGRAFT_CACHE"]).with_name(FILE), {"diffs": {"a.weight": entry_of(dense, form)}})
    np.testing.assert_array_equal(restored(read_difference(path))["a.weight"], dense)


def test_torch_itself_refuses_the_file_or_would_execute_it(tmp_path: Path) -> None:
    """Why there is a reader of our own: the first step is a number of numpy's."""
    path = written(tmp_path / FILE, {"diffs": {"a.weight": entry_of(dense_of((3, 3), 0, 1), "steps")}, "abs": {}})
    with pytest.raises(pickle.UnpicklingError, match=r"multiarray\.scalar"):
        torch.load(path, weights_only=True)


# As an adapter


def test_an_adapter_of_it_holds_the_same_and_its_head(tmp_path: Path) -> None:
    dense = {name: dense_of(shape, n) for n, (name, shape) in enumerate(SHAPES.items())}
    entries = {name: entry_of(value, "steps") for name, value in dense.items()}
    entries["embeddings.weight"] = entry_of(np.zeros((4, 4), np.float32), "steps")
    written(tmp_path / FILE, {"diffs": entries, "abs": HEAD})
    to_adapter(read_difference(tmp_path), "some/base", "TOKEN_CLS").save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    counts = {name.removesuffix(".weight"): int((value != 0).sum()) for name, value in dense.items()}
    assert config["peft_type"] == "SPARSE" and config["task_type"] == "TOKEN_CLS"
    assert config["base_model_name_or_path"] == "some/base"
    assert config["entries"] == counts
    assert config["target_modules"] == ["encoder.conv", "encoder.layer.0.dense"]
    assert config["modules_to_save"] == ["classifier"]
    loaded = Adapter.load(tmp_path / "out")
    assert loaded.structure == "sparse" and set(loaded.layout) == set(counts)
    for name, value in dense.items():
        tensors = loaded.site(name.removesuffix(".weight")).tensors
        np.testing.assert_array_equal(tensors["indices"], np.flatnonzero(value))
        np.testing.assert_array_equal(tensors["values"], value[value != 0])
        np.testing.assert_array_equal(tensors["shape"], value.shape)
    assert set(loaded.others) == {f"base_model.model.{name}" for name in HEAD}
    for name, value in HEAD.items():
        np.testing.assert_array_equal(loaded.others[f"base_model.model.{name}"](), value.numpy())


def test_a_model_with_the_adapter_is_the_model_with_the_differences_added(tmp_path: Path) -> None:
    import transformers
    from peft import PeftModel

    folder = str(save_tiny_model(tmp_path / "model", "bert"))
    load = transformers.AutoModelForMaskedLM.from_pretrained
    expected, base = load(folder), load(folder)
    names = ["bert.encoder.layer.0.output.dense.weight", "bert.encoder.layer.1.attention.self.query.bias"]
    names += ["bert.embeddings.position_embeddings.weight"]
    entries = {}
    for n, name in enumerate(names):
        parameter = expected.get_parameter(name)
        dense = dense_of(tuple(parameter.shape), n)
        parameter.data += torch.from_numpy(dense)
        entries[name] = entry_of(dense, "steps")
    to_adapter(read_difference(written(tmp_path / FILE, {"diffs": entries, "abs": {}}))).save(tmp_path / "out")
    model = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        ours, theirs = model(input_ids=ids).logits, expected.eval()(input_ids=ids).logits
        plain = load(folder).eval()(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert (plain - theirs).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("diffs", "head", "said"),
    [
        (["a.gamma", "a.weight"], [], "a.gamma"),
        (["weight"], [], "weight"),
        (["a.weight"], ["scale"], "scale"),
        ([], ["a.weight"], "no parameter differs"),
        (["a.b.weight"], ["a.norm.weight"], "'a' has parameters"),
        (["a.bias.weight", "a.bias"], [], "one place"),
    ],
)
def test_what_no_adapter_can_hold_is_refused_by_name(
    diffs: list[str], head: list[str], said: str, tmp_path: Path
) -> None:
    entries = {name: entry_of(dense_of((3,), 0, 1), "steps") for name in diffs}
    found = read_difference(written(tmp_path / FILE, {"diffs": entries, "abs": {n: torch.ones(1) for n in head}}))
    with pytest.raises(AdapterError, match=said):
        to_adapter(found)


def test_a_parameter_that_is_a_single_number_is_refused(tmp_path: Path) -> None:
    entry = {"size": torch.Size([]), "index_steps": [0], "values": torch.ones(1)}
    with pytest.raises(AdapterError, match="without a shape"):
        to_adapter(read_difference(written(tmp_path / FILE, {"diffs": {"a.weight": entry}})))


def test_the_verb_says_what_it_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = {"a.weight": entry_of(np.eye(4, dtype=np.float32), "steps"), "b.bias": entry_of(np.zeros(3), "steps")}
    file = written(tmp_path / FILE, {"diffs": entries, "abs": HEAD})
    told = convert_difference(tmp_path, tmp_path / "one", None, None, True)
    assert told is not None
    assert told["parameters"] == {"a.weight": 4} and told["entries"] == 4
    assert told["head"] == {"classifier.weight": [2, 3], "classifier.bias": [2]}
    assert convert_difference(file, tmp_path / "two", "some/base", "SEQ_CLS", False) is None
    said = capsys.readouterr().err
    assert "4 of 19 entries of 1 parameters" in said and "head: classifier, 8 numbers" in said
    converted = Adapter.load(tmp_path / "two").sidecar["provenance"]["converted"]
    assert converted["file"] == FILE and len(converted["sha256"]) == 64


# Files that are not to be trusted


class Calling:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def archive(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None, **options: Any) -> Path:
    """A zip as torch writes it, of any pickle."""
    with zipfile.ZipFile(path, "w", **options) as made:
        made.writestr("archive/data.pkl", pickled)
        for key, raw in (storages or {}).items():
            made.writestr(f"archive/data/{key}", raw)
    return path


def refused(path: Path, match: str | None = None) -> AdapterError:
    with pytest.raises(AdapterError, match=match) as caught:
        read_difference(path)
    assert caught.value.where is not None and str(path) in caught.value.where
    return caught.value


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("place", ["top", "entry", "values"])
def test_nothing_of_a_file_is_executed(protocol: int, place: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    calls = [
        Calling(os.system, f"touch {marker}"),
        Calling(eval, f"open({str(marker)!r}, 'w')"),
        Calling(exec, f"open({str(marker)!r}, 'w')"),
        Calling(open, str(marker), "w"),
        Calling(getattr, os, "system"),
        Calling(Path.touch, marker),
        Calling(torch.load, io.BytesIO(b"")),
        Calling(np.load, str(marker), None, True),
        Calling(pickle.loads, b""),
    ]
    for n, call in enumerate(calls):
        value = {"top": call, "entry": {"diffs": {"a.weight": call}}}.get(place)
        value = value or {"diffs": {"a.weight": {"size": (1,), "index_steps": [0], "values": call}}}
        try:
            pickled = pickle.dumps(value, protocol)
        except TypeError:  # A module cannot be pickled: by hand, further down.
            continue
        refused(archive(tmp_path / f"{n}.bin", pickled))
    assert not marker.exists()
    # The file does what it is made for where it is trusted: the marker shows it.
    torch.load(written(tmp_path / "trusted.bin", calls[0]), weights_only=False)
    assert marker.exists()


def test_the_refused_name_is_said(tmp_path: Path) -> None:
    assert os.system.__module__ in str(
        refused(written(tmp_path / FILE, {"diffs": Calling(os.system, "true")}), "system")
    )
    refused(written(tmp_path / FILE, {"diffs": {"a": Calling(eval, "1")}}), "eval")
    refused(written(tmp_path / FILE, {"diffs": {"a": torch.nn.Linear(1, 1)}}), "Linear")


RAW = {
    "a class by INST": b"(S'true'\nios\nsystem\n.",
    "an object by OBJ": b"(cos\nsystem\nX\x04\x00\x00\x00trueo.",
    "an object by NEWOBJ": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "an attribute of an attribute": b"\x80\x04\x8c\x0bcollections\x8c\x0bOrderedDict.__init__\x93.",
    "an extension": b"\x80\x02\x82\x01.",
    "a state set on a table's type": b"\x80\x02ccollections\nOrderedDict\n}b.",
    "a call of what is no function": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "a call of a text": b"\x80\x02X\x01\x00\x00\x00a)R.",
    "an index of gigabytes": b"\x80\x02}r\xff\xff\xff\xffj\xfe\xff\xff\xff.",
    "a text of gigabytes": b"\x80\x02X\xff\xff\xff\xffabc.",
    "bytes of gigabytes": b"\x80\x03B\xff\xff\xff\xffabc.",
    "a key without end": b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"K\x01s.",
    "a key of a tuple of tuples, doubled": b"\x80\x02}" + b")" + b"q\x00h\x00\x86" * 60 + b"K\x01s.",
    "lists without end": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "a list of itself": b"\x80\x02]q\x00h\x00a.",
    "a table of itself": b"\x80\x02}q\x00X\x05\x00\x00\x00diffsh\x00s.",
    "an entry of itself": b"\x80\x02}X\x05\x00\x00\x00diffs}q\x00X\x01\x00\x00\x00ah\x00ss.",
    "too many values": b"\x80\x02]]." + b"",
    "nothing": b"",
    "no end": b"\x80\x02}",
    "a mark that is not there": b"\x80\x02t.",
    "a tuple of more than there is": b"\x80\x02\x87.",
    "a million instructions": b"\x80\x02" + b"}" * (1 << 21) + b".",
    "a number cut short": b"\x80\x02J\x01",
    "a storage without a name": b"\x80\x02K\x01Q.",
    "half a character": b"\x80\x02}X\x05\x00\x00\x00diffs}X\x03\x00\x00\x00\xed\xa0\x80]ss.",
}


@pytest.mark.parametrize("what", RAW)
def test_odd_pickles_are_refused(what: str, tmp_path: Path) -> None:
    refused(archive(tmp_path / FILE, RAW[what]))


def test_bytes_made_again_and_again_are_refused(tmp_path: Path) -> None:
    text = b"X" + (1000).to_bytes(4, "little") + b"x" * 1000 + b"q\x00"
    again = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R"
    refused(archive(tmp_path / FILE, b"\x80\x02" + text + again * 1000 + b"."), "more bytes")


def storage(key: str, kind: str, count: int) -> Any:
    """A storage's name as a pickler writes it."""
    return ("storage", kind, key, "cpu", count)


class _Pickler(pickle.Pickler):
    """Writes tuples that name storages as torch does."""

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, tuple) and len(obj) == 5 and obj[0] == "storage":
            return ("storage", getattr(torch, obj[1]), *obj[2:])
        return None


def tensor(offset: Any, size: Any, stride: Any, count: int = 6, kind: str = "FloatStorage") -> Calling:
    return Calling(
        _rebuild_tensor_v2, storage("0", kind, count), offset, size, stride, False, collections.OrderedDict()
    )


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (tensor(0, (7,), (1,)), "larger than its storage"),
        (tensor(1, (2, 3), (3, 1)), "reaches beyond"),
        (tensor(-1, (2,), (1,)), "no storage"),
        (tensor(0, (2, 3), (-1, 1)), "proportion"),
        (tensor(0, (2, 3), (1 << 39, 1)), "reaches beyond"),
        (tensor(0, (1 << 30, 1 << 30), (0, 0)), "larger than its storage"),
        (tensor(0, (1,) * 17, (1,) * 17), "no size"),
        (tensor(0, (1 << 41,), (0,)), "proportion"),
        (tensor(0, (2, 3), (3,)), "larger than its storage"),
        (tensor(0, (6,), (1,), count=7), "has 24 bytes"),
        (tensor(0, (6,), (1,), count=1 << 60), "has 24 bytes"),
        (tensor(0, (6,), (1,), kind="DoubleStorage"), "has 24 bytes"),
        (Calling(_rebuild_tensor_v2, 1, 0, (1,), (1,), False, {}), "no storage"),
    ],
)
def test_tensors_stay_within_their_storage(value: Any, said: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    tables = {"diffs": {"a.weight": {"size": [2], "index_steps": [0], "values": [1.0]}}, "abs": {"h.weight": value}}
    _Pickler(buffer, 2).dump(tables)
    raw = {"0": np.arange(6, dtype=np.float32).tobytes()}
    refused(archive(tmp_path / FILE, buffer.getvalue(), raw), said)
    good = io.BytesIO()
    _Pickler(good, 2).dump({**tables, "abs": {"h.weight": tensor(1, (2, 2), (1, 2))}})
    found = read_difference(archive(tmp_path / FILE, good.getvalue(), raw))
    np.testing.assert_array_equal(found.head["h.weight"], [[1, 3], [2, 4]])


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"size": (2,), "index_steps": [0, 1], "values": ONE}, "as many"),
        ({"size": (2,), "index_steps": [2], "values": ONE}, "beyond the size"),
        ({"size": (2,), "index_steps": [-1], "values": ONE}, "not ascending"),
        ({"size": (2,), "index_steps": [0, 0], "values": torch.ones(2)}, "not ascending"),
        ({"size": (2,), "index_steps": [1 << 41], "values": ONE}, "not ascending"),
        ({"size": (2,), "index_steps": [1 << 70], "values": ONE}, "too large|too big"),
        ({"size": (0, 2), "index_steps": [0], "values": ONE}, "beyond the size"),
        ({"size": (2,), "index_steps": [0.0], "values": ONE}, "other than numbers"),
        ({"size": (2,), "index_steps": ["0"], "values": ONE}, "other than numbers"),
        ({"size": (2,), "index_steps": [[0]], "values": ONE}, "other than numbers"),
        ({"size": (2,), "index_steps": np.array([0.5]), "values": ONE}, "indices are float64"),
        ({"size": (2,), "index_steps": [0], "values": torch.ones(1, 1)}, "no list"),
        ({"size": (2,), "index_steps": [0], "values": torch.ones(1, dtype=torch.long)}, "values are int64"),
        ({"size": (2,), "index_steps": [0], "values": torch.tensor([float("nan")])}, "NaN"),
        (
            {"size": (2,), "index_steps": [0], "values": torch.tensor([1e300], dtype=torch.float64)},
            "infinite in float32",
        ),
        ({"size": (1 << 39, 1 << 39), "index_steps": [0], "values": ONE}, "proportion"),
        ({"size": (-2,), "index_steps": [0], "values": ONE}, "proportion"),
        ({"size": 2, "index_steps": [0], "values": ONE}, "no size"),
        ({"size": (2,), "indices": [[0], [0]], "values": [1.0]}, "do not fit"),
        ({"size": (2,), "indices": [[2]], "values": [1.0]}, "beyond the size"),
        ({"size": (2,), "indices": [[-1]], "values": [1.0]}, "beyond the size"),
        ({"size": (2,), "index_steps": [0]}, "no sparse difference"),
        ({"size": (2,), "index_steps": [0], "values": ONE, "more": 1}, "no sparse difference"),
        (torch.ones(2, dtype=torch.long), "values are int64"),
        ([1.0], "no sparse difference"),
        (None, "no sparse difference"),
        (1.5, "no sparse difference"),
    ],
)
def test_differences_that_do_not_add_up_are_refused(entry: Any, said: str, tmp_path: Path) -> None:
    assert "a.weight" in refused(written(tmp_path / FILE, {"diffs": {"a.weight": entry}}), said).what


def test_sparse_tensors_of_other_layouts_or_sizes_are_refused(tmp_path: Path) -> None:
    matrix = torch.eye(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Such tensors are in beta.
        rows = matrix.to_sparse_csr()
    refused(written(tmp_path / FILE, {"diffs": {"a.weight": rows}}), "layout")
    hybrid = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1, 3), (3, 3), check_invariants=True)
    refused(written(tmp_path / FILE, {"diffs": {"a.weight": hybrid}}))
    beyond = torch.sparse_coo_tensor(torch.tensor([[0], [3]]), torch.ones(1), (3, 3), check_invariants=False)
    refused(written(tmp_path / FILE, {"diffs": {"a.weight": beyond}}), "beyond the size")
    wide = {"size": (1 << 20, 1 << 20), "index_steps": [5], "values": ONE}
    diffs = {"a.weight": entry_of(np.eye(2, dtype=np.float32), "steps")}
    refused(written(tmp_path / FILE, {"diffs": diffs, "abs": {"h.weight": wide}}), "too large")


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    for array in (np.array([os.getcwd], object), np.array(["a"]), np.array([b"a"]), np.zeros(1, "M8[s]")):
        refused(written(tmp_path / FILE, {"diffs": {"a.weight": array}}))
    refused(written(tmp_path / FILE, {"diffs": {"a.weight": np.zeros(1, [("a", "f4")])}}))
    complex_head = {"diffs": {"a.weight": entry_of(np.eye(2, dtype=np.float32), "steps")}, "abs": {"h.weight": 1 + 2j}}
    refused(written(tmp_path / FILE, complex_head), "complex")


def test_one_tensor_under_many_names_does_not_grow(tmp_path: Path) -> None:
    dense = dense_of((100, 100), 0, 0.5)
    entry = entry_of(dense, "steps")
    two = {f"a{n}.weight": entry for n in range(2)}
    assert len(read_difference(written(tmp_path / FILE, {"diffs": two})).diffs) == 2
    many = {f"a{n}.weight": entry for n in range(1000)}
    refused(written(tmp_path / FILE, {"diffs": many}), "more numbers than bytes")


def test_tables_that_are_more_or_less_are_refused(tmp_path: Path) -> None:
    entry = entry_of(np.eye(2, dtype=np.float32), "steps")
    for value, said in (
        ({"diffs": {"a.weight": entry}, "block_sparses": {"b": 1}}, "block_sparses"),
        ({"diffs": {"a.weight": entry}, "extra": {}}, "extra"),
        ({"diffs": {"a.weight": entry}, "body": {}}, "body"),
        ({"diffs": [entry]}, "tables"),
        ({"diffs": {"a.weight": entry}, "abs": {"a.weight": ONE}}, "both"),
        ({"diffs": {"a/../b.weight": entry}}, "no name"),
        ({"diffs": {"a..weight": entry}}, "no name"),
        ({"diffs": {"": entry}}, "no name"),
        ({"diffs": {"a" * 600: entry}}, "no name"),
        ({"diffs": {"a\x1b[31m.weight": entry}}, "no name"),
        ({"diffs": {1: entry}}, "no text"),
        ({"diffs": {"a.weight": entry}, "abs": {"h.weight": torch.tensor([float("inf")])}}, "h.weight"),
        ({"layer.weight": torch.ones(2)}, "no differences"),
        ({}, "no differences"),
        ([entry], "no table"),
        (None, "no table"),
    ):
        refused(written(tmp_path / FILE, value), said)


# Files that are damaged


def test_files_of_another_kind_are_refused_with_what_to_do(tmp_path: Path) -> None:
    value = {"diffs": {"a.weight": entry_of(np.eye(2, dtype=np.float32), "steps")}}
    torch.save(value, tmp_path / FILE, _use_new_zipfile_serialization=False)
    error = refused(tmp_path / FILE, "before zip")
    assert error.remedy is not None and "torch.save" in error.remedy
    (tmp_path / FILE).write_bytes(b"no zip")
    refused(tmp_path / FILE, "no zip")
    (tmp_path / FILE).write_bytes(b"")
    refused(tmp_path / FILE, "no zip")
    with pytest.raises(AdapterError, match="cannot be read"):
        read_difference(tmp_path / "absent.bin")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match="cannot be read"):
        read_difference(tmp_path / "empty")
    with zipfile.ZipFile(tmp_path / FILE, "w") as made:
        made.writestr("archive/other", b"")
    refused(tmp_path / FILE, "0 pickles")


def test_zips_that_hold_more_than_the_file_are_refused(tmp_path: Path) -> None:
    refused(
        archive(tmp_path / FILE, b"\x80\x02}.", {"0": bytes(10**7)}, compression=zipfile.ZIP_DEFLATED), "compressed"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(tmp_path / FILE, "w") as made:
            for _ in range(2):
                made.writestr("archive/data.pkl", b"\x80\x02}.")
    refused(tmp_path / FILE, "overlap or have one name")
    whole = archive(tmp_path / FILE, b"\x80\x02}.", {"0": bytes(1000)}).read_bytes()
    directory = whole.rindex(b"PK\x01\x02")
    larger = bytearray(whole)
    larger[directory + 20 : directory + 28] = (10**6).to_bytes(4, "little") * 2
    (tmp_path / FILE).write_bytes(larger)
    refused(tmp_path / FILE)
    with zipfile.ZipFile(tmp_path / FILE, "w") as made:
        made.writestr("archive/data.pkl", b"\x80\x02}.")
        made.writestr("archive/byteorder", b"big")
    refused(tmp_path / FILE, "byte order")


def small(path: Path) -> bytes:
    entries = {"a.weight": entry_of(dense_of((3, 4), 1), "steps"), "b.weight": entry_of(dense_of((3, 4), 2), "sparse")}
    return written(path, {"diffs": entries, "abs": HEAD}).read_bytes()


def test_a_file_cut_short_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    whole = small(tmp_path / FILE)
    for end in [*range(0, len(whole), 37), len(whole) - 1]:
        (tmp_path / FILE).write_bytes(whole[:end])
        refused(tmp_path / FILE)


def test_a_pickle_with_any_byte_changed_is_refused_or_does_no_harm(tmp_path: Path) -> None:
    small(tmp_path / FILE)
    with zipfile.ZipFile(tmp_path / FILE) as made:
        folder = made.namelist()[0].split("/")[0]
        parts = {name.removeprefix(folder + "/"): made.read(name) for name in made.namelist()}
    pickled = parts["data.pkl"]
    storages = {name.removeprefix("data/"): raw for name, raw in parts.items() if name.startswith("data/")}
    random = np.random.default_rng(0)
    outcomes = collections.Counter[str]()
    for place in range(len(pickled)):
        changed = bytearray(pickled)
        changed[place] = random.integers(0, 256)
        try:
            found = read_difference(archive(tmp_path / FILE, bytes(changed), storages))
        except AdapterError:
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
            assert all(np.isfinite(diff.values).all() for diff in found.diffs.values())
    assert outcomes["refused"] > outcomes["read"] > 0
