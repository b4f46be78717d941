"""`lingraft divergence`, `merge` and `inspect`: arithmetic on adapters, without a base model."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lingraft import merging
from lingraft.adapter import Adapter, content_digest, is_divergence
from lingraft.atlas import ALL, atlas, clusters
from lingraft.divergence import Divergence
from lingraft.errors import AdapterError, MissingExtra, UserError
from lingraft.families import GUARDS
from lingraft.fitting import base_digest
from lingraft.fusion.stages import FIRST, first_digest
from lingraft.layouts.common import WEIGHTS, read_sidecar
from lingraft.merging import Combination, Graft, divergence_of, similarity
from lingraft.stacks import is_stack, parts_of, stack_digest, write_note
from lingraft.store import appearing, write_json

if TYPE_CHECKING:
    from rich.console import Console


def save_divergence(target_ref: Path, source_ref: Path, out: Path, as_json: bool) -> dict[str, Any] | None:
    """`lingraft divergence`; of two stacks that of every part."""
    if is_stack(target_ref) or is_stack(source_ref):
        pairs = _alike({"target_ref": target_ref, "source_ref": source_ref})
        with appearing(out, {"kind": "divergence", "of": [stack_digest(target_ref), stack_digest(source_ref)]}) as work:
            found = {
                name: _divergence(part["target_ref"], part["source_ref"], work / name) for name, part in pairs.items()
            }
            write_note(work, list(pairs), {"of": "divergences"})
    else:
        found = {"": _divergence(target_ref, source_ref, out)}
    if as_json:
        return {"out": str(out), **found[""]} if "" in found else {"out": str(out), "parts": found}
    for name, alike in found.items():
        cosine = "undefined (one of them is zero)" if alike["cosine"] is None else f"{alike['cosine']:.3f}"
        click.echo(f"{out / name}: cosine of the two updates {cosine}", err=True)
    return None


def _divergence(target_ref: Path, source_ref: Path, out: Path) -> dict[str, Any]:
    """Saves one divergence; the cosine and the norms of its references."""
    found, provenance = divergence_of(target_ref, source_ref)
    alike = similarity(found.target_ref, found.source_ref)
    found.save(out, provenance)
    return {"cosine": alike["cosine"], "norms": alike["norms"]}


def _alike(folders: Mapping[str, Path]) -> dict[str, dict[str, Path]]:
    """The parts of stacks side by side, by their names, the lowest first.

    Raises:
        AdapterError: They have not the same.
    """
    names = {
        role: [part.name for part in parts_of(folder)] if is_stack(folder) else [] for role, folder in folders.items()
    }
    first = next(iter(names.values()))
    if any(found != first for found in names.values()):
        said = ", ".join(f"--{role.replace('_', '-')} {' and '.join(n) or 'no stack'}" for role, n in names.items())
        raise AdapterError(f"the stacks have different parts: {said}", remedy="give stacks of the same kind")
    return {name: {role: folder / name for role, folder in folders.items()} for name in first}


def _named_numbers(texts: Sequence[str], what: str) -> list[tuple[str, float]]:
    """Reads `NAME=NUMBER`; the last equals sign divides."""
    found: list[tuple[str, float]] = []
    for text in texts:
        name, sign, number = text.rpartition("=")
        try:
            found.append((name, float(number)))
        except ValueError:
            sign = ""
        if not sign or not name:
            raise UserError(f"'{text}' is not {what}=NUMBER", remedy=f"write for example {what.lower()}=0.5")
    return found


def merge_adapters(
    adapters: Sequence[str], verify: bool, out: Path, as_json: bool, **options: Any
) -> dict[str, Any] | None:
    """`lingraft merge`."""
    roles = ("task", "target_ref", "source_ref", "divergence_dir")
    folders = {role: options[role] for role in roles if options[role] is not None}
    combining = options["method"] in merging.COMBINATIONS if options["method"] else bool(adapters)
    if not combining and any(map(is_stack, folders.values())):
        parts = {name: _graft(adapters, _of_part(options, part)) for name, part in _alike(folders).items()}
    else:
        parts = {"": _combination(adapters, options) if combining else _graft(adapters, options)}
    merged = {name: part.merge(part.parts) for name, part in parts.items()}
    record = parts[""].provenance if "" in parts else {"parts": {name: part.provenance for name, part in parts.items()}}
    results: dict[str, dict[str, Any]] = {}
    with appearing(out, {"kind": "merge", **record}) as work:
        for name, part in parts.items():
            (work / name).mkdir(exist_ok=True)
            results[name] = _written(merged[name], part.provenance, work / name)
        if "" not in parts:
            write_note(work, list(parts), {**(read_sidecar(folders["task"]) or {}), "provenance": record})
    if verify:
        for name, part in parts.items():
            results[name]["relative_error"] = merging.verify(out / name, part.parts, part.exact)
    if as_json:
        return {"out": str(out), **results[""]} if "" in parts else {"out": str(out), "parts": results}
    for name, part in parts.items():
        click.echo("\n".join(_said(out / name, part, results[name])), err=True)
    return None


def _of_part(options: dict[str, Any], part: Mapping[str, Path]) -> dict[str, Any]:
    """The options of a merge for one part of the stacks; language adapters are merged number by number."""
    structure = Adapter.load(part["task"]).structure if "task" in part else ""
    plain = options["method"] in (None, "transfer") and options["space"] is None
    return {**options, **part, "space": merging.LANGUAGE_SPACES.get(structure) if plain else options["space"]}


def _written(merged: Adapter, provenance: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Computes a merge into a folder, and says what showed on the way."""
    merged.write(folder, provenance)
    kept, guarded = merging.energy_kept(merged), merged.notes.guarded
    write_json(folder / "extra.json", {"energy_kept": kept, "guarded": guarded})
    return {
        "energy_kept": kept,
        "guarded": sum(guarded.values()),
        "guarded_sites": len(guarded),
        "sites": len(merged.layout),
    }


def _said(place: Path, made: "_Made", result: dict[str, Any]) -> list[str]:
    """A merge's figures for people."""
    said = [f"{place}: {made.title}, {result['sites']} sites"]
    if kept := result["energy_kept"]:
        said.append(f"energy kept: mean {100 * kept['mean']:.2f} %, least {100 * kept['least']:.2f} %")
    if result["guarded"]:
        count, places = result["guarded"], result["guarded_sites"]
        said.append(f"guarded: {count} numbers at {places} sites, too near nothing to divide by or out of bounds")
    if "relative_error" in result:
        said.append(f"relative error: {result['relative_error']:.2e}")
    return said


@dataclass(frozen=True)
class _Made:
    """A merge as asked for: its parts, how they are merged, with and without compression, and its record."""

    parts: list[Adapter]
    merge: Callable[[Sequence[Adapter]], Adapter]
    exact: Callable[[Sequence[Adapter]], Adapter]
    provenance: dict[str, Any]
    title: str


def _graft(adapters: Sequence[str], options: dict[str, Any]) -> _Made:
    """A divergence grafted onto a task."""
    if adapters:
        raise UserError(
            f"'{options['method']}' merges --task with references, not ADAPTER=WEIGHT",
            remedy="give --task, --weight and the references, or --method linear",
        )
    _refuse_options(options, ("density", "drop", "seed"), f"a {options['method'] or 'transfer'}")
    absent = [name for name in ("task", "weight") if options[name] is None]
    if absent:
        raise UserError("--" + " and --".join(absent) + " missing", remedy="see lingraft merge --help")
    folder, target, source = options["divergence_dir"], options["target_ref"], options["source_ref"]
    if folder is not None and (target or source):
        raise UserError("give either --divergence or the two references, not both", remedy="leave one of them out")
    if folder is not None:
        divergence, inputs = Divergence.load(folder), {"divergence": content_digest(folder)}
    elif target is not None and options["method"] == "arimerge-add":
        # Nothing is subtracted: the target's reference stands in for the source's, which is not looked at.
        divergence = Adapter.load(target) - Adapter.load(source or target)
        inputs = {"target_ref": content_digest(target)}
    elif target is None or source is None:
        raise UserError("the divergence is missing", remedy="give --target-ref and --source-ref, or --divergence")
    else:
        divergence = Adapter.load(target) - Adapter.load(source)
        inputs = {"target_ref": content_digest(target), "source_ref": content_digest(source)}
    graft = Graft(
        options["weight"],
        options["method"] or "transfer",
        options["space"],
        options["modules"],
        _named_numbers(options["rules"], "SITES"),
        options["out_rank"],
        {name: options[name] for name in GUARDS},
    )
    task = Adapter.load(options["task"])
    return _Made(
        [task, divergence.target_ref, divergence.source_ref],
        lambda parts: graft.onto(parts[0], Divergence(parts[1], parts[2])),
        lambda parts: replace(graft, out_rank=None).onto(parts[0], Divergence(parts[1], parts[2])),
        graft.provenance(task, {"task": content_digest(options["task"]), **inputs}),
        f"{graft.method}, λ = {graft.weight:g}, {graft.space_of(task.structure)}",
    )


def _refuse_options(options: dict[str, Any], names: Sequence[str], what: str) -> None:
    """Refuses options that would be ignored."""
    strange = [name for name in names if options[name] is not None and options[name] != ()]
    if strange:
        spelt = {"divergence_dir": "divergence", "rules": "weight-of"}
        shown = ", ".join("--" + spelt.get(name, name.replace("_", "-")) for name in strange)
        raise UserError(f"{shown}: not for {what}", remedy="leave out what does not apply; see lingraft merge --help")


def _combination(adapters: Sequence[str], options: dict[str, Any]) -> _Made:
    """Any number of adapters combined."""
    method = options["method"] or "linear"
    parts = ("task", "target_ref", "source_ref", "divergence_dir", "weight", "rules", *GUARDS)
    _refuse_options(options, parts, "combining ADAPTER=WEIGHT")
    values = {"density": ("ties", "knots"), "drop": ("dare",), "seed": ("dare",)}
    _refuse_options(options, [name for name, users in values.items() if method not in users], method)
    given = [(Path(name), weight) for name, weight in _named_numbers(adapters, "ADAPTER")]
    if not given:
        raise UserError("there is nothing to combine", remedy="give adapters and weights: runs/a=0.5 runs/b=0.5")
    chosen = {name: options[name] for name in values if options[name] is not None}
    combination = Combination(method, *(options[name] for name in ("space", "modules", "out_rank")), **chosen)
    weights = [weight for _, weight in given]
    return _Made(
        [Adapter.load(path) for path, _ in given],
        lambda parts: combination.of(parts, weights),
        lambda parts: replace(combination, out_rank=None).of(parts, weights),
        combination.provenance(given),
        f"{combination.method} of {len(given)} adapters",
    )


def inspect_folders(folders: Sequence[Path], as_json: bool) -> dict[str, Any] | None:
    """`lingraft inspect`: one adapter, how alike two are, or of more how alike all are with one another."""
    from rich.console import Console  # A merge starts without it.

    from lingraft.report.terminal import lines

    compared = len(folders) == 2
    if len(folders) > 1 and any(map(is_stack, folders)):
        raise UserError(
            "inspect compares adapters, not stacks", remedy="give a part of each: A/bottleneck B/bottleneck"
        )
    if len(folders) > 2:
        return _compare_all(folders, as_json, Console())
    if not compared:  # Of a stack every part.
        folders = parts_of(folders[0])
    loaded = [_as_adapter(folder) for folder in folders]
    described = [_described(folder, *found) for folder, found in zip(folders, loaded, strict=True)]
    alike = similarity(loaded[0][0], loaded[1][0]) if compared else None
    if as_json:
        return {"adapters": described, "similarity": alike}
    console = Console()
    for entry in described:
        lines(["", entry["path"]], _shown(entry), console)
    if alike:
        head = ["layer", "cosine", "norm of the first", "of the second"]
        rows = [["all", _cosine(alike["cosine"]), *(f"{n:.4g}" for n in alike["norms"])]]
        rows += [
            [layer, _cosine(c), *(f"{n:.4g}" for n in alike["norms_by_layer"][layer])]
            for layer, c in alike["by_layer"].items()
        ]
        lines(head, rows, console)
    else:
        for entry in described:
            lines(["layer", "norm"], [[layer, f"{n:.4g}"] for layer, n in entry["norm_by_layer"].items()], console)
    return None


def _compare_all(folders: Sequence[Path], as_json: bool, console: "Console") -> dict[str, Any] | None:
    """How alike the changes of several adapters or divergences are: in an order in which those that are alike stand together."""
    from lingraft.report.terminal import lines

    loaded = [_as_adapter(folder) for folder in folders]
    charted = atlas(dict(zip(_apart(folders), (adapter for adapter, _ in loaded), strict=True)))
    try:
        order, linkage = clusters(charted["cosines"][ALL])
        remark = "the order is that of clusters (average linkage of 1 − cosine)"
    except MissingExtra as error:  # The figures do without it.
        order, linkage = list(range(len(folders))), []
        remark = f"in the order given; for one by likeness: {error.remedy}"
    if as_json:
        described = [_described(folder, *found) for folder, found in zip(folders, loaded, strict=True)]
        return {"adapters": described, "atlas": {**charted, "order": order, "linkage": linkage}}
    names, rows = charted["names"], charted["cosines"][ALL]
    cells = [
        [f"{number} {names[i]}", *(_cosine(rows[i][j]) for j in order), f"{charted['norms'][ALL][i]:.4g}"]
        for number, i in enumerate(order, 1)
    ]
    lines(["cosine", *(str(number) for number in range(1, len(order) + 1)), "norm"], cells, console)
    console.print(f"{remark}; --json has every layer", markup=False, highlight=False)
    return None


def _apart(folders: Sequence[Path]) -> list[str]:
    """Short names of folders that tell them apart: the ends of their paths, as much of them as it takes."""
    paths = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    raise UserError("one folder is given twice", remedy="give each adapter once")


def _cosine(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _as_adapter(folder: Path) -> tuple[Adapter, bool]:
    """An adapter, or a divergence as what it does to the model."""
    if not is_divergence(folder):
        return Adapter.load(folder), False
    # Its own notes, not those of a reference it is made of.
    return replace(Divergence.load(folder).as_adapter(), sidecar=read_sidecar(folder) or {}), True


def _described(folder: Path, adapter: Adapter, diverges: bool) -> dict[str, Any]:
    sizes = Counter(size for place in adapter.layout.values() if (size := adapter.files.size(place)) is not None)
    own = similarity(adapter, adapter)
    return {
        "path": str(folder),
        "kind": "divergence" if diverges else "adapter",
        "family": adapter.structure,
        "base": adapter.config.get("base_model_name_or_path"),
        "base_digest": base_digest(adapter),
        "sites": len(adapter.layout),
        "ranks": dict(sorted(sizes.items())) or None,
        "dtype": str(adapter.dtype),
        "init_sha256": adapter.sidecar.get("init_sha256"),
        "norm": own["norms"][0],
        "norm_by_layer": {layer: norms[0] for layer, norms in own["norms_by_layer"].items()},
        "provenance": adapter.sidecar.get("provenance"),
        **_two_stages(folder, adapter),
    }


def _two_stages(folder: Path, adapter: Adapter) -> dict[str, Any]:
    """Of a second stage: what it is, what it stands on, and whether that is there."""
    notes = adapter.sidecar.get("second")
    if not isinstance(notes, dict):
        return {}
    there = first_digest(folder / FIRST) if (folder / FIRST / WEIGHTS).is_file() else None
    state = "missing" if there is None else "here" if there == notes.get("stage1") else f"another one here, {there}"
    return {"second": notes, "first_stage": state}


_READS = {
    "alone": "reads no counterpart",
    "beside": "mixed with the counterpart's states",
    "concatenated": "reads the counterpart's text in front",
    "itself": "mixed with a translation encoder's states of the text",
}


def _readable(value: Any, within: bool = False) -> str:
    """A value for people: figures to four digits, a mapping a line each, what is empty left out."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        told = {str(key): _readable(held, within=True) for key, held in value.items() if held not in (None, {}, [], "")}
        return ("; " if within else "\n").join(f"{key}: {text}" for key, text in told.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _shown(entry: dict[str, Any]) -> list[list[str]]:
    """A description as rows for people."""
    hidden = ("path", "norm_by_layer", "second", "first_stage")
    rows = [
        ["sites by rank" if k == "ranks" else k.replace("_", " "), _readable(v)]
        for k, v in entry.items()
        if k not in hidden and v is not None
    ]
    if (notes := entry.get("second")) is None:
        return rows
    unused = () if notes.get("kind") == "fused-mt" else ("encoder", "encoder_revision")
    fusion, mixup = {k: v for k, v in (notes.get("fusion") or {}).items() if k not in unused}, notes.get("mixup")
    said = [
        str(notes.get("kind")),
        _READS.get(notes.get("form", ""), ""),
        *([f"φ {fusion['function']}"] if fusion else []),
    ]
    said += [f"source language {notes['source']}"] if notes.get("source") else []
    rows.append(["second stage", ", ".join(part for part in said if part)])
    for name, values in (("fusion", fusion), ("mixup", mixup)):
        if values:
            rows.append([name, ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)])
    rows.append(["first stage", f"{notes.get('stage1')} ({entry['first_stage']})"])
    rows.append(["in plain PEFT", f"LoRA, on top of the one in {FIRST}/ merged into the base; nothing is mixed"])
    return rows
