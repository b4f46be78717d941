"""What each process of a launch does in the tests of several processes: `python distributed_worker.py MODE FOLDER`.

The same functions are called by the tests themselves, as one process.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from lingraft import processes
from lingraft.adapter import Adapter
from lingraft.backbones import Backbone
from lingraft.batching import answer_sequences, text_sequences
from lingraft.config import AdapterConfig, BackboneConfig, SpeedConfig, TrainingConfig
from lingraft.encoding import labelled_sequences
from lingraft.evaluation import Asking, ask
from lingraft.heads import Head
from lingraft.locating import locate
from lingraft.stepping import Learner
from lingraft.tasks.items import Example
from lingraft.training import Job, train, train_together

WORDS = ["tea", "a red kite", "the boat leaks and nobody minds", "so it goes", "bread", "two of them left early", "no"]
EXAMPLES = [Example(str(n), f"Text: {w}\nTopic:", (" yes", " no"), n % 2, parts=(w,)) for n, w in enumerate(WORDS)]
TEXTS = [[1, *(3 + (7 * n + k) % 90 for k in range(4 + 5 * n))] for n in range(6)]
LORA = AdapterConfig(rank=2, dropout=0.2)
FAMILIES = {"lora": LORA, "ia3": AdapterConfig(family="ia3"), "bottleneck": AdapterConfig(family="bottleneck")}
SOON = TrainingConfig(batch_size=4, epochs=3, learning_rate=0.01)


class Stop(Exception):
    """A training is stopped here."""


def backbone(folder: Path, **speed: Any) -> Backbone:
    return Backbone(locate(BackboneConfig(model=str(folder), dtype="float32", device="cpu")), SpeedConfig(**speed))


def place(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def families(model: Backbone, out: Path) -> None:
    for name, adapter in FAMILIES.items():
        train(model, answer_sequences(model, EXAMPLES, 128), place(out / name), adapter=adapter, training=SOON)


def encoder(model: Backbone, out: Path) -> None:
    head = Head("classification", 2)
    found = labelled_sequences(model, EXAMPLES, head, 64).sequences
    train(model, found, place(out / "encoder"), adapter=LORA, training=SOON, head=head)


def others(model: Backbone, out: Path) -> dict[str, Any]:
    """Plain text with a part held out; fewer texts than processes; two adapters in every pass."""
    held = SOON.model_copy(update={"held_out": 0.3, "loss_positions": 0.5})
    summary = train(model, text_sequences(TEXTS), place(out / "held"), adapter=LORA, training=held)
    alone = TrainingConfig(batch_size=1, epochs=1)
    train(model, answer_sequences(model, EXAMPLES[:3], 128), place(out / "alone"), adapter=LORA, training=alone)
    jobs = [
        Job(answer_sequences(model, EXAMPLES[n:], 128), place(out / f"lane{n}"), LORA, SOON, seed=n) for n in range(2)
    ]
    train_together(model, jobs)
    return summary["held_out"]


def sparse(model: Backbone, out: Path) -> None:
    adapter = AdapterConfig(family="sparse", entries=300)
    two = TrainingConfig(batch_size=4, epochs=1, learning_rate=0.01, weight_decay=0)
    train(model, answer_sequences(model, EXAMPLES, 128), place(out / "sparse"), adapter=adapter, training=two)


def stopped(model: Backbone, out: Path, at: int, by: Any) -> None:
    """A training that something happens to after so many steps, in the middle of an epoch; every step leaves a checkpoint."""
    taken = Learner.take

    def take(self: Learner, *args: Any) -> None:
        taken(self, *args)
        if self.done == at:
            by()

    Learner.take = take  # pyright: ignore[reportAttributeAccessIssue]
    try:
        go_on(model, out)
    except Stop:
        pass
    finally:
        Learner.take = taken


def go_on(model: Backbone, out: Path) -> None:
    few = SOON.model_copy(update={"batch_size": 2})
    sequences = answer_sequences(model, EXAMPLES, 128)
    train(model, sequences, place(out), adapter=LORA, training=few, checkpoint_seconds=0.0)


def stop() -> None:
    raise Stop


def die() -> None:
    if processes.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def short_of_memory(model: Backbone, out: Path, tokens: int, ranks: tuple[int, ...]) -> dict[str, Any]:
    """A training in which some processes have no room for as many tokens."""
    usual = model.hidden

    def hidden(ids: torch.Tensor, *args: Any, **given: Any) -> torch.Tensor:
        if ids.numel() > tokens and processes.rank() in ranks:
            raise torch.OutOfMemoryError("out of memory")
        return usual(ids, *args, **given)

    model.hidden = hidden  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return train(model, answer_sequences(model, EXAMPLES, 128), place(out), adapter=LORA, training=SOON)
    finally:
        del model.hidden


def asked(model: Backbone, adapter: Path) -> list[Any]:
    loaded = Adapter.load(adapter)
    chosen = ask(model, loaded, EXAMPLES, Asking(batch_tokens=64))
    written = ask(model, loaded, EXAMPLES, Asking(scoring="generation", new_tokens=4, batch_tokens=64))
    single = ask(model, loaded, EXAMPLES[:1], Asking())  # Of two processes one has nothing to do.
    return [[list(p.scores) for p in [*chosen, *single]], [w.text for w in written]]  # pyright: ignore[reportAttributeAccessIssue]


def main(mode: str, out: Path) -> None:
    with processes.said_once():
        decoder = backbone(out.parent / "llama")
        said: dict[str, Any] = {}
        if mode == "die":
            stopped(decoder, out / "killed", 5, die)
        if mode == "data":
            families(decoder, out)
            encoder(backbone(out.parent / "bert"), out)
            said["held_out"] = others(decoder, out)
            sparse(decoder, out)
            stopped(decoder, out / "stopped", 5, stop)
            go_on(decoder, out / "stopped")
            go_on(decoder, out / "whole")
            said["short"] = short_of_memory(decoder, out / "short", 60, (1,))["part_tokens"]
            if (out / "killed").exists():
                go_on(decoder, out / "killed")
        if mode == "sharded":
            families(decoder, out)
            again = backbone(out.parent / "llama", gradient_checkpointing=True, part_tokens=64)
            train(again, answer_sequences(again, EXAMPLES, 128), place(out / "again"), adapter=LORA, training=SOON)
            encoder(backbone(out.parent / "bert"), out)
            others(decoder, out)
            said["share"] = share_of(decoder)
        said["patience"] = patience()
        said["asked"] = asked(decoder, out / "lora") if mode != "die" else None
        if processes.is_main():
            (out / "said.json").write_text(json.dumps(said))


def patience() -> float:
    """Seconds that a process waits for the others."""
    backend = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))  # pyright: ignore[reportOptionalMemberAccess]
    return backend.options._timeout.total_seconds()


def share_of(model: Backbone) -> list[float]:
    """Which share of the layers' numbers each process holds."""
    layers = [m for m in model.model.modules() if type(m).__name__.endswith("DecoderLayer")]
    held = whole = 0
    for parameter in (p for layer in layers for p in layer.parameters()):
        local = getattr(parameter, "ds_tensor", None)
        if local is not None:
            held, whole = held + local.numel(), whole + parameter.ds_numel  # pyright: ignore[reportAttributeAccessIssue]
        else:
            held, whole = held + parameter.to_local().numel(), whole + parameter.numel()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    return processes.gathered(held / whole)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
