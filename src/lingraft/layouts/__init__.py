"""The table of layouts: how adapters of each structure lie in PEFT's folders."""

from pathlib import Path

from lingraft.errors import AdapterError
from lingraft.layouts.bottleneck import BOTTLENECK
from lingraft.layouts.common import Config, Layout, shown
from lingraft.layouts.ia3 import IA3
from lingraft.layouts.invertible import INVERTIBLE
from lingraft.layouts.lora import LORA
from lingraft.layouts.prefix import PrefixLayout
from lingraft.layouts.sparse import SparseLayout

_ROWS: tuple[Layout, ...] = (LORA, IA3, PrefixLayout(), BOTTLENECK, INVERTIBLE, SparseLayout())
LAYOUTS = {row.structure: row for row in _ROWS}


def layout_of(config: Config, where: Path) -> Layout:
    """The layout that a configuration names.

    Raises:
        AdapterError: lingraft knows no such structure.
    """
    kind = config["peft_type"]
    for row in LAYOUTS.values():
        if row.peft_type == kind:
            return row
    known = ", ".join(row.peft_type for row in LAYOUTS.values())
    raise AdapterError(
        f"adapters of the type {shown(kind)!r} cannot be merged", where=where, remedy=f"known types: {known}"
    )
