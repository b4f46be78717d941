"""Which layouts of models are served: told from a configuration alone, before anything is loaded."""

from collections.abc import Mapping
from typing import Any, Literal

from lingraft.errors import BackboneError

Kind = Literal["decoder", "encoder", "encoder-decoder"]
ENCODERS = (
    "bert",
    "camembert",
    "deberta-v2",
    "distilbert",
    "electra",
    "modernbert",
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
)
ENCODER_DECODERS = ("mt5", "t5", "umt5")
_OF_CLASS: Mapping[str, Kind] = {"ForMaskedLM": "encoder", "ForCausalLM": "decoder", "LMHeadModel": "decoder"}


def guessed_kind(name: str) -> Kind:
    """What a model probably is, from its name alone: for plans that nothing is made of."""
    words = name.lower()
    if "t5" in words:
        return "encoder-decoder"
    return "encoder" if "bert" in words or words.partition("/")[2].startswith(("multilingual-e5", "e5-")) else "decoder"


def kind_of(config: Mapping[str, Any]) -> Kind:
    """What a model is, from the contents of its `config.json`.

    Raises:
        BackboneError: It is nothing that is served.
    """
    name, classes = config.get("model_type"), [str(c) for c in config.get("architectures") or ()]
    if name in ENCODERS:
        return "decoder" if config.get("is_decoder") else "encoder"
    if name in ENCODER_DECODERS:
        return "encoder-decoder"
    found: set[Kind] = {kind for c in classes for end, kind in _OF_CLASS.items() if c.endswith(end)}
    if config.get("is_encoder_decoder"):
        return "encoder-decoder"
    if len(found) == 1:
        return found.pop()
    # A configuration that names no class is a decoder's or nothing: loading it will tell.
    if not classes or any(c.endswith("ForConditionalGeneration") for c in classes):
        return "decoder"
    raise BackboneError(
        f"a model of the type '{name}' ({', '.join(classes)}) is not served",
        remedy="served are causal language models, encoders "
        f"({', '.join(ENCODERS)}) and encoder-decoders ({', '.join(ENCODER_DECODERS)})",
    )
