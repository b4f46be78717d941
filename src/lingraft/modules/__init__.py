"""Kinds of adapters that PEFT lacks, as methods of PEFT's own: it saves, loads, switches and unloads them like the others.

PEFT's list of methods is a closed enumeration, its tables of methods are open: `register` enters plain strings there.
"""

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from lingraft.modules import bottleneck, invertible, sparse


def register() -> None:
    """Tells PEFT of these adapters; telling it twice changes nothing."""
    rows: list[tuple[str, Any, Any, str]] = [
        (bottleneck.PEFT_TYPE, bottleneck.BottleneckConfig, bottleneck.BottleneckModel, bottleneck.PREFIX),
        (invertible.PEFT_TYPE, invertible.InvertibleConfig, invertible.InvertibleModel, invertible.PREFIX),
        (sparse.PEFT_TYPE, sparse.SparseConfig, sparse.SparseModel, sparse.PREFIX),
    ]
    tables: list[dict[Any, Any]] = [
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
    ]
    for name, *entries in rows:
        for table, entry in zip(tables, entries, strict=True):
            table[name] = entry


# `import lingraft` lets PEFT import this package (see `_peft_hook`); whoever imports it first is served as well.
register()
