"""What rows have in common is read once, and scores are those of whole rows, whatever is on the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lingraft import caching, likelihood
from lingraft.adapter import Adapter
from lingraft.backbones import Backbone
from lingraft.config import BackboneConfig, SpeedConfig
from lingraft.errors import DataError
from lingraft.evaluation import Asking, ask, predict
from lingraft.locating import locate
from lingraft.tasks.items import Example
from tests.conftest import save_tiny_model
from tests.unit.adapters import rewrite, write_structure
from tests.unit.test_live import SHAPES

WINDOW = {
    "tie_word_embeddings": False,
    "head_dim": 8,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention"],
}
ARCHITECTURES = {
    "llama": {},
    "gemma3_text": WINDOW,
    "mistral": {"sliding_window": 7, "head_dim": 8},
    "qwen3": {"head_dim": 8},
}
STRUCTURES = ("none", "lora", "ia3", "bottleneck", "prefix")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    name = request.param
    folder = save_tiny_model(tmp_path_factory.mktemp(name), name, **ARCHITECTURES[name])
    return Backbone(locate(BackboneConfig(model=str(folder), dtype="float32", device="cpu")))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter | None]:
    found: dict[str, Adapter | None] = {"none": None}
    for structure in STRUCTURES[1:]:
        folder = write_structure(tmp_path_factory.mktemp(structure), structure, 3, shapes=SHAPES)
        if structure == "lora":
            rewrite(folder, lambda name, tensor: (0.2 * tensor).astype(tensor.dtype))
        found[structure] = Adapter.load(folder)
    return found


@contextmanager
def sharing(worth: float) -> Iterator[None]:
    before, likelihood._WORTH = likelihood._WORTH, worth  # pyright: ignore[reportPrivateUsage, reportConstantRedefinition]
    try:
        yield
    finally:
        likelihood._WORTH = before  # pyright: ignore[reportPrivateUsage, reportConstantRedefinition]


@contextmanager
def counted(backbone: Backbone) -> Iterator[list[int]]:
    """The tokens that go through the model."""
    found: list[int] = []
    handle = backbone.model.base_model.register_forward_pre_hook(
        lambda module, args, given: found.append(given["input_ids"].numel()), with_kwargs=True
    )
    try:
        yield found
    finally:
        handle.remove()


WORDS = st.text("abcde ", min_size=1, max_size=12)
CANDIDATES = st.lists(WORDS, min_size=2, max_size=4, unique=True)
SLOW = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("structure", STRUCTURES)
@SLOW
@given(
    st.lists(st.tuples(st.text("xyz ", max_size=30), CANDIDATES), min_size=1, max_size=4),
    st.sampled_from([9, 60, 4096]),
)
def test_candidates_that_share_a_prompt_score_as_whole_texts_do(
    model: Backbone,
    adapters: dict[str, Adapter | None],
    structure: str,
    drawn: list[tuple[str, list[str]]],
    budget: int,
) -> None:
    examples = [Example(str(n), f"{p}:", tuple(c), 0) for n, (p, c) in enumerate(drawn)]
    for scoring in ("sequence", "auto"):
        asking = Asking(scoring=scoring, batch_tokens=budget)
        with sharing(0.0):
            whole = ask(model, adapters[structure], examples, asking)
        with sharing(1e9):
            shared = ask(model, adapters[structure], examples, asking)
        for a, b in zip(whole, shared, strict=True):
            assert a.scores == pytest.approx(b.scores, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_all_items_begin_with_is_read_once(
    model: Backbone, adapters: dict[str, Adapter | None], structure: str
) -> None:
    instruction = "An instruction of many words, before every item. "
    examples = [Example(str(n), f"{instruction}{'z' * n} Topic:", (" apple", " plum"), 0) for n in range(7)]
    read: dict[float, int] = {}
    found = {}
    for worth in (0.0, 0.9):
        with sharing(worth), counted(model) as tokens:
            found[worth] = predict(model, adapters[structure], examples, batch_tokens=150)
        read[worth] = sum(tokens)
    assert read[0.9] < read[0.0] - 5 * len(instruction)
    for a, b in zip(found[0.0], found[0.9], strict=True):
        assert a.scores == pytest.approx(b.scores, abs=1e-5, rel=1e-5)


def test_the_shared_prompt_is_read_once(model: Backbone) -> None:
    examples = [Example(str(n), "xyz"[n] + "p" * 30, (" same one", " same two", " same six"), 0) for n in range(3)]
    with counted(model) as tokens:
        predict(model, None, examples, scoring="sequence")
    # The prompts with what follows them alike, and behind them two tokens of every candidate: the last is not read.
    prompt = len(model.prefix) + len(model.encode(examples[0].prompt + " same "))
    assert tokens[-2:] == [3 * prompt, 9 * 2] and tokens[:-2] in ([], [1])


def test_a_short_prompt_before_long_candidates_is_not_shared(model: Backbone) -> None:
    examples = [Example(str(n), "xyz"[n], tuple(" " + c * 40 for c in "abc"), 0) for n in range(3)]
    with sharing(0.9), counted(model) as tokens:
        predict(model, None, examples, scoring="sequence")
    assert len(tokens) == 1


def test_padding_does_not_stand_between_a_prefix_and_a_text_in_a_layer_with_a_window(
    model: Backbone, adapters: dict[str, Adapter | None]
) -> None:
    windowed = any(caching.empty(model).is_sliding)
    assert caching.pads_in_front(model)
    with model.with_adapter(adapters["prefix"]):
        assert caching.pads_in_front(model) is not windowed
    assert windowed is (model.model.config.model_type in ("gemma3_text", "mistral"))


def test_copies_of_a_common_start_are_bounded(model: Backbone) -> None:
    """Its columns are copied for every row of a batch: they count, too."""
    start, budget = "w" * 200, 64
    examples = [Example(str(n), f"{start}{'z' * (n % 5)}:", (" a", " b"), 0) for n in range(40)]
    columns: list[int] = []

    def look(module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        cache = given.get("past_key_values")
        columns.append(len(given["input_ids"]) * (0 if cache is None else cache.get_seq_length()))

    handle = model.model.base_model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        predict(model, None, examples, batch_tokens=budget)
    finally:
        handle.remove()
    assert 0 < max(columns) <= likelihood._COPIED * budget  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("scoring", ["auto", "sequence"])
def test_an_answer_with_nothing_before_it_is_refused(model: Backbone, scoring: str) -> None:
    long = Example("long", "abc", ("x" * 30, "xy", "z"), 0)
    with pytest.raises(DataError, match="long: nothing is left to read before the answer"):
        predict(model, None, [long], scoring=scoring, max_length=16)


def test_keys_are_kept_whatever_training_was_told(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "llama", "llama")
    speed = SpeedConfig(gradient_checkpointing=True)
    backbone = Backbone(locate(BackboneConfig(model=str(folder), dtype="float32", device="cpu")), speed)
    with backbone.with_adapter(None):
        assert caching.keeps_keys(backbone)
