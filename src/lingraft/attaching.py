"""Puts adapters on a transformers model with PEFT, on top of one another, and takes all of them off again."""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lingraft.adapter import Adapter
from lingraft.errors import AdapterError
from lingraft.layouts.prefix import TENSOR

if TYPE_CHECKING:
    import torch

TOP = "default"
"""What PEFT calls an adapter that is not given a name; those below are called `beneath0`, `beneath1`, …"""


@dataclass(frozen=True)
class Part:
    """An adapter that others stand on.

    Attributes:
        config: PEFT's configuration.
        tensors: Its tensors by PEFT's names.
        trained: Whether it is trained together with the one on top; else it is frozen.
    """

    config: Any
    tensors: Mapping[str, "torch.Tensor"]
    trained: bool = False


def part(adapter: Adapter) -> Part:
    """An adapter as one that others stand on; its head, if it has one, stays behind, and it drops nothing out."""
    made = {
        name: value for name, value in adapter.peft_config.items() if name not in ("modules_to_save", "lora_dropout")
    }
    return Part(peft_config(made), tensors_of(adapter, heads=False))


def tensors_of(adapter: Adapter, *, heads: bool = True) -> "dict[str, torch.Tensor]":
    """An adapter's tensors for a model, by PEFT's names."""
    import numpy as np
    import torch

    arrays = dict(adapter.tensors())
    if heads:
        arrays |= {name: read() for name, read in adapter.others.items()}
    return {name: torch.from_numpy(np.array(array, dtype=_readable(array.dtype))) for name, array in arrays.items()}


@contextmanager
def stacked(model: Any, beneath: Sequence[Part]) -> Iterator[list[str]]:
    """Puts parts on a model, the lowest first; afterwards the model is as it was, whatever else was put on it meanwhile.

    What is put on top is to call `settle` when it is there.

    Yields:
        The parts' names.

    Raises:
        AdapterError: One does not fit the model.
    """
    names: list[str] = []
    try:
        for number, one in enumerate(beneath):
            names.append(f"beneath{number}")
            _inject(model, one, names[-1])
        yield names
    finally:
        unload(model)


def _inject(model: Any, one: Part, name: str) -> None:
    from peft import inject_adapter_in_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            inject_adapter_in_model(one.config, model, adapter_name=name)
        except ValueError as error:  # PEFT found none of the modules.
            raise AdapterError(f"an adapter does not fit this base model: {error}", remedy=REMEDY) from error
    tensors = {key.removeprefix("base_model.model."): value for key, value in one.tensors.items()}
    load(model, tensors, name)
    # PEFT leaves its notes on the model; the next adapter must not be told of another one.
    model.__dict__.pop("peft_config", None)


def settle(model: Any, names: Sequence[str], beneath: Sequence[Part] = (), *, merged: Sequence[str] = ()) -> None:
    """Has the adapters on a model act in their order, freezes those that are not trained, and adds sparse differences in.

    Args:
        model: The model.
        names: All adapters' names, the lowest first.
        beneath: The parts, of which `names` begins with the names.
        merged: The sparse differences among them that are not being learned.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    from lingraft.modules.sparse import SparseLayer

    frozen = [name for name, one in zip(names, beneath, strict=False) if not one.trained]
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and len(names) > 1:
            module.set_adapter(list(names))
    for name, parameter in model.named_parameters():
        if not set(frozen).isdisjoint(name.split(".")):
            parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, SparseLayer) and merged:
            module.merge(adapter_names=list(merged))


def unload(model: Any) -> None:
    """Puts the layers back that adapters were put around; PEFT's own way refuses (IA)³ on a quantised base."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    from lingraft.modules.sparse import SparseLayer

    # The innermost first: a layer may stand around another one.
    for path, module in reversed(list(model.named_modules())):
        if isinstance(module, BaseTunerLayer):
            if isinstance(module, SparseLayer):
                module.unmerge()  # Also what a merge that was stopped half-way had written.
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module.get_base_layer())
    model.__dict__.pop("peft_config", None)


def load(wrapped: Any, tensors: Mapping[str, "torch.Tensor"], name: str = TOP) -> None:
    """Puts an adapter's tensors into a PEFT model, or into one that PEFT has put an adapter on.

    Raises:
        AdapterError: A tensor fits nowhere or has another shape, or a place gets none.
    """
    from peft import set_peft_model_state_dict

    try:
        result = set_peft_model_state_dict(wrapped, dict(tensors), adapter_name=name)
    except KeyError as error:  # PEFT looks a head's tensors up by name.
        raise AdapterError(f"the adapter lacks a tensor of its head: {error.args[0]}", remedy=REMEDY) from error
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise AdapterError(
            "the adapter does not fit this base model: a tensor has another shape", remedy=REMEDY
        ) from error
    marker = _marker(wrapped, name)
    missing = [k for k in result.missing_keys if marker and marker in k and f".{name}" in k]
    # PEFT takes a prefix out of what it is given, and then says that it did not expect it.
    wrong = [*(k for k in result.unexpected_keys if k != TENSOR), *missing]
    if wrong:
        raise AdapterError(
            f"the adapter does not fit this base model: {len(wrong)} tensors, first {wrong[0]}", remedy=REMEDY
        )


def tensors_on(wrapped: Any, name: str = TOP) -> "dict[str, torch.Tensor]":
    """An adapter's tensors as they are on a PEFT model, by the names PEFT saves them under; those of the top one with its head.

    Args:
        wrapped: The PEFT model.
        name: The adapter's.
    """
    from peft import get_peft_model_state_dict

    if name == TOP:
        # PEFT tells adapters of one structure apart only where it made both.
        # PEFT would ask the hub whether the embeddings have grown.
        found = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        return {key: tensor for key, tensor in found.items() if not _BENEATH.search(key)}
    ours = re.compile(rf"\.{name}(?=\.|$)")
    return {ours.sub("", key): tensor for key, tensor in wrapped.named_parameters() if ours.search(key)}


_BENEATH = re.compile(r"\.beneath\d+(\.|$)")


def _marker(model: Any, name: str) -> str | None:
    """What the names of an adapter's tensors contain; None for a prefix, which has no layers."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    return PEFT_TYPE_TO_PREFIX_MAPPING.get(model.peft_config[name].peft_type)


def peft_config(values: Mapping[str, Any]) -> Any:
    """PEFT's configuration object; fields that this version of PEFT does not have are left out.

    Raises:
        AdapterError: PEFT and lingraft know no modules for the structure, or a value is none of PEFT's.
    """
    import dataclasses

    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    from lingraft.modules import register

    register()
    kind: Any = values["peft_type"]
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING or kind not in PEFT_TYPE_TO_TUNER_MAPPING:
        raise AdapterError(
            f"an adapter of the type {kind} can be merged, but not yet put on a model",
            remedy="merge it, or convert it to LoRA, (IA)³, a prefix or a bottleneck",
        )
    made: Any = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    known = {f.name for f in dataclasses.fields(made) if f.init} - {"peft_type"}
    # Lists are copied: PEFT adds to them.
    try:
        return made(**{k: list(v) if isinstance(v, list) else v for k, v in values.items() if k in known})
    except (TypeError, ValueError, AttributeError) as error:
        raise AdapterError(
            f"PEFT cannot read this adapter's configuration ({error})",
            remedy="save it with the installed peft, or install the version of peft that saved it",
        ) from error


def _readable(dtype: Any) -> Any:
    """A type that torch can take from numpy: bfloat16 goes by float32."""
    import numpy as np

    return np.float32 if dtype.kind == "V" or dtype.name == "bfloat16" else dtype


REMEDY = "use the base model the adapter was trained on"
