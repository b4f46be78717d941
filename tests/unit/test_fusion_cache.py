"""Source states on disk: what is written is what is read, to whoever it belongs, or nothing is there."""

import errno
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lingraft.batching import derived_seed
from lingraft.errors import AdapterError, StoreError, UserError
from lingraft.fusion import cache
from lingraft.fusion.cache import INDEX, STATES, Request, StateCache, size_of, write_states

LAYERS = ("layers.0", "layers.1", "layers.2")
WIDTH = 5
DIGEST = "folder:" + "a" * 64
ROOMY = {"layers": LAYERS, "width": WIDTH, "limit_bytes": 1e9, "batch_tokens": 16}


def of_text(request: Request, columns: int) -> list[torch.Tensor]:
    """States that tell texts, types, layers, columns and values apart: column n is the same however many there are."""
    at = torch.arange(columns * WIDTH).reshape(columns, WIDTH)
    seed = derived_seed(request.ids, request.types) % 10_000
    return [torch.sin(0.1 + at + seed + 50 * layer) for layer in range(len(LAYERS))]


def compute(requests: Sequence[Request]) -> list[list[torch.Tensor]]:
    """A batch, padded to its widest row, as a model would give it."""
    widest = max(r.length for r in requests)
    return [of_text(r, widest) for r in requests]


def written(folder: Path, requests: Sequence[Request], **changes: Any) -> StateCache:
    write_states(folder, DIGEST, requests, compute, **{**ROOMY, **changes})
    return StateCache.open(folder, DIGEST, verify=True)


def expected(requests: Sequence[Request], layer: int) -> torch.Tensor:
    found = torch.zeros(len(requests), max((r.columns for r in requests), default=0), WIDTH, dtype=torch.bfloat16)
    for row, request in enumerate(requests):
        found[row, : request.columns] = of_text(request, request.columns)[layer].bfloat16()
    return found


REQUESTS = st.lists(
    st.builds(
        lambda ids, typed, columns: Request(tuple(ids), (0,) * len(ids) if typed else (), columns),
        st.lists(st.integers(0, 3), max_size=4),
        st.booleans(),
        st.integers(0, 6),
    ),
    max_size=12,
)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(requests=REQUESTS, asked=st.lists(st.integers(0, 11), max_size=5), tokens=st.integers(1, 40))
    def holds(requests: list[Request], asked: list[int], tokens: int) -> None:
        found = written(tmp_path, requests, batch_tokens=tokens)
        assert (found.layers, found.width) == (LAYERS, WIDTH)
        assert len(found) == len({(r.ids, r.types) for r in requests})
        assert (tmp_path / STATES).stat().st_size == size_of(requests, len(LAYERS), WIDTH)
        batch = [requests[n] for n in asked if n < len(requests)]
        states = found.get(batch)
        assert states is not None and tuple(states) == LAYERS
        for layer, name in enumerate(LAYERS):
            assert states[name].dtype == torch.bfloat16
            assert torch.equal(states[name], expected(batch, layer))

    holds()


def test_the_size_counts_every_text_once_with_the_most_columns() -> None:
    twice = [Request((1, 2), (), 2), Request((1, 2), (), 7), Request((1, 2), (0, 0), 3)]
    # (7 + 3) columns, 2 layers, 4 values, 2 bytes.
    assert size_of(twice, 2, 4) == 160
    assert size_of([], 2, 4) == 0


def test_batches_hold_near_lengths_and_no_more_tokens_than_asked_for(tmp_path: Path) -> None:
    requests = [Request((n,) * n, (), n) for n in range(1, 12)]
    seen: list[list[int]] = []

    def noting(batch: Sequence[Request]) -> list[list[torch.Tensor]]:
        seen.append([r.columns for r in batch])
        return compute(batch)

    done: list[tuple[int, int]] = []
    write_states(tmp_path, DIGEST, requests, noting, **ROOMY, progress=lambda *now: done.append(now))
    assert [n for batch in seen for n in batch] == list(range(11, 0, -1))
    assert all(len(batch) == 1 or len(batch) * max(batch) <= 16 for batch in seen)
    assert max(map(len, seen)) > 1
    assert done[-1] == (11, 11) and len(done) == len(seen)


def test_equal_texts_make_equal_files_in_whatever_order(tmp_path: Path) -> None:
    requests = [Request((n, n), (), 3) for n in range(6)]
    for name, order in (("a", requests), ("b", requests[::-1])):
        write_states(tmp_path / name, DIGEST, order, compute, **ROOMY)
    for name in (STATES, INDEX):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_fewer_columns_are_given_and_more_are_not(tmp_path: Path) -> None:
    kept, other = Request((1, 2, 3), (), 4), Request((9,), (), 1)
    found = written(tmp_path, [kept, other])
    fewer = [Request((1, 2, 3), (), 2), other]
    states = found.get(fewer)
    assert states is not None
    assert torch.equal(states[LAYERS[2]], expected(fewer, 2))
    assert found.get([other, Request((1, 2, 3), (), 5)]) is None
    assert found.get([Request((1, 2, 3), (0, 0, 0), 1)]) is None, "other token types are another text"
    assert not found.covers([kept, Request((8,), (), 0)])


def test_a_batch_may_be_changed_without_changing_the_file(tmp_path: Path) -> None:
    request = Request((1,), (), 2)
    found = written(tmp_path, [request])
    first = found.get([request])
    assert first is not None
    first[LAYERS[0]].zero_()
    again = found.get([request])
    assert again is not None
    assert torch.equal(again[LAYERS[0]], expected([request], 0))


def test_a_change_of_the_texts_replaces_what_was_there(tmp_path: Path) -> None:
    old, new = Request((1,), (), 3), Request((2,), (), 2)
    written(tmp_path, [old])
    found = written(tmp_path, [new])
    assert found.get([old]) is None
    assert found.get([new]) is not None


def test_states_of_another_first_stage_are_refused(tmp_path: Path) -> None:
    written(tmp_path, [Request((1,), (), 1)])
    with pytest.raises(AdapterError, match="another first stage") as raised:
        StateCache.open(tmp_path, "folder:" + "b" * 64)
    assert "aaaa…" in raised.value.what and "bbbb…" in raised.value.what


def test_nothing_written_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="missing"):
        StateCache.open(tmp_path, DIGEST)


def test_a_file_that_was_cut_or_is_gone_is_refused(tmp_path: Path) -> None:
    written(tmp_path, [Request((1,), (), 4)])
    whole = (tmp_path / STATES).read_bytes()
    (tmp_path / STATES).write_bytes(whole[:-2])
    with pytest.raises(StoreError, match="not as long"):
        StateCache.open(tmp_path, DIGEST)
    (tmp_path / STATES).unlink()
    with pytest.raises(StoreError, match="missing"):
        StateCache.open(tmp_path, DIGEST)


def test_a_flipped_bit_is_found_where_one_looks_for_it(tmp_path: Path) -> None:
    written(tmp_path, [Request((1,), (), 4)])
    data = bytearray((tmp_path / STATES).read_bytes())
    data[17] ^= 1
    (tmp_path / STATES).write_bytes(data)
    StateCache.open(tmp_path, DIGEST)
    with pytest.raises(StoreError, match="sha256"):
        StateCache.open(tmp_path, DIGEST, verify=True)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "lingraft source states 0"},
        {"entries": {"0" * 24: [0, 1000]}},
        {"entries": {"0" * 24: [-2, 1]}},
        {"entries": {"0" * 24: [1, 1]}},
        {"entries": {"0" * 24: [0, -1]}},
        {"entries": {"0" * 24: 3}},
        {"entries": None},
        {"layers": None},
        {"width": "wide"},
    ],
    ids=str,
)
def test_a_damaged_index_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    written(tmp_path, [Request((1,), (), 4)])
    index = json.loads((tmp_path / INDEX).read_text())
    (tmp_path / INDEX).write_text(json.dumps({**index, **change}))
    with pytest.raises(StoreError):
        StateCache.open(tmp_path, DIGEST)


def test_too_much_is_refused_before_anything_is_computed_or_lost(tmp_path: Path) -> None:
    kept = [Request((1,), (), 1)]
    written(tmp_path, kept)
    many = [Request((n,), (), 100) for n in range(10)]
    size = size_of(many, len(LAYERS), WIDTH)
    with pytest.raises(UserError, match=r"0\.030 MB, and 0\.030 MB") as raised:
        write_states(tmp_path, DIGEST, many, pytest.fail, **{**ROOMY, "limit_bytes": size - 1})
    assert "fusion.cache_limit" in str(raised.value) and "fusion.cache=false" in str(raised.value)
    assert StateCache.open(tmp_path, DIGEST).covers(kept)
    written(tmp_path, many, limit_bytes=size)


def test_sizes_are_said_in_units_that_fit() -> None:
    requests = [Request((1,), (), 4096)]
    with pytest.raises(UserError, match=r"3\.4 GB, and 2\.0 GB"):
        write_states(Path("x"), DIGEST, requests, pytest.fail, **{**ROOMY, "width": 138_000, "limit_bytes": 2e9})


def test_a_full_disk_is_said_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(StoreError, match=r"free on the disk") as raised:
        write_states(tmp_path, DIGEST, [Request((1,), (), 4)], pytest.fail, **ROOMY)
    assert "fusion.cache=false" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


class Filling(io.FileIO):
    """A file on a disk that has room for so many bytes."""

    room = 300
    error = errno.ENOSPC

    def write(self, data: Any, /) -> int:
        if self.tell() + len(memoryview(data).cast("B")) > self.room:
            raise OSError(self.error, "refused")
        return super().write(data)


@pytest.mark.parametrize(
    ("error", "said"),
    [(errno.ENOSPC, "no space is left"), (errno.EIO, "reports an error")],
    ids=["full", "broken"],
)
@pytest.mark.parametrize("name", [STATES, INDEX])
def test_a_disk_that_refuses_midway_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, said: str, name: str
) -> None:
    written(tmp_path, [Request((1,), (), 1)])
    opened = Path.open
    monkeypatch.setattr(Filling, "error", error)

    def filling(path: Path, mode: str = "r", **options: Any) -> Any:
        if name not in path.name or "w" not in mode:
            return opened(path, mode, **options)
        file = io.BufferedWriter(Filling(path, "w"), 64)
        return file if "b" in mode else io.TextIOWrapper(file, encoding="utf-8")

    def replacing(handle: int, mode: str, **options: Any) -> Any:
        return io.TextIOWrapper(io.BufferedWriter(Filling(handle, "w"), 64), encoding="utf-8")

    monkeypatch.setattr(Path, "open", filling)
    if name == INDEX:
        monkeypatch.setattr("lingraft.replacing.os.fdopen", replacing)
    requests = [Request((n,), (), 4) for n in range(8)]
    with pytest.raises(StoreError, match=said):
        write_states(tmp_path, DIGEST, requests, compute, **ROOMY)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_of_the_model_is_its_own_and_leaves_nothing(tmp_path: Path) -> None:
    calls: list[int] = []

    def failing(batch: Sequence[Request]) -> list[list[torch.Tensor]]:
        calls.append(len(batch))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compute(batch)

    with pytest.raises(KeyboardInterrupt):
        write_states(tmp_path, DIGEST, [Request((n,), (), 16) for n in range(3)], failing, **ROOMY)
    assert calls == [1, 1]
    assert list(tmp_path.iterdir()) == []


def test_other_shapes_than_announced_are_refused(tmp_path: Path) -> None:
    requests = [Request((1,), (), 2)]
    for wrong in (lambda s: s[:2], lambda s: [t[:1] for t in s], lambda s: [t[:, :4] for t in s]):
        with pytest.raises(ValueError, match="announced"):
            write_states(tmp_path, DIGEST, requests, lambda b, wrong=wrong: [wrong(s) for s in compute(b)], **ROOMY)
    with pytest.raises(ValueError, match="shorter"):
        write_states(tmp_path, DIGEST, requests, lambda batch: [], **ROOMY)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_does_not_matter(tmp_path: Path) -> None:
    requests = [Request((n,), (), 4) for n in range(8)]
    written(tmp_path / "whole", requests)
    for left in ([".states.bin.partial"], [STATES], [STATES, ".states.json.partial"]):
        folder = tmp_path / "-".join(left)
        folder.mkdir()
        for name in left:
            (folder / name).write_bytes(b"x" * 10_000)
        with pytest.raises(StoreError):
            StateCache.open(folder, DIGEST)
        assert written(folder, requests).covers(requests)
        assert {p.name for p in folder.iterdir()} == {STATES, INDEX}
        assert (folder / STATES).read_bytes() == (tmp_path / "whole" / STATES).read_bytes()
        shutil.rmtree(folder)
