"""Job arrays: every step once, inputs first; scripts that bash runs as they are meant, whatever names and paths hold."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingraft.config import Experiment, load_experiment, parse_yaml, validated
from lingraft.costs import Needs
from lingraft.costs.needs import LOADING
from lingraft.errors import ConfigError, UserError
from lingraft.locating import Located, locate
from lingraft.plan import VERSIONS, Plan, Step, make_plan
from lingraft.slurm import Options, export
from lingraft.slurm.scripts import Settings, resolved
from lingraft.slurm.waves import LIGHT, Array, Packing, arrays
from lingraft.store import Store
from tests.fake_slurm import Cluster, keys_of, waited_for

ROOT = Path(__file__).parents[2]
RECIPES = sorted([*(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "src/lingraft/recipes").glob("*.yaml")])


def needs(step: Step) -> Needs:
    if step.kind not in LOADING:
        return Needs(1, 0, 10**9, 0)
    device = step.config.get("gpus", 1)
    memory = step.config.get("memory", 8 * 10**9)
    return Needs(2, device, memory, memory if device else 0)


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[Step], list[Step]]:
    """Steps of all kinds, inputs first, and those of them that are pending; what needs a pending step is pending too."""
    steps: list[Step] = []
    pending: list[Step] = []
    for number in range(draw(st.integers(0, 40))):
        chosen = draw(st.lists(st.integers(0, max(0, number - 1)), max_size=4, unique=True)) if number else []
        inputs = {f"input{place}": steps[n] for place, n in enumerate(chosen)}
        config = {
            "number": number,
            "gpus": draw(st.integers(0, 2)),
            "memory": draw(st.sampled_from([None, 10**9, 40 * 10**9])),
        }
        step = Step(draw(st.sampled_from(sorted(VERSIONS))), config, inputs)
        steps.append(step)
        if draw(st.booleans()) or any(needed in pending for needed in inputs.values()):
            pending.append(step)
    return steps, pending


PACKINGS = st.builds(Packing, st.integers(1, 3), st.integers(1, 4), st.integers(1, 5))


@settings(deadline=None)
@given(plans(), PACKINGS)
def test_every_step_once_and_inputs_earlier(drawn: tuple[list[Step], list[Step]], packing: Packing) -> None:
    _, pending = drawn
    found = arrays(pending, needs, packing)
    made = [step.key for array in found for task in array.tasks for step in task]
    assert sorted(made) == sorted(step.key for step in pending)
    assert len({array.name for array in found}) == len(found)
    place = {step.key: (array, task) for array in found for task in array.tasks for step in task}
    earlier: dict[str, int] = {array.name: number for number, array in enumerate(found)}
    for array in found:
        assert all(earlier[name] < earlier[array.name] for name in array.after)
        for task in array.tasks:
            done: set[str] = set()
            for step in task:
                for needed in (n for n in step.inputs.values() if n.key in place):
                    other, others_task = place[needed.key]
                    # Made before it in its own task, or in an array that this one waits for.
                    assert needed.key in done if others_task is task else other.name in array.after
                done.add(step.key)


@settings(deadline=None)
@given(plans(), PACKINGS)
def test_tasks_ask_for_enough_and_are_no_larger_than_allowed(
    drawn: tuple[list[Step], list[Step]], packing: Packing
) -> None:
    _, pending = drawn
    for array in arrays(pending, needs, packing):
        assert 1 <= len(array.tasks) <= packing.largest
        for task in array.tasks:
            leads = [step for step in task if step.kind != "score"]
            assert len(leads) <= max((packing.of(step.kind) for step in leads), default=0)
            asked = [needs(step) for step in task]
            assert array.needs.cpus >= max(n.cpus for n in asked) and array.needs.gpus == max(n.gpus for n in asked)
            known = [n.memory for n in asked if n.memory is not None]
            assert array.needs.memory is None or (array.needs.memory >= max(known) and len(known) == len(asked))
        kinds = {step.kind for task in array.tasks for step in task}
        # No GPU waits while scores are counted, but for those of its own predictions.
        assert (not array.needs.gpus) or kinds & LOADING


def test_a_chain_worked_by_hand() -> None:
    train = Step("train", {"n": 0})
    asked = [Step("predict", {"n": n}, {"adapter": train}) for n in range(5)]
    scores = [Step("score", {"n": n}, {"predict": step}) for n, step in enumerate(asked)]
    select = Step("select", {"n": 0}, {str(n): step for n, step in enumerate(scores)})
    merge = Step("merge", {"n": 0}, {"task": train, "selection": select})
    last = Step("predict", {"n": 9}, {"adapter": merge})
    steps = [train, *asked, *scores, select, merge, last, Step("score", {"n": 9}, {"predict": last})]

    def shown(found: Sequence[Array]) -> list[tuple[str, list[str], tuple[str, ...]]]:
        return [(a.name, ["+".join(s.kind for s in task) for task in a.tasks], a.after) for a in found]

    pair = "predict+score"
    assert shown(arrays(steps, needs, Packing(asked=2))) == [
        ("01-gpu", ["train"], ()),
        ("02-gpu", [f"{pair}+{pair}", f"{pair}+{pair}", pair], ("01-gpu",)),
        ("03-light", ["select"], ("02-gpu",)),
        ("04-light", ["merge"], ("01-gpu", "03-light")),
        ("05-gpu", [pair], ("04-light",)),
    ]
    # What is finished is not waited for; scores whose predictions are there go together.
    assert shown(arrays([*scores[3:], select], needs, Packing())) == [
        ("01-light", ["score+score"], ()),
        ("02-light", ["select"], ("01-light",)),
    ]
    assert arrays([], needs, Packing()) == []


def test_light_steps_fill_tasks_and_long_arrays_are_split() -> None:
    scores = [Step("score", {"n": n}) for n in range(2 * LIGHT + 1)]
    (light,) = arrays(scores, needs, Packing())
    assert [len(task) for task in light.tasks] == [LIGHT, LIGHT, 1]
    trained = [Step("train", {"n": n}) for n in range(7)]
    assert [(a.name, len(a.tasks)) for a in arrays(trained, needs, Packing(largest=3))] == [
        ("01-gpu", 3),
        ("01-gpu-2", 3),
        ("01-gpu-3", 1),
    ]


@pytest.mark.parametrize(
    "given, remedy",
    [
        ("array=1-5", "leave it out"),
        ("dependency=afterok:1", "leave it out"),
        ("tpu.time=1", "gpu, cpu, light"),
        ("Account=x", "account=nlp"),
        ("=x", "account=nlp"),
        ("comment=a b", "submit.sh"),
        ("comment=$(reboot)", "submit.sh"),
        ("account=`id`", "submit.sh"),
        ('comment="x"', "submit.sh"),
        ("account=a\n#SBATCH --uid=0", "submit.sh"),
        ("account=", "submit.sh"),
        ("comment=a#b", "submit.sh"),
    ],
)
def test_settings_that_are_refused(given: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Settings([given])
    assert remedy in str(raised.value.remedy)


def test_settings_of_a_sort_go_before_those_of_all_and_those_before_what_is_derived() -> None:
    settings = Settings(["gpu.partition=a100", "partition=std", "exclusive", "gpu.gres=gpu:a100:1", "mem=9G"])
    own = {"gpus": "1", "mem": "24G", "time": "2:00:00"}
    assert settings.lines("gpu", own) == [
        "#SBATCH --time=2:00:00",
        "#SBATCH --partition=a100",
        "#SBATCH --exclusive",
        "#SBATCH --mem=9G",
        "#SBATCH --gres=gpu:a100:1",
    ]
    assert "#SBATCH --partition=std" in settings.lines("light", {}) and "#SBATCH --gpus=1" in settings.lines("cpu", own)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_an_experiment_is_written_as_it_was_read(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = load_experiment(recipe, ["training.learning_rate=1e-5"])
    path = tmp_path / "slurm" / "experiment.yaml"
    path.parent.mkdir()
    path.write_text(resolved(experiment, experiment.backbone.revision), encoding="utf-8")
    monkeypatch.chdir(tmp_path)  # It means the same from any folder.
    absolute = {"data_dir": found} if (found := _absolute(experiment.data_dir)) else {}
    reference = experiment.reference.model_copy(update={"data_dir": _absolute(experiment.reference.data_dir)})
    assert load_experiment(path) == experiment.model_copy(update={**absolute, "reference": reference})


def _absolute(folder: str | None) -> str | None:
    return folder if folder in (None, "bundled") else str(ROOT / folder)


@settings(deadline=None)
@given(st.text(max_size=40).filter(lambda text: text.isprintable() or "\n" in text))
def test_any_text_of_an_experiment_is_written_as_it_was_read(text: str) -> None:
    tree: dict[str, Any] = {"name": "x", "backbone": {"model": "m"}, "task": "topics", "targets": ["no", "sw"]}
    experiment = validated(Experiment, {**tree, "note": text, "trackers": ["5e-4", "no", "null", "1_0"]})
    assert validated(Experiment, parse_yaml(resolved(experiment, None))) == experiment


WITNESS = """
import json, os, sys, time, signal, pathlib
here = pathlib.Path(os.environ["WITNESS"])
keys = sys.argv[sys.argv.index("--only") + 1].split(",") if "--only" in sys.argv else ["all"]
said = {"argv": sys.argv[1:], "threads": os.environ["OMP_NUM_THREADS"], "cwd": os.getcwd(), "site": os.environ.get("SITE")}
begun = here / f"begun-{keys[0]}"
first = not begun.exists()
with (here / "said.jsonl").open("a") as file:
    file.write(json.dumps(said) + "\\n")
slow = os.environ.get("SLOW", "").split(",")
if keys[0] in slow and first:
    def interrupted(*_):
        (here / f"interrupted-{keys[0]}").touch()
        sys.exit(1)
    signal.signal(signal.SIGINT, interrupted)
    begun.touch()
    time.sleep(60)
begun.touch()
sys.exit(int(set(keys) & set(os.environ.get("FAILING", "").split(",")) != set()))
"""


class Exported:
    """A small plan, exported with a witness in lingraft's place."""

    def __init__(self, folder: Path, plan: Plan, located: Located, **options: Any) -> None:
        self.plan, self.folder = plan, folder
        (folder / "witness").mkdir(parents=True)
        (folder / "witness.py").write_text(WITNESS, encoding="utf-8")
        self.options = Options(command=(sys.executable, str(folder / "witness.py")), **options)
        self.store, self.located, self.out = Store(folder / "store"), located, folder / "out"
        self.found = self.again()
        self.cluster = Cluster(folder / "cluster")

    def again(self, **changes: Any) -> dict[str, Any]:
        return export(self.plan, self.store, self.located, self.out, replace(self.options, **changes))

    def run(self, monkeypatch: pytest.MonkeyPatch, **environment: str) -> dict[str, int]:
        monkeypatch.setenv("WITNESS", str(self.folder / "witness"))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        submitted = self.cluster.submit(self.found["submit"])
        assert submitted.returncode == 0, submitted.stderr
        return self.cluster.run()

    def said(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "witness/said.jsonl").read_text().splitlines()]

    def lines(self) -> list[list[str]]:
        return [
            said["argv"][said["argv"].index("--only") + 1].split(",")
            for said in self.said()
            if "--only" in said["argv"]
        ]

    def made(self) -> list[str]:
        return [key for keys in self.lines() for key in keys]

    def first(self, kind: str) -> str:
        """The key that a task with this kind of step begins with."""
        kinds = {step.key: step.kind for step in self.plan.steps}
        lines = [
            line
            for path in (self.out / "slurm").glob("steps-*.txt")
            for line in path.read_text(encoding="utf-8").splitlines()
        ]
        return min(line.split(",")[0] for line in lines if kinds[line.split(",")[0]] == kind)


@pytest.fixture(scope="module")
def small(tiny_folder: Path) -> tuple[Plan, Located]:
    tree = {
        "name": "small",
        "backbone": {"model": str(tiny_folder), "dtype": "float32", "device": "cuda"},
        "task": "topics",
        "targets": ["sw"],
        "development": ["vi"],
        "reference": {"text": "udhr/{language}.txt", "segment_tokens": 64, "max_segments": 10},
        "methods": ["vanilla", "eng-ft", "adamergex"],
        "selection": {"weights": [0.5, 1.0]},
        "data_dir": "bundled",
    }
    experiment = validated(Experiment, tree)
    located = locate(experiment.backbone)
    return make_plan(experiment, located), located


def test_what_is_written_runs_every_step_and_then_the_whole(
    small: tuple[Plan, Located], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = Exported(tmp_path, *small, at_once=3, settings=("account=nlp", "gpu.constraint=a100|h100"))
    statuses = exported.run(monkeypatch)
    assert set(statuses.values()) == {0}
    assert sorted(exported.made()) == sorted(step.key for step in exported.plan.steps)
    *_, last = exported.said()
    experiment = str(exported.out / "slurm/experiment.yaml")
    assert last["argv"] == ["run", experiment, "--store", str(tmp_path / "store"), "--out", str(tmp_path / "out")]
    assert {said["cwd"] for said in exported.said()} == {str(Path.cwd())}
    assert {said["threads"] for said in exported.said()} == {"1", "2"}
    jobs = {task.job["job_name"]: task.job for task in exported.cluster.tasks}
    assert all(job["account"] == "nlp" for job in jobs.values())
    assert jobs["small-01-gpu"]["constraint"] == "a100|h100" and jobs["small-01-gpu"]["gpus"] == "1"
    assert jobs["small-01-gpu"]["limit"] == 3 and jobs["small-01-gpu"]["signal"] == "B:USR1@120"
    assert jobs["small-finish"]["constraint"] is None and jobs["small-finish"]["gpus"] is None
    assert all(job["requeue"] for job in jobs.values())
    assert exported.found["steps"] == len(exported.plan.steps) and exported.found["gpu_memory"] > 0


NASTY = "a b'c\"d $(touch pwned) `touch pwned` ; touch pwned #%x%A\\ é"


def test_names_with_anything_in_them_reach_lingraft_as_they_are(
    small: tuple[Plan, Located], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / NASTY
    folder.mkdir()
    monkeypatch.chdir(folder)
    exported = Exported(folder, *small)
    monkeypatch.chdir(tmp_path)
    assert set(exported.run(monkeypatch).values()) == {0}
    assert {said["cwd"] for said in exported.said()} == {str(folder)}
    assert all(said["argv"][3:6] == [str(folder / "store"), "--out", str(folder / "out")] for said in exported.said())
    assert not list(tmp_path.rglob("pwned"))


def test_a_failed_task_keeps_nothing_else_from_running(
    small: tuple[Plan, Located], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = Exported(tmp_path, *small, steps_per_task=1)
    failing = exported.first("train")
    statuses = exported.run(monkeypatch, FAILING=failing)
    assert sorted(exported.made()) == sorted(step.key for step in exported.plan.steps)
    assert [name for name, status in statuses.items() if status] == [
        next(name for name in statuses if statuses[name]),
        "small-finish",
    ]
    log = exported.cluster.log("small-finish")
    assert "not finished: task" in log and "1 tasks did not end well" in log
    # The plain run would have made on one processor what a GPU was asked for.
    assert all("--only" in said["argv"] for said in exported.said())


def test_a_task_whose_time_is_up_is_interrupted_and_queued_again(
    small: tuple[Plan, Located], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = Exported(tmp_path, *small)
    slow = exported.first("train")

    def tell(task: Any) -> int | None:
        if task.restarts or f"begun-{slow}" in {p.name for p in (tmp_path / "witness").iterdir()}:
            return None
        if slow not in running(task):
            return None
        waited_for(tmp_path / "witness", f"begun-{slow}")
        return signal.SIGUSR1

    exported.cluster.during = tell
    assert set(exported.run(monkeypatch, SLOW=slow).values()) == {0}
    assert (tmp_path / "witness" / f"interrupted-{slow}").exists()
    assert sum(slow in keys for keys in exported.lines()) == 2
    (again,) = [task for task in exported.cluster.tasks if task.restarts]
    assert "queued again" in exported.cluster.log(again.name)


def running(task: Any) -> list[str]:
    """The keys of a task's line."""
    if task.number is None:
        return []
    name = task.job["text"].splitlines()[-1].split()[1]
    return keys_of((Path(task.job["cwd"]) / f"{name}.txt").read_text().splitlines()[task.number - 1])


def test_a_task_that_is_never_done_is_not_queued_for_ever(
    small: tuple[Plan, Located], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = Exported(tmp_path, *small, restarts=2)
    slow = exported.first("train")

    def tell(task: Any) -> int | None:
        if slow not in running(task):
            return None
        waited_for(tmp_path / "witness", f"begun-{slow}")
        (tmp_path / "witness" / f"begun-{slow}").unlink()  # It begins anew, and is told again.
        return signal.SIGUSR1

    exported.cluster.during = tell
    statuses = exported.run(monkeypatch, SLOW=slow)
    assert sum(slow in keys for keys in exported.lines()) == 3
    (stuck,) = [task for task in exported.cluster.tasks if task.restarts]
    assert statuses[stuck.name] == 1 and "after 2 restarts" in exported.cluster.log(stuck.name)


def test_a_job_that_is_stopped_ends_its_work_and_says_so(
    small: tuple[Plan, Located], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = Exported(tmp_path, *small)
    slow = exported.first("train")

    def tell(task: Any) -> int | None:
        if slow not in running(task) or task.restarts:
            return None
        waited_for(tmp_path / "witness", f"begun-{slow}")
        return signal.SIGTERM

    exported.cluster.during = tell
    assert set(exported.run(monkeypatch, SLOW=slow).values()) == {0}
    (again,) = [task for task in exported.cluster.tasks if task.restarts]
    assert "stopped from outside" in exported.cluster.log(again.name)
    assert (tmp_path / "witness" / f"interrupted-{slow}").exists()


def test_the_sites_set_up_is_read_and_kept(
    small: tuple[Plan, Located], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = Exported(tmp_path, *small)
    site = exported.out / "slurm/site.sh"
    # Such scripts use variables that are not set, and commands that fail.
    site.write_text('export SITE="here$nothing"\nfalse\nlingraft=("${lingraft[@]}" --quick)\n', encoding="utf-8")
    exported.again()
    assert set(exported.run(monkeypatch).values()) == {0}
    assert {said["site"] for said in exported.said()} == {"here"}
    assert all(said["argv"][:2] == ["--quick", "run"] for said in exported.said())


def test_what_is_finished_is_left_out_of_another_export(
    small: tuple[Plan, Located], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = Exported(tmp_path, *small)
    old = {path.name: path.read_text() for path in (exported.out / "slurm").glob("steps-*.txt")}
    trained = [step for step in exported.plan.steps if step.kind == "train"]
    for step in trained:
        with exported.store.making(step.kind, step.key, step.identity()):
            pass
    exported.found = exported.again()
    assert exported.found["steps"] == len(exported.plan.steps) - len(trained)
    assert set(exported.run(monkeypatch).values()) == {0}
    assert not {step.key for step in trained} & set(exported.made())
    # Jobs of the first export that still wait find their lists as they were.
    assert all((exported.out / "slurm" / name).read_text() == text for name, text in old.items())
    for step in exported.plan.steps:
        if not exported.store.has(step.kind, step.key):
            with exported.store.making(step.kind, step.key, step.identity()):
                pass
    assert exported.again()["arrays"] == [] and not list((exported.out / "slurm").glob("wave-*.sh"))


def test_a_step_on_several_gpus_is_launched_on_all(small: tuple[Plan, Located], tmp_path: Path) -> None:
    plan, located = small
    resources = plan.experiment.resources.model_copy(update={"gpus": 2, "cpus": 8, "memory": "10GB"})
    more = replace(plan, experiment=plan.experiment.model_copy(update={"resources": resources}))
    exported = Exported(tmp_path, more, located)
    script = (exported.out / "slurm/wave-01-gpu.sh").read_text()
    assert "--gpus=2" in script and "--cpus-per-task=8" in script and "--mem=10G" in script
    assert script.splitlines()[-1].endswith(" 2")
    (exported.out / "slurm/site.sh").write_text(f"distributed=({sys.executable} {tmp_path}/witness.py)\n")
    with pytest.MonkeyPatch.context() as monkeypatch:
        exported.run(monkeypatch)
    launched = [said["argv"] for said in exported.said() if "-m" in said["argv"]]
    assert {tuple(argv[:4]) for argv in launched} == {("--nproc-per-node=2", "-m", "lingraft.cli", "run")}


def test_a_list_that_is_not_the_exported_one_is_an_error(
    small: tuple[Plan, Located], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = Exported(tmp_path, *small)
    for path in (exported.out / "slurm").glob("steps-01-*.txt"):
        path.write_text("$(touch pwned)\n" * 9)
    statuses = exported.run(monkeypatch)
    assert statuses["small-01-gpu.1"] == 2
    assert "not the one that was exported" in exported.cluster.log("small-01-gpu.1")


def test_where_sbatch_refuses_what_was_submitted_is_named(small: tuple[Plan, Located], tmp_path: Path) -> None:
    exported = Exported(tmp_path, *small)
    (exported.cluster.folder / "refuse").write_text("2")
    submitted = exported.cluster.submit(exported.found["submit"])
    assert submitted.returncode != 0 and "scancel 100 101" in submitted.stderr and "QOS policy" in submitted.stderr


def test_where_sbatch_refuses_the_first_job_there_is_nothing_to_cancel(
    small: tuple[Plan, Located], tmp_path: Path
) -> None:
    exported = Exported(tmp_path, *small)
    (exported.cluster.folder / "refuse").write_text("0")
    submitted = exported.cluster.submit(exported.found["submit"])
    assert submitted.returncode != 0 and "error: not all was submitted\n" in submitted.stderr
    # Bash before 4.4 takes an empty array for an unset name, and would end within the message.
    text = Path(exported.found["submit"]).read_text()
    assert not re.findall(r"(?<!\+; to cancel what was: scancel )\$\{jobs\[\*\]\}", text)


def test_options_of_the_script_that_submits_are_handed_on(small: tuple[Plan, Located], tmp_path: Path) -> None:
    exported = Exported(tmp_path, *small)
    submitted = exported.cluster.submit(exported.found["submit"], "--comment=a 'b' $c", "--exclusive")
    assert submitted.returncode == 0, submitted.stderr
    jobs = [json.loads(path.read_text()) for path in exported.cluster.folder.glob("job-*.json")]
    assert {(job["comment"], job["exclusive"]) for job in jobs} == {("a 'b' $c", True)}


def test_numbers_that_make_no_sense_are_refused(small: tuple[Plan, Located], tmp_path: Path) -> None:
    plan, located = small
    for options in (Options(steps_per_task=0), Options(at_once=0), Options(largest=0)):
        with pytest.raises(UserError, match="is not above 0"):
            export(plan, Store(tmp_path / "store"), located, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_scripts_are_sound_bash(small: tuple[Plan, Located], tmp_path: Path) -> None:
    folder = tmp_path / NASTY
    exported = Exported(folder, *small)
    scripts = sorted((exported.out / "slurm").glob("*.sh"))
    assert len(scripts) > 5 and all(b"\r" not in script.read_bytes() for script in scripts)
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
    checker = os.environ.get("SHELLCHECK") or shutil.which("shellcheck")
    if checker is not None:
        found = subprocess.run([checker, *map(str, scripts)], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (["--export", "slurm", "--on", "ray"], "runs nothing"),
        (["--export", "slurm", "--dry-run"], "runs nothing"),
        (["--export", "slurm", "--only", "0" * 24], "runs nothing"),
        (["--slurm", "account=nlp"], "--slurm is of the jobs that --export writes"),
        (["--ray-address", "auto"], "--ray-address auto is of a Ray cluster"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_would_not_be_heeded_are_refused(tmp_path: Path, given: list[str], what: str) -> None:
    from click.testing import CliRunner

    from lingraft.cli import main

    done = CliRunner().invoke(main, ["run", str(tmp_path / "x.yaml"), *given])
    assert done.exit_code == 2 and what in done.output


def test_no_key_is_not_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from lingraft.cli import main
    from lingraft.commands import experiments

    asked: list[Any] = []
    monkeypatch.setattr(experiments, "run_experiment", lambda *given, **_: asked.append(given[4].only))
    for words in (["--only", ""], ["--only", "a,b"], []):
        assert CliRunner().invoke(main, ["run", "x.yaml", *words]).exit_code == 0
    assert asked == [("",), ("a", "b"), ()]
