"""A run's grafted adapters, copied to where a user looks for them."""

import re
import secrets
import shutil
from pathlib import Path
from typing import Any

from lingraft.errors import StoreError, UserError


def collect_adapters(found: dict[str, Any], target: Path) -> None:
    """Copies the grafted adapters to where a user looks for them, each folder at once."""
    from lingraft.store import RECORD, verify

    for entry in found["adapters"]:
        name = f"{entry['method'].replace(':', '-by-')}-{entry['language']}" + (
            f"-seed{entry['seed']}" if len(found["seeds"]) > 1 else ""
        )
        # A run's folder may be somebody else's: what is removed and written below must be in it.
        if not re.fullmatch(r"[A-Za-z][\w-]*", name, re.ASCII) or target.is_symlink():
            raise UserError(f"an adapter of this run cannot be called {name!r}", where=target, remedy="run it again")
        final, partial = target / name, target / f".{name}.{secrets.token_hex(4)}"
        source = Path(entry["path"])
        try:
            if (final / RECORD).read_bytes() == (source / RECORD).read_bytes():
                continue
        except OSError:  # One of them is not there.
            pass
        if wrong := verify(source):
            raise StoreError(wrong, where=source, remedy="give the `lingraft run` command again: it is made anew")
        try:
            shutil.copytree(source, partial)
            shutil.rmtree(final, ignore_errors=True)
            try:
                partial.rename(final)
            except OSError:
                if not (final / RECORD).is_file():  # Else another run of the same was faster.
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
