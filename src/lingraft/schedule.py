"""Which steps can begin, which wait for others, and which never will: told of what happens, it knows no store and no worker."""

import heapq
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from lingraft.plan import Step


class Schedule:
    """The steps of a run that are not finished, and how far they are.

    A step is open, running, finished, failed, or stopped because something that it needs failed. It is ready when it is open and
    all of its inputs are finished. What is not among the steps counts as finished, until it is added.

    Args:
        steps: What is to be done, inputs first.
        sort: Divides the steps into those that ask the same of whoever makes them.

    Attributes:
        finished: The keys of steps that were finished since.
        failed: The keys of steps that failed.
        stopped: The keys of steps that will not run, because of those.
    """

    def __init__(self, steps: Sequence[Step], sort: Callable[[Step], Hashable] = lambda step: None) -> None:
        self._sort = sort
        self._steps: dict[str, Step] = {}
        self._place: dict[str, int] = {}
        self._missing: dict[str, set[str]] = {}
        self._needed_by: dict[str, list[str]] = {}
        self._ready: dict[Hashable, list[tuple[int, str]]] = {}
        self._open: set[str] = set()
        self.running: dict[str, Step] = {}
        self.finished: set[str] = set()
        self.failed: set[str] = set()
        self.stopped: set[str] = set()
        self.add(steps)

    @property
    def total(self) -> int:
        """How many steps there are, whatever became of them."""
        return len(self._steps)

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        return not self._open and not self.running

    @property
    def sorts(self) -> list[Hashable]:
        """The sorts of which some step is ready, that of the earliest step first."""
        heads = {sort: heap[0] for sort, heap in self._ready.items() if self._head(heap)}
        return sorted(heads, key=lambda sort: heads[sort])

    def add(self, steps: Iterable[Step]) -> None:
        """Takes up steps, or takes them up again: what needs them waits until they are finished. Those that are known are left."""
        fresh = [step for step in steps if step.key not in self._open and step.key not in self.running]
        for step in fresh:
            if step.key not in self._steps:
                self._place[step.key] = len(self._place)
                for needed in dict.fromkeys(needed.key for needed in step.inputs.values()):
                    self._needed_by.setdefault(needed, []).append(step.key)
            self._steps[step.key] = step
            for known in (self.finished, self.failed, self.stopped):
                known.discard(step.key)
            self._open.add(step.key)
        unfinished = self._open | self.running.keys()
        for step in fresh:
            self._missing[step.key] = {n.key for n in step.inputs.values()} & unfinished
            for other in self._needed_by.get(step.key, ()):
                self._missing.setdefault(other, set()).add(step.key)
        for step in fresh:
            self._push(step.key)

    def take(self, sort: Hashable = None) -> Step | None:
        """The earliest step of a sort that is ready, which is running from now on; None: none is."""
        heap = self._ready.get(sort, [])
        if not self._head(heap):
            return None
        return self._start(heapq.heappop(heap)[1])

    def take_like(self, first: Step, shape: Callable[[Step], Any], most: int) -> list[Step]:
        """Ready steps of the sort and the shape of one that was taken, no more than `most`; they are running from now on."""
        heap, wanted, found = self._ready.get(self._sort(first), []), shape(first), list[Step]()
        others: list[tuple[int, str]] = []
        while self._head(heap) and len(found) < most:
            entry = heapq.heappop(heap)
            if shape(self._steps[entry[1]]) == wanted:
                found.append(self._start(entry[1]))
            else:
                others.append(entry)
        for entry in others:
            heapq.heappush(heap, entry)
        return found

    def put_back(self, step: Step) -> None:
        """A running step is open again, or stopped, where what it needs has failed meanwhile."""
        del self.running[step.key]
        if self._missing[step.key] & (self.failed | self.stopped):
            self.stopped.add(step.key)
            self._stop_after(step.key)
            return
        self._open.add(step.key)
        self._push(step.key)

    def finish(self, step: Step) -> None:
        """A step is finished, here or elsewhere."""
        self.running.pop(step.key, None)
        self._open.discard(step.key)
        self.finished.add(step.key)
        for other in self._needed_by.get(step.key, ()):
            self._missing[other].discard(step.key)
            self._push(other)

    def fail(self, step: Step) -> None:
        """A step failed: whatever needs it will not run."""
        self.running.pop(step.key, None)
        self._open.discard(step.key)
        self.failed.add(step.key)
        self._stop_after(step.key)

    def _stop_after(self, key: str) -> None:
        reached = [key]
        while reached:
            for other in self._needed_by.get(reached.pop(), ()):
                if other in self._open:
                    self._open.discard(other)
                    self.stopped.add(other)
                    reached.append(other)

    def _start(self, key: str) -> Step:
        self._open.discard(key)
        self.running[key] = self._steps[key]
        return self._steps[key]

    def _is_ready(self, key: str) -> bool:
        return key in self._open and not self._missing[key]

    def _push(self, key: str) -> None:
        if self._is_ready(key):
            heap = self._ready.setdefault(self._sort(self._steps[key]), [])
            heapq.heappush(heap, (self._place[key], key))

    def _head(self, heap: list[tuple[int, str]]) -> bool:
        """Whether a step is ready, once what is no longer so is taken off the heap."""
        while heap and not self._is_ready(heap[0][1]):
            heapq.heappop(heap)
        return bool(heap)
