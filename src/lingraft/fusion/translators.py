"""FLARE-MT: source states without a source text, from a translation model's encoder that reads the target text.

The encoder is frozen; what is trained is one linear map from its width to the backbone's, the same for every fused layer.
"""

import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lingraft.backbones import training_stack
from lingraft.batching import derived_seed
from lingraft.config import BackboneConfig
from lingraft.errors import BackboneError, MissingExtra, UserError
from lingraft.languages import LANGUAGES
from lingraft.locating import architecture_of, locate, materialise

_UNBOUNDED = 10**9
"""Tokenizers without a limit give a number far above this one."""


class TranslationEncoder:
    """A frozen encoder of target-language text: that of NLLB-200, M2M-100, Marian or (m)T5, or an encoder by itself.

    A text's states are all that the encoder gives, from the first token on that its tokenizer sets: those of special tokens
    are states like others. NLLB-200 and M2M-100 begin with the language's tag, which is the *target* language's here, since
    it is the target text that is read.

    Args:
        model: A hub id or a folder, with safetensors weights.
        revision: The commit of a hub model.
        language: The language of the texts: a code of `languages.LANGUAGES`, or one that the tokenizer has itself.
        device: Where it computes.
        dtype: The type of its weights and states.

    Attributes:
        width: Values of a state.
        digest: The digest of weights and tokenizer.
        longest: The most tokens it reads; None where there is no bound.

    Raises:
        BackboneError: The model cannot be found or loaded, lacks weights, or has no encoder.
        MissingExtra: The training extra is not installed, or sentencepiece for a tokenizer that needs it.
        UserError: The translation model does not know the language.
    """

    def __init__(
        self, model: str, *, revision: str | None = None, language: str, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        training_stack()
        located = locate(BackboneConfig(model=model, revision=revision))
        kind = architecture_of(located)
        if kind == "decoder":
            raise BackboneError(
                "this model has no encoder",
                where=located.name,
                remedy="take NLLB-200, M2M-100, Marian or an encoder (fusion.encoder)",
            )
        folder = materialise(located)
        self.digest = located.digest
        self.device = torch.device(device)
        self._tokenizer = _tokenizer(folder)
        tag = _tag(self._tokenizer, language, located.name)
        if tag is not None:
            self._tokenizer.src_lang = tag
        encoder = _encoder(folder, dtype, inner=kind == "encoder-decoder")
        # torch's own method: transformers' refuses some models that it thinks are quantised.
        torch.nn.Module.to(encoder, self.device)
        self._encoder: Any = encoder.eval().requires_grad_(False)
        self.width = int(encoder.config.hidden_size)
        self.longest = _longest(encoder.config, self._tokenizer, relative=kind == "encoder-decoder")
        self._cut: set[str] = set()

    @property
    def truncated(self) -> int:
        """How many different texts were longer than `longest` and lost their ends."""
        return len(self._cut)

    def states(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """The encoder's output, without gradient.

        Args:
            texts: At least one, in the encoder's language.

        Returns:
            States (batch × length × width), padded on the right, and where they are of a text (batch × length, 1 and 0).
        """
        rows = [self._ids(text) for text in texts]
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self._tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for n, row in enumerate(rows):
            ids[n, : len(row)] = torch.tensor(row)
            mask[n, : len(row)] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        # Not inference mode: the trained map must be able to keep the states for its gradient. And in the encoder's own
        # type, whoever asks, or a training under autocast would read other states than an evaluation.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self._encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text)["input_ids"]
        if self.longest is None or len(ids) <= self.longest:
            return ids
        self._cut.add(text)
        return self._tokenizer(text, truncation=True, max_length=self.longest)["input_ids"]


def _tokenizer(folder: Path) -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer

    pieces = any(folder.glob("*.spm")) or any(folder.glob("*.bpe.model"))
    if pieces and not (folder / "tokenizer.json").is_file() and importlib.util.find_spec("sentencepiece") is None:
        raise MissingExtra("sentencepiece", "translation")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, TypeError, OSError, ImportError) as error:
        raise BackboneError(
            f"the tokenizer cannot be loaded: {error}",
            where=folder,
            remedy="download the checkpoint again; Marian and M2M-100 need pip install 'lingraft[translation]'",
        ) from error
    tokenizer.truncation_side = "right"
    return tokenizer


def _tag(tokenizer: Any, language: str, name: str) -> str | None:
    """What a tokenizer calls a language; None: it is told of none.

    Raises:
        UserError: It does not know the language.
    """
    if not hasattr(tokenizer, "src_lang"):
        return None
    # M2M-100 has codes, for which it keeps tokens of another form; NLLB-200 has the tokens themselves, FLORES' codes.
    known = getattr(tokenizer, "lang_code_to_token", None) or tokenizer.get_added_vocab()
    names = [language, LANGUAGES[language].flores] if language in LANGUAGES else [language]
    found = next((each for each in names if each in known), None)
    if found is None:
        raise UserError(
            f"the translation model does not know the language '{' or '.join(names)}'",
            where=name,
            remedy="leave the language out, or take an encoder that knows it (fusion.encoder)",
        )
    return found


def _encoder(folder: Path, dtype: torch.dtype, *, inner: bool) -> Any:
    """The encoder of a model, or the model itself where it is one.

    Raises:
        BackboneError: It cannot be loaded, or the checkpoint lacks weights of the encoder.
    """
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # What is not in the checkpoint, a decoder or a pooler that is never asked, is drawn from the global state.
    with torch.random.fork_rng(devices=[]):
        try:
            model, found = AutoModel.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
        except (ValueError, KeyError, OSError, ImportError, RuntimeError) as error:
            raise BackboneError(
                f"the model cannot be loaded: {error}",
                where=folder,
                remedy="download the checkpoint again, or choose another translation model",
            ) from error
    encoder = model.get_encoder() if inner else model
    # By identity: a tied embedding has several names.
    own = {
        id(parameter)
        for path, module in encoder.named_modules()
        for parameter in module.parameters(recurse=False)
        # A pooler is not asked; such positions (Marian's) are computed, and in no file.
        if path.partition(".")[0] != "pooler" and "Sinusoidal" not in type(module).__name__
    }
    named = dict(model.named_parameters(remove_duplicate=False))
    lacking = sorted(n for n in found["missing_keys"] if id(named.get(n)) in own)
    if lacking:
        raise BackboneError(
            f"this checkpoint lacks weights of its encoder: {len(lacking)} tensors, first {lacking[0]}",
            where=folder,
            remedy="download the checkpoint again, or choose another translation model",
        )
    return encoder


def _longest(config: Any, tokenizer: Any, *, relative: bool) -> int | None:
    """The least of what the model has positions for and what its tokenizer allows.

    Args:
        config: The encoder's.
        tokenizer: Its tokenizer.
        relative: Whether a model that names no number of positions has relative ones.
    """
    positions = getattr(config, "max_position_embeddings", None)
    # RoBERTa's positions start behind the one of the padding token.
    offset = "roberta" in config.model_type or config.model_type == "camembert"
    taken = config.pad_token_id + 1 if positions is not None and offset else 0
    bounds = [positions - taken] if positions is not None else []
    bounds += [tokenizer.model_max_length] if tokenizer.model_max_length < _UNBOUNDED else []
    return min(bounds, default=None)


def projection(width_in: int, width_out: int, seed_parts: Sequence[object]) -> torch.Tensor:
    """Initial weights of the trained map from the encoder's width to the backbone's, width_out × width_in in float32.

    Uniform in ±1/√width_in (a linear layer's usual start), a function of the sizes and the seed's parts alone.

    Args:
        width_in: The encoder's width.
        width_out: The backbone's.
        seed_parts: What the drawing depends on, such as the backbone's digest and the seed; values of JSON.
    """
    rng = np.random.default_rng(derived_seed("translation projection", width_in, width_out, *seed_parts))
    values = rng.uniform(-1, 1, size=(width_out, width_in)) / math.sqrt(width_in)
    return torch.from_numpy(values.astype(np.float32))
