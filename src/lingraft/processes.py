"""Several processes in one training or evaluation, as torchrun and `accelerate launch` start them.

What the launcher put into the environment says who is who (RANK, WORLD_SIZE, LOCAL_RANK) and whether the base is sharded
(accelerate's ACCELERATE_USE_FSDP, ACCELERATE_USE_DEEPSPEED). Where nothing was launched every function here is that of one process:
it gives back what it was given. All of them are called by all processes, in the same order.
"""

import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lingraft.errors import LingraftError, UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")
_PATIENCE = timedelta(days=7)
"""How long a process waits: the first may fetch a model, or wait for what another run makes. One that ends is noticed at once."""
_LOST = "another process of this launch has ended or cannot be reached"
_REMEDY = "look at its message, and run the same command again: a training goes on from its last checkpoint"


@dataclass(frozen=True)
class Sharding:
    """How the layers of the frozen base are divided.

    Attributes:
        reshard: Whether a layer is given up as soon as it has been computed: less memory, and the backward pass gathers it again.
        deepspeed: DeepSpeed's configuration, where its stage 3 is asked for; None: PyTorch's FSDP.
    """

    reshard: bool = True
    deepspeed: Mapping[str, Any] | None = None


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """This process's number."""
    return int(os.environ["RANK"]) if world() > 1 else 0


def local_rank() -> int:
    """This process's number on its host: that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world() > 1 else 0


def local_world() -> int:
    """How many processes there are on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world() > 1 else 1


def is_main() -> bool:
    """Whether this process writes files and messages."""
    return rank() == 0


def sharding() -> Sharding | None:
    """How the launcher wants the base sharded; None: every process has all of it.

    Raises:
        UserError: It wants something that lingraft has not.
    """
    check_launcher()
    if world() == 1:
        return None
    if _says("ACCELERATE_USE_DEEPSPEED"):
        zero = _zero()
        # The batch is divided here; DeepSpeed wants to be told of one.
        given = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        return Sharding(deepspeed=given) if zero["stage"] == 3 else None
    if not _says("ACCELERATE_USE_FSDP"):
        return None
    strategy = os.environ.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD").upper()
    again = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").upper()
    # accelerate gives the first version's strategy by either name.
    chosen = {strategy, again} & {"2", "SHARD_GRAD_OP", "FALSE"}
    if {strategy, again} & {"3", "NO_SHARD"}:
        return None
    return Sharding(reshard=not chosen)


def _says(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


_OWN = "leave it out of the launcher's configuration"
_REFUSED: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    (
        "ACCELERATE_MIXED_PRECISION",
        ("fp16", "bf16", "fp8"),
        "mixed precision",
        f"set the base's type (dtype) and {_OWN}",
    ),
    ("ACCELERATE_DYNAMO_BACKEND", ("inductor", "eager", "aot_eager"), "compilation", f"set speed.compile and {_OWN}"),
    ("ACCELERATE_USE_MEGATRON_LM", ("true",), "Megatron-LM", "use data parallel or FSDP"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", ("true",), "a parallelism configuration", "use data parallel or FSDP"),
)
"""By a variable that accelerate sets the values that ask for what lingraft has a setting of its own for, or has not."""
_REFUSED_SHARDED: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    ("FSDP_OFFLOAD_PARAMS", ("true",), "parameters kept on the processor", "leave fsdp_offload_params out"),
    (
        "FSDP_ACTIVATION_CHECKPOINTING",
        ("true",),
        "FSDP's activation checkpointing",
        f"set speed.gradient_checkpointing=true and {_OWN}",
    ),
    ("FSDP_SHARDING_STRATEGY", ("4", "5", "hybrid_shard", "hybrid_shard_zero2"), "hybrid sharding", "use FULL_SHARD"),
    ("FSDP_RESHARD_AFTER_FORWARD", ("hybrid_shard", "hybrid_shard_zero2"), "hybrid sharding", "use FULL_SHARD"),
)


def check_launcher() -> None:
    """Makes sure that what the launcher asks for is what will be done.

    Raises:
        UserError: It is not.
    """
    if world() == 1:
        return
    table = _REFUSED + (_REFUSED_SHARDED if _says("ACCELERATE_USE_FSDP") else ())
    for name, values, what, remedy in table:
        if os.environ.get(name, "").lower() in values:
            raise UserError(f"the launcher asks for {what} ({name}={os.environ[name]})", remedy=remedy)
    if int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") or "1") > 1:
        raise UserError(
            "the launcher asks for gradient accumulation: training.batch_size is the whole batch, of all processes and parts",
            remedy=f"set training.batch_size and speed.part_tokens, and {_OWN}",
        )
    if _says("ACCELERATE_USE_DEEPSPEED"):
        zero = _zero()
        held = [name for name in ("offload_param", "offload_optimizer") if _offloads(zero.get(name))]
        if held or os.environ.get("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES"):
            raise UserError(
                f"the launcher asks DeepSpeed for {held[0] if held else 'layers of experts'}, which lingraft has not",
                remedy=_OWN,
            )


def _offloads(values: Any) -> bool:
    return isinstance(values, dict) and values.get("device", "none") != "none"


def _zero() -> dict[str, Any]:
    """DeepSpeed's ZeRO settings, as accelerate was told them.

    Raises:
        UserError: They cannot be read.
    """
    if path := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            zero = dict(found.get("zero_optimization", {}))
            return {**zero, "stage": int(zero.get("stage", 0))}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"DeepSpeed's configuration cannot be read ({error})",
                where=path,
                remedy="give the launcher a JSON file that all processes may read",
            ) from None
    offload = {
        name: {"device": os.environ.get(f"ACCELERATE_DEEPSPEED_{name.upper()}_DEVICE") or "none"}
        for name in ("offload_param", "offload_optimizer")
    }
    return {"stage": int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") or "2"), **offload}


def described() -> dict[str, Any]:
    """For the numeric environment: how many processes, and how the base is held; nothing of one process."""
    if world() == 1:
        return {}
    return {"processes": world(), "base": "sharded" if sharding() is not None else "whole"}


def start(device: "torch.device") -> None:
    """Joins the others, once; nothing without a launcher.

    Args:
        device: Where this process computes: what is exchanged goes from there.

    Raises:
        LingraftError: They cannot be reached.
    """
    import torch

    if world() == 1 or torch.distributed.is_initialized():
        return
    check_launcher()
    try:
        if _says("ACCELERATE_USE_DEEPSPEED"):  # accelerate would ask for DeepSpeed where only stage 3 needs it.
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
        else:
            from accelerate import PartialState

            PartialState(cpu=device.type == "cpu", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise LingraftError(
            f"the processes of this launch did not find one another: {error}",
            remedy="give the launcher the same address and port for all, and a network they share",
        ) from error
    if device.type == "cuda":
        torch.cuda.set_device(device)


@contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        _end_in_peace()
        raise LingraftError(f"{_LOST} ({next(iter(str(error).splitlines()), '')})", remedy=_REMEDY) from error


def add(tensor: "torch.Tensor") -> None:
    """Adds up a tensor over the processes, in place."""
    if world() > 1:
        import torch

        with _talking():
            torch.distributed.all_reduce(tensor)


def spread(tensor: "torch.Tensor") -> None:
    """Gives all processes the first one's values of a tensor, in place."""
    if world() > 1:
        import torch

        with _talking():
            torch.distributed.broadcast(tensor, 0)


def shared(value: Callable[[], T]) -> T:
    """What the first process finds, in all of them; the others do not look.

    Args:
        value: Finds it: what can be pickled.
    """
    if world() == 1:
        return value()
    import torch

    held = [value() if is_main() else None]
    with _talking():
        torch.distributed.broadcast_object_list(held, 0)
    return held[0]  # pyright: ignore[reportReturnType]


def gathered(value: T) -> list[T]:
    """Every process's value, in all of them, by number."""
    if world() == 1:
        return [value]
    import torch

    found: list[Any] = [None] * world()
    with _talking():
        torch.distributed.all_gather_object(found, value)
    return found


def in_turn(make: Callable[[], T]) -> T:
    """What every process makes for itself, the first one before the others: what it leaves on the disk they find.

    Args:
        make: Makes it.
    """
    made = make() if is_main() else None
    barrier()
    return make() if made is None else made


def barrier() -> None:
    """Waits for the others."""
    gathered(None)


def divides() -> bool:
    """Whether batches of an evaluation are divided: with a sharded base all processes go through all of them."""
    return world() > 1 and sharding() is None


def computed(
    batches: Sequence[Sequence[K]],
    compute: Callable[[Sequence[K]], Mapping[K, V]],
    known: Mapping[K, V],
    after: Callable[[Sequence[K], Mapping[K, V]], None] = lambda batch, made: None,
) -> dict[K, V]:
    """What is found of the items of batches, each batch in one of the processes; the same in all of them.

    Args:
        batches: The same in all processes, so that each is computed as by one process.
        compute: From a batch, what is found of its items.
        known: What the first process knows already.
        after: Called in the first process for every batch, with what is new of it: after its own ones, at the end for others'.
    """
    found = shared(lambda: dict(known))
    left = [batch for batch in batches if not found.keys() >= set(batch)]
    mine = [batch for n, batch in enumerate(left) if not divides() or n % world() == rank()]
    own = {id(batch) for batch in mine}
    if is_main():
        for batch in batches:
            if found.keys() >= set(batch):
                after(batch, {})
    made: dict[K, V] = {}
    for batch in mine:
        new = dict(compute(batch))
        made |= new
        if is_main():
            after(batch, new)
    if not divides():
        return found | made
    for part in gathered(made):
        found |= part
    if is_main():
        for batch in left:
            if id(batch) not in own:
                after(batch, {item: found[item] for item in batch})
    return found


@contextmanager
def own_folder(folder: Path) -> Iterator[Path]:
    """The folder in the first process; in the others one that is thrown away."""
    if is_main():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="lingraft-") as scratch:
        yield Path(scratch)


@contextmanager
def made_once(make: Callable[[], AbstractContextManager[Path]]) -> Iterator[Path]:
    """What only the first process may enter, such as a folder that appears; the others get one that is thrown away.

    Args:
        make: Gives the first process's context.
    """
    if is_main():
        with make() as folder:
            yield folder
        return
    with own_folder(Path()) as scratch:
        yield scratch


@contextmanager
def said_once() -> Iterator[None]:
    """Has one process alone report how a command failed; the others end with the same exit code, silently."""
    if world() == 1:
        yield
        return
    try:
        yield
    except BaseException as error:
        _end_in_peace()
        if not is_main():
            time.sleep(0.5)  # Where all fail alike the first process says it: it knows what was kept.
        if isinstance(error, SystemExit) or _first():
            raise
        # The launcher ends all as soon as one has ended: the one that reports is to be the first.
        time.sleep(2)
        raise SystemExit(error.exit_code if isinstance(error, LingraftError) else 1) from None
    _leave()


def _end_in_peace() -> None:
    """Has this process, which ends anyway, say why before it does: the launcher tells all to end as soon as one has."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _first() -> bool:
    """Whether no other process has failed before."""
    import torch

    if not torch.distributed.is_initialized():
        return is_main()
    try:
        return torch.distributed.distributed_c10d._get_default_store().add("lingraft/failed", 1) == 1
    except RuntimeError:  # The process that keeps the store is gone, and has said why.
        return False


def _leave() -> None:
    import torch

    if torch.distributed.is_initialized():
        try:
            torch.distributed.destroy_process_group()
        except RuntimeError:
            return
