"""Translation models: NLLB, M2M-100 and Marian, from the hub or a folder, one pair of languages at a time.

`located_translator` and `translation_digest` are all that a plan needs; they import no deep-learning library.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingraft.backbones import device_name, training_stack
from lingraft.config import BackboneConfig
from lingraft.digests import digest_value
from lingraft.errors import BackboneError, MissingExtra, UserError
from lingraft.languages import LANGUAGES, name_of
from lingraft.locating import Located, configuration, locate, materialise

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int], None]
"""Told how many pieces of text are done, and of how many."""
_MULTILINGUAL = ("m2m_100", "nllb-moe")
_TYPES = (*_MULTILINGUAL, "marian")
# Part of every digest: raise it when the same model would write something else.
_FORM = 1
# A translation is rarely three times as long as its text, in tokens of one vocabulary; a model that repeats itself is.
_TIMES, _MORE = 3, 20
_UNSPACED = ("Hans", "Hant", "Jpan")
"""Scripts whose sentences follow one another without a blank."""

_BOUNDARIES = (
    re.compile(r"(\s*\n\s*)"),
    re.compile(r"""(?:[.!?…։؟۔।॥።][”’»"')\]]*(?=\s)|[。！？][”’」』）]*)(\s*)"""),
    re.compile(r"(\s+)"),
)
"""Where a text may be divided, the best first: lines, sentences, words. The group is what stands between two pieces."""


def located_translator(
    model: str, source: str, target: str, *, revision: str | None = None, device: str = "auto", dtype: str = "float32"
) -> Located:
    """Finds a translation model.

    Args:
        model: A hub id or a folder; `{source}` and `{target}` are filled with the languages' codes (Marian has a model a pair).
        source: The language of the texts.
        target: The language to translate into.
        revision: The commit of a hub model; None: the newest.
        device: As for a backbone.
        dtype: As for a backbone.

    Raises:
        BackboneError: It does not exist, or has only pickled weights.
        UserError: It is no translation model.
    """
    name = model.replace("{source}", source).replace("{target}", target)
    located = locate(
        BackboneConfig.model_validate({"model": name, "revision": revision, "device": device, "dtype": dtype})
    )
    if located.kind == "gguf":
        raise UserError(f"'{name}' is no translation model", remedy="give an NLLB, M2M-100 or Marian model")
    return located


def translation_digest(located: Located, source: str, target: str, beams: int = 1) -> str:
    """What a step's key knows of a translation besides its texts."""
    values = {"model": located.digest, "dtype": located.config.dtype, "languages": [source, target], "beams": beams}
    return digest_value({**values, "form": _FORM})


def pieces(text: str, fits: Callable[[str], bool]) -> list[tuple[str, str]]:
    """Divides a text that is too long, in halves as equal as the ends of its lines, sentences or words allow.

    Args:
        text: The text.
        fits: Whether a text is short enough; a single character is always taken as it is.

    Returns:
        Pieces, each with what stands between it and the next; put together they are the text.
    """
    if len(text) < 2 or fits(text):
        return [(text, "")]
    first = last = len(text) // 2
    for boundary in _BOUNDARIES:
        inside = [m.span(1) for m in boundary.finditer(text) if m.start(1) > 0 and m.end(1) < len(text)]
        if inside:
            first, last = min(inside, key=lambda span: abs(sum(span) - len(text)))
            break
    before, behind = pieces(text[:first], fits), pieces(text[last:], fits)
    return [*before[:-1], (before[-1][0], text[first:last]), *behind]


class Translator:
    """A loaded translation model, from one language into another.

    It writes the likeliest token each time, or searches with beams; nothing is drawn, and nothing of the model's own defaults is
    taken but its special tokens.

    Args:
        model: A hub id or a folder (see `located_translator`).
        source: The language of the texts.
        target: The language to translate into.
        revision: The commit of a hub model; None: the newest.
        device: As for a backbone.
        dtype: As for a backbone.
        beams: The width of the search.
        batch_tokens: At most so many tokens are read at once, padding included.

    Attributes:
        located: The model that was found.
        digest: What a step's key knows of a translation besides its texts.
        cut: How many pieces of text were translated to as many tokens as there is room for, and end there.

    Raises:
        BackboneError: The model cannot be found or loaded.
        MissingExtra: The training extra is not installed, or sentencepiece, which some tokenizers need.
        UserError: It is no translation model, or does not know one of the languages.
    """

    def __init__(
        self,
        model: str,
        source: str,
        target: str,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "float32",
        beams: int = 1,
        batch_tokens: int = 4096,
    ) -> None:
        training_stack()
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import torch
        from transformers import GenerationConfig
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self.located = located_translator(model, source, target, revision=revision, device=device, dtype=dtype)
        self.digest = translation_digest(self.located, source, target, beams)
        self.source, self.target, self.beams, self.batch_tokens = source, target, beams, batch_tokens
        self.cut = 0
        folder = materialise(self.located)
        kind = _kind(folder, self.located.name)
        self.tokenizer = _tokenizer(folder)
        self.device = torch.device(device_name(device))
        self.model = _model(folder, getattr(torch, dtype)).to(self.device).eval().requires_grad_(False)
        config, own = self.model.config, self.model.generation_config
        first: int | None = None
        self._sign = ""
        if kind in _MULTILINGUAL:
            self.tokenizer.src_lang, first = self._known(source)[0], self._known(target)[1]
        else:
            self._sign = self._marian_sign()
        self._positions = min(int(config.max_position_embeddings), int(self.tokenizer.model_max_length))
        start = own.decoder_start_token_id if own is not None else None
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        self._values: dict[str, Any] = {
            "decoder_start_token_id": config.decoder_start_token_id if start is None else start,
            "pad_token_id": pad,
            "eos_token_id": end,
            "forced_bos_token_id": first,
            # Marian's own configuration forbids padding in a translation; nobody wants any.
            "suppress_tokens": [pad] if pad not in (None, end) else None,
        }
        # What a configuration leaves open is filled from the model's, whose beams and penalties are not asked for.
        self.model.generation_config = GenerationConfig(**self._values)
        blank = LANGUAGES[target].flores.endswith(_UNSPACED) if target in LANGUAGES else False
        self._between = "" if blank else " "

    def translate(self, texts: Sequence[str], progress: Progress | None = None) -> list[str]:
        """The texts' translations, in their order.

        A text that is longer than the model's positions is translated in pieces. A text without a word stays as it is.

        Args:
            texts: The texts.
            progress: Told after every batch.
        """
        divided = [pieces(text, self._fits) if text.strip() else [] for text in texts]
        unique = list(dict.fromkeys(piece for found in divided for piece, _ in found if piece.strip()))
        known: dict[str, str] = {}
        for batch in self._batches(unique):
            known.update(zip(batch, self._translated(batch), strict=True))
            if progress is not None:
                progress(len(known), len(unique))
        return [self._joined(found, known) if found else text for text, found in zip(texts, divided, strict=True)]

    def _joined(self, found: list[tuple[str, str]], known: dict[str, str]) -> str:
        whole = ""
        for piece, behind in found:
            whole += known.get(piece, piece) + (behind if "\n" in behind else self._between)
        return whole.strip()

    def _fits(self, text: str) -> bool:
        return len(self._ids(text)) <= self._positions

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(self._sign + text)["input_ids"]

    def _batches(self, texts: Sequence[str]) -> Iterator[list[str]]:
        """Texts of like length together, the longest first."""
        lengths = {text: len(self._ids(text)) for text in texts}
        room, batch = self.batch_tokens // self.beams, []
        for text in sorted(texts, key=lambda t: -lengths[t]):
            if batch and (len(batch) + 1) * lengths[batch[0]] > room:
                yield batch
                batch = []
            batch.append(text)
        if batch:
            yield batch

    def _translated(self, batch: list[str]) -> list[str]:
        import torch
        from transformers import GenerationConfig

        rows = [self._ids(text)[: self._positions] for text in batch]
        # What a text may become does not depend on what else is in the batch.
        bounds = [min(self._positions - 2, _TIMES * len(row) + _MORE) for row in rows]
        pad, width = self._values["pad_token_id"], max(map(len, rows))
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device)
        asked = GenerationConfig(do_sample=False, num_beams=self.beams, max_new_tokens=max(bounds), **self._values)
        with torch.inference_mode():
            written = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=asked).tolist()
        return [self._text(row[1:], bound) for row, bound in zip(written, bounds, strict=True)]

    def _text(self, ids: list[int], bound: int) -> str:
        end, ids = self._values["eos_token_id"], ids[:bound]
        self.cut += end not in ids
        kept = ids[: ids.index(end)] if end in ids else ids
        # The first one says the language, where the model was told to begin with it.
        kept = kept if self._values["forced_bos_token_id"] is None else kept[1:]
        return self.tokenizer.decode(kept, skip_special_tokens=True).strip()

    def _known(self, code: str) -> tuple[str, int]:
        """What a multilingual model calls a language, and the id of its token."""
        flores = LANGUAGES[code].flores if code in LANGUAGES else code
        for name, token in ((flores, flores), (code, f"__{code}__")):
            number = self.tokenizer.convert_tokens_to_ids(token)
            if isinstance(number, int) and number != self.tokenizer.unk_token_id:
                return name, number
        raise self._unknown(code)

    def _marian_sign(self) -> str:
        """What a Marian model that writes several languages reads in front of the text."""
        signs = {token for token in self.tokenizer.get_vocab() if re.fullmatch(r">>\w+<<", token)}
        if not signs:
            return ""
        flores = LANGUAGES[self.target].flores if self.target in LANGUAGES else self.target
        for code in (flores.split("_")[0], flores, self.target):
            if f">>{code}<<" in signs:
                return f">>{code}<< "
        raise self._unknown(self.target)

    def _unknown(self, code: str) -> UserError:
        return UserError(
            f"the translation model '{self.located.name}' does not know the language '{code}' ({name_of(code)})",
            remedy="take another translation.model, or aligned rows of the task",
        )


def _kind(folder: Path, name: str) -> str:
    kind = configuration(folder / "config.json").get("model_type")
    if kind not in _TYPES:
        raise UserError(
            f"'{name}' is no translation model (its type is {kind})", remedy="give an NLLB, M2M-100 or Marian model"
        )
    return kind


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ImportError as error:
        raise MissingExtra("sentencepiece", "translation") from error
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise BackboneError(
            f"the model's tokenizer cannot be loaded: {error}",
            where=folder,
            remedy="download the translation model again; Marian and M2M-100 need pip install 'lingraft[translation]'",
        ) from error


def _model(folder: Path, dtype: "torch.dtype") -> Any:
    from transformers import AutoModelForSeq2SeqLM

    try:
        model, found = AutoModelForSeq2SeqLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise BackboneError(
            f"the model cannot be loaded: {error}",
            where=folder,
            remedy="download the translation model again, or choose another",
        ) from error
    if missing := found["missing_keys"]:
        raise BackboneError(
            f"this checkpoint lacks {len(missing)} of the model's tensors, first {min(missing)}",
            where=folder,
            remedy="download the translation model again",
        )
    return model
