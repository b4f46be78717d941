"""Several adapters of one shape on one model, each meeting the rows of the batch that are its own."""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from lingraft.attaching import REMEDY, TOP, load, peft_config, stacked
from lingraft.backbones import Backbone
from lingraft.errors import AdapterError
from lingraft.heads import Head

if TYPE_CHECKING:
    import torch

MOST = 100
"""The most adapters at once: PEFT looks for names inside of names, so that all are of one length."""
_LANE = re.compile(r"\.lane\d\d(?=\.|$)")


def lane_name(number: int) -> str:
    """What PEFT calls an adapter that is trained with others."""
    return f"lane{number:02}"


@contextmanager
def side_by_side(
    backbone: Backbone, made: Mapping[str, Any], tensors: Sequence[Mapping[str, "torch.Tensor"]], head: Head | None
) -> Iterator[Any]:
    """Puts adapters of one configuration on a model and takes them off again; the base is the same before and after.

    Which of them a row meets is what `Backbone.rows` says (`Rows.lanes`, by `lane_name`).

    Args:
        backbone: The base model.
        made: PEFT's configuration of each.
        tensors: The tensors of each by PEFT's names, those of a head among them.
        head: The head of an encoder; None: its language model.

    Yields:
        The PEFT model.

    Raises:
        AdapterError: They do not fit the model, or it cannot tell them apart.
    """
    from peft import PeftModel, get_peft_model

    from lingraft.modules.bylane import serve
    from lingraft.modules.lowrank import quicken

    names = [lane_name(number) for number in range(len(tensors))]
    with backbone.bare(head) as model, stacked(model, ()), ExitStack() as around:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft_config(made)
            plain = config.is_prompt_learning and config.task_type is None
            try:
                wrapped: Any = (PeftModel if plain else get_peft_model)(model, config, adapter_name=names[0])
            except ValueError as error:  # PEFT found none of the modules.
                raise AdapterError(f"the adapter does not fit this base model: {error}", remedy=REMEDY) from error
            for name in names[1:]:
                wrapped.add_adapter(name, peft_config(made))
        for name, own in zip(names, tensors, strict=True):
            load(wrapped, own, name)
        # PEFT trains the active adapter alone, and of several heads has one active.
        for name, parameter in wrapped.named_parameters():
            parameter.requires_grad_(bool(_LANE.search(name)))
        quicken(model, backbone.rows)
        serve(model, backbone.rows)
        around.enter_context(backbone.sped(model))
        yield wrapped


def parameters_of(wrapped: Any, number: int) -> "dict[str, torch.nn.Parameter]":
    """The parameters of one of the adapters, by the names they have where it is alone."""
    own = f".{lane_name(number)}"
    return {
        _LANE.sub(f".{TOP}", name): parameter
        for name, parameter in wrapped.named_parameters()
        if (found := _LANE.search(name)) and found[0] == own
    }


def tensors_of_lane(wrapped: Any, number: int) -> "dict[str, torch.Tensor]":
    """The tensors of one of the adapters and its head, by the names PEFT saves them under."""
    from peft import get_peft_model_state_dict

    # Asked to find out by itself whether embeddings were trained, PEFT would look at the hub.
    return get_peft_model_state_dict(wrapped, adapter_name=lane_name(number), save_embedding_layers=False)


def random_layers(model: Any) -> str | None:
    """What of a base model is random while something is trained on it: it would be drawn for all rows at once.

    Returns:
        A name, or None where nothing is.
    """
    import torch

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            return name
    values = model.config.get_text_config().to_dict()
    drawn = (n for n in values if "drop" in n or "jitter" in n)
    return next((n for n in drawn if isinstance(values[n], int | float) and values[n] > 0), None)
