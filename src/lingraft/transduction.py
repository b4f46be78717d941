"""Encoder-decoders: what they read and write, how they learn from answers and from plain text, and what they answer."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from lingraft import processes
from lingraft.backbones import Backbone
from lingraft.batching import Counterpart, cut
from lingraft.encoding import Encoded
from lingraft.errors import BackboneError, DataError
from lingraft.fusion.attaching import fusing, with_adapter
from lingraft.fusion.xmixup import Texts
from lingraft.fusion.xmixup_losses import paired_loss
from lingraft.journal import Journal
from lingraft.losses import Drawn, Objective, by_sequence, cross_entropies, project, summed_cross_entropy
from lingraft.memory import by_halves
from lingraft.metrics import Generated, Prediction
from lingraft.stacks import Adapters
from lingraft.tasks.items import Example

NOISE_SHARE, MEAN_SPAN = 0.15, 3
"""How much of a text is left out, and in spans how long on average (Raffel et al., 2020, section 3.1.4)."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PairSequence:
    """What is read and what is to be written, end of text included.

    Attributes:
        source: What is read.
        target: What is to be written.
        counterpart: What is read beside it of the item's counterpart.
        alike: Whether the answer is the same for the counterpart, as a label's name is.
    """

    source: tuple[int, ...]
    target: tuple[int, ...]
    counterpart: Counterpart | None = None
    alike: bool = False

    @property
    def length(self) -> int:
        """Its tokens, both sides."""
        return len(self.source) + len(self.target)


@dataclass(frozen=True)
class CorruptedSequence:
    """A text; which spans of it are left out is drawn at every step."""

    ids: tuple[int, ...]

    @property
    def length(self) -> int:
        """Its tokens."""
        return len(self.ids)


# What is read and written


def _end(backbone: Backbone) -> tuple[int, ...]:
    end = backbone.tokenizer.eos_token_id
    return (end,) if isinstance(end, int) else ()


def read(backbone: Backbone, example: Example, max_input: int) -> tuple[tuple[int, ...], bool]:
    """An item's prompt as ids, end of text included, and whether some of it had to be cut.

    A prompt that is too long loses the end of the part that may be cut; where there is none, its beginning.

    Raises:
        DataError: It is too long even without that part.
    """
    end = _end(backbone)
    ids = backbone.encode(example.prompt)
    excess = len(ids) + len(end) - max_input
    return (*cut(backbone, example.prompt, ids, excess, example.cuttables, example.id), *end), excess > 0


def counterpart(backbone: Backbone, example: Example, max_input: int) -> Counterpart | None:
    """What is read of an item's counterpart, as `read` reads an item."""
    source = example.source
    return None if source is None else Counterpart(read(backbone, source, max_input)[0], text=source.prompt)


def _written(backbone: Backbone, text: str, max_output: int | None = None) -> tuple[int, ...]:
    """An answer as ids, end of text included; a longer one loses its last tokens and its end of text."""
    ids = (*backbone.encode(text.strip()), *_end(backbone))
    return ids if max_output is None else ids[:max_output]


def answer_sequences(backbone: Backbone, examples: Sequence[Example], max_input: int, max_output: int) -> Encoded:
    """Prompts and right answers.

    Raises:
        DataError: There is no example.
    """
    if not examples:
        raise DataError(
            "there is nothing to train on", remedy="look at the data: every row was left out, or there is none"
        )
    prompts = [read(backbone, e, max_input) for e in examples]
    answers = [_written(backbone, e.completion) for e in examples]
    cut = sum(shorter or len(a) > max_output for (_, shorter), a in zip(prompts, answers, strict=True))
    beside = [counterpart(backbone, e, max_input) for e in examples]
    pairs = [
        PairSequence(p[0], a[:max_output], c, bool(e.candidates))
        for p, a, c, e in zip(prompts, answers, beside, examples, strict=True)
    ]
    return Encoded(pairs, cut)


def span_corruption_sequences(backbone: Backbone, segments: Sequence[Sequence[int]]) -> list[CorruptedSequence]:
    """Text of which spans are left out and to be written: T5's own pre-training. Spans are drawn anew at every step.

    Raises:
        DataError: There is no segment.
        BackboneError: The tokenizer has no sentinels.
    """
    _some(segments)
    _sentinel(backbone, 0)
    return [CorruptedSequence(tuple(ids)) for ids in segments]


def prefix_lm_sequences(backbone: Backbone, segments: Sequence[Sequence[int]]) -> list[PairSequence]:
    """The second half of a text to be written after the first, for models that were adapted to language modelling.

    Raises:
        DataError: There is no segment.
    """
    _some(segments)
    end = _end(backbone)
    return [PairSequence((*ids[: len(ids) // 2], *end), tuple(ids[len(ids) // 2 :])) for ids in segments]


def _some(segments: Sequence[Sequence[int]]) -> None:
    if not any(len(ids) > 1 for ids in segments):
        raise DataError(
            "the reference text is too short for one segment", remedy="give more text, or a smaller segment_tokens"
        )


def _sentinel(backbone: Backbone, number: int) -> int:
    """The token that stands for a span that was left out."""
    tokenizer = backbone.tokenizer
    for name in (f"<extra_id_{number}>", f"▁<extra_id_{number}>"):
        found = tokenizer.convert_tokens_to_ids(name)
        if isinstance(found, int) and found != tokenizer.unk_token_id:
            return found
    raise BackboneError(
        f"this tokenizer has no sentinel <extra_id_{number}> for a span that is left out",
        where=backbone.located.name,
        remedy="use the reference task prefix-lm, or shorter segments",
    )


def spans(length: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Which spans of a text are left out: first and last token (exclusive), in order; never two side by side.

    Both what is left out and what stays is divided at random into as many parts, as T5 does.
    """
    noise = min(max(1, round(length * NOISE_SHARE)), length - 1)
    count = min(max(1, round(noise / MEAN_SPAN)), length - noise)
    lengths = [
        np.diff([0, *sorted(rng.choice(n - 1, count - 1, replace=False) + 1), n]) for n in (noise, length - noise)
    ]
    ends = np.cumsum([kept + gone for gone, kept in zip(*lengths, strict=True)])
    return [(int(end - gone), int(end)) for end, gone in zip(ends, lengths[0], strict=True)]


def corrupted(backbone: Backbone, ids: Sequence[int], seed: int, number: int) -> PairSequence:
    """A text with sentinels for the spans that are left out, and the sentinels with these spans; both end.

    What is drawn depends on the seed, the text's place in its batch, and its length.
    """
    end = _end(backbone)
    source, target, last = [], [], 0
    for index, (start, stop) in enumerate(spans(len(ids), np.random.default_rng([seed, number]))):
        sentinel = _sentinel(backbone, index)
        source += [*ids[last:start], sentinel]
        target += [sentinel, *ids[start:stop]]
        last = stop
    return PairSequence((*source, *ids[last:], *end), (*target, *end))


# What is computed


def _padded(backbone: Backbone, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and their mask, padded on the right."""
    ids = torch.full((len(rows), max(len(row) for row in rows)), backbone.pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[number, : len(row)] = 1
    return ids.to(backbone.device), mask.to(backbone.device)


def _shifted(backbone: Backbone, target: Sequence[int]) -> tuple[int, ...]:
    """What the decoder reads to write these tokens."""
    config: Any = backbone.model.config
    start = config.decoder_start_token_id
    return (backbone.pad_id if start is None else start, *target[:-1])


def _encoded(
    backbone: Backbone, sources: Sequence[Sequence[int]], beside: Sequence[Counterpart | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The encoder's states, and the mask of what it read."""
    ids, mask = _padded(backbone, sources)
    with backbone.autocast(), fusing(backbone, beside, [len(ids) for ids in sources]):
        return backbone.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state, mask


def _states(
    backbone: Backbone, read: torch.Tensor, mask: torch.Tensor, targets: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states before every token that is to be written (tokens × width), and these tokens, all targets in a row."""
    ids, _ = _padded(backbone, [_shifted(backbone, target) for target in targets])
    with backbone.autocast():
        states = backbone.answering(read, mask, ids)
    there = torch.zeros(ids.shape, dtype=torch.bool)
    for number, target in enumerate(targets):
        there[number, : len(target)] = True
    labels = torch.tensor([token for target in targets for token in target], dtype=torch.long, device=ids.device)
    return states[there.to(states.device)], labels


def _draw_pairs(backbone: Backbone, chosen: Sequence[PairSequence], share: float, seed: int) -> list[Drawn]:
    # An empty line of parallel text has nothing to write.
    beside = [0 if s.counterpart is None else len(s.counterpart.ids) for s in chosen]
    return [Drawn(s, len(s.target), s.length + more) for s, more in zip(chosen, beside, strict=True)]


def _draw_corrupted(backbone: Backbone, chosen: Sequence[CorruptedSequence], share: float, seed: int) -> list[Drawn]:
    drawn = [
        corrupted(backbone, s.ids, seed, number) if len(s.ids) > 1 else PairSequence(s.ids, ())
        for number, s in enumerate(chosen)
    ]
    return _draw_pairs(backbone, drawn, share, seed)


def _summed(backbone: Backbone, model: Any, part: Sequence[Drawn]) -> torch.Tensor:
    """Cross-entropy summed over what is to be written, by sequence; with X-Mixup over all."""
    chosen: list[PairSequence] = [d.item for d in part]
    if backbone.mixup is not None and all(s.counterpart is not None for s in chosen):
        return _summed_mixed(backbone, chosen)
    states, mask = _encoded(backbone, [s.source for s in chosen], [s.counterpart for s in chosen])
    here, labels = _states(backbone, states, mask, [s.target for s in chosen])
    weight = backbone.model.get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]
    losses = cross_entropies(here, weight, labels)  # pyright: ignore[reportArgumentType]
    return by_sequence(losses, [len(s.target) for s in chosen])


def _summed_mixed(backbone: Backbone, chosen: Sequence[PairSequence]) -> torch.Tensor:
    """The loss of X-Mixup, summed over what is to be written."""
    targets, weight = [s.target for s in chosen], backbone.model.get_output_embeddings().weight  # pyright: ignore
    labels = torch.tensor([token for target in targets for token in target], device=backbone.device)

    def texts(rows: Sequence[Sequence[int]]) -> Texts:
        def run() -> torch.Tensor:
            return _states(backbone, *_encoded(backbone, rows, [None] * len(rows)), targets)[0]

        return Texts(run, [len(row) for row in rows])

    beside = [s.counterpart.ids for s in chosen if s.counterpart is not None]
    source, target = backbone.mixup.both(backbone.model, texts(beside), texts([s.source for s in chosen]))
    return paired_loss(
        backbone.mixup.config,
        source,
        target,
        lambda states: summed_cross_entropy(states, weight, labels),  # pyright: ignore
        lambda states: project(states, weight),  # pyright: ignore
        [len(target) for target in targets],
        alike=chosen[0].alike,
    )


@contextmanager
def _mixing(backbone: Backbone, rows: Sequence[Sequence[int]], beside: Sequence[Counterpart | None]) -> Iterator[None]:
    """Everything that is read inside is mixed by X-Mixup, where that is on the model and there are counterparts."""
    mixup = backbone.mixup
    if mixup is None or all(source is None for source in beside):
        yield
        return
    # A row without counterpart stands in for one, and nothing is mixed in from it.
    ids = [row if source is None else source.ids for row, source in zip(rows, beside, strict=True)]
    lengths = [0 if source is None else len(source.ids) for source in beside]
    nothing = [None] * len(ids)
    source = mixup.read(backbone.model, Texts(lambda: _encoded(backbone, ids, nothing)[0], lengths))
    with mixup.mixing(backbone.model, source, [len(row) for row in rows]):
        yield


PAIRED = Objective(_draw_pairs, _summed)
CORRUPTED = Objective(_draw_corrupted, _summed)


# What is answered


def _batches(sources: Sequence[Sequence[int]], counts: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Numbers of items, those of similar length together, the longest first; with every item its answers are written."""
    found: list[list[int]] = []
    for number in sorted(range(len(sources)), key=lambda n: (-len(sources[n]), n)):
        widest = len(sources[found[-1][0]]) if found else 0
        if found and (sum(counts[n] for n in found[-1]) + counts[number]) * widest <= batch_tokens:
            found[-1].append(number)
        else:
            found.append([number])
    return found


def _log_likelihoods(
    backbone: Backbone, read: torch.Tensor, mask: torch.Tensor, targets: Sequence[Sequence[int]]
) -> list[list[float]]:
    """The log-likelihood of every token of every target, in nats."""
    states, labels = _states(backbone, read, mask, targets)
    weight: Any = backbone.model.get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]
    values: list[float] = []
    for start in range(0, len(labels), 256):
        part = slice(start, start + 256)
        scores = torch.log_softmax(project(states[part], weight), dim=-1)
        values += scores.gather(1, labels[part, None])[:, 0].tolist()
    rest = iter(values)
    return [[next(rest) for _ in target] for target in targets]


def predict_choice(
    backbone: Backbone,
    adapter: Adapters,
    examples: Sequence[Example],
    *,
    normalised: bool = False,
    max_input: int = 1024,
    batch_tokens: int = 2048,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> list[Prediction]:
    """Scores every candidate of every example by its likelihood after the prompt; the prompt is read once.

    Args:
        backbone: The base model.
        adapter: The adapter to put on it, or None.
        examples: The items.
        normalised: Whether a candidate's score is the mean over its tokens and not their sum, so that length does not count.
        max_input: Tokens; a longer prompt is cut.
        batch_tokens: Padded tokens in a batch; changes speed only.
        progress: Called with the items done and the items in all.
        journal: Batches that it knows are not computed again.

    Returns:
        Predictions in the order of the examples; a score is of the candidate's tokens and the end of text.

    Raises:
        DataError: There is no example.
    """
    if not examples:
        raise DataError(
            "there is nothing to evaluate",
            remedy="look at the data of this split: every row was left out, or there is none",
        )
    sources = [read(backbone, e, max_input) for e in examples]
    beside = [counterpart(backbone, e, max_input) for e in examples]
    targets = [[_written(backbone, c) for c in e.candidates] for e in examples]

    def ask(numbers: Sequence[int]) -> dict[int, list[list[float]]]:
        rows, besides = [sources[n][0] for n in numbers], [beside[n] for n in numbers]
        with _mixing(backbone, rows, besides):
            states, mask = _encoded(backbone, rows, besides)
        owners = torch.tensor([row for row, n in enumerate(numbers) for _ in targets[n]], device=states.device)
        flat = [target for n in numbers for target in targets[n]]
        values = iter(_log_likelihoods(backbone, states[owners], mask[owners], flat))
        return {n: [next(values) for _ in targets[n]] for n in numbers}

    batches = _batches([s for s, _ in sources], [len(t) for t in targets], batch_tokens)
    with with_adapter(backbone, adapter), torch.inference_mode():
        known = _computed(batches, ask, journal, "labels", progress)
    found: list[Prediction] = []
    for n, example in enumerate(examples):
        scores = tuple(sum(v) / len(v) if normalised else sum(v) for v in known[n])
        found.append(Prediction(example.id, example.gold, scores, example.prompt, sources[n][1]))
    return found


def _computed(
    batches: Iterable[Sequence[int]],
    ask: Callable[[Sequence[int]], dict[int, Any]],
    journal: Journal | None,
    part: str,
    progress: Progress | None,
) -> dict[int, Any]:
    """What is found of the items of batches, those that a journal knows left out."""
    batches, done = list(batches), 0
    total = sum(map(len, batches))

    def after(numbers: Sequence[int], made: Mapping[int, Any]) -> None:
        nonlocal done
        if journal is not None and made:
            journal.add(part, made)
        done += len(numbers)
        if progress is not None:
            progress(done, total)

    known = {} if journal is None else journal.known(part)
    return processes.computed(batches, partial(by_halves, ask), known, after)


def generate(
    backbone: Backbone,
    adapter: Adapters,
    examples: Sequence[Example],
    *,
    max_input: int = 1024,
    max_output: int = 64,
    batch_tokens: int = 2048,
    write: bool = True,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> list[Generated]:
    """Has the model write after every prompt, the likeliest token each time, and finds how likely the right answer was.

    Args:
        backbone: The base model.
        adapter: The adapter to put on it, or None.
        examples: The items.
        max_input: Tokens; a longer prompt is cut.
        max_output: Tokens to write at most.
        batch_tokens: Padded tokens in a batch; changes speed only.
        write: Whether anything is written: the likelihood alone is cheaper.
        progress: Called with the items done and the items in all.
        journal: Batches that it knows are not computed again.

    Returns:
        In the order of the examples; the gold log-likelihood is the mean over the right answer's tokens and the end of text.

    Raises:
        DataError: There is no example.
    """
    if not examples:
        raise DataError(
            "there is nothing to evaluate",
            remedy="look at the data of this split: every row was left out, or there is none",
        )
    sources = [read(backbone, e, max_input) for e in examples]
    beside = [counterpart(backbone, e, max_input) for e in examples]

    def ask(numbers: Sequence[int]) -> dict[int, tuple[str | None, float]]:
        rows, besides = [sources[n][0] for n in numbers], [beside[n] for n in numbers]
        with _mixing(backbone, rows, besides):
            states, mask = _encoded(backbone, rows, besides)
            texts = _texts(backbone, rows, besides, max_output, states) if write else [None] * len(rows)
        targets = [_written(backbone, examples[n].completion) for n in numbers]
        likely = [sum(v) / len(v) for v in _log_likelihoods(backbone, states, mask, targets)]
        return dict(zip(numbers, zip(texts, likely, strict=True), strict=True))

    batches = _batches([s for s, _ in sources], [1] * len(sources), batch_tokens)
    with with_adapter(backbone, adapter), torch.inference_mode():
        known = _computed(batches, ask, journal, "texts", progress)
    found: list[Generated] = []
    for n, e in enumerate(examples):
        references = e.references or ((e.completion.strip(),) if e.candidates else ())
        text, likelihood = known[n]
        found.append(Generated(e.id, e.prompt, text, references, likelihood, sources[n][1]))
    return found


def _texts(
    backbone: Backbone,
    rows: Sequence[Sequence[int]],
    beside: Sequence[Counterpart | None],
    max_output: int,
    read: torch.Tensor,
) -> list[str]:
    """What is written, special tokens left out; `read`: the encoder's states, which are not computed again."""
    from transformers.modeling_outputs import BaseModelOutput

    ids, mask = _padded(backbone, rows)
    model: Any = backbone.model
    # What mixes counterparts in follows the calls of a whole generation, the encoder's among them.
    whole = backbone.fuser is not None or backbone.mixup is not None
    known = {} if whole else {"encoder_outputs": BaseModelOutput(last_hidden_state=read)}  # pyright: ignore[reportArgumentType]
    mixed = fusing(backbone, beside, [len(row) for row in rows])
    with backbone.autocast(), backbone.greedy(max_output) as configuration, mixed:
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=configuration, **known)
    return [str(backbone.tokenizer.decode(row, skip_special_tokens=True)) for row in out.tolist()]
