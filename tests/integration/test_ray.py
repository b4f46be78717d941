"""Steps on a local Ray cluster: the same bytes as here, whatever becomes of a worker, and clear words where it cannot be."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed")
psutil = pytest.importorskip("psutil", reason="psutil, which comes with accelerate, is not installed")

from lingraft.config import Experiment, load_experiment  # noqa: E402
from lingraft.errors import LingraftError, TransientError, UserError  # noqa: E402
from lingraft.locating import locate  # noqa: E402
from lingraft.plan import Step, make_plan  # noqa: E402
from lingraft.runner import Events, run  # noqa: E402
from lingraft.session import Session  # noqa: E402
from lingraft.store import Store  # noqa: E402
from lingraft.workers import cluster as workers  # noqa: E402
from lingraft.workers.cluster import Cluster  # noqa: E402
from tests.conftest import save_tiny_model  # noqa: E402
from tests.integration.test_pipeline import make_experiment  # noqa: E402

SMALL = ["seeds=[0]", "targets=[sw]", "methods=[eng-ft, adamergex-product]", "resources.cpus=1"]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("ray")
    return load_experiment(make_experiment(folder, save_tiny_model(folder / "model")), SMALL)


def contents(store: Path) -> dict[str, str]:
    """Digests of all that the steps hold, but for records and logs of time."""
    files = [p for p in store.glob("*/*/**/*") if p.is_file() and p.name != "step.json"]
    return {str(p.relative_to(store)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def makers() -> list[psutil.Process]:
    """The actors of clusters that this process has started."""
    below = psutil.Process().children(recursive=True)
    return [p for p in below if p.is_running() and any("ray::Maker" in part for part in p.cmdline())]


def test_a_worker_that_dies_costs_nothing_but_time_and_the_bytes_are_those_of_here(
    experiment: Experiment, tmp_path: Path
) -> None:
    ended: list[str] = []
    told: list[str] = []
    seen: list[str] = []
    killed: list[int] = []

    def end(step: Step) -> None:
        ended.append(step.key)
        if len(ended) == 3:  # One of the two is at work, or about to be.
            victim = makers()[0]
            killed.append(victim.pid)
            victim.kill()

    events = Events(
        step=lambda step, number, total: seen.append(step.key),
        ended=end,
        notice=told.append,
        failure=lambda step, error: told.append(f"failed: {error}"),
    )
    there = run(experiment, tmp_path / "there", store=tmp_path / "theirs", on="ray", events=events)
    assert killed and not any(text.startswith("failed") for text in told)
    assert sorted(ended) == sorted(step.key for step in there.plan.steps) and len(seen) == len(ended)
    here = run(experiment, tmp_path / "here", store=tmp_path / "ours")
    assert there.plan.steps == here.plan.steps and here.ran == len(here.plan.steps)
    assert contents(tmp_path / "theirs") == contents(tmp_path / "ours")
    store = Store(tmp_path / "theirs")
    assert {store.record("train", key)["environment"]["threads"] for kind, key in store.steps() if kind == "train"} == {
        1
    }
    assert not makers() and not list((tmp_path / "theirs").glob(".seen-*"))
    again = run(experiment, tmp_path / "there", store=tmp_path / "theirs", on="ray")
    assert (again.ran, again.kept) == (0, len(here.plan.steps)), "and no cluster is started for nothing"


@pytest.fixture
def cluster(experiment: Experiment, tmp_path: Path) -> Iterator[Cluster]:
    """A cluster of this machine."""
    located = locate(experiment.backbone)
    steps = make_plan(experiment, located).steps
    session = Session(experiment, located, Store(tmp_path / "store"))
    made = Cluster(session, str(tmp_path / "store"), None, steps, lambda *_: None, lambda text: None)
    yield made
    made.stop()


def look_until(cluster: Cluster, done: Callable[[], bool]) -> list[LingraftError | None]:
    """Asks for what has ended until something holds, with as many looks at the actors as there may be."""
    found: list[LingraftError | None] = []
    deadline = time.monotonic() + 120
    while not done() and time.monotonic() < deadline:
        cluster._looked = 0.0
        found += [error for _, error in cluster.ended(0.2)]
    return found


def test_an_actor_that_was_idle_is_not_taken_for_stuck_and_one_that_died_idle_is_let_go(cluster: Cluster) -> None:
    first, second, third = [step for step in cluster.steps if step.kind == "train"][:3]
    told: list[str] = []
    cluster.notice = told.append

    def carried(step: Step) -> list[LingraftError | None]:
        assert cluster.room(step)
        cluster.start([step])
        return look_until(cluster, lambda: not any(actor.group for actor in cluster._actors))

    assert carried(first) == [None]
    (actor,) = cluster._actors
    actor.pulse, actor.alive, actor.asked = None, True, 0.0
    assert carried(second) == [None]
    assert cluster._actors == [actor] and not told
    for process in makers():
        process.kill()
    look_until(cluster, lambda: not cluster._actors)
    assert not cluster._actors
    assert carried(third) == [None], "at the first try"


@pytest.mark.parametrize("how", ["refuses", "cannot start"])
def test_a_machine_that_can_make_nothing_ends_the_run_with_its_reason_or_is_left_out(
    how: str, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:

    class Unfit(workers.Maker):
        def __init__(self, *_: object) -> None:
            raise ImportError("no such name")

    if how == "refuses":
        monkeypatch.setattr(workers, "__version__", "0.0.0")
        says = "and 0.0.0 here"
    else:
        monkeypatch.setattr(workers, "Maker", Unfit)
        says = "a worker cannot start on a machine of the cluster: ImportError: no such name"
    step = next(step for step in cluster.steps if step.kind == "train")
    assert cluster.room(step)
    cluster.start([step])
    with pytest.raises(UserError, match=says):
        look_until(cluster, lambda: False)

    # Beside another machine, it is told, and the step tried there.
    told: list[str] = []
    cluster.notice = told.append
    cluster._left_out.clear()
    rooms = {"another": next(iter(cluster._nodes().values()))}
    monkeypatch.setattr(Cluster, "_nodes", lambda self: rooms)
    cluster._rooms = {next(node["NodeID"] for node in cluster._ray.nodes()): rooms["another"]}
    cluster._looked = time.monotonic() + 1000
    cluster.start([step])
    found: list[LingraftError | None] = []
    while not found:
        found = [error for _, error in cluster.ended(1.0)]
    assert isinstance(found[0], TransientError) and len(told) == 1 and "is left out" in told[0]


def test_a_step_that_is_too_large_for_the_cluster_is_refused(experiment: Experiment, tmp_path: Path) -> None:
    large = experiment.model_copy(
        update={"resources": experiment.resources.model_copy(update={"memory": "900TB", "cpus": 1})}
    )
    with pytest.raises(UserError, match="no machine of the cluster is large enough") as caught:
        run(large, tmp_path / "out", store=tmp_path / "store", on="ray")
    assert "resources.memory" in str(caught.value)


def test_a_cluster_that_does_not_answer_is_said(experiment: Experiment, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no Ray cluster answers at 'ray://"):
        run(experiment, tmp_path / "out", store=tmp_path / "store", on="ray", address="ray://127.0.0.1:1")


@pytest.mark.full
@pytest.mark.parametrize("fault", ["stalled", "headless"])
def test_a_worker_that_stalls_is_ended_and_a_dead_head_is_said(
    fault: str, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINGRAFT_STALLED", "6")
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from lingraft.config import load_experiment\n"
        "from lingraft.runner import Events, run\n"
        "folder = Path(sys.argv[1])\n"
        "run(load_experiment(folder / 'tiny.yaml', sys.argv[2:]), folder / 'out', on='ray',\n"
        "    events=Events(ended=lambda step: print('ended', flush=True), notice=lambda t: print(t, flush=True)))\n"
    )
    path = make_experiment(tmp_path, save_tiny_model(tmp_path / "model"))
    command = [sys.executable, "-c", script, str(path.parent), *SMALL]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said: list[str] = []
    assert process.stdout is not None
    reading = threading.Thread(target=lambda: said.extend(process.stdout), daemon=True)  # pyright: ignore[reportArgumentType]
    reading.start()
    deadline = time.monotonic() + 200
    while not any(line == "ended\n" for line in said) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    wanted = "ray::Maker" if fault == "stalled" else "gcs_server"
    below = psutil.Process(process.pid).children(recursive=True)
    found = [p for p in below if any(wanted in part for part in p.cmdline())]
    assert found, said
    os.kill(found[0].pid, signal.SIGSTOP if fault == "stalled" else signal.SIGKILL)
    process.wait(timeout=200)
    reading.join(10)
    if fault == "headless":
        assert process.returncode == 1 and "head at" in "".join(said), said
        assert subprocess.run(command, capture_output=True, timeout=300).returncode == 0
    else:
        assert process.returncode == 0, said
    steps = run(load_experiment(path, SMALL), tmp_path / "out").plan.steps
    assert sorted(Store(tmp_path / "store").steps()) == sorted((s.kind, s.key) for s in steps)
