"""Running out of memory: told from other errors, and answered by halves."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from lingraft import processes
from lingraft.errors import LingraftError

K = TypeVar("K")
V = TypeVar("V")
_SAID = ("out of memory", "not enough memory", "can't allocate memory")
"""What torch says: of a GPU, and of a processor on the systems it knows."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice."""
    # torch.OutOfMemoryError is a RuntimeError, too.
    named = type(error).__name__ == "OutOfMemoryError"
    said = isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _SAID)
    return isinstance(error, MemoryError) or named or said


def give_back() -> None:
    """Has torch give unused memory of a GPU back, so that other sizes find room; nothing without one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def by_halves(compute: Callable[[Sequence[K]], Mapping[K, V]], items: Sequence[K]) -> dict[K, V]:
    """What is computed of items together, or where memory does not suffice of each half, down to one.

    Args:
        compute: From items, what is found of each.
        items: They.

    Raises:
        LingraftError: There is no room for a single one; or the other processes wait within the same pass.
    """
    try:
        return dict(compute(items))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if processes.sharding() is not None:
            raise LingraftError(
                "there is not enough memory for a batch, and with a sharded base it cannot be computed in parts",
                remedy="lower max_length or the tokens to be written, or launch more processes",
            ) from error
        if len(items) < 2:
            raise LingraftError(
                "there is not enough memory for a single item",
                remedy="lower max_length or the tokens to be written, or use a device with more memory",
            ) from error
    # Here the error, and with it what the failed call had made, is gone.
    give_back()
    half = len(items) // 2
    return by_halves(compute, items[:half]) | by_halves(compute, items[half:])
