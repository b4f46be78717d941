"""What the rows of the batch that goes through a model are: whose they are, and where a text stands in them.

One value for all layers of a model. It is set before a forward pass and stays until the backward pass is over, which may compute
layers again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate

from lingraft.errors import AdapterError

REMEDY = "train them one by one: speed.together=1"


@dataclass(frozen=True)
class Segment:
    """One text in a batch.

    Attributes:
        row: Its row.
        start: Its first column.
        length: Its columns.
        seed: What is dropped out of it is a function of this and the layer, wherever it stands.
    """

    row: int
    start: int
    length: int
    seed: int


@dataclass
class Rows:
    """What the layers of a model are told of the batch.

    Attributes:
        lanes: Names of adapters and how many rows belong to each, in the order of the rows, while several are trained together;
            empty: all rows belong to the active adapters.
        segments: The texts; empty: not told.
    """

    lanes: tuple[tuple[str, int], ...] = ()
    segments: tuple[Segment, ...] = field(default=())

    def spans(self, count: int) -> list[tuple[str, slice]]:
        """By the adapters' names, the rows of each.

        Args:
            count: The rows that a layer reads.

        Raises:
            AdapterError: They are not the batch's: the layer reads something else, as an expert does.
        """
        ends = list(accumulate(size for _, size in self.lanes))
        if count != ends[-1]:
            raise AdapterError(
                f"adapters cannot be trained together on this model: a layer reads {count} rows where the batch has {ends[-1]}",
                remedy=REMEDY,
            )
        return [(name, slice(end - size, end)) for end, (name, size) in zip(ends, self.lanes, strict=True)]

    @contextmanager
    def told(
        self, *, lanes: tuple[tuple[str, int], ...] | None = None, segments: tuple[Segment, ...] = ()
    ) -> Iterator[None]:
        """Sets what the layers are told, and takes it back.

        Args:
            lanes: As the attribute; None: as before.
            segments: As the attribute.
        """
        before = self.lanes, self.segments
        self.lanes, self.segments = before[0] if lanes is None else lanes, segments
        try:
            yield
        finally:
            self.lanes, self.segments = before
