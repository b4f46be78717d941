"""Does a run survive what befalls it? Kills, full disks, damaged bytes, several at once, and what is there in the end.

    .venv/bin/python benchmarks/faults.py [--quick] [--kills 50] [--out benchmarks/results/faults.json]

A tiny random model and an experiment of 44 steps (trainings, comparisons, evaluations, scores, selections, merges) are disturbed by
the harness of tests/faults; after every disturbance each step is compared, file by file, with an undisturbed run. A disturbance
that is not survived is written down with what went wrong, and the exit code is 1. Writes the page beside the result.
"""

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

sys.path.insert(0, str(common.HERE.parent))
KINDS = ("train", "predict", "score", "select", "merge", "compare")
LABELS = {"train": "train kind en", "predict": "predict adamergex λ=1", "score": "score adamergex λ=1"}


class Missing(Exception):
    """What a disturbance needs is not there; why."""


def disturbances(options: argparse.Namespace) -> dict[str, Callable[[Any], dict[str, Any]]]:
    """What is done, by what the page calls it; each gives figures."""
    quick = options.quick
    found: dict[str, Callable[[Any], dict[str, Any]]] = {
        "SIGKILL at random moments, the same store until it is finished": lambda lab: kills(lab, options.kills)
    }
    for kind in KINDS[:1] if quick else KINDS:
        what = f"death before every operation on the store, `{kind}`"
        found[what] = lambda lab, kind=kind: points(lab, kind, 4 if quick else None)
        if not quick:
            what = f"the same, and half of what was not synced is lost, `{kind}`"
            found[what] = lambda lab, kind=kind: points(lab, kind, None, powerless=True)
    if not quick:
        found["every process dies after 20 to 200 operations, until one gets to the end"] = chain
    found |= {
        "full disk, enlarged later": lambda lab: disk(lab, (0.5,) if quick else (0.02, 0.1, 0.25, 0.5, 0.75, 0.9)),
        "bytes of finished steps damaged": lambda lab: damaged(lab, 2 if quick else None),
        "the same experiment at once, processes": lambda lab: at_once(lab, 2 if quick else 4),
        "two hosts at once (namespaces), locks not passed on": hosts,
        "one of two hosts killed, the other takes over": taken_over,
    }
    return found


def kills(lab: Any, count: int) -> dict[str, Any]:
    from tests.faults.scenarios import random_kills

    found = random_kills(lab, count)
    note = f"{found['while_steps_were_made']} while steps were made, {found['stores']} stores"
    return {"count": found["kills"], "note": note}


def points(lab: Any, kind: str, most: int | None, powerless: bool = False) -> dict[str, Any]:
    from tests.faults.scenarios import crash_points

    step = lab.steps(kind, LABELS.get(kind, ""))[0]
    found = crash_points(lab, step, powerless=powerless, most=most)
    return {"count": found["deaths"], "note": f"{found['operations']} operations"}


def chain(lab: Any) -> dict[str, Any]:
    from tests.faults.scenarios import crash_chain

    return {"count": crash_chain(lab, (20, 200))["deaths"], "note": ""}


def disk(lab: Any, shares: tuple[float, ...]) -> dict[str, Any]:
    from tests.faults.test_space import FULL, Disk, used

    whole = used(lab.folder / "baseline")
    for share in shares:
        try:
            small = Disk(lab.path("disk"), int(whole * share))
        except OSError as error:
            raise Missing("no disk can be mounted here") from error
        try:
            store = small.folder / "store"
            lab.failing(store, FULL, "--out", str(lab.path("out")))
            small.resize(whole * 8)
            lab.finish(store, "--out", str(lab.path("out")))
            lab.check(store)
        finally:
            small.close()
    return {"count": len(shares), "note": "at " + ", ".join(f"{share:.0%}" for share in shares) + " of what is needed"}


def damaged(lab: Any, most: int | None) -> dict[str, Any]:
    from tests.faults.children import damage
    from tests.faults.test_corruption import CASES, step_of

    cases = CASES[:most]
    for label, name, how in cases:
        step = step_of(lab, label)
        store = lab.copy(without=lab.dependants(step))
        damage(store / step, how, name)
        said = " ".join(lab.finish(store).said().split())
        assert "set aside" in said, f"{name} of '{label}', {how}: not noticed"
        lab.check(store)
        shutil.rmtree(store)
    return {"count": len(cases), "note": "a bit changed, cut, emptied, deleted, a file added"}


def at_once(lab: Any, count: int, **befalls: Any) -> dict[str, Any]:
    from tests.faults.laboratory import made, tail, watched

    store, notes = lab.path("store"), lab.path("made")
    hosts_ = befalls.pop("hosts", [None] * count)
    with watched(lab, store):
        each = [lab.start(store, "--out", str(lab.path("out")), made=notes, host=name, **befalls) for name in hosts_]
        codes = [child.wait() for child in each]
    assert codes == [0] * len(each), "\n".join(tail(child.spec.log) for child in each)
    assert sorted(made(notes)) == sorted(lab.baseline), "a step was made more than once"
    lab.check(store)
    return {"count": len(each), "note": "every step made once"}


def hosts(lab: Any) -> dict[str, Any]:
    reason = _no_hosts()
    if reason:
        raise Missing(reason)
    return at_once(lab, 2, hosts=["one", "other"], pids=True, lockless=True)


def taken_over(lab: Any) -> dict[str, Any]:
    from tests.faults.laboratory import finished, made, tail, until, watched

    reason = _no_hosts()
    if reason:
        raise Missing(reason)
    store, notes = lab.path("store"), lab.path("made")
    far = {"pids": True, "lockless": True, "made": notes}
    with watched(lab, store):
        first = lab.start(store, host="one", pause=0.05, **far)
        until(lambda: len(finished(store)) >= 5 and list(store.glob("*/.*.partial")), first)
        second = lab.start(store, "--out", str(lab.path("out")), host="other", **far)
        time.sleep(0.5)
        first.kill()
        assert second.wait() == 0, tail(second.spec.log)
    assert len(made(notes)) == len(set(made(notes)))
    lab.check(store)
    return {"count": 1, "note": "every step made once"}


def _no_hosts() -> str | None:
    from tests.faults.test_several import hosts as reason

    return reason()


def page(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    machine = found["machine"]
    versions = ", ".join(f"{n} {machine[n]}" for n in ("python", "torch", "transformers", "peft") if n in machine)
    total, looked = found["disturbed"], found["compared"]
    rows = []
    for what, one in found["cases"].items():
        if "missing" in one:
            rows.append([what, "", "not done", "", one["missing"]])
            continue
        ended = "survived" if one["survived"] else "**not survived**"
        rows.append([what, str(one.get("count", "")), ended, f"{one['seconds']:.0f}", one["note"]])
    failures = [
        f"- {what}: `{one['failure']}`"
        for what, one in found["cases"].items()
        if not one.get("survived", "missing" in one)
    ]
    return "\n".join(
        [
            "# Faults",
            "",
            "    .venv/bin/python benchmarks/faults.py",
            "",
            f"{found['date']}; commit {found['commit']}; {machine['cores']} cores of {machine['processor']}; {versions}.",
            "",
            f"A tiny random model, an experiment of {found['steps']} steps that takes {found['undisturbed_s']:.1f} s undisturbed. "
            "After every disturbance the same command was run again until it ended, and each step's files were compared with those "
            f"of the undisturbed run: {total} disturbances, {looked['folders']} folders, {looked['files']} files, "
            f"{looked['bytes'] / 1e6:.1f} MB, {found['seconds']:.0f} s. While runs were at work, every folder was read as soon as "
            "it could be seen.",
            "",
            common.table(["what", "times", "", "s", ""], rows),
            "",
            *(["## What went wrong", "", *failures, ""] if failures else []),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few of each")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--out", type=Path, default=common.RESULTS / "faults.json")
    options = parser.parse_args()
    options.threads, options.rounds = 1, 1
    if options.quick:
        options.kills = min(options.kills, 3)
    os.environ["OMP_NUM_THREADS"] = "1"  # Before torch is imported: equal threads give equal bytes.
    from tests.faults.laboratory import laboratory

    cases: dict[str, Any] = {}
    began = time.monotonic()
    with laboratory() as lab:
        for what, do in disturbances(options).items():
            started = time.monotonic()
            one: dict[str, Any] = {"survived": True}
            try:
                one |= do(lab)
            except Missing as error:
                one = {"missing": str(error)}
            except AssertionError as error:
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                one = {"survived": False, "failure": " ".join(lines)[:400], "note": ""}
            one["seconds"] = time.monotonic() - started
            cases[what] = one
            print(f"{what}: {one}", file=sys.stderr, flush=True)
        found = {
            **common.heading(options),
            "steps": len(lab.baseline),
            "undisturbed_s": lab.seconds,
            "disturbed": sum(one.get("count", 0) for one in cases.values()),
            "compared": {"folders": lab.found.folders, "files": lab.found.files, "bytes": lab.found.bytes},
            "seconds": time.monotonic() - began,
            "cases": cases,
        }
    common.write(options.out, found)
    options.out.with_suffix(".md").write_text(page(found), encoding="utf-8")
    sys.exit(any(not one.get("survived", True) for one in cases.values()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    main()
