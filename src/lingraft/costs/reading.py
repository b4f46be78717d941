"""What steps read and write: from files where there are any, else from what is known of published data sets."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lingraft.config import Experiment
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
Items = Sequence[tuple[int, int]]
"""Of every item: characters of prompt and answer."""
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
    longer = 1.0 if language == "en" else LENGTH.get(language, 1.1)
    prompt, answer = _CHARACTERS[task]
    return [(int(prompt * longer), int(answer * longer))] * known[("train", "validation", "test").index(split)]


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
                    found[key] = [(len(e.prompt), len(e.completion)) for e in examples]
                except LingraftError:
                    pass  # Said by the plan, or by the run; an estimate need not fail for it.
        return found[key]

    return read


def work_of(step: "Step", experiment: Experiment, shape: Shape, lookup: Lookup) -> Work | None:
    """What a step reads and writes, or None where nothing is known of its data."""
    config = step.config
    if "reference" in config or "projected" in config:
        return _text_work(step, experiment, shape)
    task, prompt = config["task"]["task"], config.get("prompt", "default")
    known = lookup(task, config["language"], config["split"], prompt)
    return None if known is None else _item_work(step, known, shape)


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
    count *= values["epochs"]
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


def _item_work(step: "Step", known: Items, shape: Shape) -> Work:
    """A task's items: read once an epoch, the loss on the answer; or asked, and perhaps answered in writing."""
    config, training = step.config, step.config.get("training")
    values = training or config
    limit, times = values.get("limit"), training["epochs"] if training else 1
    rate = characters_a_token(shape, config["language"])
    share = 1.0 if limit is None or not known else min(1.0, limit / len(known))
    count = share * len(known)
    prompts = share * sum(min(prompt / rate, values["max_length"]) for prompt, _ in known)
    # An answer is a token longer than its text: the end, or the first token of another candidate.
    answers = share * sum(answer / rate + 1 for _, answer in known)
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
        longest=min(values["max_length"], _longest(known) / rate),
    )


def _longest(known: Items) -> int:
    """Characters of the longest item; where all are said to be of the usual length, twice that."""
    lengths = {prompt + answer for prompt, answer in known}
    return max(lengths, default=0) * (2 if len(lengths) == 1 else 1)
