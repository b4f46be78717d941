"""What methods answered, item by item: the gold answer, every method's, and why, as columns in which each text stands once."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lingraft.errors import StoreError
from lingraft.predictions import DAMAGE
from lingraft.report.readings import Readings, answer_of, opened
from lingraft.report.results import manifest_of, metric_of, store_of

MOST = 200_000
"""Answers that are carried, unless another number is asked for."""
_NONE = -1
Answer = tuple[str, str, str, str, float]
"""A method's answer to an item: the prompt, the gold answer, the answer, the reason, and its figure."""


def examples(run: Path, found: dict[str, Any], most: int = MOST) -> dict[str, Any]:
    """The items of a run's test with all methods' answers, of the lowest seed.

    Args:
        run: The run's folder.
        found: Its figures, see `results.results`.
        most: So many answers are carried at most, as many in each language: first those to items on which methods differ.

    Returns:
        `languages` and `methods` in the experiment's order; `seed`; `labels`, the names of the candidates, or None;
        `strings`, every text once, to which all numbers below point; `items`, by language columns `id`, `gold`, `prompt` and
        `answers` (by method `answer`, `reason`, `value` and `prompt`: −1 where there is none, or the prompt is the item's);
        `differ`, by language the places in these columns where methods' figures differ: where some are right and others wrong,
        or, with figures between (ROUGE-L), some are better than others; and `left_out`, how many answers are not carried.

    Raises:
        StoreError: A file is missing or damaged.
    """
    manifest = manifest_of(run)
    readings = opened(run, store_of(run, manifest), metric_of(manifest))
    cells = _lowest(manifest["cells"])
    order = [found["source"], *found["targets"]]
    languages = [code for code in order if any(language == code for _, language in cells)]
    methods = [name for name in found["methods"] if any(method == name for method, _ in cells)]
    labels = _labels(readings, manifest["cells"])
    strings, items, differ, left = _Strings(), {}, {}, 0
    sizes = {c: sum(found["items"].get(c, 0) for _, language in cells if language == c) for c in languages}
    room = _shared(sizes, most)
    for code in languages:
        said = {name: _answers(readings, cells[name, code], labels) for name in methods if (name, code) in cells}
        ids = list(dict.fromkeys(name for answers in said.values() for name in answers))
        apart = {item for item in ids if _differ(item, said.values())}
        chosen = _chosen(code, ids, apart, room[code] // max(1, len(said)))
        left += sum(len(answers) for answers in said.values()) - sum(
            n in answers for answers in said.values() for n in chosen
        )
        items[code] = _columns(chosen, said, strings)
        differ[code] = [place for place, item in enumerate(chosen) if item in apart]
    readings.forget()
    return {
        "languages": languages,
        "methods": methods,
        "seed": min((cell["seed"] for cell in cells.values()), default=0),
        "labels": labels,
        "strings": list(strings.places),
        "items": items,
        "differ": differ,
        "left_out": left,
    }


class _Strings:
    """Texts, each once, in the order in which they came."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}

    def place(self, text: str) -> int:
        return self.places.setdefault(text, len(self.places))


def _lowest(cells: Iterable[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """The cell of each method and language that has the lowest seed."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for cell in cells:
        key = cell["method"], cell["language"]
        if key not in found or cell["seed"] < found[key]["seed"]:
            found[key] = cell
    return found


def _labels(readings: Readings, cells: Sequence[dict[str, Any]]) -> list[str] | None:
    """The names of a choice task's candidates, in their order, from a prediction's record."""
    if not cells:
        return None
    kind, _, key = cells[0]["predict"].partition("/")
    try:
        answers = readings.store.record(kind, key)["config"]["task"]["answers"]
        return [str(label) for label, _ in answers] or None
    except (KeyError, TypeError, ValueError):
        return None


def _answers(readings: Readings, cell: dict[str, Any], labels: Sequence[str] | None) -> dict[str, Answer]:
    """A method's answers in a language, by item."""
    lines, read = readings.lines(cell["predict"], cell["score"])
    try:
        if read:
            return {str(line["id"]): _written(line, read[str(line["id"])], readings.metric) for line in lines}
        return {str(line["id"]): _candidate(line, labels or ()) for line in lines}
    except (*DAMAGE, AttributeError) as error:
        raise StoreError(
            f"predictions cannot be read ({error!r})",
            where=readings.folder(cell["predict"]),
            remedy="delete its folder and run again",
        ) from error


def _candidate(line: dict[str, Any], labels: Sequence[str]) -> Answer:
    """An answer by likelihood: the reason is how likely it is, and what comes next."""
    scores, chosen = line["scores"], answer_of(line)

    def named(number: int) -> str:
        known = {line["gold"]: line.get("gold_label"), line.get("answer"): line.get("answer_label")}
        return str(labels[number] if number < len(labels) else known.get(number) or f"candidate {number + 1}")

    reason = f"log-likelihood {_number(scores[chosen])}"
    if len(scores) > 1:
        following = max((n for n in range(len(scores)) if n != chosen), key=lambda n: scores[n])
        reason += f"; next: {named(following)} {_number(scores[following])}"
    right = float(chosen == line["gold"])
    return line["prompt"], named(line["gold"]), named(chosen), reason + _cut(line), right


def _written(line: dict[str, Any], read: dict[str, Any], metric: str) -> Answer:
    """An answer that was written: the reason is what was read in it, and how."""
    parsed = "cannot be read" if read["answer"] is None else f"read as “{read['answer']}”"
    reason = f"{parsed}: {read['reason']}{_cut(line)}"
    gold = " | ".join(map(str, line["references"]))
    return line["prompt"], gold, str(line["text"] or ""), reason, float(read["figures"][metric])


def _cut(line: dict[str, Any]) -> str:
    return "; the prompt was cut" if line.get("truncated") else ""


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _differ(item: str, said: Iterable[dict[str, Answer]]) -> bool:
    """Whether methods differ in how right they are."""
    return len({answers[item][-1] for answers in said if item in answers}) > 1


def _shared(sizes: dict[str, int], most: int) -> dict[str, int]:
    """So many answers for each language: equal shares, and what one does not need goes to the others."""
    room: dict[str, int] = {}
    for number, code in enumerate(sorted(sizes, key=lambda c: (sizes[c], c))):
        room[code] = min(sizes[code], max(0, most - sum(room.values())) // (len(sizes) - number))
    return room


def _chosen(code: str, ids: Sequence[str], apart: set[str], most: int) -> list[str]:
    """At most so many items in their order: those on which methods differ first, drawn by a hash of their names."""
    if len(ids) <= most:
        return list(ids)
    drawn = sorted(ids, key=lambda item: (item not in apart, hashlib.sha256(f"{code}/{item}".encode()).digest()))
    kept = set(drawn[:most])
    return [item for item in ids if item in kept]


def _columns(ids: Sequence[str], said: dict[str, dict[str, Answer]], strings: _Strings) -> dict[str, Any]:
    """Items as columns. An item's own prompt and gold answer are those of the first method that has it."""
    own = [next(answers[item] for answers in said.values() if item in answers) for item in ids]
    columns: dict[str, Any] = {
        "id": list(ids),
        "gold": [strings.place(answer[1]) for answer in own],
        "prompt": [strings.place(answer[0]) for answer in own],
        "answers": {},
    }
    for name, answers in said.items():
        rows = [answers.get(item) for item in ids]
        columns["answers"][name] = {
            "answer": [_NONE if row is None else strings.place(row[2]) for row in rows],
            "reason": [_NONE if row is None else strings.place(row[3]) for row in rows],
            "value": [None if row is None else row[4] for row in rows],
            "prompt": [
                _NONE if row is None or row[0] == first[0] else strings.place(row[0])
                for row, first in zip(rows, own, strict=True)
            ],
        }
    return columns
