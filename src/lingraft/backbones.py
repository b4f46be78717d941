"""A loaded, frozen base model, to which adapters are attached and from which they are detached in place."""

import importlib.util
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lingraft import roles
from lingraft.adapter import Adapter
from lingraft.errors import AdapterError, BackboneError, MissingExtra, UserError
from lingraft.fitting import base_digest
from lingraft.layouts.prefix import TENSOR
from lingraft.locating import Located, materialise

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def training_stack() -> None:
    """Checks that the training extra is installed.

    Raises:
        MissingExtra: A package is absent.
    """
    for package in ("torch", "transformers", "peft", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, "training")


class Backbone:
    """A loaded, frozen base model with its tokenizer; adapters are attached and detached in place.

    Args:
        located: What `locate` found.

    Raises:
        BackboneError: The model cannot be loaded.
        MissingExtra: The training extra is not installed.
    """

    def __init__(self, located: Located) -> None:
        training_stack()
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self.located = located
        folder = materialise(located)
        remote = located.config.trust_remote_code
        self.device = torch.device(_device(located.config.device))
        self.dtype: torch.dtype = getattr(torch, located.config.dtype)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=self.dtype,
                use_safetensors=True,
                trust_remote_code=remote,
                local_files_only=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote, local_files_only=True)
        except (ValueError, KeyError, OSError, ImportError) as error:
            raise BackboneError(f"the model cannot be loaded: {error}", where=folder) from error
        torch.nn.Module.to(model, self.device)
        self.model: PreTrainedModel = model.eval().requires_grad_(False)
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self._check_head()

    @property
    def digest(self) -> str:
        """The digest of weights and tokenizer."""
        return self.located.digest

    @property
    def prefix(self) -> list[int]:
        """The ids a text starts with: the tokenizer's own beginning-of-text token, where it adds one."""
        ids, first = self.tokenizer("a")["input_ids"], self.tokenizer.bos_token_id
        return [first] if isinstance(first, int) and ids and ids[0] == first else []

    @property
    def pad_id(self) -> int:
        """An id to fill up a batch; it is masked everywhere."""
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return next((int(i) for i in (pad, end) if isinstance(i, int)), 0)

    def encode(self, text: str) -> list[int]:
        """Text to ids, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text."""
        return self.tokenizer.decode(list(ids))  # pyright: ignore[reportReturnType]

    def hidden(self, input_ids: "torch.Tensor", attention_mask: "torch.Tensor") -> "torch.Tensor":
        """The states before the output embedding (batch × length × width), adapters included."""
        return self.model.base_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state

    @property
    def softcap(self) -> float | None:
        """The bound of the logits, where the architecture has one (Gemma 2)."""
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    def _check_head(self) -> None:
        """Makes sure that states times the output embedding are the model's own logits.

        Losses and scores project only the positions they need, past the model's own forward; an architecture that does
        more than a linear map and a soft cap there must be refused, not approximated.
        """
        import torch

        from lingraft.losses import project

        ids = torch.tensor([[*self.prefix, 1, 2, 3]], device=self.device)
        head = self.model.get_output_embeddings()
        if head is None or getattr(head, "bias", None) is not None:
            raise BackboneError(f"the architecture {type(self.model).__name__} has no plain output embedding")
        with torch.no_grad():
            expected = self.model(input_ids=ids).logits[0, -1].float()
            ours = project(self.hidden(ids, torch.ones_like(ids))[0, -1:], head.weight, self.softcap)[0]
        if not torch.allclose(expected, ours, rtol=0.02, atol=0.02 * float(expected.abs().max())):
            raise BackboneError(
                f"the architecture {type(self.model).__name__} changes its logits in a way lingraft does not know",
                remedy="use a Llama, Gemma, Qwen or Mistral layout",
            )

    @contextmanager
    def attached(self, peft_config: Any, tensors: Mapping[str, "torch.Tensor"] | None = None) -> Iterator[Any]:
        """Attaches a PEFT adapter and takes it off again; the base is the same before and after.

        Args:
            peft_config: A PEFT configuration.
            tensors: The adapter's tensors by PEFT's names; None: PEFT's initial ones.

        Yields:
            The PEFT model.

        Raises:
            AdapterError: A tensor fits nowhere, or a place gets none.
        """
        from peft import get_peft_model

        from lingraft.prefixes import in_front

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = get_peft_model(self.model, peft_config)
        learned = getattr(wrapped, "prompt_encoder", None)
        try:
            if tensors is not None:
                _load(wrapped, tensors)
            if learned is None:
                yield wrapped
            else:
                with in_front(self.model, learned.to(self.device)["default"].embedding.weight):
                    yield wrapped
        finally:
            if learned is None:
                wrapped.unload()
            self.model.requires_grad_(False)
            # PEFT leaves its notes on the base model; the next adapter must not be told of a second one.
            self.model.__dict__.pop("peft_config", None)

    @contextmanager
    def with_adapter(self, adapter: Adapter | None) -> Iterator[Any]:
        """The base with an adapter on it, in evaluation mode; None: the base alone.

        Yields:
            The PEFT model, or None.

        Raises:
            AdapterError: The adapter belongs to another base model.
        """
        if adapter is None:
            self.model.eval()
            yield None
            return
        import numpy as np
        import torch

        theirs = base_digest(adapter)
        if theirs and theirs != self.digest:
            raise AdapterError(
                f"the adapter belongs to another base model ({theirs[:40]}…, this one is {self.digest[:40]}…)",
                where=adapter.path,
                remedy="give the base model it was trained on",
            )
        arrays = {**dict(adapter.tensors()), **{name: read() for name, read in adapter.others.items()}}
        tensors = {n: torch.from_numpy(np.array(a, dtype=_readable(a.dtype))) for n, a in arrays.items()}
        with self.attached(peft_config(adapter.peft_config), tensors) as wrapped:
            wrapped.eval()
            yield wrapped

    def target_modules(self, chosen: str | Sequence[str]) -> list[str]:
        """The paths of the linear layers that names and roles choose, sorted.

        Raises:
            UserError: A name or role matches no linear layer.
        """
        import torch

        head = self.model.get_output_embeddings()
        linear = [n for n, m in self.model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
        if not linear:
            raise UserError(f"{type(self.model).__name__} has no linear layers to adapt")
        return sorted(roles.select(linear, chosen))


def _load(wrapped: Any, tensors: Mapping[str, "torch.Tensor"]) -> None:
    """Puts tensors into a PEFT model.

    Raises:
        AdapterError: A tensor fits nowhere or has another shape, or a place gets none.
    """
    from peft import set_peft_model_state_dict

    remedy = "use the base model the adapter was trained on"
    try:
        result = set_peft_model_state_dict(wrapped, dict(tensors))
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise AdapterError(
            "the adapter does not fit this base model: a tensor has another shape", remedy=remedy
        ) from error
    marker = getattr(wrapped.base_model, "prefix", None)
    missing = [k for k in result.missing_keys if marker and marker in k]
    # PEFT takes a prefix out of what it is given, and then says that it did not expect it.
    wrong = [*(k for k in result.unexpected_keys if k != TENSOR), *missing]
    if wrong:
        raise AdapterError(
            f"the adapter does not fit this base model: {len(wrong)} tensors, first {wrong[0]}", remedy=remedy
        )


def peft_config(values: Mapping[str, Any]) -> Any:
    """PEFT's configuration object; fields that this version of PEFT does not have are left out.

    Raises:
        AdapterError: PEFT and lingraft know no modules for the structure.
    """
    import dataclasses

    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    from lingraft.modules import register

    register()
    kind: Any = values["peft_type"]
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING or kind not in PEFT_TYPE_TO_TUNER_MAPPING:
        raise AdapterError(f"an adapter of the type {kind} can be merged, but not yet put on a model")
    made = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    known = {f.name for f in dataclasses.fields(made) if f.init} - {"peft_type"}
    return made(**{k: v for k, v in values.items() if k in known})


def _readable(dtype: Any) -> Any:
    """A type that torch can take from numpy: bfloat16 goes by float32."""
    import numpy as np

    return np.float32 if dtype.kind == "V" or dtype.name == "bfloat16" else dtype


def _device(name: str) -> str:
    import torch

    if name != "auto":
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"the device '{name}' is not available", remedy="use device=auto or device=cpu")
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def environment(backbone: Backbone | None = None) -> dict[str, Any]:
    """The numeric environment: equal bytes are promised for equal ones."""
    import platform

    import numpy as np

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "numpy": np.__version__,
    }
    if backbone is not None:
        import peft
        import torch
        import transformers

        found |= {
            "device": torch.cuda.get_device_name() if backbone.device.type == "cuda" else str(backbone.device),
            "threads": torch.get_num_threads(),
            "dtype": str(backbone.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        }
    return found
