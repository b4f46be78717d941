"""What a run was made to find out, in two sentences: the question, and what the figures say, as a careful statistician would.

The method that the sentence is about is named by its place in the experiment and by its kind, never by its figures: the best
of many on a test is better than it is.
"""

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from lingraft.languages import name_of
from lingraft.methods import Method, method
from lingraft.report.results import BASELINE, UNFUSED
from lingraft.report.tables import AVERAGE, GROUP, METRICS
from lingraft.significance import DRAWS, LEVEL, holm

_FEW = 200
"""Items of a language below which it is said how large a difference must be to be seen."""
_NAMED = 4
"""Languages that a sentence names one by one, at most."""
_TRANSFERS = ("graft", "second", "stack", "projected")
"""The kinds of methods that a run is about, in this order."""
Marks = dict[str, dict[str, dict[str, Any]]]


def headline(found: dict[str, Any]) -> dict[str, Any]:
    """The question and the answer of a run.

    Args:
        found: The figures of a run, see `results.results`.

    Returns:
        `question` and `answer`, a sentence each; `verdict`: `better` or `worse` where p is below .05 and the interval of the
        difference does not hold 0, `undecided` where it could not be told, `unknown` where nothing was compared; `method`
        and `baseline` by name, `value`, `interval`, `difference`, `difference_interval` and `p`, of the average over all
        targets (shares, not percent; None where there is none); and `cautions`, sentences that a reader who decides must see.
    """
    name = named_method(found)
    if name is None:
        question = f"How do models answer the task {found['experiment']['task']}?"
        return {"question": question, "answer": "There are no figures.", **_NOTHING, "cautions": _cautions(found, None)}
    baseline, compared = _compared(found, name)
    average = found["methods"][name]["average"] or {}
    figures = {
        "value": average.get("value"),
        "interval": average.get("interval"),
        "difference": compared.get("difference"),
        "difference_interval": compared.get("difference_interval"),
        "p": compared.get("p"),
    }
    verdict = _verdict(figures)
    return {
        "question": _question(found, name, baseline),
        "answer": _answer(found, name, baseline, figures, verdict),
        "verdict": verdict,
        "method": name,
        "baseline": baseline,
        **figures,
        "cautions": _cautions(found, name, figures),
    }


_NOTHING: dict[str, Any] = {
    "verdict": "unknown",
    **dict.fromkeys(("method", "baseline", "value", "interval", "difference", "difference_interval", "p")),
}


def named_method(found: dict[str, Any]) -> str | None:
    """The method that a run is about: the first of the experiment that transfers, else the source's adapter, else the first.

    Controls and ceilings are no candidates, and neither is the plain second stage where another is measured against it.
    """
    names = [name for name, row in found["methods"].items() if row["languages"]] or list(found["methods"])
    for kind in _TRANSFERS:
        of_kind = candidates(found, kind, names)
        if of_kind:
            return of_kind[0]
    for name in names:
        if method(name).reads == "instead":
            return name
    return BASELINE if BASELINE in names else next(iter(names), None)


def candidates(found: dict[str, Any], kind: str, names: Sequence[str] | None = None) -> list[str]:
    """The methods of a kind that a run could be about, in the experiment's order."""
    rows = [method(name) for name in (found["methods"] if names is None else names)]
    of_kind = [row.name for row in rows if row.adapter == kind and not row.name.startswith("control")]
    if kind == "second" and len(of_kind) > 1:
        of_kind = [name for name in of_kind if name != UNFUSED]
    return of_kind


def _compared(found: dict[str, Any], name: str) -> tuple[str | None, dict[str, Any]]:
    """What a method is measured against, and its average difference to it."""
    methods = found["methods"]
    average = methods[name]["average"] or {}
    row = method(name)
    if row.adapter == "second" and name != UNFUSED and UNFUSED in methods:
        return UNFUSED, average.get("against_unfused") or {}
    if name != BASELINE:
        return (BASELINE, average) if BASELINE in methods else (None, {})
    other = (methods["vanilla"]["average"] or {}) if "vanilla" in methods else {}
    if "difference" not in other:
        return None, {}
    low, high = other["difference_interval"]
    # What is recorded is the base model's difference to this one.
    turned = {"difference": 0.0 - other["difference"], "difference_interval": [0.0 - high, 0.0 - low], "p": other["p"]}
    return "vanilla", turned


def _verdict(figures: dict[str, Any]) -> str:
    if figures["difference"] is None:
        return "unknown"
    low, high = figures["difference_interval"]
    if figures["p"] >= LEVEL or low <= 0 <= high:
        return "undecided"
    return "better" if figures["difference"] > 0 else "worse"


# Sentences.


def _question(found: dict[str, Any], name: str, baseline: str | None) -> str:
    task, backbone = found["experiment"]["task"], model_name(found["backbone"]["name"])
    source, where = name_of(found["source"]), _languages(found["targets"])
    title = found["methods"][name]["title"]
    begin = f"On the task {task}, with {backbone} and {source} as the source language"
    if baseline is None:
        return f"{begin}, how well does {title} answer in {where}?"
    return f"{begin}, does {title} answer better in {where} than {_called(found, baseline)}?"


def _called(found: dict[str, Any], name: str) -> str:
    """A baseline in words."""
    if name == BASELINE:
        return f"{name_of(found['source'])} fine-tuning"
    if name == UNFUSED:
        return "the same training without fusion"
    return "the base model" if name == "vanilla" else found["methods"][name]["title"]


def _answer(found: dict[str, Any], name: str, baseline: str | None, figures: dict[str, Any], verdict: str) -> str:
    title, targets = found["methods"][name]["title"], found["targets"]
    if figures["value"] is None:
        return _without_average(found, name)
    where = f"In {name_of(targets[0])}" if len(targets) == 1 else f"On average over {_languages(_averaged(found))}"
    said = f"{where}, {title} {_scored(found['metric'], figures['value'])}"
    if figures["interval"]:
        low, high = figures["interval"]
        said += f" (95 % interval {_points(low)} to {_points(high)})"
    if baseline is None:
        return f"{said}; there is nothing in this run to compare it with."
    called = _called(found, baseline)
    if figures["difference"] is None:
        return f"{said}; how far that is from {called} cannot be told on average{_one_by_one(found, name, baseline)}."
    if baseline == BASELINE and figures["difference"] == 0 and _is_source(found, name):
        chosen = f"λ = {_at(method(name).neutral)} was {_how(found, name)}, so nothing is grafted"
        same = (
            ""
            if figures["value"] == (found["methods"][baseline]["average"] or {}).get("value")
            else " of the same seeds"
        )
        return f"{said}, and so does {called}{same}: {chosen}, and the two are one adapter."
    low, high = figures["difference_interval"]
    said += f", {_than(figures['difference'])} {called} ({_end(low)} to {_end(high)}, {p_text(figures['p'])})"
    return f"{said}{_by_group(found, name, baseline)}: {_MEANS[verdict]}."


_MEANS = {
    "better": "a gain that chance in the choice of items does not explain",
    "worse": "a loss that chance in the choice of items does not explain",
    "undecided": "no difference can be told from these data",
}


def _scored(metric: str, value: float) -> str:
    figure = _points(value)
    if metric == "accuracy":
        return f"answers {figure} % right"
    return f"reaches an exact match of {figure} %" if metric == "exact_match" else f"reaches a ROUGE-L of {figure}"


def _than(difference: float) -> str:
    points = _points(abs(difference))
    if points == "0.0":
        return "within a tenth of a point of"
    amount = f"{points} {'point' if points == '1.0' else 'points'}"
    return f"{amount} {'more' if difference > 0 else 'less'} than"


def _by_group(found: dict[str, Any], name: str, baseline: str) -> str:
    """What the difference is in each group of targets, where there are several."""
    said: list[str] = []
    groups = found["methods"][name].get("groups") or {}
    for group, average in groups.items():
        cell = (average or {}) if baseline != UNFUSED else (average or {}).get("against_unfused") or {}
        if baseline == "vanilla" or "difference" not in cell:
            return ""
        low, high = cell["difference_interval"]
        said.append(f"{group} {_signed(cell['difference'])} ({_signed(low)} to {_signed(high)})")
    return f", by group {', '.join(said)}" if len(said) > 1 else ""


def _without_average(found: dict[str, Any], name: str) -> str:
    """The answer where a method has no figure in one of the targets."""
    row, targets = found["methods"][name], _averaged(found)
    known = [code for code in targets if code in row["languages"]]
    if not known:
        return f"{row['title']} has no figures in {_languages(found['targets'])}."
    unit = "" if found["metric"] == "rouge_l" else " %"
    parts = [f"{_points(row['languages'][code]['value'])}{unit} in {name_of(code)}" for code in known[:_NAMED]]
    more = f" and {len(known) - _NAMED} more" if len(known) > _NAMED else ""
    lacking = _languages([code for code in targets if code not in known])
    listed = f"{METRICS[found['metric']]} is {', '.join(parts)}{more}"
    return f"{row['title']} has no average, because it has no figures in {lacking}; its {listed}."


def _one_by_one(found: dict[str, Any], name: str, baseline: str) -> str:
    """Why there is no difference on average, and in how many languages one can be told."""
    lacking = [code for code in _averaged(found) if code not in found["methods"][baseline]["languages"]]
    why = f"it has no figures in {_languages(lacking)}" if lacking else "its languages have items of their own"
    of = {code: mark for code, mark in marks(found).get(name, {}).items() if code in found["targets"]}
    if not of or baseline != BASELINE:  # What marks are of.
        return f" ({why})"
    up, down = (sum(m["significant"] and m["direction"] == sign for m in of.values()) for sign in "+-")
    told = f"one by one it is better in {up} and worse in {down} of {len(of)} languages"
    return f" ({why}); {told}"


def _is_source(found: dict[str, Any], name: str) -> bool:
    """Whether what was evaluated is the source's adapter itself, because the weight that was chosen adds nothing."""
    row = method(name)
    if row.adapter != "graft" or row.stack is not None or name not in found["selections"]:
        return False
    return all(weight == row.neutral for weight in _weights(found, name).values())


def _how(found: dict[str, Any], name: str) -> str:
    """Whether a method's weight was chosen or given."""
    selection = found["selections"][name]
    return "chosen" if "by_language" in selection or selection.get("curve") else "given"


def _weights(found: dict[str, Any], name: str) -> dict[str, Any]:
    """The weight that a method has in each target language."""
    chosen = found["selections"][name]
    if "by_language" in chosen:
        return {
            code: chosen["by_language"][code]["weight"] for code in found["targets"] if code in chosen["by_language"]
        }
    return dict.fromkeys(found["targets"], chosen["weight"])


def _cautions(found: dict[str, Any], name: str | None, figures: dict[str, Any] | None = None) -> list[str]:
    said = [found["chance_and_size_warning"]] if found.get("chance_and_size_warning") else []
    said += _trainings(found, name)
    if name is not None:
        row = method(name)
        said += _chosen(found, row)
        said += _many(found, row)
        said += _small(found, figures or {})
        said += _sampled(found)
    return [*said, *_absent(found), *_too_many(found)]


def _trainings(found: dict[str, Any], name: str | None) -> list[str]:
    """Of how many trainings the figures are; those of the method that is spoken of may be fewer than others have."""
    seeds, of = len(found["seeds"]), "The intervals are"
    if name is not None:
        if all(method(other).adapter == "none" for other in found["methods"]):
            return []
        cells = found["methods"][name]["languages"].values()
        own = max((len(cell["by_seed"]) for cell in cells), default=seeds)
        if method(name).adapter != "none" and own != seeds:
            seeds, of = own, f"{found['methods'][name]['title']}'s intervals are"
    covered = "which items were asked, not how much trainings differ."
    if seeds > 1:
        return [f"{of} of the mean of {seeds} seeds: they cover {covered}"]
    if seeds != len(found["seeds"]):
        return [f"{of} of one seed, compared with others of the same: they cover {covered}"]
    return [f"Each adapter was trained once: the intervals cover {covered}"]


def _chosen(found: dict[str, Any], row: Method) -> list[str]:
    """What is to be known of how the weight was chosen."""
    said: list[str] = []
    selection = found["selections"].get(row.name)
    if selection is None:
        return said
    weights = _weights(found, row.name)
    still = [code for code, weight in weights.items() if weight == row.neutral]
    if still:
        where = "" if len(still) == len(weights) else f" in {_languages(still)}"
        what = f"the graft is {name_of(found['source'])} fine-tuning"
        if row.stack is not None:
            what = f"the language adapter stays {name_of(found['source'])}'s"
        said.append(
            f"λ = {_at(row.neutral)} was {_how(found, row.name)}{where}: there {what}, and nothing of the target language is added."
        )
    own = [code for code in found["experiment"].get("development") or () if code in found["targets"]]
    if own and selection.get("curve"):
        verb = "is" if len(own) == 1 else "are"
        said.append(
            f"λ was chosen on validation items of {_languages(own)}, which {verb} also among the targets: not held out."
        )
    return said


def _many(found: dict[str, Any], row: Method) -> list[str]:
    """That other methods of the kind were run, too, and that this one was not picked by its figures."""
    others = candidates(found, row.adapter)
    if len(others) < 2 or row.name not in others:
        return []
    return [
        f"{_count(len(others))} methods of this kind were compared: the sentence is about the first of the experiment's list, "
        "whatever the figures; marks in the tables are adjusted for the number of comparisons (Holm)."
    ]


def _small(found: dict[str, Any], figures: dict[str, Any]) -> list[str]:
    counts = [n for code, n in found["items"].items() if code in found["targets"]]
    if not counts or min(counts) >= _FEW:
        return []
    asked = f"Only {min(counts)} items a language were asked"
    if min(counts) != max(counts):
        asked = f"In some languages only {min(counts)} items were asked"
    if min(counts) == 1:
        asked = asked.replace("items a language were", "item a language was").replace("items were", "item was")
    low, high = figures.get("difference_interval") or (0.0, 0.0)
    if high - low <= 0:
        return [f"{asked}: intervals are wide."]
    return [f"{asked}: a difference of less than about {_points((high - low) / 2)} points cannot be seen in them."]


def _sampled(found: dict[str, Any]) -> list[str]:
    return [
        f"{found['methods'][name]['title']} was asked on a sample of the items, and is compared with others on that sample."
        for name in found.get("samples") or {}
    ]


def _absent(found: dict[str, Any]) -> list[str]:
    """The cells of the table that have no figure, each reason once."""
    by_reason: dict[str, dict[str, list[str]]] = {}
    for name, code, why in found["absent"]:
        if code != found["source"]:
            by_reason.setdefault(why, {}).setdefault(found["methods"].get(name, {}).get("title", name), []).append(code)
    return [
        "No figures: " + "; ".join(f"{title} in {_languages(codes)}" for title, codes in cells.items()) + f" ({why})."
        for why, cells in by_reason.items()
    ]


def _too_many(found: dict[str, Any]) -> list[str]:
    """Where so many comparisons are made that no p of so few draws can pass the adjustment."""
    family = sum(1 for _ in _tests(found, averages=False))
    if family / (DRAWS + 1) < LEVEL:
        return []
    return [
        f"{family} differences of methods and languages are tested: the smallest p of {DRAWS:,} permutations is too large for any "
        "of them to be marked. Look at the averages."
    ]


# Marks.


def marks(found: dict[str, Any]) -> Marks:
    """Which differences to Eng-FT are significant, adjusted by Holm.

    Args:
        found: The figures of a run.

    Returns:
        By method, and below by language, `average` or `group:NAME`: the raw `p`, `adjusted` over all methods × languages
        (averages and groups are a family of their own), whether it is `significant` at .05, and the `direction` of the
        difference, `+` or `-` (`+` where there is none).
    """
    marked: Marks = {}
    for averages in (False, True):
        tests = list(_tests(found, averages=averages))
        adjusted = holm([cell["p"] for _, _, cell in tests])
        for (name, where, cell), p in zip(tests, adjusted, strict=True):
            direction = "-" if cell["difference"] < 0 else "+"
            mark = {"p": cell["p"], "adjusted": p, "significant": p < LEVEL, "direction": direction}
            marked.setdefault(name, {})[where] = mark
    return marked


def _tests(found: dict[str, Any], *, averages: bool) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every difference to Eng-FT that was tested: of languages, or of averages over several."""
    for name, row in found["methods"].items():
        cells = row["languages"]
        if averages:
            cells = {
                AVERAGE: row["average"],
                **{f"{GROUP}{group}": c for group, c in (row.get("groups") or {}).items()},
            }
        for where, cell in cells.items():
            if cell and cell.get("p") is not None:
                yield name, where, cell


# Words.


def model_name(name: str) -> str:
    """What to call a model: its name; of one in a folder, the folder's, not where it is on a machine."""
    if PureWindowsPath(name).is_absolute():
        return PureWindowsPath(name).name or name
    path = PurePosixPath(name)
    return (path.name or name) if path.is_absolute() or name.startswith(("~", ".")) else name


def p_text(p: float) -> str:
    """A p-value as texts print it: never as zero, and without the zero in front."""
    if p < 0.001:
        return "p < .001"
    if p < LEVEL and f"{p:.3f}" == f"{LEVEL:.3f}":
        return "p < .05"  # What rounding would put on the other side.
    if p > 0.99:
        return "p > .99"
    return "p = " + (f"{p:.3f}" if p < 0.1 else f"{p:.2f}").removeprefix("0")


def _averaged(found: dict[str, Any]) -> list[str]:
    """The targets that have data anywhere, over which averages are."""
    return [code for code in found["targets"] if code in found["items"]] or list(found["targets"])


def _languages(codes: Sequence[str]) -> str:
    if len(codes) > _NAMED:
        return f"{len(codes)} languages"
    names = [name_of(code) for code in codes]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _count(number: int) -> str:
    words = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten")
    return words[number] if number < len(words) else str(number)


def _points(share: float) -> str:
    return f"{100 * share:.1f}".replace("-0.0", "0.0").replace("-", "−")


def _signed(share: float) -> str:
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def _end(share: float) -> str:
    """The end of an interval; one that rounds to zero and is none has a further digit."""
    text = _signed(share)
    return f"{100 * share:+.2f}".replace("-", "−") if text == "0.0" and abs(share) >= 0.5e-4 else text


def _at(weight: float) -> str:
    return f"{weight:g}"
