"""Writes the page of the speed benchmarks, and its figure, from their results; measures nothing.

.venv/bin/python benchmarks/page.py [--results benchmarks/results]
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common

Found = Mapping[str, Any]
GOALS = {"label": 3.5, "lm": 1.5, "memory": 0.5, "scoring": 3.0, "grid": 1.3, "together": 1.5}
ABSENT = "not measured"


def read(folder: Path) -> dict[str, Any]:
    """All results that are there, by name."""
    names = ("limits", "training", "training-gpu", "profile", "profile-before", "scoring", "grid", "growth", "startup")
    paths = {name: folder / f"{name}.json" for name in names}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def seconds(found: Found) -> str:
    """Median and spread."""
    return f"{found['median_s']:.2f} [{found['min_s']:.2f}, {found['max_s']:.2f}]"


def verdict(value: float | None, goal: float, *, at_most: bool = False) -> str:
    """Whether a goal is met."""
    if value is None:
        return ABSENT
    return "met" if (value <= goal if at_most else value >= goal) else "**missed**"


# Goals


def goals(all_found: Found) -> list[str]:
    """Goals beside what was measured."""
    rows = [*_training_goals(all_found.get("training")), *_scoring_goals(all_found.get("scoring"))]
    grid = all_found.get("grid")
    value = grid["times"]["λ in place"]["times_the_bare"] if grid else None
    note = f"{grid['same_answers']} of {grid['answers']} answers as by merged files" if grid else ""
    rows.append(_goal("a grid of 8 weights λ, to 8 bare evaluations", "at most 1.3", value, GOALS["grid"], note, True))
    rows.append(_together_goal(all_found))
    return [common.table(["", "goal", "measured", "", "beside it"], rows), ""]


def _goal(what: str, goal: str, value: float | None, bound: float, note: str, at_most: bool = False) -> list[str]:
    shown = "" if value is None else f"{value:.2f}"
    return [what, goal, shown, verdict(value, bound, at_most=at_most), note]


def _ours(training: Found | None, case: str) -> Found:
    if training is None or case not in training["cases"]:
        return {}
    return training["cases"][case]["compared"].get("ours", {})


def _training_goals(training: Found | None) -> list[list[str]]:
    rows = []
    titles = {
        "label": "training on labels, times Trainer + PEFT",
        "lm": "causal LM at all positions, times Trainer + PEFT",
    }
    for case, title in titles.items():
        found = _ours(training, case)
        apart = found.get("largest_loss_difference")
        note = "" if apart is None else f"largest difference of a step's loss {apart:.1e}"
        exact = _ours(training, f"{case}-exact").get("largest_loss_difference")
        note += "" if exact is None else f" (in float32 {exact:.1e})"
        rows.append(_goal(title, f"at least {GOALS[case]}", found.get("times_faster"), GOALS[case], note))
    for case, title in (("label", "labels"), ("lm", "causal LM")):
        found = _ours(training, case)
        note = ""
        if found and training is not None:
            ways = training["cases"][case]["ways"]
            note = f"{ways['ours']['peak_mib']} to {ways['peer']['peak_mib']} MiB, the model included"
        value = found.get("memory_share")
        rows.append(
            _goal(
                f"peak memory at 8 × 128, {title}, share of the peer's",
                "at most 0.5",
                value,
                GOALS["memory"],
                note,
                True,
            )
        )
    return rows


def _scoring_goals(scoring: Found | None) -> list[list[str]]:
    found = scoring["rows"].get("xcopa", {}) if scoring else {}
    rows = [
        _goal("scoring XCOPA, times lm-eval", "at least 3", found.get("times_faster"), GOALS["scoring"], _same(found))
    ]
    each = (scoring or {}).get("as_each_has_it") or {}
    note = f"{each['same']} of {each['items']} answers the same" if each else ""
    title = "scoring topics by the first token, times lm-eval on whole candidates"
    rows.append(_goal(title, "at least 3", each.get("times_faster"), GOALS["scoring"], note))
    found = scoring["rows"].get("topics", {}) if scoring else {}
    title = "the same, lm-eval given candidates that end with that token"
    rows.append(_goal(title, "at least 3", found.get("times_faster"), GOALS["scoring"], _same(found)))
    return rows


def _same(found: Found) -> str:
    """How many answers are the same."""
    if "same" not in found:
        return ""
    others = f" ({found['undecided']} of the others undecided)" if found["same"] < found["items"] else ""
    margins = f"margins within {found['largest_margin_difference']:.1e}"
    return f"{found['same']} of {found['items']} answers the same{others}, {margins}"


def _together_goal(all_found: Found) -> list[str]:
    on_gpu = all_found.get("training-gpu", {}).get("cases", {}).get("together", {})
    here = all_found.get("training", {}).get("cases", {}).get("together", {})
    value = on_gpu.get("compared", {}).get("together", {}).get("times_faster")
    cpu = here.get("compared", {}).get("together", {}).get("times_faster")
    note = "" if cpu is None else f"on this processor {cpu:.2f} times, for which there is no goal"
    if value is None:
        note = _absent_gpu(all_found) + (f"; {note}" if note else "")
    return _goal("two adapters in one pass on a GPU, times one after the other", "at least 1.5", value, 1.5, note)


def _absent_gpu(all_found: Found) -> str:
    return "there is one, and nothing was run on it" if all_found.get("limits", {}).get("gpu") else "there is none here"


# Sections


def limits(found: Found) -> list[str]:
    """What the machine can do at most."""
    rows = [
        [f"matrix products, {dtype}, {title}", f"{_rate(rates[way])} GFLOP/s"]
        for dtype, rates in found["products_gflops"].items()
        for way, title in (("layers", "the shapes of Gemma 3 270M's layers"), ("square", "a large square"))
    ]
    rows += [
        [
            f"memory, {way}, arrays of {found['memory_gbs']['array_mib']:.0f} MiB",
            f"{_rate(found['memory_gbs'][way])} GB/s",
        ]
        for way in ("copy", "triad")
    ]
    rows += [
        [f"disk, {way}, {found['disk_mbs']['file_mb']:.0f} MB", f"{_rate(found['disk_mbs'][way])} MB/s"]
        for way in ("write and fsync", "read", "read again")
    ]
    rows.append(["threads", str(found["threads"])])
    return ["## What the machine can do", "", common.table(["", "median [least, most]"], rows), ""]


def _rate(found: Found) -> str:
    digits = 0 if found["median"] >= 100 else 1
    return f"{found['median']:.{digits}f} [{found['least']:.{digits}f}, {found['most']:.{digits}f}]"


def product_rate(limits: Found | None, dtype: str) -> float | None:
    """The greatest measured rate of matrix products, in GFLOP/s."""
    if limits is None or dtype not in limits["products_gflops"]:
        return None
    return max(rate["median"] for rate in limits["products_gflops"][dtype].values())


def training(found: Found, limits: Found | None) -> list[str]:
    """A table for every case."""
    where = "" if found["device"] == "cpu" else f" on {found['device']}"
    lines = [
        f"## Training{where}",
        "",
        f"{found['dtype']}, LoRA of rank 8 on all linear layers, AdamW. Both sides run the loop their users run, in a process "
        "each; steps take turns. Tokens are without padding. Memory is the most a process held since its model was loaded, the "
        "model included; *beyond*: less what it held then. The share is of the greatest rate of matrix products above, and "
        "counts what the layers multiply for every token, and the vocabulary's product where there is a loss (`training.flops`).",
        "",
    ]
    for case in found["cases"].values():
        rate = product_rate(limits, case["dtype"]) if found["device"] == "cpu" else None
        rows = []
        for key, way in case["ways"].items():
            row = case["compared"].get(key, {})
            share = ""
            lanes = 2 if key == "together" else 1
            if rate is not None and key != "positions":  # Of another arithmetic.
                shares = [lanes * g / s / rate for g, s in zip(case["gflop"], way["seconds"], strict=True)]
                share = f"{statistics.median(shares):.0%}"
            apart = row.get("largest_loss_difference")
            rows.append(
                [
                    found["titles"][key],
                    seconds(way),
                    f"{way['tokens_s']:.0f}",
                    f"{row['times_faster']:.2f} [{row['least']:.2f}, {row['most']:.2f}]" if row else "",
                    str(way["peak_mib"]),
                    str(way["beyond_model_mib"]),
                    share,
                    "" if apart is None else f"{apart:.1e}",
                ]
            )
        header = ["", "s a step", "tokens/s", "times the first", "peak MiB", "beyond", "share", "losses within"]
        gflop = statistics.median(case["gflop"])
        lines += [
            f"### {case['title']}",
            "",
            f"{case['model']}; {case['data']}; {gflop:.0f} GFLOP a step."
            + (f" Commit {case['commit']}." if case.get("commit") else ""),
            "",
            common.table(header, rows),
            "",
        ]
        lines += _losses(case, found["titles"])
    for name, reason in found["skipped"].items():
        lines.append(f"- {name}: {ABSENT}, {reason}.")
    return [*lines, ""] if found["skipped"] else lines


def _losses(case: Found, titles: Mapping[str, str]) -> list[str]:
    """The steps' losses side by side, where they are to be equal."""
    if case["dropout"] or not {"peer", "ours"} <= set(case["ways"]):
        return []
    digits = 6 if case["dtype"] == "float32" else 4
    body = [[titles[key], *(f"{loss:.{digits}f}" for loss in case["ways"][key]["losses"])] for key in ("peer", "ours")]
    header = ["loss of step", *(str(n + 1) for n in range(len(body[0]) - 1))]
    return [common.table(header, body), ""]


def profiles(after: Found | None, before: Found | None) -> list[str]:
    """Where a step's time goes, before and after."""
    there = [(name, found) for name, found in (("before", before), ("after", after)) if found]
    if not there:
        return []
    lines = ["## Where a step's time goes", ""]
    for objective, title in (("label", "label only"), ("lm", "causal LM")):
        parts = {name: found["profile"][objective] for name, found in there}
        kinds = list(dict.fromkeys(kind for part in parts.values() for kind in part["groups"]))
        rows = [
            [kind, *(f"{part['groups'].get(kind, 0):.2f}" for part in parts.values())]
            for kind in kinds
            if any(part["groups"].get(kind, 0) >= 0.005 for part in parts.values())
        ]
        rows.append(["all, as profiled", *(f"{sum(part['groups'].values()):.2f}" for part in parts.values())])
        rows.append(["a step without the profiler", *(f"{part['seconds']:.2f}" for part in parts.values())])
        heads = [f"{name} ({found['commit']})" for name, found in there]
        lines += [f"{title}, {'8 × 128'}, dropout 0.05, seconds of the calling thread by kind of operator:", ""]
        lines += [common.table(["", *heads], rows), ""]
    name, found = there[-1]
    lines += [f"The operators, {name}, label only:", "", "```", found["profile"]["label"]["table"].rstrip(), "```", ""]
    return lines


def scoring(found: Found) -> list[str]:
    """Items a second beside lm-eval."""
    rows = []
    for row in found["rows"].values():
        beside = ["", "", "", "", ""]
        if "peer" in row:
            beside = [
                f"{row['peer']['items_s']:.2f} [{row['peer']['items_s_least']:.2f}, {row['peer']['items_s_most']:.2f}]",
                str(row["batch_size"]),
                f"{row['times_faster']:.2f} [{row['least']:.2f}, {row['most']:.2f}]",
                f"{row['same']} of {row['items']}",
                f"{row['largest_margin_difference']:.1e}",
            ]
        ours = row["ours"]
        speed = f"{ours['items_s']:.2f} [{ours['items_s_least']:.2f}, {ours['items_s_most']:.2f}]"
        rows.append([row["title"], speed, *beside])
    header = ["", "lingraft, items/s", "lm-eval, items/s", "its batch", "times", "same answers", "margins within"]
    lines = [
        "## Scoring",
        "",
        "float32; the same prompts and candidates; lm-eval at the better of batch sizes "
        f"{' and '.join(next(iter(found['rows'].values())).get('tried_s', {'1': 0, '8': 0}))}. "
        "*Margins within*: the largest difference, in nats, of two candidates' log-likelihoods between the sides.",
        "",
        common.table(header, rows),
        "",
    ]
    if found["as_each_has_it"]:
        each = found["as_each_has_it"]
        lines += [
            f"Topics as each side scores them when not told otherwise (lingraft: the first token that differs; lm-eval: whole "
            f"candidates): {each['times_faster']:.2f} times, {each['same']} of {each['items']} answers the same.",
            "",
        ]
    return lines + [f"- {name}: {ABSENT}, {reason}." for name, reason in found["skipped"].items()] + [""]


def grid(found: Found) -> list[str]:
    """A grid of λ."""
    rows = [[name, seconds(row), f"{row['times_the_bare']:.2f}"] for name, row in found["times"].items()]
    return [
        "## A grid of eight weights λ",
        "",
        f"{found['data']}; weights {', '.join(f'{w:g}' for w in found['weights'])}.",
        "",
        common.table(["", "s", "times the bare model"], rows),
        "",
        "bfloat16. In place and by merged files: "
        f"{found['same_answers']} of {found['answers']} answers the same, scores within "
        f"{found['largest_score_difference']:.1e} nats; in float32, {found['in_float32']['same_answers']} of "
        f"{found['in_float32']['answers']}, within {found['in_float32']['largest_score_difference']:.1e}. Of the items, "
        f"{found['changed_by_the_weight']} score differently at the first and the last weight.",
        "",
    ]


def growth(found: Found) -> list[str]:
    """How cost grows."""
    tasks = sorted({row["tasks"] for row in found["plans"]})
    languages = sorted({row["languages"] for row in found["plans"]})
    cell = {(row["tasks"], row["languages"]): row for row in found["plans"]}

    def hours(row: Found) -> str:
        return "" if row["estimated_s"] is None else f", {row['estimated_s'] / 60:.0f} min"

    body = [
        [
            str(t),
            *(
                f"{r['steps']} steps, {r['trained']} trained{hours(r)}, {r['bytes'] / 1e6:.0f} MB"
                for n in languages
                if (r := cell[t, n])
            ),
        ]
        for t in tasks
    ]
    steps = [
        ("tokens a batch", "tokens", found["tokens"]),
        ("rank, 4 × 128 tokens", "rank", found["ranks"]),
        ("parameters of a random model, 4 × 128 tokens", "parameters", found["sizes"]),
    ]
    lines = [
        "## How cost grows",
        "",
        "Planned steps of tasks × target languages, one store (100 made-up items a split, 100 lines of reference text; the four "
        f"methods of the default; the time is lingraft's estimate; {found['adapter_bytes'] / 1e6:.1f} MB an adapter, measured):",
        "",
        common.table(["tasks", *(f"languages: {n}" for n in languages)], body),
        "",
        f"A label-only training step, {found['threads']} thread(s), medians of {found['rounds']}:"
        + (f" {found['note']}" if found.get("note") else ""),
        "",
    ]
    for title, name, rows in steps:
        if rows:
            lines += [
                common.table(
                    [title, "s", "tokens/s", "peak MiB", "beyond the model"],
                    [
                        [
                            f"{row[name]:,}",
                            seconds(row),
                            f"{row['tokens'] / row['median_s']:.0f}",
                            str(row["peak_mib"]),
                            str(row["beyond_model_mib"]),
                        ]
                        for row in rows
                    ],
                ),
                "",
            ]
    return lines


def startup(found: Found) -> list[str]:
    """Time to the first line."""
    rows = [
        [name, seconds(row["first_line"]), seconds(row["whole"]), str(row["peak_mib"])]
        for name, row in found["commands"].items()
    ]
    return ["## Start", "", common.table(["", "s to the first line", "s to the end", "peak MiB"], rows), ""]


def unmeasured(all_found: Found) -> list[str]:
    """What is not on this page."""
    lines = [
        f"- {name}.json: {ABSENT}"
        for name in ("limits", "training", "profile", "scoring", "grid", "growth", "startup")
        if name not in all_found
    ]
    if "training-gpu" not in all_found:
        lines.append(f"- GPU: {ABSENT} ({_absent_gpu(all_found)}). All of the above is of a processor.")
    ways = {key for case in all_found.get("training", {}).get("cases", {}).values() for key in case["ways"]}
    titles = all_found.get("training", {}).get("titles", {})
    lines += [f"- Training with {title}: {ABSENT}." for key, title in titles.items() if key not in ways]
    return ["## What was not measured", "", *lines, ""] if lines else []


# The page


def page(all_found: Found, plot: str | None) -> str:
    """All of it."""
    some: Found = all_found.get("training") or next(iter(all_found.values()))
    where = some["machine"]
    listed = ", ".join(
        f"{name} {value}" for name, value in where.items() if name not in ("processor", "cores", "memory_gib")
    )
    shown = (found["commit"] for name, found in all_found.items() if name != "profile-before")
    commits = sorted(
        {one for commits in shown for one in commits.split(", ")}
    )  # Results of several runs name them all.
    lines = [
        "# Speed",
        "",
        "    make bench",
        "",
        f"{some['date']}; commit {', '.join(commits)}; {where['cores']} cores of {where['processor']}, "
        f"{where['memory_gib']} GiB, {some['threads']} threads; {listed}.",
        f"Medians of {some['rounds']} [least, most] where nothing else is said; what is compared takes turns in one run.",
        "",
        *goals(all_found),
    ]
    if plot:
        lines += [f"![Speed, memory and growth]({plot})", ""]
    if "limits" in all_found:
        lines += limits(all_found["limits"])
    for name in ("training", "training-gpu"):
        if name in all_found:
            lines += training(all_found[name], all_found.get("limits"))
    lines += profiles(all_found.get("profile"), all_found.get("profile-before"))
    for name, section in (("scoring", scoring), ("grid", grid), ("growth", growth), ("startup", startup)):
        if name in all_found:
            lines += section(all_found[name])
    return "\n".join([*lines, *unmeasured(all_found)]).rstrip() + "\n"


def draw(all_found: Found, path: Path) -> bool:
    """The figure: tokens a second, and the curves of growth; nothing where neither was measured."""
    panels = []
    if "training" in all_found:
        panels.append(_bars)
    if "growth" in all_found:
        panels += [_plans, _by_tokens, _by_rank, _by_size]
    if not panels:
        return False
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.hashsalt": "lingraft", "font.size": 9}):
        wide = 3 if len(panels) > 1 else 1
        tall = -(-len(panels) // wide)
        figure, grid = plt.subplots(tall, wide, figsize=(3.6 * wide, 3.0 * tall), layout="constrained", squeeze=False)
        for axes in grid.flat:
            axes.spines[["top", "right"]].set_visible(False)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_axis_off()
        for axes, panel in zip(grid.flat, panels, strict=False):
            panel(axes, all_found)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
    return True


def _bars(axes: Any, all_found: Found) -> None:
    """Tokens a second of both sides."""
    found = all_found["training"]["cases"].items()
    cases = {n: c for n, c in found if {"peer", "ours"} <= set(c["ways"]) and not n.endswith("-exact")}
    for offset, key in ((-0.2, "peer"), (0.2, "ours")):
        ways = [case["ways"][key] for case in cases.values()]
        values = [way["tokens_s"] for way in ways]
        below = [way["tokens_s"] - way["tokens_s_least"] for way in ways]
        above = [way["tokens_s_most"] - way["tokens_s"] for way in ways]
        places = [number + offset for number in range(len(cases))]
        axes.bar(places, values, 0.4, yerr=[below, above], label=all_found["training"]["titles"][key], capsize=2)
    axes.set_xticks(range(len(cases)), list(cases), rotation=30, ha="right")
    axes.set_ylabel("tokens/s")
    axes.legend(frameon=False, fontsize=8)


def _plans(axes: Any, all_found: Found) -> None:
    """Steps by languages, a line for every number of tasks."""
    rows = all_found["growth"]["plans"]
    for tasks in sorted({row["tasks"] for row in rows}):
        line = [row for row in rows if row["tasks"] == tasks]
        axes.plot(
            [r["languages"] for r in line], [r["steps"] for r in line], marker="o", markersize=3, label=f"{tasks} tasks"
        )
    axes.set_xlabel("target languages")
    axes.set_ylabel("planned steps")
    axes.legend(frameon=False, fontsize=8)


def _curve(axes: Any, rows: Sequence[Found], name: str, label: str) -> None:
    """Seconds of a step on the left, memory beyond the model on the right."""
    if not rows:
        axes.set_axis_off()
        return
    across = [row[name] for row in rows]
    medians = [row["median_s"] for row in rows]
    error = [
        [m - row["min_s"] for m, row in zip(medians, rows, strict=True)],
        [row["max_s"] - m for m, row in zip(medians, rows, strict=True)],
    ]
    axes.errorbar(across, medians, yerr=error, marker="o", markersize=3, capsize=2)
    if name != "parameters":
        axes.set_xscale("log", base=2)
    axes.set_xlabel(label)
    axes.set_ylabel("s a step")
    axes.set_ylim(bottom=0)
    other = axes.twinx()
    other.plot(across, [row["beyond_model_mib"] for row in rows], linestyle=":", color="gray")
    other.set_ylabel("MiB beyond the model (dotted)", fontsize=8)
    other.set_ylim(bottom=0)


def _by_tokens(axes: Any, all_found: Found) -> None:
    _curve(axes, all_found["growth"]["tokens"], "tokens", "tokens a batch")


def _by_rank(axes: Any, all_found: Found) -> None:
    _curve(axes, all_found["growth"]["ranks"], "rank", "rank")


def _by_size(axes: Any, all_found: Found) -> None:
    _curve(axes, all_found["growth"]["sizes"], "parameters", "parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    options = parser.parse_args()
    found = read(options.results)
    if not found:
        raise SystemExit(f"{options.results} holds no results")
    drawn = draw(found, options.results / "speed.svg")
    text = page(found, "speed.svg" if drawn else None)
    (options.results / "speed.md").write_text(text, encoding="utf-8")
    print("\n".join(text.splitlines()[:24]))


if __name__ == "__main__":
    main()
