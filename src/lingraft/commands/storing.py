"""`lingraft store ls`, `verify` and `gc`."""

import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from os import cpu_count
from pathlib import Path
from typing import Any

from rich.console import Console

from lingraft.commands.watching import stderr
from lingraft.errors import Busy, StoreError, UserError
from lingraft.remote import url_of
from lingraft.store import Store, open_store, read_json


def list_store(where: str, kind: str | None, as_json: bool) -> dict[str, Any] | None:
    """`lingraft store ls`."""
    from lingraft.report.terminal import lines

    store = _existing(where)
    sizes = store.sizes()
    wanted = [(k, key) for k, key in sizes if kind in (None, k)]
    with ThreadPoolExecutor(8) as pool:
        steps = list(pool.map(lambda at: _described(store, at, sizes[at]), wanted))
    sums = {
        name: {
            "steps": sum(s["kind"] == name for s in steps),
            "bytes": sum(s["bytes"] for s in steps if s["kind"] == name),
            "seconds": round(sum(s["seconds"] or 0 for s in steps if s["kind"] == name), 3),
        }
        for name in sorted({s["kind"] for s in steps})
    }
    if as_json:
        return {"store": store.url or str(store.root), "steps": steps, "kinds": sums}
    console = Console()
    rows = [
        [
            s["kind"],
            s["key"],
            s["label"] or "",
            s["language"] or "",
            size(s["bytes"]),
            s["when"],
            _seconds(s["seconds"]),
        ]
        for s in steps
    ]
    lines(["kind", "key", "step", "language", "size", "when (UTC)", "seconds"], rows, console)
    rows = [[k, str(v["steps"]), size(v["bytes"]), _seconds(v["seconds"])] for k, v in sums.items()]
    rows.append(
        [
            "all",
            str(len(steps)),
            size(sum(s["bytes"] for s in steps)),
            _seconds(sum(v["seconds"] for v in sums.values())),
        ]
    )
    lines(["kind", "steps", "size", "seconds"], rows, console)
    return None


def _described(store: Store, at: tuple[str, str], there: tuple[int, float]) -> dict[str, Any]:
    (kind, key), (count, when) = at, there
    try:
        record = store.record(kind, key)
    except StoreError as error:
        record = {"label": f"({error.what})"}
    config = record.get("config")
    return {
        "kind": kind,
        "key": key,
        "label": record.get("label"),
        "language": config.get("language") if isinstance(config, dict) else None,
        "bytes": count,
        "when": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(when)),
        "seconds": record.get("wall_seconds", record.get("seconds")),
    }


def verify_store(where: str, repair: bool, as_json: bool) -> tuple[dict[str, Any], bool]:
    """`lingraft store verify`: what it found, and whether all is well."""
    from lingraft.report.terminal import lines

    store = _existing(where)
    sizes = store.sizes()
    began = time.monotonic()
    # Hashing releases the interpreter, and one thread more than there are cores reads ahead.
    pool = ThreadPoolExecutor((cpu_count() or 1) + 1)
    with _bar("verifying", sum(count for count, _ in sizes.values()), as_json) as read, pool:
        found = list(pool.map(lambda at: store.check(at[0], at[1], read), sizes))
    damaged: list[dict[str, Any]] = [
        {"kind": k, "key": key, "what": what} for (k, key), what in zip(sizes, found, strict=True) if what
    ]
    left = 0
    if repair:
        for entry in damaged:
            try:
                entry["moved_to"] = store.set_aside(entry["kind"], entry["key"])
            except Busy as error:
                entry["moved_to"], entry["busy"] = None, error.what
                left += 1
    result = {
        "store": store.url or str(store.root),
        "steps": len(sizes),
        "bytes": sum(count for count, _ in sizes.values()),
        "seconds": round(time.monotonic() - began, 3),
        "damaged": damaged,
    }
    if not as_json:
        console = Console()
        if damaged:
            rows = [[e["kind"], e["key"], e["what"], e.get("moved_to") or e.get("busy") or ""] for e in damaged]
            lines(["kind", "key", "what is wrong", "moved to" if repair else ""], rows, console)
        console.print(
            f"{len(sizes)} steps, {size(result['bytes'])} in {result['seconds']:.1f} s: {len(damaged) or 'none'} damaged",
            highlight=False,
        )
        if damaged and not repair:
            console.print("to do: lingraft store verify --repair, then run the experiment again", highlight=False)
    return result, not damaged or (repair and not left)


def collect_garbage(where: str, keep: Sequence[Path], dry_run: bool, as_json: bool) -> dict[str, Any] | None:
    """`lingraft store gc`."""
    from lingraft.report.terminal import lines

    store = _existing(where)
    unused = _unused(store, keep) if keep else []
    sizes = store.sizes() if unused else {}
    left = [{"what": name, "bytes": count} for name, count in store.leftovers()]
    steps = [{"what": "/".join(at), "bytes": sizes[at][0]} for at in unused]
    if not dry_run:
        store.clean([entry["what"] for entry in left])
        for kind, key in unused:
            store.drop(kind, key)
    result = {
        "store": store.url or str(store.root),
        "removed": not dry_run,
        "leftovers": left,
        "steps": steps,
        "bytes": sum(entry["bytes"] for entry in (*left, *steps)),
    }
    if as_json:
        return result
    console = Console()
    rows = [[entry["what"], size(entry["bytes"])] for entry in (*left, *steps)]
    if rows:
        lines(["would be removed" if dry_run else "removed", "size"], rows, console)
    console.print(
        f"{len(left)} leftovers and {len(steps)} steps, {size(result['bytes'])}" + (", not removed" if dry_run else ""),
        highlight=False,
    )
    return None


def _unused(store: Store, keep: Sequence[Path]) -> list[tuple[str, str]]:
    """The finished steps that none of these runs needs.

    Raises:
        UserError: A run does not say what it needs, or has nothing in this store.
        Busy: Something is being made, and may need any of them.
    """
    needed: set[str] = set()
    there = list(store.steps())
    for run in keep:
        path = run / "manifest.json"
        if not path.is_file():
            raise UserError(
                "this folder is not a finished run", where=run, remedy="give the --out folder of `lingraft run`"
            )
        names = read_json(path).get("steps")
        if not isinstance(names, list):
            raise UserError(
                "this run does not say which steps it needs: it was written by another version of lingraft",
                where=path,
                remedy="give its `lingraft run` command again: what is finished is kept",
            )
        if there and not {"/".join(at) for at in there} & set(names):
            raise UserError("no step of this run is in this store", where=run, remedy="give the run's own store")
        needed |= set(names)
    busy = store.busy()
    if busy is not None:
        raise Busy("a step is being made here, and may need any other", where=busy, remedy="wait until the run is done")
    return [at for at in there if "/".join(at) not in needed]


def _existing(where: str) -> Store:
    store = open_store(where)
    if not url_of(where) and not store.root.is_dir():
        raise UserError("there is no store here", where=store.root, remedy="give the --store of `lingraft run`")
    return store


@contextmanager
def _bar(says: str, total: int, quiet: bool) -> Generator[Callable[[int], None], None, None]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = stderr()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as bar:
        task = bar.add_task(says, total=total)
        yield lambda count: bar.advance(task, count)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def size(count: float) -> str:
    """Bytes, for people, in powers of ten."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} B"
