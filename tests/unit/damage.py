"""Small adapters of every structure, and a table of ways to damage them: each a function of a random generator and a folder."""

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.unit.adapters import PREFIX, config_of, write_folder

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
SIDECAR = "lingraft.json"
SITES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
OUT, IN, RANK = 6, 8, 2
TYPES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2},
    **{"U8": 1, "BOOL": 1, "F8_E4M3": 1, "C64": 8},
}
"""Types of the format and their sizes; lingraft computes with some of them."""
FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}

Entry = tuple[str, list[int], bytes]
"""A tensor's type, shape and bytes."""


# Whole adapters


def _roles(structure: str, width: int) -> tuple[str, dict[str, tuple[int, ...]]]:
    """PEFT's name of a structure, and the shapes of one site's tensors by the end of their names."""
    linear = {"down.weight": (RANK, IN), "down.bias": (RANK,), "up.weight": (IN, RANK), "up.bias": (IN,)}
    return {
        "lora": ("LORA", {"lora_A.weight": (RANK, width), "lora_B.weight": (OUT, RANK)}),
        "ia3": ("IA3", {"ia3_l": (OUT, 1)}),
        "bottleneck": ("BOTTLENECK", {f"bottleneck_{role}": shape for role, shape in linear.items()}),
        "invertible": (
            "INVERTIBLE",
            {f"invertible_{net}_{role}": shape for net in "FG" for role, shape in linear.items()},
        ),
        "sparse": ("SPARSE", {}),
    }[structure]


def write_any(folder: Path, structure: str, seed: int, dtype: Any, sidecar: bool, width: int = IN) -> Path:
    """A valid adapter of a structure, as small as can be."""
    random = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {f"{PREFIX}score.weight": random.normal(size=(2, 3)).astype(dtype)}
    extra: dict[str, Any] = {}
    if structure == "prefix":
        kind = "PREFIX_TUNING"
        tensors["prompt_embeddings"] = random.normal(size=(3, 2 * 2 * 4)).astype(dtype)
        extra = {"num_virtual_tokens": 3, "num_layers": 2, "num_attention_heads": 2, "token_dim": 4}
    else:
        kind, shapes = _roles(structure, width)
        for site in SITES:
            for role, shape in shapes.items():
                tensors[f"{PREFIX}{site}.{role}"] = random.normal(size=shape).astype(dtype)
            if structure == "sparse":
                chosen = np.sort(random.choice(OUT * IN, size=5, replace=False)).astype(np.int64)
                tensors[f"{PREFIX}{site}.sparse_indices"] = chosen
                tensors[f"{PREFIX}{site}.sparse_values"] = random.normal(size=5).astype(dtype)
                tensors[f"{PREFIX}{site}.sparse_shape"] = np.array([OUT, IN], np.int64)
    if structure == "lora":
        extra = {"r": RANK, "lora_alpha": 4}
    if structure in ("bottleneck", "invertible"):
        extra = {"bottleneck_size": RANK, "activation": "relu"}
    write_folder(folder, tensors, config_of(dict.fromkeys(SITES, (OUT, IN)), **{"peft_type": kind, **extra}))
    if sidecar:
        notes = {"format": 1, "kind": "adapter", "family": structure, "init_sha256": "i"}
        notes["backbone"] = {"name": "tiny", "digest": "d"}
        (folder / SIDECAR).write_text(json.dumps(notes))
    return folder


# Tensor files, taken apart and put together without the library


def entries_of(path: Path) -> dict[str, Entry]:
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        found[name] = (entry["dtype"], entry["shape"], raw[8 + size + start : 8 + size + end])
    return found


def header_of(entries: Mapping[str, Entry]) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (kind, shape, data) in entries.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    return header


def put(path: Path, header: Mapping[str, Any] | str, data: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def put_entries(path: Path, entries: Mapping[str, Entry]) -> None:
    put(path, header_of(entries), b"".join(data for _, _, data in entries.values()))


def blank(random: np.random.Generator, kind: str, shape: list[int]) -> bytes:
    """Bytes for a tensor: small numbers in most types."""
    count = math.prod(shape)
    if kind in FLOATS:
        return random.normal(size=count).astype(FLOATS[kind]).tobytes()
    return bytes(random.integers(0, 2, size=count * TYPES[kind], dtype=np.uint8))


def pick(random: np.random.Generator, options: Any) -> Any:
    options = list(options)
    return options[int(random.integers(len(options)))]


# Damage to the bytes of a file


def flip(random: np.random.Generator, folder: Path) -> str:
    path = folder / pick(random, (CONFIG, WEIGHTS, WEIGHTS, WEIGHTS))
    raw = bytearray(path.read_bytes())
    where = pick(random, ("length", "header", "data")) if path.name == WEIGHTS else "text"
    size = struct.unpack("<Q", raw[:8])[0] if path.name == WEIGHTS else 0
    low, high = {"length": (0, 8), "header": (8, 8 + size), "data": (8 + size, len(raw)), "text": (0, len(raw))}[where]
    places = random.integers(low, high, size=pick(random, (1, 1, 3, 20)))
    for place in places:
        raw[place] ^= 1 << int(random.integers(8))
    path.write_bytes(raw)
    return f"bits of {path.name} at {places.tolist()}"


def truncate(random: np.random.Generator, folder: Path) -> str:
    path = folder / pick(random, (CONFIG, WEIGHTS, WEIGHTS))
    raw = path.read_bytes()
    keep = pick(random, (0, 1, 7, 8, 9, len(raw) - 1, int(random.integers(len(raw)))))
    path.write_bytes(raw[:keep])
    return f"{path.name} cut to {keep}"


def lengthen(random: np.random.Generator, folder: Path) -> str:
    path = folder / pick(random, (CONFIG, WEIGHTS))
    extra = pick(random, (b"\0", b" ", b"\n", b"}", bytes(1000), b"\xff\xfe"))
    raw = path.read_bytes()
    path.write_bytes(extra + raw if random.random() < 0.3 else raw + extra)
    return f"{path.name} with {extra[:3]!r} more"


def header_length(random: np.random.Generator, folder: Path) -> str:
    path = folder / WEIGHTS
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    new = pick(random, (0, 1, size - 1, size + 1, len(raw), len(raw) - 8, 10**8, 10**8 + 1, 10**15, 2**63, 2**64 - 1))
    path.write_bytes(struct.pack("<Q", new) + raw[8:])
    return f"header length {new}"


# Damage to what the header says


def _some_site(random: np.random.Generator, entries: Mapping[str, Entry]) -> str:
    return pick(random, [n for n in entries if "score" not in n] if random.random() < 0.8 else list(entries))


def offsets(random: np.random.Generator, folder: Path) -> str:
    entries = entries_of(folder / WEIGHTS)
    header, name = header_of(entries), _some_site(random, entries)
    start, end = header[name]["data_offsets"]
    options = ([0, end - start], [start, end + 4], [start + 4, end + 4], [end, start], [-4, end], [start, 10**15])
    options += (
        [2**64 - 8, 2**64 - 4],
        [start],
        [],
        None,
        [start, "x"],
        [float(start), end],
        [start, end, end],
        {"a": 1},
    )
    header[name]["data_offsets"] = pick(random, options)
    put(folder / WEIGHTS, header, b"".join(data for _, _, data in entries.values()))
    return f"offsets {header[name]['data_offsets']} of {name}"


def claims(random: np.random.Generator, folder: Path) -> str:
    """Types and shapes that the bytes do not bear out."""
    entries = entries_of(folder / WEIGHTS)
    header, name = header_of(entries), _some_site(random, entries)
    shape = header[name]["shape"]
    if random.random() < 0.4:
        header[name]["dtype"] = pick(random, (*TYPES, "F128", "", None, 4, ["F32"], "f32"))
    else:
        huge = ([10**15], [10**15, 10**15], [2**63, 2], [2**64], [10**30], [0, 10**15], [10**8, 10**7])
        odd = ([], [0], [-1], [-shape[0], *shape[1:]], [1.0], ["1"], None, {}, [None], [shape], [1] * 100, shape[::-1])
        header[name]["shape"] = pick(random, (*huge, *odd, [math.prod(shape)], [*shape, 2], [*shape, 1]))
    put(folder / WEIGHTS, header, b"".join(data for _, _, data in entries.values()))
    return f"{name} said to be {header[name]['dtype']} {header[name]['shape']}"


def retyped(random: np.random.Generator, folder: Path) -> str:
    """Another type, in a file that is valid."""
    entries = entries_of(folder / WEIGHTS)
    name = _some_site(random, entries)
    kind, shape = pick(random, TYPES), entries[name][1]
    entries[name] = (kind, shape, blank(random, kind, shape))
    put_entries(folder / WEIGHTS, entries)
    return f"{name} as {kind}"


def reshaped(random: np.random.Generator, folder: Path) -> str:
    """Another shape, in a file that is valid."""
    entries = entries_of(folder / WEIGHTS)
    name = _some_site(random, entries)
    kind, shape, _ = entries[name]
    none = ([0], [0, 4], [4, 0], [0, 0], [0, 10**15], [10**15, 0], [0, 2**62], [0, 2**63], [0] * 70)
    some = ([], [1], [1, 1], [math.prod(shape)], shape[::-1], [*shape, 1], [1, *shape], [n + 1 for n in shape])
    new = pick(random, (*none, *some, [1] * 65, [1000, 1000], [2, 3, 4], [1] * 2000))
    entries[name] = (kind, new, blank(random, kind, new))
    put_entries(folder / WEIGHTS, entries)
    return f"{name} as {new[:9]}"


NAMES = (
    "",
    " ",
    "../../x",
    "/etc/x",
    "C:\\x",
    "..\\x",
    "a\0b",
    "a\nb",
    "\x1b[31mred",
    "a" * 10_000,
    "é" * 300,
    "x.9" + "9" * 5000 + ".y",
    "model.layers.²",
    "model.layers.-1",
    "[bold]x[/bold]",
    "[/]",
    "..",
    ".",
    "\u202e",
    "__metadata__",
    "nan",
)


def renamed(random: np.random.Generator, folder: Path) -> str:
    entries = entries_of(folder / WEIGHTS)
    odd, how = pick(random, NAMES), pick(random, ("one", "whole", "site", "no prefix", "twice"))
    name = _some_site(random, entries)
    if how in ("no prefix", "twice"):
        short = name.removeprefix(PREFIX)
        new = {**entries, short: entries[name]}
        if how == "no prefix":
            new.pop(name)
        entries = new
    elif how == "site":
        entries = {n.replace(SITES[0], odd): entry for n, entry in entries.items()}
    else:
        replaced = odd if how == "whole" else name.replace(SITES[0], odd)
        entries = {replaced if n == name else n: entry for n, entry in entries.items()}
    put_entries(folder / WEIGHTS, entries)
    return f"{how} renamed: {name} with {odd[:20]!r}"


def removed(random: np.random.Generator, folder: Path) -> str:
    entries = entries_of(folder / WEIGHTS)
    name = _some_site(random, entries)
    how = pick(random, ("one", "site", "all", "all but the head"))
    gone = {
        "one": {name},
        "site": {n for n in entries if SITES[0] in n},
        "all": set(entries),
        "all but the head": {n for n in entries if "score" not in n},
    }[how]
    put_entries(folder / WEIGHTS, {n: entry for n, entry in entries.items() if n not in gone})
    return f"{how} removed"


def strange_header(random: np.random.Generator, folder: Path) -> str:
    entries = entries_of(folder / WEIGHTS)
    header = header_of(entries)
    name = _some_site(random, entries)
    deep = "[" * 100_000
    options: dict[str, Any] = {
        "metadata null": {**header, "__metadata__": None},
        "metadata list": {**header, "__metadata__": [1]},
        "metadata numbers": {**header, "__metadata__": {"format": 1}},
        "no metadata": {k: v for k, v in header.items() if k != "__metadata__"},
        "entry null": {**header, name: None},
        "entry list": {**header, name: [1, 2]},
        "entry without type": {**header, name: {k: v for k, v in header[name].items() if k != "dtype"}},
        "entry with more": {**header, name: {**header[name], "more": [1]}},
        "a list": "[]",
        "a number": "1",
        "nothing": "",
        "empty": "{}",
        "deep": deep,
        "deep metadata": '{"__metadata__":' + deep,
        "twice": json.dumps(header)[:-1] + "," + json.dumps({name: header[name]})[1:],
        "surrogate": json.dumps(header).replace(name, name + "\\ud800"),
        "raw surrogate": json.dumps(header).replace(name, name + "\ud800"),
        "NaN": json.dumps(header).replace('"shape": [', '"shape": [NaN, '),
        "digits": json.dumps(header).replace('"shape": [', f'"shape": [{"9" * 6000}, '),
    }
    how = pick(random, options)
    put(folder / WEIGHTS, options[how], b"".join(data for _, _, data in entries.values()))
    return f"header: {how}"


# Damage to the numbers


def values(random: np.random.Generator, folder: Path) -> str:
    entries = entries_of(folder / WEIGHTS)
    name = _some_site(random, [n for n, (kind, _, _) in entries.items() if kind in FLOATS])  # pyright: ignore
    kind, shape, data = entries[name]
    dtype = FLOATS[kind]
    numbers = np.frombuffer(data, dtype).copy()
    value = pick(random, (math.nan, math.inf, -math.inf, 1e-40, 6e-8, 0.0, -0.0, 1e38, 3e38, -3e38, 65504, 1e30))
    with np.errstate(over="ignore"):
        if random.random() < 0.5:
            numbers[:] = dtype.type(value)
        else:
            numbers[random.integers(numbers.size)] = dtype.type(value)
    entries[name] = (kind, shape, numbers.tobytes())
    put_entries(folder / WEIGHTS, entries)
    return f"{value} in {name}"


def all_values(random: np.random.Generator, folder: Path) -> str:
    entries = entries_of(folder / WEIGHTS)
    value = pick(random, (math.nan, math.inf, 1e-40, 0.0, 1e38, 3e38))
    with np.errstate(over="ignore"):
        for name, (kind, shape, data) in entries.items():
            if kind in FLOATS:
                entries[name] = (kind, shape, np.full(len(data) // TYPES[kind], value, FLOATS[kind]).tobytes())
    put_entries(folder / WEIGHTS, entries)
    return f"{value} everywhere"


def whole_numbers(random: np.random.Generator, folder: Path) -> str:
    """For sparse differences: indices and shapes that are none. For the others, a head of whole numbers."""
    entries = entries_of(folder / WEIGHTS)
    names = [n for n, (kind, _, _) in entries.items() if kind == "I64"]
    if not names:
        entries["steps"] = ("I64", [], struct.pack("<q", -1))
        put_entries(folder / WEIGHTS, entries)
        return "a whole number of its own"
    name = pick(random, names)
    kind, shape, data = entries[name]
    numbers = np.frombuffer(data, np.int64).copy()
    low, high = -(2**63), 2**63 - 1
    change: dict[str, Callable[[], Any]] = {
        "negative": lambda: -numbers,
        "zero": lambda: numbers * 0,
        "least": lambda: np.full_like(numbers, low),
        "greatest": lambda: np.full_like(numbers, high),
        "large": lambda: np.full_like(numbers, 10**9),
        "rather large": lambda: numbers * 20_000,
        "reversed": lambda: numbers[::-1].copy(),
        "last greatest": lambda: np.append(numbers[:-1], high),
        "wraps": lambda: np.append(numbers[:-1], low),
    }
    how = pick(random, change)
    entries[name] = (kind, shape, change[how]().tobytes())
    put_entries(folder / WEIGHTS, entries)
    return f"{how} in {name}"


# Damage to the texts

DEEP = 100_000
VALUES = (
    *(
        "null",
        "true",
        "false",
        "0",
        "-0.0",
        "-1",
        "1",
        "3",
        "1.5",
        "1e308",
        "-1e308",
        "5e-324",
        "1e400",
        "-1e400",
        "NaN",
    ),
    *(
        "Infinity",
        "-Infinity",
        "1" + "0" * 15,
        "1" + "0" * 400,
        "9" * 5000,
        '""',
        '"16"',
        '"nan"',
        '"../../x"',
        '"\\ud800"',
    ),
    *(
        '"a\\u0000b"',
        "[]",
        "[1]",
        "[null]",
        '["x"]',
        "[[]]",
        "{}",
        '{"a": 1}',
        '{"a": null}',
        '{"": 1}',
        '{"a": {"b": []}}',
    ),
    *('"no"', '"yes"', '"[/]"', "[" * 900 + "]" * 900, "[" * 80 + "]" * 80),
    "[" * DEEP + "]" * DEEP,
    '{"a":' * 900 + "1" + "}" * 900,
)
EVIL = (
    *(
        "(a|a)*b",
        "(.*)*",
        "(a?){50}a{50}",
        "(a+)+$",
        "(.|.)*x",
        "((a*)*)*",
        "(?:.+)+x",
        ".*.*.*.*.*.*.*.*x",
        "(a|aa)+$",
    ),
    *(
        "(.*.*.*.*.*.*x)?",
        "([a-z_.0-9]+)*x",
        "(?=(.*)+x).*",
        "(x+x+)+y",
        "(\\w|\\w\\w)+!",
        "(?P<a>.*)(?P=a)*!",
        "(.*)\\1*x",
    ),
    *("." * 2000, ".*" * 400 + "x", "(" * 500 + ")" * 500, "(", "[", "*", "a{99999999999}", "(?#", "\\", "(?i)q_proj"),
    *(
        "(?(1)a|b)",
        "a**",
        "x{2,1}",
        "(.?)" * 60 + "x",
        "(.|..)" * 40 + "x",
        "(a|b|[^!])" * 30 + "x",
        "\\p{L}",
        "q_proj)|(.*",
    ),
    *(
        "(?>.*)*x",
        "(.{1,30}){1,30}x",
        "(([^!]|.)+.)+x",
        "[^\\W]*+[a-z]*[a-z]*[a-z]*[a-z]*[a-z]*x",
        "(?s:.)*",
        "",
        "$",
        "^",
        "\n",
    ),
)
CONFIG_KEYS = (
    *("lora_alpha", "alpha_pattern", "use_rslora", "r", "rank_pattern", "peft_type", "target_modules", "num_layers"),
    *(
        "num_virtual_tokens",
        "num_transformer_submodules",
        "num_attention_heads",
        "activation",
        "bias",
        "init_lora_weights",
    ),
    *(
        "base_model_name_or_path",
        "modules_to_save",
        "bottleneck_size",
        "use_dora",
        "layer_replication",
        "lora_dropout",
        "x",
    ),
    *("target_parameters", "bottleneck_pattern", "inference_mode", "lora_bias"),
)
"""What a configuration may hold; several are of one structure, and more in another."""
SIDECAR_KEYS = (
    "backbone",
    "init_sha256",
    "kind",
    "target_ranks",
    "family",
    "format",
    "provenance",
    "x",
    "backbone.digest",
)
TEXTS = (
    *(
        "",
        " ",
        "{",
        "[]",
        "null",
        "1",
        '"x"',
        "NaN",
        "{}",
        '{"peft_type": 1}',
        "\0",
        "\ufeff{}",
        "{'a': 1}",
        "[" * DEEP,
    ),
    *(
        '{"a":' * DEEP,
        "9" * 5000,
        "-" + "9" * 5000,
        '{"peft_type": "LORA", "peft_type": null}',
        '{"a": 1}' * 2,
        '"\\ud800"',
    ),
)


def set_texts(path: Path, changes: Mapping[str, str]) -> None:
    """Sets keys to JSON texts that Python's writer would not write."""
    text = json.dumps({**json.loads(path.read_text()), **{k: f"<{n}>" for n, k in enumerate(changes)}})
    for number, value in enumerate(changes.values()):
        text = text.replace(f'"<{number}>"', value)
    path.write_text(text)


def bad_config(random: np.random.Generator, folder: Path) -> str:
    kind = json.loads((folder / CONFIG).read_text())["peft_type"]
    important = {"LORA": CONFIG_KEYS[:5], "PREFIX_TUNING": CONFIG_KEYS[7:11], "BOTTLENECK": CONFIG_KEYS[11:12]}
    keys = important.get(kind, CONFIG_KEYS) if random.random() < 0.6 else CONFIG_KEYS
    key, value = pick(random, keys), pick(random, VALUES)
    set_texts(folder / CONFIG, {key: value})
    return f"{key} = {value[:30]}"


def bad_pattern(random: np.random.Generator, folder: Path) -> str:
    key, pattern = pick(random, ("alpha_pattern", "alpha_pattern", "rank_pattern")), pick(random, EVIL)
    value = pick(random, ("1", "16", *VALUES[:20]))
    set_texts(folder / CONFIG, {key: "{" + json.dumps(pattern) + ": " + value + "}"})
    return f"{key} = {pattern[:40]!r}: {value[:30]}"


def bad_text(random: np.random.Generator, folder: Path) -> str:
    path, text = folder / pick(random, (CONFIG, SIDECAR)), pick(random, (*TEXTS, b"\xff\xfe{}", b"\x80", b"{}\0"))
    if isinstance(text, bytes):
        path.write_bytes(text)
    else:
        path.write_text(text)
    return f"{path.name} is {text[:20]!r}"


def bad_sidecar(random: np.random.Generator, folder: Path) -> str:
    path, key, value = folder / SIDECAR, pick(random, SIDECAR_KEYS), pick(random, VALUES)
    if not path.exists():
        path.write_text('{"format": 1, "kind": "adapter", "backbone": {"digest": "d"}, "init_sha256": "i"}')
    if key == "kind" and random.random() < 0.5:
        value = '"divergence"'
    if key == "target_ranks":
        ranks = pick(random, VALUES)
        value = pick(random, (value, "{" + ", ".join(f'"{site}": {ranks}' for site in SITES) + "}"))
    shown = value[:40]
    if key == "backbone.digest":
        key, value = "backbone", '{"digest": ' + value + "}"
    set_texts(path, {key: value})
    return f"{key} = {shown} in {SIDECAR}"


# Damage to the folder


def another_base(random: np.random.Generator, folder: Path) -> str:
    notes = {"format": 1, "kind": "adapter", "backbone": {"name": "other", "digest": "another"}, "init_sha256": "i"}
    (folder / SIDECAR).write_text(json.dumps(notes))
    return "another base model"


def files(random: np.random.Generator, folder: Path) -> str:
    path = folder / pick(random, (CONFIG, WEIGHTS, SIDECAR))
    how = pick(
        random, ("missing", "empty", "a folder", "a loop", "a dangling link", "a pickle", "swapped", "unreadable")
    )
    if how == "swapped":
        raw = (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(raw[0])
        (folder / CONFIG).write_bytes(raw[1])
    elif how == "a pickle":
        (folder / WEIGHTS).replace(folder / "adapter_model.bin")
    elif how == "unreadable":
        path.touch()
        path.chmod(0)
    else:
        path.unlink(missing_ok=True)
        if how == "empty":
            path.touch()
        elif how == "a folder":
            path.mkdir()
        elif how != "missing":
            path.symlink_to(path if how == "a loop" else folder / "nowhere")
    return f"{path.name}: {how}"


Damage = Callable[[np.random.Generator, Path], str]
DAMAGES: dict[str, tuple[int, Damage]] = {
    "flip": (12, flip),
    "truncate": (5, truncate),
    "lengthen": (2, lengthen),
    "header_length": (3, header_length),
    "offsets": (5, offsets),
    "claims": (8, claims),
    "retyped": (6, retyped),
    "reshaped": (8, reshaped),
    "renamed": (9, renamed),
    "removed": (3, removed),
    "strange_header": (6, strange_header),
    "values": (9, values),
    "all_values": (3, all_values),
    "whole_numbers": (6, whole_numbers),
    "bad_config": (18, bad_config),
    "bad_pattern": (6, bad_pattern),
    "bad_text": (6, bad_text),
    "bad_sidecar": (9, bad_sidecar),
    "another_base": (1, another_base),
    "files": (5, files),
}
"""By name, how often, and the damage."""


def damage(random: np.random.Generator, folder: Path, structure: str) -> str:
    """Damages a folder in one way; says how."""
    table = {n: row for n, row in DAMAGES.items() if n != "bad_pattern" or structure == "lora"}
    if structure == "lora":
        table["bad_pattern"] = (24, bad_pattern)
    weights = np.array([often for often, _ in table.values()], float)
    name = list(table)[int(random.choice(len(table), p=weights / weights.sum()))]
    return f"{name}: {table[name][1](random, folder)}"
