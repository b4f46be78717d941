"""A second stage on disk: an ordinary PEFT folder, a note of what it stands on, and a copy of the first stage beside it.

adapter_config.json, adapter_model.safetensors   the second stage's LoRA, which plain PEFT opens
stage1/                                          the first stage, an adapter folder of its own
fusion.safetensors                               tensors beyond LoRA's, where there are any
lingraft.json                                    `second`: the kind, what it reads, how it fuses, the first stage's digest
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from lingraft.adapter import Adapter, content_digest
from lingraft.cards import Facts, write_card
from lingraft.config import AdapterConfig, FusionConfig, MixupConfig, validated
from lingraft.digests import digest_file, digest_value
from lingraft.errors import AdapterError
from lingraft.layouts.common import CONFIG, SIDECAR, WEIGHTS, read_config
from lingraft.tensors import TensorFile, write_all

if TYPE_CHECKING:
    import torch

    from lingraft.fusion.cache import StateCache

FIRST = "stage1"
TENSORS = "fusion.safetensors"
Kind = Literal["lora", "fused", "fused-mt", "mixup"]
Form = Literal["alone", "beside", "concatenated", "itself"]
"""What is read of counterparts: nothing, their states beside the item, both texts as one input, or the item itself as its own."""
_FORMS: dict[Kind, Form] = {"lora": "alone", "fused": "beside", "fused-mt": "itself", "mixup": "beside"}


@dataclass(frozen=True)
class SecondStage:
    """What a second stage is trained as.

    Attributes:
        first: The first stage, a LoRA, on disk.
        kind: `lora`: on its own; `fused`: with source states; `fused-mt`: with a translation encoder's; `mixup`: X-Mixup.
        fusion: How it fuses, for the two kinds that do.
        mixup: The values of X-Mixup, for that kind.
        language: The target language, which a translation encoder asks for.
        cache: Source states that were computed before.
        folder: Where it was read from.
        form: What is read of counterparts, in training and when asked; None: what the kind says, which for LoRA is nothing.
        source: The source language, that of the counterparts; empty: none is read, or it is not known.
        encoder: The digest of the translation encoder it was trained with.
    """

    first: Adapter
    kind: Kind = "lora"
    fusion: FusionConfig | None = None
    mixup: MixupConfig | None = None
    language: str = ""
    cache: "StateCache | None" = None
    folder: Path | None = None
    form: Form | None = None
    source: str = ""
    encoder: str = ""

    def __post_init__(self) -> None:
        if self.first.structure != "lora":
            raise AdapterError(
                f"the first stage is {self.first.structure}, which cannot be merged into the weights", remedy="use LoRA"
            )
        if "second" in self.first.sidecar:
            raise AdapterError(
                "a second stage cannot be the first of another",
                where=self.first.path,
                remedy="give the first stage itself: a LoRA of one language",
            )

    @property
    def place(self) -> Path:
        """Where the first stage lies.

        Raises:
            AdapterError: It is not on disk.
        """
        if self.first.path is None:
            raise AdapterError("the first stage must be an adapter on disk", remedy="save it first")
        return self.first.path

    @property
    def digest(self) -> str:
        """The first stage's digest."""
        return first_digest(self.place)

    @property
    def reads(self) -> Form:
        """What is read of counterparts."""
        return self.form or _FORMS[self.kind]

    def notes(self) -> dict[str, Any]:
        """What the sidecar says."""
        found: dict[str, Any] = {
            "kind": self.kind,
            "form": self.reads,
            "language": self.language,
            "stage1": self.digest,
        }
        if self.source:
            found["source"] = self.source
        if self.encoder:
            found["encoder"] = self.encoder
        if self.fusion is not None:
            found["fusion"] = self.fusion.model_dump(mode="json", exclude={"cache", "cache_limit"})
        if self.mixup is not None:
            found["mixup"] = self.mixup.model_dump(mode="json")
        return found

    def write(self, folder: Path, extra: Mapping[str, "torch.Tensor"]) -> None:
        """Writes the first stage and tensors beyond LoRA's beside an adapter's files."""
        (folder / FIRST).mkdir(exist_ok=True)
        for name in (CONFIG, WEIGHTS, SIDECAR):
            if (self.place / name).exists():
                shutil.copyfile(self.place / name, folder / FIRST / name)
        write_card(folder / FIRST, Facts(read_config(folder / FIRST), self.first.sidecar))
        if extra:
            write_all(folder / TENSORS, {name: tensor.float().cpu().numpy() for name, tensor in extra.items()})

    def load(self, module: "torch.nn.Module") -> None:
        """Puts saved tensors into a module.

        Raises:
            AdapterError: They are missing or do not fit.
        """
        import torch

        path = (self.folder or Path()) / TENSORS
        if self.folder is None or not path.is_file():
            raise AdapterError(f"the file {TENSORS} is missing", where=self.folder, remedy="train the adapter again")
        saved = TensorFile(path)
        try:
            module.load_state_dict({name: torch.from_numpy(np.array(saved.read(name))) for name in saved.names})
        except RuntimeError as error:
            raise AdapterError(f"the tensors of {TENSORS} do not fit", where=path, remedy=str(error)) from error


def second_stage(adapter: Adapter) -> SecondStage | None:
    """How an adapter was trained, if that was in two stages.

    Raises:
        AdapterError: Its first stage is missing or another one, or its note cannot be read.
    """
    notes = adapter.sidecar.get("second")
    if notes is None:
        return None
    if adapter.path is None or not (adapter.path / FIRST).is_dir():
        raise AdapterError(
            "the first stage of this adapter is missing",
            where=adapter.path,
            remedy=f"keep its folder '{FIRST}' with it",
        )
    if (
        not isinstance(notes, dict)
        or notes.get("kind") not in get_args(Kind)
        or notes.get("form") not in (None, *get_args(Form))
    ):
        raise AdapterError(
            "what the second stage is cannot be read",
            where=adapter.path / SIDECAR,
            remedy="make the adapter again, or copy it again whole",
        )
    digest = first_digest(adapter.path / FIRST)
    if notes.get("stage1") != digest:
        raise AdapterError(
            f"the first stage is another one than this adapter was trained on ({digest[:12]}…, not "
            f"{str(notes.get('stage1'))[:12]}…)",
            where=adapter.path / FIRST,
            remedy="put the right one back, or train again",
        )
    where = adapter.path / SIDECAR
    return SecondStage(
        Adapter.load(adapter.path / FIRST),
        notes["kind"],
        validated(FusionConfig, notes["fusion"], where) if notes.get("fusion") is not None else None,
        validated(MixupConfig, notes["mixup"], where) if notes.get("mixup") is not None else None,
        str(notes.get("language", "")),
        folder=adapter.path,
        form=notes.get("form"),
        source=str(notes.get("source", "")),
        encoder=str(notes.get("encoder", "")),
    )


def first_digest(folder: Path) -> str:
    """Of a first stage: its tensors, and its configuration, which says by what they are multiplied."""
    return digest_value([content_digest(folder), digest_file(folder / CONFIG)])


def second_adapter(adapter: AdapterConfig, fusion: FusionConfig) -> AdapterConfig:
    """The structure of a second stage: LoRA of the first one's sizes on the fused layers and those with plain LoRA.

    All second stages that are compared have it: they differ in what is mixed in, not in what is trained.
    """
    fused = (fusion.modules,) if isinstance(fusion.modules, str) else fusion.modules
    plain = (fusion.plain,) if isinstance(fusion.plain, str) else fusion.plain
    modules = "all" if "all" in (*fused, *plain) else tuple(dict.fromkeys((*fused, *plain)))
    return AdapterConfig(rank=adapter.rank, alpha=adapter.alpha, dropout=adapter.dropout, modules=modules)
