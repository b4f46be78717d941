"""Torch's zip files read without trusting them: plain values and tensors, and nothing of the file is executed.

A file of `torch.save` is a zip of a pickle and of the tensors' bytes. The few instructions that write plain values are read by a
machine of our own, whose calls are the functions of one table, and every size is held against the bytes that are there.
(Python's own unpickler with a guarded `find_class` would still take gigabytes for an index a pickle may name, and hash keys
nested without end.)
"""

import math
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lingraft.errors import AdapterError
from lingraft.layouts.common import shown
from lingraft.tensors import DTYPES

AGAIN = "get the file from where the difference came from"
_LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
"""How files begin that torch wrote before version 1.6."""
_MOST_AXES, LARGEST = 16, 1 << 40
_MOST_INSTRUCTIONS = 1 << 20
"""How many instructions other than numbers a pickle may have: a difference of a hundred million entries has a third of it."""
DAMAGE = (IndexError, KeyError, OverflowError, TypeError, ValueError, struct.error)
"""What reading a damaged pickle raises."""


def read_values(path: Path) -> Any:
    """The value that a file of `torch.save` holds: texts, numbers, lists, tables by text, numpy arrays for tensors, `Sparse`.

    Raises:
        AdapterError: It is missing, damaged, of torch's format before zip, or names something that is no plain value.
    """
    with _opened(path) as archive:
        return _Machine(archive.pickled(), archive.storage, path).run()


# What the pickle's values are here


@dataclass(frozen=True)
class _Name:
    """Something the pickle names; it is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class _Storage:
    """A tensor's bytes."""

    dtype: np.dtype[Any]
    raw: bytes


@dataclass(frozen=True)
class Sparse:
    """A sparse tensor of torch's: coordinates (axes × entries), values, size."""

    indices: np.ndarray
    values: np.ndarray
    size: tuple[int, ...]


@dataclass
class _Dtype:
    """A type of numpy's; its byte order is told afterwards."""

    dtype: np.dtype[Any]


@dataclass
class _NumpyArray:
    """An array of numpy's, whose contents are told afterwards."""

    value: np.ndarray | None = None


def array(value: Any) -> Any:
    """An array of numpy's as itself; anything else as it is."""
    return value.value if isinstance(value, _NumpyArray) else value


def _sizes(value: Any) -> tuple[int, ...]:
    """A shape, or strides."""
    if not isinstance(value, tuple | list) or len(value) > _MOST_AXES:
        raise ValueError("this is no size")
    if not all(type(n) is int and 0 <= n <= LARGEST for n in value):
        raise ValueError("a size is out of all proportion")
    return tuple(value)


def counted(value: Any) -> tuple[int, ...]:
    """A parameter's shape, whose entries int64 can count."""
    shape = _sizes(value)
    if math.prod(shape) >= 1 << 62:
        raise ValueError("a size is out of all proportion")
    return shape


def numbers(value: Any, kind: type, count: int | None = None) -> np.ndarray:
    """Integers (int64) or floats (as they are) of an array or a list; `count` of them, looked at first."""
    value = array(value)
    if count is not None and (not isinstance(value, np.ndarray | list) or len(value) != count):
        raise ValueError(f"there are not as many indices as the {count} values")
    if isinstance(value, list):
        # Looked at before numpy does, which would follow lists of lists wherever they lead.
        if not set(map(type, value)) <= ({int} if kind is int else {int, float}):
            raise ValueError("a list holds something other than numbers")
        value = np.array(value, np.int64 if kind is int else np.float64)
    if not isinstance(value, np.ndarray) or value.ndim != 1:
        raise ValueError("this is no list of numbers")
    if kind is int:
        if value.dtype.kind not in "iu":
            raise ValueError(f"the indices are {value.dtype}")
        return value.astype(np.int64)
    if value.dtype not in [DTYPES[name] for name in ("F64", "F32", "F16", "BF16")]:
        raise ValueError(f"the values are {value.dtype}")
    return value


# What a pickle may call, by what it is called there


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> np.ndarray:
    """`torch._utils._rebuild_tensor_v2`: a view of a storage."""
    if not isinstance(storage, _Storage) or type(offset) is not int or offset < 0:
        raise ValueError("a tensor has no storage")
    shape, strides, width = _sizes(size), _sizes(stride), storage.dtype.itemsize
    count = math.prod(shape)
    if len(shape) != len(strides) or count * width > len(storage.raw):
        raise ValueError("a tensor is larger than its storage")
    if not count:
        return np.zeros(shape, storage.dtype)
    if (offset + 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))) * width > len(storage.raw):
        raise ValueError("a tensor reaches beyond its storage")
    return np.ndarray(shape, storage.dtype, storage.raw, offset * width, [step * width for step in strides])


def _parameter(data: Any, *rest: Any) -> np.ndarray:
    """`torch._utils._rebuild_parameter`: what it is made of."""
    if not isinstance(data, np.ndarray):
        raise ValueError("a parameter is no tensor")
    return data


def _layout(name: Any) -> _Name:
    """`torch.serialization._get_layout`."""
    if name != "torch.sparse_coo":
        raise ValueError("a sparse tensor is of another layout than COO")
    return _Name("torch", "sparse_coo")


def _sparse(layout: Any, data: Any) -> Sparse:
    """`torch._utils._rebuild_sparse_tensor`: coordinates, values, size, and perhaps whether entries occur once."""
    if layout != _Name("torch", "sparse_coo") or not isinstance(data, tuple) or len(data) not in (3, 4):
        raise ValueError("a sparse tensor is of another layout than COO")
    indices, values, size = data[0], data[1], counted(data[2])
    if not isinstance(indices, np.ndarray) or indices.dtype != np.int64 or indices.ndim != 2:
        raise ValueError("a sparse tensor has no coordinates")
    return Sparse(indices, numbers(values, float), size)


def _size(value: Any = ()) -> tuple[int, ...]:
    """`torch.Size`."""
    return _sizes(value)


def _table(*nothing: Any) -> dict[str, Any]:
    """`collections.OrderedDict`, filled afterwards."""
    if nothing:
        raise ValueError("a table is filled in an unknown way")
    return {}


def _dtype(kind: Any, *rest: Any) -> _Dtype:
    """`numpy.dtype`: plain numbers, never objects."""
    if not isinstance(kind, str) or kind not in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "f2", "f4", "f8"):
        raise ValueError(f"numpy's type {shown(kind) if isinstance(kind, str) else ''} is not one of plain numbers")
    return _Dtype(np.dtype(kind))


def _scalar(kind: Any, raw: Any) -> Any:
    """`numpy.core.multiarray.scalar`: one number, as Python's."""
    if not isinstance(kind, _Dtype) or not isinstance(raw, bytes) or len(raw) != kind.dtype.itemsize:
        raise ValueError("a number of numpy's is not plain")
    return np.frombuffer(raw, kind.dtype)[0].item()


def _reconstruct(kind: Any, *rest: Any) -> _NumpyArray:
    """`numpy.core.multiarray._reconstruct`: an array, its contents to come."""
    if kind != _Name("numpy", "ndarray"):
        raise ValueError("an array is of an unknown kind")
    return _NumpyArray()


def _encode(text: Any, encoding: Any) -> bytes:
    """`_codecs.encode`: bytes in pickles of protocol 2."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("bytes are written in an unknown way")
    return text.encode("latin1")


def _no_bytes(*nothing: Any) -> bytes:
    """`bytes`, in pickles of protocol 2 that of nothing."""
    if nothing:
        raise ValueError("bytes are written in an unknown way")
    return b""


_CALLS: dict[_Name, Callable[..., Any]] = {
    _Name("torch._utils", "_rebuild_tensor"): _tensor,
    _Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    _Name("torch._utils", "_rebuild_parameter"): _parameter,
    _Name("torch._utils", "_rebuild_sparse_tensor"): _sparse,
    _Name("torch.serialization", "_get_layout"): _layout,
    _Name("torch", "Size"): _size,
    _Name("collections", "OrderedDict"): _table,
    _Name("numpy", "dtype"): _dtype,
    _Name("numpy.core.multiarray", "scalar"): _scalar,
    _Name("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    _Name("numpy._core.multiarray", "scalar"): _scalar,
    _Name("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    _Name("_codecs", "encode"): _encode,
    _Name("__builtin__", "bytes"): _no_bytes,
    _Name("builtins", "bytes"): _no_bytes,
}
_STORAGES: dict[_Name, np.dtype[Any]] = {
    _Name("torch", f"{kind}Storage"): np.dtype(dtype)
    for kind, dtype in {
        "Double": np.float64,
        "Float": np.float32,
        "Half": np.float16,
        "BFloat16": ml_dtypes.bfloat16,
        "Long": np.int64,
        "Int": np.int32,
        "Short": np.int16,
        "Char": np.int8,
        "Byte": np.uint8,
        "Bool": np.bool_,
    }.items()
}
_NAMED = {*_CALLS, *_STORAGES, _Name("numpy", "ndarray"), _Name("torch", "sparse_coo")}


def _build(target: Any, state: Any) -> None:
    """Tells an object what it holds."""
    if isinstance(target, _Dtype):
        if not isinstance(state, tuple) or len(state) < 2 or not isinstance(state[1], str) or state[1] not in "<>|=":
            raise ValueError("numpy's type has an unknown byte order")
        if state[1] == ">":
            target.dtype = target.dtype.newbyteorder(">")
    elif isinstance(target, _NumpyArray):
        _, shape, kind, columns_first, raw = state
        shape = _sizes(shape)
        if not isinstance(kind, _Dtype) or not isinstance(raw, bytes):
            raise ValueError("an array is not one of plain numbers")
        if math.prod(shape) * kind.dtype.itemsize != len(raw):
            raise ValueError("an array is larger than its bytes")
        target.value = np.ndarray(shape, kind.dtype, raw, order="F" if columns_first is True else "C")
    elif not isinstance(target, dict):  # A state dict notes its versions, of which nothing is needed.
        raise ValueError("something is told what it holds that holds nothing")


class _Machine:
    """Reads a pickle: its instructions move plain values about, and call the functions of one table.

    Values are None, booleans, numbers, texts, bytes, tuples, lists, tables keyed by texts, and the stand-ins above. Nothing
    here follows values into each other, so that none can nest too deeply.
    """

    def __init__(self, data: bytes, storage: Callable[[str, np.dtype[Any], int], bytes], path: Path) -> None:
        self.data, self.storage, self.path = data, storage, path
        self.at = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.left, self.room = _MOST_INSTRUCTIONS, len(data)

    def run(self) -> Any:
        """The value the pickle ends with.

        Raises:
            AdapterError: It is damaged, or holds what no sparse difference does.
        """
        try:
            while (instruction := self._number(1)) != ord("."):
                self.left -= instruction not in _NUMBERS
                if self.left < 0:
                    raise ValueError("it has more instructions than a difference needs")
                if (move := _INSTRUCTIONS.get(instruction)) is None:
                    raise ValueError(f"it has the instruction {instruction:#04x}")
                move(self)
            (found,) = self.stack
        except DAMAGE as error:
            said = "it ends too early" if isinstance(error, IndexError) else str(error)
            raise refused(said, self.path) from None
        return found

    def _bytes(self, count: int) -> bytes:
        self.at += count
        if self.at > len(self.data):
            raise IndexError
        return self.data[self.at - count : self.at]

    def _skip(self, count: int) -> None:
        self._bytes(count)

    def _number(self, width: int) -> int:
        return int.from_bytes(self._bytes(width), "little")

    def _line(self) -> str:
        end = self.data.index(b"\n", self.at)
        found = self.data[self.at : end].decode()
        self.at = end + 1
        return found

    def _marked(self) -> list[Any]:
        """What was put on the stack since the last mark."""
        mark = self.marks.pop()
        found = self.stack[mark:]
        del self.stack[mark:]
        return found

    def _integers(self) -> None:
        """A run of integers, without a step of the machine for each: the millions of a difference."""
        data, at, push = self.data, self.at - 1, self.stack.append
        while True:
            kind = data[at]
            if kind == 0x4B:
                push(data[at + 1])
                at += 2
            elif kind == 0x4D:
                push(data[at + 1] | data[at + 2] << 8)
                at += 3
            elif kind == 0x4A:
                push(int.from_bytes(data[at + 1 : at + 5], "little", signed=True))
                at += 5
            else:
                break
        self.at = at

    def _append(self, items: list[Any]) -> None:
        if type(target := self.stack[-1]) is not list:
            raise ValueError("something that is no list is added to")
        target.extend(items)

    def _set(self, items: list[Any]) -> None:
        if type(target := self.stack[-1]) is not dict:
            raise ValueError("something that is no table is added to")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str or key in target:
                raise ValueError("a table has a key twice, or one that is no text")
            target[key] = value

    def _name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("something is named by what is no text")
        if (found := _Name(module, name)) not in _NAMED:
            raise AdapterError(
                f"this file names {shown(str(found))}, which is no part of a sparse difference",
                where=self.path,
                remedy="nothing of it was executed; do not open it with torch.load unless you trust it",
            )
        self.stack.append(found)

    def _call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Name) or function not in _CALLS or not isinstance(arguments, tuple):
            raise ValueError("it calls what cannot be called")
        made = _CALLS[function](*arguments)
        # Texts are made bytes of: of one text again and again, they could fill any memory.
        self.room -= len(made) if isinstance(made, bytes) else 0
        if self.room < 0:
            raise ValueError("it makes more bytes than it has")
        self.stack.append(made)

    def _persistent(self) -> None:
        """A storage: `('storage', type, key, device, entries)`."""
        word, kind, key, _, count = self.stack.pop()
        if not isinstance(word, str) or word != "storage" or not isinstance(kind, _Name) or not isinstance(key, str):
            raise ValueError("a storage is named in an unknown way")
        if type(count) is not int:
            raise ValueError("a storage has no size")
        if (dtype := _STORAGES.get(kind)) is None:
            raise ValueError("a storage is of no known type")
        self.stack.append(_Storage(dtype, self.storage(key, dtype, count)))

    def _tuple(self, count: int) -> None:
        if count > len(self.stack):
            raise IndexError
        items = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        self.stack.append(items)

    def _builds(self) -> None:
        state = self.stack.pop()
        _build(self.stack[-1], state)

    def _pair(self) -> list[Any]:
        value, key = self.stack.pop(), self.stack.pop()
        return [key, value]

    def _named_on_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._name(module, name)

    def _kept(self, place: int) -> None:
        if place not in self.memo:
            raise ValueError("it refers to what is not there")
        self.stack.append(self.memo[place])

    def _keep(self, place: int) -> None:
        self.memo[place] = self.stack[-1]


def _pushing(value: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value(machine))


def _text(width: int) -> Callable[[_Machine], None]:
    return _pushing(lambda machine: machine._bytes(machine._number(width)).decode("utf-8", "surrogatepass"))


_INSTRUCTIONS: dict[int, Callable[[_Machine], None]] = {
    0x80: lambda machine: machine._skip(1),  # The protocol.
    0x95: lambda machine: machine._skip(8),  # A frame.
    ord("("): lambda machine: machine.marks.append(len(machine.stack)),
    ord("N"): _pushing(lambda machine: None),
    0x88: _pushing(lambda machine: True),
    0x89: _pushing(lambda machine: False),
    ord("K"): _Machine._integers,
    ord("M"): _Machine._integers,
    ord("J"): _Machine._integers,
    0x8A: _pushing(lambda machine: int.from_bytes(machine._bytes(machine._number(1)), "little", signed=True)),
    ord("G"): _pushing(lambda machine: struct.unpack(">d", machine._bytes(8))[0]),
    ord("X"): _text(4),
    0x8C: _text(1),
    ord("B"): _pushing(lambda machine: machine._bytes(machine._number(4))),
    ord("C"): _pushing(lambda machine: machine._bytes(machine._number(1))),
    ord(")"): _pushing(lambda machine: ()),
    0x85: lambda machine: machine._tuple(1),
    0x86: lambda machine: machine._tuple(2),
    0x87: lambda machine: machine._tuple(3),
    ord("t"): _pushing(lambda machine: tuple(machine._marked())),
    ord("]"): _pushing(lambda machine: []),
    ord("a"): lambda machine: machine._append([machine.stack.pop()]),
    ord("e"): lambda machine: machine._append(machine._marked()),
    ord("}"): _pushing(lambda machine: {}),
    ord("s"): lambda machine: machine._set(machine._pair()),
    ord("u"): lambda machine: machine._set(machine._marked()),
    ord("h"): lambda machine: machine._kept(machine._number(1)),
    ord("j"): lambda machine: machine._kept(machine._number(4)),
    ord("q"): lambda machine: machine._keep(machine._number(1)),
    ord("r"): lambda machine: machine._keep(machine._number(4)),
    0x94: lambda machine: machine._keep(len(machine.memo)),
    ord("c"): lambda machine: machine._name(machine._line(), machine._line()),
    0x93: _Machine._named_on_stack,
    ord("R"): _Machine._call,
    ord("b"): _Machine._builds,
    ord("Q"): _Machine._persistent,
}
"""What torch.save writes, by pickle's instructions, of any protocol. Others, such as making objects of classes, are refused."""
_NUMBERS = frozenset(b"KMJG\x8a")
"""Instructions of which a difference has as many as entries."""


# The zip


class _Archive:
    """A zip of torch's: nothing in it is compressed, so nothing in it is larger than the file."""

    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self.archive, self.path = archive, path
        self.read: dict[str, bytes] = {}
        entries = archive.infolist()
        if any(e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size for e in entries):
            raise refused("it has compressed parts, which torch does not write", path)
        if any(e.flag_bits & 1 for e in entries):
            raise refused("it has encrypted parts", path)
        if sum(e.file_size for e in entries) > path.stat().st_size or len({e.filename for e in entries}) < len(entries):
            raise refused("its parts overlap or have one name", path)
        pickles = [e.filename for e in entries if e.filename.endswith("/data.pkl") and e.filename.count("/") == 1]
        if len(pickles) != 1:
            raise refused(f"this zip has {len(pickles)} pickles of torch's", path)
        self.folder = pickles[0].removesuffix("data.pkl")
        order = self.folder + "byteorder"
        if any(e.filename == order for e in entries) and archive.read(order) != b"little":
            raise refused("it was written on a machine of the other byte order", path)

    def pickled(self) -> bytes:
        """The pickle."""
        return self.archive.read(self.folder + "data.pkl")

    def storage(self, key: str, dtype: np.dtype[Any], count: int) -> bytes:
        """The bytes of a storage, which must be as many as the pickle says."""
        if key not in self.read:
            self.read[key] = self.archive.read(f"{self.folder}data/{key}")
        if len(self.read[key]) != count * dtype.itemsize:
            raise ValueError(f"storage '{shown(key)}' has {len(self.read[key])} bytes, not {count} of {dtype}")
        return self.read[key]


@contextmanager
def _opened(path: Path) -> Iterator[_Archive]:
    """The file as an archive of torch's."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_LEGACY))
    except OSError as error:
        raise AdapterError(
            f"this file cannot be read ({error.strerror})", where=path, remedy="check the path"
        ) from None
    if start == _LEGACY:
        raise AdapterError(
            "this file is of torch's format before zip, of which every reading may run code",
            where=path,
            remedy='where you trust it, write it anew: python -c "import sys, torch; '
            "torch.save(torch.load(sys.argv[1], map_location='cpu', weights_only=False), sys.argv[2])\" "
            f"{path} new.bin",
        )
    if not start.startswith(b"PK"):
        raise refused("it is no zip of torch's", path)
    try:
        with zipfile.ZipFile(path) as archive:
            yield _Archive(archive, path)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, *DAMAGE) as error:
        raise refused(str(error) or type(error).__name__, path) from None


def refused(what: str, path: Path, remedy: str = AGAIN) -> AdapterError:
    """The error for a file that is not what it should be."""
    return AdapterError(f"this file cannot be read as a sparse difference: {what}", where=path, remedy=remedy)
