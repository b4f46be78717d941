"""The atlas of a run: how alike its languages' divergences `R_t − R_s` are, from the reference adapters in its store."""

import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import combinations, repeat
from pathlib import Path
from typing import Any

from lingraft.adapter import Adapter
from lingraft.atlas import ALL, atlas, clusters
from lingraft.digests import digest_value
from lingraft.errors import StoreError, writing
from lingraft.families import FAMILIES
from lingraft.languages import name_of
from lingraft.report.readings import Made, Readings, opened
from lingraft.report.results import manifest_of, metric_of, store_of
from lingraft.report.trainings import kinds_of
from lingraft.stacks import parts_of
from lingraft.store import read_json, write_json

CACHE = "atlas.json"
"""In the run's folder: the atlas, and the digest of what it was made from."""
_FORM = 2
"""Of what is cached."""
_SHARED = (
    "From all of them the same source adapter is subtracted, which alone makes unrelated languages alike: where adapters "
    "are equally large, near 0.5, not 0."
)


def divergences(run: Path, found: dict[str, Any]) -> dict[str, Any] | None:
    """How alike a run's divergences are, all languages with one another.

    Of the lowest seed that has the source's reference adapter and those of two targets. Where the experiment has language
    adapters instead (MAD-X, LF-SFT), they are what is compared; of those of two parts, the part within the layers.

    Args:
        run: The run's folder; `atlas.json` in it keeps what was found, as reading many adapters takes time.
        found: Its figures, see `results.results`.

    Returns:
        `structure`, `languages` (targets, then development languages), `seed`, `layers` (`all`, and by number), `cosines`
        and `norms` by layer, `order` and `linkage` (see `atlas.clusters`) and `says`, the gist in a sentence. None where
        there are no references in two target languages.

    Raises:
        StoreError: An adapter is damaged.
        MissingExtra: scipy is not installed.
    """
    manifest = manifest_of(run)
    readings = opened(run, store_of(run, manifest), metric_of(manifest))
    steps = [step for step in readings.made(manifest["steps"]) if step.kind == "train" and step.record]
    chosen = _references(steps, found)
    if chosen is None:
        return None
    seed, source, references = chosen
    made_of = digest_value([_FORM, seed, _content(source), *([code, _content(s)] for code, s in references.items())])
    charted = _known(run / CACHE, made_of, list(references))
    if charted is None:
        origin = _adapter(readings, source)
        charted = atlas({code: (_adapter(readings, step) - origin).as_adapter() for code, step in references.items()})
        with (
            suppress(StoreError, OSError),
            writing(run),
        ):  # It only saves time: a run may be looked at where nothing can be written.
            write_json(run / CACHE, {"made_of": made_of, "atlas": charted})
    order, linkage = clusters(charted["cosines"][ALL])
    return {
        "structure": charted["structure"],
        "languages": charted["names"],
        "seed": seed,
        "layers": charted["layers"],
        "cosines": charted["cosines"],
        "norms": charted["norms"],
        "order": order,
        "linkage": linkage,
        "says": _says(charted["names"], charted["cosines"][ALL]),
    }


def _references(steps: Sequence[Made], found: dict[str, Any]) -> tuple[int, Made, dict[str, Made]] | None:
    """The lowest seed that has references of the source and of two targets, the source's, and the others in order."""
    kinds, experiment = kinds_of(steps, found["experiment"]), found["experiment"]
    wanted = [*found["targets"], *(experiment.get("development") or ())]
    for kind in ("reference", "language"):
        several = [step for step in steps if kinds[step.key] == kind and not step.config.get("initial")]
        # Those of one structure and training are compared, in the order in which they were planned.
        for like in dict.fromkeys(digest_value(step.config.get("adapter")) for step in several):
            alike = [step for step in several if digest_value(step.config.get("adapter")) == like]
            for seed in sorted({int(step.config["seed"]) for step in alike}):
                by_language = {step.config["language"]: step for step in alike if step.config["seed"] == seed}
                source = by_language.get(found["source"])
                here = {code: by_language[code] for code in dict.fromkeys(wanted) if code in by_language}
                if source is not None and sum(code in found["targets"] for code in here) > 1:
                    return seed, source, here
    return None


def _content(step: Made) -> Any:
    """What changes when an adapter's numbers do."""
    return step.record.get("files") or step.key


def _adapter(readings: Readings, step: Made) -> Adapter:
    return Adapter.load(parts_of(readings.folder(step.place))[-1])


def _known(path: Path, made_of: str, codes: list[str]) -> dict[str, Any] | None:
    """What was kept of these languages, where it is of the same adapters and has the shape of an atlas."""
    try:
        kept = read_json(path)
    except StoreError:  # Not there, or not whole: it is made again.
        return None
    if not isinstance(kept, dict) or kept.get("made_of") != made_of or not isinstance(kept.get("atlas"), dict):
        return None
    charted = kept["atlas"]
    if not _is_whole(charted, codes):
        return None
    # A file's keys are in the order of the alphabet.
    return charted | {name: {key: charted[name][key] for key in charted["layers"]} for name in ("cosines", "norms")}


def _is_whole(charted: dict[str, Any], codes: list[str]) -> bool:
    """Whether what was kept can be an atlas of these languages: the file may be somebody else's."""
    layers, cosines, norms = charted.get("layers"), charted.get("cosines"), charted.get("norms")
    if charted.get("names") != codes or charted.get("structure") not in FAMILIES:
        return False
    if not (isinstance(layers, list) and isinstance(cosines, dict) and isinstance(norms, dict)):
        return False
    if layers[:1] != [ALL] or not all(isinstance(layer, str) and _LAYER.fullmatch(layer) for layer in layers):
        return False
    if not (sorted(cosines) == sorted(norms) == sorted(layers)):
        return False
    return all(map(_is_matrix, cosines.values(), repeat(len(codes)))) and all(
        isinstance(row, list) and len(row) == len(codes) and all(_is_number(n) and n >= 0 for n in row)
        for row in norms.values()
    )


def _is_matrix(rows: Any, size: int) -> bool:
    """Whether rows are cosines of all pairs, those of a pair equal."""
    if not isinstance(rows, list) or len(rows) != size:
        return False
    if not all(isinstance(row, list) and len(row) == size for row in rows):
        return False
    if not all(value is None or (_is_number(value) and -1 <= value <= 1) for row in rows for value in row):
        return False
    return all(rows[i][j] == rows[j][i] for i, j in combinations(range(size), 2))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


_LAYER = re.compile(rf"{ALL}|-|\d{{1,6}}", re.ASCII)


def _says(codes: Sequence[str], cosines: Sequence[Sequence[float | None]]) -> str:
    """The pair that is most alike, the one that is least, and the mean of all."""
    pairs = [
        (cosine, one, other)
        for (n, one), (m, other) in combinations(enumerate(codes), 2)
        if (cosine := cosines[n][m]) is not None
    ]
    if not pairs:
        return "No two divergences could be compared."
    most, least = max(pairs, key=lambda pair: pair[0]), min(pairs, key=lambda pair: pair[0])
    if len(pairs) == 1:
        return f"The divergences of {_pair(most)} have a cosine of {_number(most[0])}. {_SHARED}"
    mean = sum(cosine for cosine, _, _ in pairs) / len(pairs)
    return (
        f"Most alike are the divergences of {_pair(most)} (cosine {_number(most[0])}), least those of {_pair(least)} "
        f"({_number(least[0])}); the mean of {len(pairs)} pairs is {_number(mean)}. {_SHARED}"
    )


def _pair(pair: tuple[float, str, str]) -> str:
    return f"{name_of(pair[1])} and {name_of(pair[2])}"


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−")
