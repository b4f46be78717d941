"""`lingraft divergence`, `merge` and `inspect`: arithmetic on adapters, without a base model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lingraft.commands.watching import stderr
from lingraft.errors import UserError


def save_divergence(target_ref: Path, source_ref: Path, out: Path, as_json: bool) -> dict[str, Any] | None:
    """`lingraft divergence`."""
    from lingraft.merging import divergence_of, similarity

    found, provenance = divergence_of(target_ref, source_ref)
    alike = similarity(found.target_ref, found.source_ref)
    found.save(out, provenance)
    if as_json:
        return {"out": str(out), "cosine": alike["cosine"], "norms": alike["norms"]}
    cosine = "undefined (one of them is zero)" if alike["cosine"] is None else f"{alike['cosine']:.3f}"
    stderr().print(f"{out}: cosine of the two updates {cosine}", markup=False, highlight=False)
    return None


def merge_adapters(
    task: Path,
    target_ref: Path | None,
    source_ref: Path | None,
    divergence_dir: Path | None,
    weight: float,
    space: str,
    modules: str,
    out_rank: int | None,
    verify: bool,
    out: Path,
    as_json: bool,
) -> dict[str, Any] | None:
    """`lingraft merge`."""
    from lingraft import merging
    from lingraft.adapter import Divergence, content_digest
    from lingraft.store import appearing, write_json

    if divergence_dir is not None and (target_ref or source_ref):
        raise UserError("give either --divergence or the two references, not both")
    if divergence_dir is not None:
        divergence = Divergence.load(divergence_dir)
        inputs = {"divergence": content_digest(divergence_dir)}
    elif target_ref is None or source_ref is None:
        raise UserError("the divergence is missing", remedy="give --target-ref and --source-ref, or --divergence")
    else:
        divergence, made = merging.divergence_of(target_ref, source_ref)
        inputs = made["inputs"]
    merged, provenance = merging.graft(
        task, divergence, inputs, weight, space=space, modules=modules, out_rank=out_rank
    )
    with appearing(out, {"kind": "merge", **provenance}) as work:
        merged.write(work, provenance)
        kept = merging.energy_kept(merged)
        write_json(work / "extra.json", {"energy_kept": kept})
    result: dict[str, Any] = {"out": str(out), "energy_kept": kept}
    if verify:
        result["relative_error"] = merging.verify(out, task, divergence, weight, space=space, modules=modules)
    if as_json:
        return result
    said = [f"{out}: λ = {weight:g}, {space} space, {len(merged.layout)} sites"]
    if kept:
        said.append(f"energy kept: mean {100 * kept['mean']:.2f} %, least {100 * kept['least']:.2f} %")
    if verify:
        said.append(f"relative error of the weight updates: {result['relative_error']:.2e}")
    stderr().print("\n".join(said), markup=False, highlight=False)
    return None


def inspect_folders(folders: Sequence[Path], as_json: bool) -> dict[str, Any] | None:
    """`lingraft inspect`."""
    from collections import Counter

    from lingraft.adapter import Adapter, Divergence
    from lingraft.merging import similarity
    from lingraft.report.terminal import lines
    from lingraft.store import read_json

    described: list[dict[str, Any]] = []
    loaded: list[Adapter] = []
    for folder in folders:
        sidecar = folder / "lingraft.json"
        is_divergence = sidecar.is_file() and read_json(sidecar).get("kind") == "divergence"
        adapter = Divergence.load(folder)._as_adapter() if is_divergence else Adapter.load(folder)
        loaded.append(adapter)
        described.append(
            {
                "path": str(folder),
                "kind": "divergence" if is_divergence else "adapter",
                "family": adapter.structure,
                "base": adapter.config.get("base_model_name_or_path"),
                "base_digest": (adapter.sidecar.get("backbone") or {}).get("digest"),
                "sites": len(adapter.layout),
                "ranks": dict(sorted(Counter(p.rank for p in adapter.layout.values()).items())),
                "dtype": str(adapter.dtype),
                "init_sha256": adapter.sidecar.get("init_sha256"),
                "norm": similarity(adapter, adapter)["norms"][0],
                "provenance": adapter.sidecar.get("provenance"),
            }
        )
    alike = similarity(loaded[0], loaded[1]) if len(loaded) == 2 else None
    if as_json:
        return {"adapters": described, "similarity": alike}
    console = Console()
    for entry in described:
        lines(
            ["", entry["path"]],
            [[k, str(v)] for k, v in entry.items() if k != "path" and v is not None],
            console,
        )
    if alike:
        rows = [
            [layer, "–" if c is None else f"{c:.3f}"]
            for layer, c in {"all": alike["cosine"], **alike["by_layer"]}.items()
        ]
        lines(["layer", "cosine"], rows, console)
    return None
