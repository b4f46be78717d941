"""What steps read and write: from files where there are any, else from what is known of published data sets."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lingraft.config import Experiment, epochs_read
from lingraft.costs.arithmetic import Work
from lingraft.costs.shapes import Shape
from lingraft.errors import LingraftError
from lingraft.tasks.reference import reference_path
from lingraft.tasks.sources import bundled_or
from lingraft.tasks.table import find_task

if TYPE_CHECKING:
    from lingraft.plan import Step

_MULTILINGUAL = 100_000
"""From so many tokens on a vocabulary is taken for a multilingual one."""
CHARACTERS_A_TOKEN = {
    "en": 4.4, "de": 4.2, "fr": 3.8, "es": 4.2, "vi": 3.8, "tr": 3.8, "sw": 3.6, "ru": 3.7, "el": 3.0, "ar": 3.1,
    "hi": 3.5, "th": 3.3, "zh": 1.5,
}  # fmt: skip
"""Of vocabularies of 250,000 tokens: the mean of XLM-R's and Gemma 3's on 300 parallel lines of news."""
_FEW = {"en": 3.8, "ru": 2.2, "el": 1.0, "ar": 1.0, "hi": 1.0, "th": 1.0, "zh": 0.8}
"""Of vocabularies of 32,000 tokens, not measured: about a character a token outside Latin and Cyrillic letters."""
LENGTH = {
    "de": 1.19, "fr": 1.18, "es": 1.16, "vi": 1.10, "tr": 1.07, "sw": 1.10, "ru": 1.11, "el": 1.21, "ar": 0.94,
    "hi": 1.06, "th": 0.96, "zh": 0.35,
}  # fmt: skip
"""Characters of a translation for one of its English original, on the same lines; 1.1 for other languages."""


def characters_a_token(shape: Shape, language: str) -> float:
    """About how many characters of a language one token holds."""
    if shape.vocabulary >= _MULTILINGUAL:
        return CHARACTERS_A_TOKEN.get(language, 3.0)
    return _FEW.get(language, 2.6)


_XLSUM = {
    "en": (306_522, 11_535), "fr": (8_697, 1_086), "es": (38_110, 4_763), "ru": (62_243, 7_780), "zh": (37_362, 4_670),
    "vi": (32_111, 4_013), "tr": (27_176, 3_397), "ar": (37_519, 4_689), "th": (6_616, 826), "hi": (70_778, 8_847),
    "sw": (7_898, 987),
}  # fmt: skip
_SIZES = {
    "mgsm": (7_473, 8, 250),
    "xcopa": (400, 100, 500),
    "xnli": (392_702, 2_490, 5_010),
    "xquad": (87_599, 510, 1_190),
    "topics": (701, 99, 204),
    "nusax": (500, 100, 400),
    "tydiqa": (3_326, 370, 440),
    "xquad-tydiqa": (3_696, 800, 1_190),
}
"""Items of the published data sets: training (English), validation, test; of TyDiQA, whose languages differ, about."""
_CHARACTERS = {
    "mgsm": (280, 290), "xcopa": (200, 5), "xnli": (320, 12), "xquad": (880, 19), "xlsum": (2_900, 130), "topics": (230, 10),
    "nusax": (230, 9), "tydiqa": (670, 25), "xquad-tydiqa": (880, 19),
}  # fmt: skip
"""Characters of an English item, its prompt's wording included, and of its answer; about, where files say nothing."""
_SHARES = {"prefix-lm": (0.5, 0.5), "span-corruption": (0.9, 0.2)}
"""Of a segment, what an encoder-decoder reads and what it learns to write (spans of 15 %, and their marks)."""
Items = Mapping[tuple[int, int], int]
"""Characters of prompt and answer, and how many items have so many."""
Tokens = Sequence[tuple[float, float, int]]
"""Tokens of prompt and answer, of an answer one more than its text has, and how many items have so many."""
Lookup = Callable[[str, str, str, str], Items | None]
"""From task, language, split and wording to the items; None: nothing is known."""


def items(task: str, language: str, split: str) -> Items | None:
    """What is known of a published data set's items: how many, and how long in the language."""
    known = _SIZES.get(task)
    if task == "xlsum" and language in _XLSUM:
        train, test = _XLSUM[language]
        known = (train, test, test)
    if known is None:
        return None
    longer = _longer(language)
    prompt, answer = _CHARACTERS[task]
    return {(int(prompt * longer), int(answer * longer)): known[("train", "validation", "test").index(split)]}


def items_of(experiment: Experiment) -> Lookup:
    """What tasks ask: read from the experiment's own folder, or, of the hub, where nothing is fetched, from what is known."""
    found: dict[tuple[str, str, str, str], Items | None] = {}

    def read(task: str, language: str, split: str, prompt: str) -> Items | None:
        key = (task, language, split, prompt)
        if key not in found:
            folder = experiment.data_dir
            if task != experiment.task and experiment.reference.data_dir is not None:
                folder = experiment.reference.data_dir
            found[key] = items(task, language, split)
            if folder is not None:
                try:
                    asked = find_task(task, experiment.tasks)
                    rows = asked.sources(language, split, bundled_or(folder))
                    examples = asked.examples(rows, language=language, prompt=prompt)
                    found[key] = Counter((len(e.prompt), len(e.completion)) for e in examples)
                except LingraftError:
                    pass  # Said by the plan, or by the run; an estimate need not fail for it.
        return found[key]

    return read


@dataclass(frozen=True)
class Read:
    """What is read beside a step's own items, without a gradient.

    Attributes:
        source: Counterparts that the backbone reads for its source states; in training with X-Mixup, which learns from both texts,
            they are learned from too.
        encoder: Items that a translation encoder reads.
        columns: Tokens of the items that source states are laid beside, each once: what a store of them holds.
    """

    source: Work = field(default_factory=Work)
    encoder: Work = field(default_factory=Work)
    columns: float = 0


def work_of(step: "Step", experiment: Experiment, shape: Shape, lookup: Lookup) -> Work | None:
    """What a step reads and writes, or None where nothing is known of its data."""
    if "reference" in step.config or "projected" in step.config:
        return _text_work(step, experiment, shape)
    known = _asked(step, experiment, shape, lookup)
    return None if known is None else _item_work(step, known, shape)


def beside(step: "Step", experiment: Experiment, shape: Shape, lookup: Lookup) -> Read:
    """What a step of two languages reads beside its items; nothing where it reads only these."""
    form = step.config.get("counterpart", {}).get("form")
    if form not in ("beside", "itself") or (mine := _asked(step, experiment, shape, lookup)) is None:
        return Read()
    if form == "itself":
        return Read(encoder=_prompts(step, mine, shape))
    theirs = _counterparts(step, experiment, shape, lookup)
    if theirs is None:
        return Read()
    places = step.config.get("places", {})
    shortest = min(1.0, _mean(theirs) / _mean(mine)) if places.get("mask_padding") and _mean(mine) else 1.0
    # Computed before, they are only read from the disk.
    source = Work() if "states" in step.inputs else _prompts(step, theirs, shape)
    return Read(source=source, columns=shortest * _prompts(step, mine, shape, epochs=1).tokens)


def translated(step: "Step", reader: Shape, lookup: Lookup) -> Work | None:
    """What a translation model reads and writes, with its own vocabulary; None where nothing is known of the rows."""
    config = step.config
    known = lookup(config["task"], config["language"], config["split"], "default")
    if known is None:
        return None
    count = min(sum(known.values()), config.get("limit") or sum(known.values()))
    read = count * _mean(_tokens(known, reader, config["language"]))
    written = count * _mean(_tokens(_scaled(known, config["language"], config["into"]), reader, config["into"]))
    each = read / count if count else 0.0
    return Work(items=count, tokens=read, length=each, written=written * config["beams"], longest=2 * each)


def _asked(step: "Step", experiment: Experiment, shape: Shape, lookup: Lookup) -> Tokens | None:
    """Tokens of a step's items, what is put into the same input with them included."""
    config = step.config
    form = config.get("counterpart", {}).get("form")
    if form == "instead":
        return _counterparts(step, experiment, shape, lookup)
    mine = _own(step, experiment, shape, lookup)
    if form != "concatenated" or mine is None:
        return mine
    theirs = _counterparts(step, experiment, shape, lookup)
    if theirs is None:
        return None
    more = _mean(theirs)
    return [(prompt + more, answer, count) for prompt, answer, count in mine]


def _own(step: "Step", experiment: Experiment, shape: Shape, lookup: Lookup) -> Tokens | None:
    """A step's items; of a second stage that learns from translations, they are as many as their originals."""
    config, language = step.config, step.config["language"]
    origin = language
    if {"second", "places"} & set(config) and _is_translated(experiment, config["split"]):
        origin = experiment.source
    known = lookup(config["task"]["task"], origin, config["split"], config.get("prompt", "default"))
    return None if known is None else _tokens(_scaled(known, origin, language), shape, language)


def _counterparts(step: "Step", experiment: Experiment, shape: Shape, lookup: Lookup) -> Tokens | None:
    """The items in the source language: originals, or translations of a test's."""
    config, source = step.config, experiment.source
    origin = source
    if not {"second", "places"} & set(config) and _is_translated(experiment, config["split"]):
        origin = config["language"]
    known = lookup(config["task"]["task"], origin, config["split"], config.get("prompt", "default"))
    return None if known is None else _tokens(_scaled(known, origin, source), shape, source)


def _is_translated(experiment: Experiment, split: str) -> bool:
    settings = experiment.translation
    return (settings.model is not None or settings.files is not None) and split in settings.splits


def _scaled(known: Items, origin: str, language: str) -> Items:
    """Items in another language, by how long translations are."""
    if origin == language:
        return known
    longer = _longer(language) / _longer(origin)
    found: Counter[tuple[int, int]] = Counter()
    for (prompt, answer), count in known.items():
        found[int(prompt * longer), int(answer * longer)] += count
    return found


def _longer(language: str) -> float:
    return 1.0 if language == "en" else LENGTH.get(language, 1.1)


def _tokens(known: Items, shape: Shape, language: str) -> Tokens:
    rate = characters_a_token(shape, language)
    # An answer is a token longer than its text: the end, or the first token of another candidate.
    return [(prompt / rate, answer / rate + 1, count) for (prompt, answer), count in known.items()]


def _number(found: Tokens) -> int:
    return sum(count for _, _, count in found)


def _mean(found: Tokens) -> float:
    number = _number(found)
    return sum(prompt * count for prompt, _, count in found) / number if number else 0.0


def _text_work(step: "Step", experiment: Experiment, shape: Shape) -> Work | None:
    """Language modelling on segments, or lines of text that are labelled."""
    config, reference = step.config, experiment.reference
    count, length = reference.max_segments, float(reference.segment_tokens)
    if reference.text:
        try:
            path = reference_path(reference, config["language"], experiment.data_dir)
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except (LingraftError, OSError):
            lines = []
        held = sum(map(len, lines)) / characters_a_token(shape, config["language"])
        if lines and reference.unit == "line":
            count, length = min(len(lines), count or len(lines)), min(length, held / len(lines))
        elif lines:
            count = min(count or held, held / length)  # pyright: ignore[reportAssignmentType]
    if count is None:
        return None
    values = config.get("training", {"epochs": 1, "loss_positions": 0.0})
    count *= epochs_read(config["adapter"], values) if "training" in config else 1
    tokens = count * length
    if shape.kind == "encoder-decoder":
        read, said = _SHARES.get(reference.task, (0.5, 0.5))
        return Work(
            items=count,
            tokens=tokens * read,
            length=length * read,
            scored=tokens * said,
            outputs=tokens * said,
            output_length=length * said,
            longest=length * read,
        )
    share = 0.15 if reference.task == "mlm" else 1.0
    return Work(count, tokens, length, share * tokens * values["loss_positions"], longest=reference.segment_tokens)


def _prompts(step: "Step", found: Tokens, shape: Shape, epochs: float | None = None) -> Work:
    """Prompts alone, as often as a step reads its items; nothing is predicted behind them."""
    read = _item_work(step, [(prompt, 0.0, count) for prompt, _, count in found], shape, epochs)
    return replace(read, scored=0.0, outputs=0.0, output_length=0.0, written=0.0)


def _item_work(step: "Step", found: Tokens, shape: Shape, epochs: float | None = None) -> Work:
    """A task's items: read once an epoch, the loss on the answer; or asked, and perhaps answered in writing."""
    config, training = step.config, step.config.get("training")
    values = training or config
    limit, times = values.get("limit"), epochs_read(config["adapter"], training) if training else 1
    times = times if epochs is None else epochs
    number = _number(found)
    share = 1.0 if limit is None or not number else min(1.0, limit / number)
    count = share * number
    prompts = share * sum(min(prompt, values["max_length"]) * many for prompt, _, many in found)
    answers = share * sum(answer * many for _, answer, many in found)
    written = count * config.get("new_tokens", 0)
    if written or shape.kind == "encoder":
        answers = 0.0
    apart = shape.kind == "encoder-decoder"
    tokens = prompts if apart else prompts + answers
    return Work(
        items=times * count,
        tokens=times * tokens,
        length=tokens / count if count else 0.0,
        scored=times * answers,
        outputs=times * answers if apart else 0.0,
        output_length=answers / count if apart and count else 0.0,
        written=written,
        longest=min(values["max_length"], _longest(found)),
    )


def _longest(found: Tokens) -> float:
    """Tokens of the longest item; where all are said to be of the usual length, twice that."""
    lengths = {prompt + max(0.0, answer - 1) for prompt, answer, _ in found}
    return max(lengths, default=0.0) * (2 if len(lengths) == 1 else 1)
