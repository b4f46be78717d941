"""An evaluation that was killed goes on from its finished items, and finds what an uninterrupted one finds."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingraft.backbones import Backbone
from lingraft.config import BackboneConfig
from lingraft.evaluation import Asking, Questions, ask
from lingraft.journal import Journal
from lingraft.locating import locate
from lingraft.tasks.items import Example
from tests.conftest import save_tiny_model

CHOICES = [Example(str(n), f"Pick {'x' * n}:", (" (A) one", " (A) two", " (A)"), n % 3) for n in range(8)]
FREE = [Example(str(n), f"{'y' * n} go:", answer=f" {n} b", references=(f"{n} b",)) for n in range(8)]
ASKED = {
    "labels": (CHOICES, Asking(scoring="sequence", batch_tokens=60)),
    "first tokens": ([Example(e.id, e.prompt, (" a", " c"), 0) for e in CHOICES], Asking(batch_tokens=20)),
    "gold": (FREE, Asking(scoring="gold", batch_tokens=40)),
    "texts": (FREE, Asking(scoring="generation", new_tokens=6, batch_tokens=36)),
}


class Killed(Exception):
    """The end of a run."""


def killer(after: int) -> Callable[[int, int], None]:
    """Ends a run after so many batches."""
    batches = iter(range(1, 1000))

    def stop(done: int, total: int) -> None:
        if next(batches) >= after and done < total:
            raise Killed

    return stop


@pytest.mark.parametrize("name", ASKED)
def test_what_was_finished_is_not_computed_again(tiny: Backbone, tmp_path: Path, name: str) -> None:
    questions = Questions(tiny, *ASKED[name])
    expected = ask(tiny, None, questions)
    calls: list[int] = []
    handle = tiny.model.base_model.register_forward_pre_hook(lambda module, args: calls.append(1))
    try:
        ask(tiny, None, questions)
        whole, rounds = len(calls), 0
        calls.clear()
        found = None
        while found is None:
            rounds += 1
            journal = questions.journal(tmp_path / "j", "x")
            with suppress(Killed):
                found = ask(tiny, None, questions, None, killer(rounds), journal)
    finally:
        handle.remove()
    assert rounds > 2
    assert found == expected  # to the last bit
    # What all items begin with, or whether padding may stand in front, is computed again in every round.
    assert len(calls) <= whole + rounds
    journal.close()
    assert not (tmp_path / "j").exists()


@pytest.mark.parametrize("changed", ["items", "asking", "adapter"])
def test_a_journal_of_something_else_is_not_believed(tiny: Backbone, tmp_path: Path, changed: str) -> None:
    questions = Questions(tiny, *ASKED["labels"])
    ask(tiny, None, questions, None, None, questions.journal(tmp_path / "j", "x"))
    assert len(questions.journal(tmp_path / "j", "x").known("labels")) == 8
    examples, asking = ASKED["labels"]
    other = questions
    if changed == "items":
        other = Questions(tiny, examples[1:], asking)
    elif changed == "asking":
        other = Questions(tiny, examples, Asking(scoring="sequence", batch_tokens=60, max_length=99))
    assert other.journal(tmp_path / "j", "y" if changed == "adapter" else "x").known("labels") == {}


@given(st.integers(0, 400), st.binary(max_size=9))
def test_what_stands_before_the_damage_is_believed(
    tmp_path_factory: pytest.TempPathFactory, cut: int, junk: bytes
) -> None:
    path = tmp_path_factory.mktemp("journal") / "j"
    journal = Journal(path, "a")
    journal.add("texts", {0: "ü", 1: "two\nlines"})
    journal.add("gold", {0: [[-0.1, 1e-17]]})
    journal.add("texts", {2: " "})
    path.write_bytes(path.read_bytes()[:cut] + junk)
    again = Journal(path, "a")
    texts = {0: "ü", 1: "two\nlines", 2: " "}
    assert again.known("texts").items() <= texts.items()
    assert again.known("gold") in ({}, {0: [[-0.1, 1e-17]]})
    again.add("texts", texts)
    assert Journal(path, "a").known("texts") == texts


SCRIPT = """
import sys
from pathlib import Path
from lingraft.backbones import Backbone
from lingraft.config import BackboneConfig
from lingraft.evaluation import Questions, ask
from lingraft.locating import locate
from tests.unit.test_evaluation_journal import ASKED
backbone = Backbone(locate(BackboneConfig(model=sys.argv[1], dtype="float32", device="cpu")))
questions = Questions(backbone, *ASKED["texts"])
def report(done, total):
    print(done, flush=True)
    sys.stdin.readline()
ask(backbone, None, questions, None, report, questions.journal(Path(sys.argv[2]), "x"))
"""


@pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL")
def test_a_process_that_was_killed_leaves_its_finished_items(tiny: Backbone, tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "j"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tiny_folder), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    done = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    questions = Questions(tiny, *ASKED["texts"])
    journal = questions.journal(path, "x")
    assert 0 < done < 8 and 0 < len(journal.known("texts")) <= done
    assert ask(tiny, None, questions, None, None, journal) == ask(tiny, None, questions)


@pytest.mark.parametrize(
    "asking", [Asking(), Asking(scoring="generation", new_tokens=5), Asking(scoring="gold")], ids=str
)
def test_an_encoder_decoder_goes_on_too(tmp_path: Path, asking: Asking) -> None:
    folder = save_tiny_model(tmp_path / "t5", "t5")
    backbone = Backbone(locate(BackboneConfig(model=str(folder), dtype="float32", device="cpu")))
    questions = Questions(backbone, CHOICES, replace(asking, batch_tokens=40))
    expected = ask(backbone, None, questions)
    with pytest.raises(Killed):
        ask(backbone, None, questions, None, killer(2), questions.journal(tmp_path / "j", "x"))
    read: list[int] = []
    backbone.model.get_encoder().register_forward_pre_hook(
        lambda module, args, given: read.append(len(given["input_ids"])), with_kwargs=True
    )
    assert ask(backbone, None, questions, None, None, questions.journal(tmp_path / "j", "x")) == expected
    assert 0 < sum(read) < len(CHOICES)  # every item that was left, once
