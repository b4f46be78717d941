"""What a user may ask for: frozen values that refuse unknown keys, read from YAML and `key=value` overrides."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lingraft.errors import ConfigError, suggestion
from lingraft.protocols import PAPER, division

LanguageCode = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,31}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Weight = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class Config(BaseModel):
    """A frozen value that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    later: ClassVar[frozenset[str]] = frozenset()
    """Fields that came after steps had been finished: left out of keys while they hold their default."""

    def key(self, *without: str) -> dict[str, Any]:
        """The value as plain data for a step's key, less the fields named."""
        unset = {name for name in self.later if getattr(self, name) == type(self).model_fields[name].default}
        return self.model_dump(mode="json", exclude={*without, *unset})


ConfigType = TypeVar("ConfigType", bound=Config)


class BackboneConfig(Config):
    """A frozen base model."""

    model: str = Field(description="'demo', a folder, a .gguf file, or a hub id")
    revision: str | None = Field(None, description="commit of a hub model; resolved once and recorded if absent")
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    device: str = Field(default="auto", description="'auto', 'cpu', 'cuda', 'cuda:0', 'mps'")
    trust_remote_code: bool = Field(default=False, description="run Python code that comes with the model")
    quantization: Literal["none", "nf4", "int8"] = Field(
        default="none", description="base weights in 4 or 8 bits (bitsandbytes, on a GPU); adapters stay in float32"
    )


_OF_FAMILY = {
    "lora": ("rank", "alpha", "dropout", "modules"),
    "ia3": ("modules",),
    "prefix": ("tokens",),
    "bottleneck": ("reduction", "positions", "activation", "invertible", "leave_out_last"),
    "sparse": ("entries", "modules", "l1", "select", "first_epochs"),
}
"""Which values of an adapter's configuration mean something to which structure."""


class SpeedConfig(Config):
    """How fast and in how much memory something is computed, never what: no step's key holds any of it."""

    part_tokens: int = Field(
        default=4096,
        ge=16,
        description="training: padded tokens that go through the model at once; a batch is split into parts",
    )
    packing: bool = Field(
        default=False, description="training decoders: several texts in one row, none of which sees another"
    )
    together: int = Field(
        default=1, ge=1, description="adapters of one shape that are trained in one forward pass, at most"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="training: activations are computed again instead of kept: less memory, more time"
    )
    compile: bool = Field(default=False, description="torch.compile; it needs a C++ compiler")
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        default="auto",
        description="auto: transformers' choice for the model, which is PyTorch's fused attention where it can be",
    )
    kernels: Literal["auto", "none", "liger"] = Field(
        default="auto", description="fused kernels on a GPU; auto: Liger's where it is installed"
    )

    @model_validator(mode="after")
    def _one_layout(self) -> "SpeedConfig":
        if self.packing and self.together > 1:
            raise ValueError(
                "packing and together: the texts of several adapters do not share a row; ask for one of them"
            )
        return self

    @property
    def lost_behind_prefixes(self) -> tuple[str, ...]:
        """What was asked for and cannot be had while a prefix stands before every text."""
        return tuple(name for name in ("packing", "gradient_checkpointing", "compile") if getattr(self, name))


class AdapterConfig(Config):
    """The structure of an adapter; values that another structure needs are refused."""

    family: Literal["lora", "ia3", "prefix", "bottleneck", "sparse"] = "lora"
    rank: int = Field(default=8, ge=1, le=4096, description="LoRA")
    alpha: float = Field(default=16, gt=0, description="LoRA: the update is alpha / rank times B·A")
    dropout: float = Field(default=0.05, ge=0, lt=1, description="LoRA")
    modules: str | tuple[str, ...] = Field(
        default="all",
        description="names and roles such as q_proj, attention.query; 'all': for LoRA all linear layers, for (IA)³ the "
        "paper's: key, value, and the feed-forward output, whose input is scaled; for sparse all weights but those of norms and "
        "the output embedding",
    )
    tokens: int = Field(default=16, ge=1, le=4096, description="prefix: virtual tokens")
    reduction: float = Field(default=16, ge=1, description="bottleneck: the model's width over the bottleneck's")
    positions: Literal["pfeiffer", "houlsby", "madx"] = Field(
        default="pfeiffer",
        description="bottleneck: after the feed-forward part, or after attention too; madx: after the feed-forward part, and where "
        "the model normalises sums behind it (BERT) reading the normalised sum, as its authors do",
    )
    activation: Literal["relu", "gelu", "silu", "tanh"] = Field(default="relu", description="bottleneck")
    invertible: bool = Field(
        default=False,
        description="bottleneck: with an invertible coupling behind the embeddings, inverted before the output embedding (MAD-X's "
        "language adapters); they are two folders",
    )
    leave_out_last: bool = Field(default=False, description="bottleneck: none in the last layer (MAD-X 2.0)")
    entries: int = Field(
        default=7_667_712, ge=1, description="sparse: K, how many numbers of the model change (LF-SFT's for a language)"
    )
    l1: float = Field(
        default=0.0, ge=0, description="sparse: λ of the penalty λ/N · ‖θ − θ0‖₁, N the model's parameters"
    )
    select: Literal["change", "gradient"] = Field(
        default="change",
        description="sparse: the entries that full fine-tuning moves most, or (not LF-SFT's way, in less memory) those of the "
        "greatest summed gradients at θ0",
    )
    first_epochs: float | None = Field(
        default=None, gt=0, description="sparse: epochs of the phase that selects; absent: as many as the second's"
    )

    later: ClassVar[frozenset[str]] = frozenset({"invertible", "leave_out_last"})

    @model_validator(mode="after")
    def _of_family(self) -> "AdapterConfig":
        others = set(type(self).model_fields) - {"family", *_OF_FAMILY[self.family]}
        strange = sorted(name for name in others if getattr(self, name) != type(self).model_fields[name].default)
        if strange:
            raise ValueError(
                f"{', '.join(strange)}: not of the structure '{self.family}', which has {', '.join(_OF_FAMILY[self.family])}"
            )
        return self

    def key(self, *without: str) -> dict[str, Any]:
        """The values of this structure alone: what another one could have been does not make new work."""
        kept = {"family", *_OF_FAMILY[self.family]} - set(without)
        unset = {name for name in self.later if getattr(self, name) == type(self).model_fields[name].default}
        return self.model_dump(mode="json", include=kept - unset)


class TrainingConfig(Config):
    """How an adapter is trained. The defaults are the paper's (LoRA)."""

    learning_rate: float = Field(default=2e-4, gt=0)
    epochs: float = Field(default=3, ge=0)
    batch_size: int = Field(default=8, ge=1)
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the steps")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = Field(default=0, ge=0)
    clip: float = Field(default=0.3, gt=0, description="maximum gradient norm")
    max_length: int = Field(
        default=1024, ge=8, description="tokens; a longer prompt loses its context's end or its beginning"
    )
    loss_positions: float = Field(
        default=1.0, gt=0, le=1, description="share of the positions at which language modelling takes a loss"
    )
    group_by_length: bool = Field(
        default=True, description="batches of similar length (off: the order of the seed alone)"
    )
    limit: int | None = Field(
        default=None, ge=1, description="a sample of so many training items, the same in every language"
    )
    max_output: int = Field(default=128, ge=2, description="encoder-decoders: tokens of an answer")
    held_out: float = Field(
        default=0.0, ge=0, le=0.5, description="share that is not learned from: the step of its least loss is kept"
    )
    evaluate_every: int = Field(default=1000, ge=1, description="held_out: steps from one look at its loss to the next")

    later: ClassVar[frozenset[str]] = frozenset({"limit", "max_output", "held_out", "evaluate_every"})


def epochs_read(adapter: Mapping[str, Any], training: Mapping[str, Any]) -> float:
    """How often a training reads its data, from the keys of its configurations: sparse differences are learned in two phases."""
    first = 0.0
    if adapter["family"] == "sparse":
        first = adapter.get("first_epochs")
        first = training["epochs"] if first is None else first
    return training["epochs"] + first


TEXT_TASKS = {
    "clm": "causal language modelling (decoders)",
    "mlm": "masked language modelling (encoders)",
    "prefix-lm": "the second half of a segment after its first (encoder-decoders)",
    "span-corruption": "spans that were taken out of a segment (encoder-decoders)",
}
"""Reference tasks on plain text, and the backbones that learn them."""


NO_REFERENCE = "none"
"""What stands for the reference task where no method needs one."""


class ReferenceConfig(Config):
    """The reference task: language modelling on plain text, which needs no labels, or a labelled task in both languages."""

    task: str = Field(
        default="clm",
        description=f"{', '.join(TEXT_TASKS)}, or a task that has labels in all the languages; 'none': no method needs one",
    )
    text: str | None = Field(default=None, description="path with {language} in it, below the data folder")
    hub: str | None = Field(default=None, description="instead of `text`: a hub data set with a field `text`")
    hub_config: str = Field(default="{language}", description="the hub data set's configuration, with {language} in it")
    data_dir: str | None = Field(default=None, description="folder of the text; absent: as the task's, or 'bundled'")
    split: Literal["train", "validation"] = Field(
        default="train",
        description="of a task with labels: XCOPA has labels in its target languages for validation only",
    )
    unit: Literal["packed", "line"] = Field(
        "packed",
        description="'packed': equal segments of running text; 'line': one segment a line (parallel text)",
    )
    segment_tokens: int = Field(default=512, ge=8, description="length of a segment, in tokens")
    max_segments: int | None = Field(default=None, ge=1, description="the same number in every language")

    later: ClassVar[frozenset[str]] = frozenset({"hub", "hub_config", "split"})

    @model_validator(mode="after")
    def _sourced(self) -> "ReferenceConfig":
        if self.task not in TEXT_TASKS:
            if self.text or self.hub:
                raise ValueError(f"the reference task '{self.task}' has labels: it takes no `text` and no `hub`")
        elif bool(self.text) == bool(self.hub):
            raise ValueError(f"the reference task '{self.task}' reads plain text: give `text` (a path) or `hub`")
        return self

    @property
    def labelled(self) -> bool:
        """Whether it is a task with labels."""
        return self.task not in TEXT_TASKS and self.task != NO_REFERENCE


class ProjectionConfig(Config):
    """Which lines of the parallel reference text get a label from T, read on the source side, for training on the other."""

    confidence: float = Field(default=0.8, ge=0, le=1, description="least probability that T gives its label")
    per_label: int | None = Field(default=200, ge=1, description="at most so many lines of a label")


FUSION_FUNCTIONS = ("add", "mul", "add_relu", "mul_relu", "cross_attention")
"""How the bottleneck states of source and target are mixed (FLARE, section 3.2): `fusion.functions` has the formulas."""


class FusionConfig(Config):
    """FLARE: where and how a text's states are mixed with those of its counterpart in the source language."""

    function: Literal["add", "mul", "add_relu", "mul_relu", "cross_attention"] = Field(
        default="add_relu", description="add_relu: relu(s) + relu(t), the paper's best"
    )
    modules: str | tuple[str, ...] = Field(
        default=("attention.query", "attention.value"),
        description="the layers that fuse, of every self-attention block (of an encoder-decoder: of its encoder)",
    )
    plain: str | tuple[str, ...] = Field(
        default=(),
        description="further layers, with plain LoRA; 'all': all other linear layers, the paper's choice for LLMs",
    )
    layer_offset: Literal[0, 1] = Field(
        default=0, description="layer i reads the source's states before layer i (the authors' code), or behind it"
    )
    normalize_source: bool = Field(
        default=True, description="source states pass the layer's own norm first, as target states do (pre-norm models)"
    )
    mask_padding: bool = Field(
        default=False,
        description="plain LoRA where the source is shorter; off: states of padding are fused, as published",
    )
    decoding: Literal["lora", "continuation"] = Field(
        default="lora",
        description="what is written is plain LoRA, or fused with what the first stage writes after the source text",
    )
    encoder: str = Field(
        default="facebook/nllb-200-distilled-600M",
        description="flare-mt: a translation model whose encoder reads the target text, or any encoder: hub id or folder",
    )
    encoder_revision: str | None = Field(default=None, description="commit of a hub encoder; resolved if absent")
    cache: bool = Field(default=False, description="keep source states on disk instead of computing them at every step")
    cache_limit: float = Field(default=20.0, gt=0, description="GB that the states of one step may take")

    @model_validator(mode="after")
    def _continued(self) -> "FusionConfig":
        if self.decoding == "continuation" and not self.mask_padding:
            raise ValueError("decoding: continuation needs mask_padding: true, or padding would stand inside a text")
        if self.decoding == "continuation" and self.cache:
            raise ValueError("cache: true is for decoding: lora: what continues a source text is not known beforehand")
        return self


class MixupConfig(Config):
    """X-Mixup (Yang et al. 2022): the states of one layer are mixed with source states aligned by attention."""

    layer: int | None = Field(
        default=None, ge=0, description="the layer that mixes, from 0; absent: the middle one (authors: 0, spans 15)"
    )
    most: float = Field(default=0.5, ge=0, le=1, description="λ0, the greatest share that source states can have")
    source_loss: float = Field(
        default=0.4, ge=0, le=1, description="α, the source's share of the task's loss; not for spans"
    )
    states: float = Field(default=1.0, ge=0, description="weight of the squared difference between both texts' states")
    predictions: float = Field(default=1.0, ge=0, description="weight of KL(source ‖ target); not for spans")
    average: bool = Field(
        default=True, description="encoders answer by the mean of both texts' logits, as the authors do; not for spans"
    )


class TranslationConfig(Config):
    """Where an item's counterpart in the other language comes from; by default from the task's own aligned rows."""

    model: str | None = Field(
        default=None,
        description="NLLB, M2M-100 or Marian: hub id or folder, in which {source} and {target} are filled (Marian has one a pair)",
    )
    revision: str | None = Field(default=None, description="commit of a hub model; resolved and recorded if absent")
    files: str | None = Field(
        default=None,
        description="instead: translated rows below the data folder, a path with {from}, {to} and {split}; with the items' ids",
    )
    splits: tuple[Literal["train", "validation", "test"], ...] = Field(
        default=("train", "validation", "test"), description="the splits that are translated; others are aligned"
    )
    missing: Literal["error", "skip"] = Field(
        default="error", description="what to do about an item without counterpart"
    )
    beams: int = Field(default=1, ge=1, description="width of the translation model's search")

    @model_validator(mode="after")
    def _one(self) -> "TranslationConfig":
        if self.model and self.files:
            raise ValueError("give a translation `model` or `files`, not both")
        return self


class MadxConfig(Config):
    """MAD-X (Pfeiffer et al. 2020): language adapters, and a task adapter trained on top of the source language's."""

    language_reduction: float = Field(
        default=2, ge=1, description="of the language adapters: the model's width over the bottleneck's"
    )
    task_reduction: float = Field(default=16, ge=1, description="the same, of the task adapter")
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    invertible: bool = Field(
        default=True,
        description="language adapters have an invertible coupling behind the embeddings, inverted before the output embedding",
    )
    leave_out_last: bool = Field(default=False, description="no adapter in the last layer (MAD-X 2.0)")
    training: TrainingConfig | None = Field(
        default=None, description="of the task adapter; absent: as the experiment's `training`"
    )
    reference_training: TrainingConfig | None = Field(
        default=None, description="of the language adapters; absent: as the experiment's `reference_training`"
    )

    @property
    def language_adapter(self) -> AdapterConfig:
        """The structure of a language adapter."""
        return self._adapter(self.language_reduction, self.invertible)

    @property
    def task_adapter(self) -> AdapterConfig:
        """The structure of the task adapter."""
        return self._adapter(self.task_reduction, False)

    def _adapter(self, reduction: float, invertible: bool) -> AdapterConfig:
        return AdapterConfig(
            family="bottleneck",
            reduction=reduction,
            positions="madx",
            activation=self.activation,
            invertible=invertible,
            leave_out_last=self.leave_out_last,
        )


class LfsftConfig(Config):
    """LF-SFT (Ansell et al. 2022): sparse differences of languages and of the task, learned on top of the source language's."""

    language_entries: int = Field(default=7_667_712, ge=1, description="K, how many numbers a language changes")
    task_entries: int = Field(default=14_155_776, ge=1, description="K of the task")
    modules: str | tuple[str, ...] = Field(
        default="all", description="whose numbers: all but norms and the output embedding, or those of modules named"
    )
    l1: float = Field(
        default=0.1,
        ge=0,
        description="λ of the penalty λ/N · ‖θ − θ0‖₁, in both phases of a language; the task has none",
    )
    select: Literal["change", "gradient"] = Field(
        default="change", description="which numbers change: see `adapter.select`"
    )
    first_epochs: float | None = Field(
        default=None,
        ge=0,
        description="epochs of the task's first phase, which selects; absent: as many as the second's",
    )
    reference_first_epochs: float | None = Field(default=None, gt=0, description="the same, of a language")
    training: TrainingConfig | None = Field(
        default=None, description="of the task's second phase; absent: as the experiment's `training`"
    )
    reference_training: TrainingConfig | None = Field(
        default=None, description="of a language's second phase; absent: as the experiment's `reference_training`"
    )

    @property
    def language_adapter(self) -> AdapterConfig:
        """The structure of a language's sparse difference."""
        return self._adapter(self.language_entries, self.l1, self.reference_first_epochs)

    @property
    def task_adapter(self) -> AdapterConfig:
        """The structure of the task's."""
        return self._adapter(self.task_entries, 0.0, self.first_epochs)

    def _adapter(self, entries: int, l1: float, first_epochs: float | None) -> AdapterConfig:
        return AdapterConfig(
            family="sparse", entries=entries, modules=self.modules, l1=l1, select=self.select, first_epochs=first_epochs
        )


class MergeConfig(Config):
    """Which sites are merged, and to what rank a product-space merge is compressed."""

    modules: str | tuple[str, ...] = "all"
    out_rank: int | None = Field(
        default=None, ge=1, description="LoRA: rank kept in product space; absent: exact, three times the rank"
    )


class SelectionConfig(Config):
    """How λ is chosen: on the development languages only, by mean gold log-likelihood."""

    weights: tuple[Weight, ...] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    splits: tuple[Literal["train", "validation"], ...] = ("validation",)
    limit: int | None = Field(default=None, ge=1, description="items per language and split")
    seeds: tuple[int, ...] | None = Field(default=None, description="some of the seeds to choose on; absent: all")
    weight: Weight | None = Field(default=None, description="a fixed λ: nothing is chosen")

    @model_validator(mode="after")
    def _sorted(self) -> "SelectionConfig":
        object.__setattr__(self, "weights", tuple(sorted({w for w in self.weights if w > 0})))
        if not self.weights and self.weight is None:
            raise ValueError("give at least one weight above 0")
        return self


class EvaluationConfig(Config):
    """How a model is scored."""

    split: Literal["validation", "test"] = "test"
    limit: int | None = Field(
        default=None, ge=1, description="items per language; absent: the task's published sample or all"
    )
    source: bool = Field(default=True, description="score the source language too, with the methods that have it")
    written_limit: int | None = Field(
        default=None, ge=1, description="items per language where the model writes its answers, which takes longer"
    )
    new_tokens: int | None = Field(
        default=None, ge=1, description="at most so many tokens where the model writes; absent: the prompt's own number"
    )
    scoring: Literal["auto", "first_token", "sequence", "generation"] = Field(
        default="auto",
        description="choice tasks: by the candidates' likelihood, or by what the model writes; others are always written",
    )
    normalised: bool = Field(
        default=False, description="likelihood of a candidate's token, not of the whole candidate (scoring: sequence)"
    )


class ResourcesConfig(Config):
    """What a step that loads the base model is given where steps are scheduled: on Ray, and in Slurm's scripts.

    No step key holds it. Equal results are promised for equal threads.
    """

    cpus: int | None = Field(default=None, ge=1, description="cores and threads; absent: as many as here")
    gpus: int | None = Field(default=None, ge=0, description="absent: one where there are any")
    memory: str | None = Field(
        default=None,
        pattern=r"^[0-9]+(\.[0-9]+)?(MB|GB|TB)$",
        description="main memory, such as 24GB; absent: reckoned from the model's shape",
    )


class CustomTask(Config):
    """A user's own choice task: files, a prompt template and labels."""

    files: dict[Literal["train", "validation", "test"], str] = Field(description="path of each split, with {language}")
    prompt: str = Field(description="template; {field} is filled from the row")
    labels: dict[str, str] | tuple[str, ...] = Field(description="labels, or label: text the model should answer")
    label_field: str = "label"
    id_field: str | None = Field(default=None, description="aligns items across languages; absent: the row number")
    licence: str | None = None

    @field_validator("labels")
    @classmethod
    def _two(cls, value: Any) -> Any:
        if len(value) < 2:
            raise ValueError("a choice task needs at least two labels")
        return value


class Experiment(Config):
    """A comparison: methods × target languages × seeds on one task and one backbone."""

    name: Name
    backbone: BackboneConfig
    task: str
    prompt: str = Field(default="default", description="the wording of the task: `lingraft tasks` lists each task's")
    protocol: str | None = Field(
        None,
        description="fills in source, targets, development and groups where they are left out. 'low-high': a fixed division "
        "of languages; 'paper': the AdaMergeX paper's languages of the task, λ tuned on a language that is also a target",
    )
    source: LanguageCode = "en"
    targets: tuple[LanguageCode, ...] = Field(min_length=1)
    development: tuple[LanguageCode, ...] = ()
    groups: dict[Name, tuple[LanguageCode, ...]] = Field(
        default={}, description="targets whose figures are also given together"
    )
    reference: ReferenceConfig = ReferenceConfig(task=NO_REFERENCE, unit="packed")
    adapter: AdapterConfig = AdapterConfig()
    training: TrainingConfig = TrainingConfig()
    reference_training: TrainingConfig | None = Field(default=None, description="absent: as `training`")
    projection: ProjectionConfig = ProjectionConfig()
    projection_training: TrainingConfig | None = Field(default=None, description="absent: as `training`")
    fusion: FusionConfig = FusionConfig()
    fusion_training: TrainingConfig | None = Field(
        default=None, description="of the second stage, on both languages; absent: as `training`"
    )
    mixup: MixupConfig = MixupConfig()
    madx: MadxConfig = MadxConfig()
    lfsft: LfsftConfig = LfsftConfig()
    translation: TranslationConfig = TranslationConfig()
    merge: MergeConfig = MergeConfig()
    methods: tuple[str, ...] = ("vanilla", "eng-ft", "adamergex", "adamergex-product")
    selection: SelectionConfig = SelectionConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    speed: SpeedConfig = SpeedConfig()
    resources: ResourcesConfig = ResourcesConfig()
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    seeds_of: dict[str, tuple[int, ...]] = Field(
        default={}, description="fewer of the seeds for some of the methods, by name: a dear ceiling, a minor control"
    )
    data_dir: str | None = Field(None, description="upstream files; 'bundled': lingraft's own; absent: the hub")
    data_revision: str | None = Field(None, description="commit of the hub data set; resolved and recorded if absent")
    tasks: dict[Name, CustomTask] = Field(default={}, description="your own tasks")
    trackers: tuple[str, ...] = Field(default=(), description="accelerate's trackers, such as tensorboard")
    note: str | None = Field(default=None, description="printed with the results")

    @field_validator("backbone", mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _divided(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or tree.get("protocol") is None:
            return tree
        chosen = division(tree["protocol"], tree.get("task"), tree.get("source"))
        filled = {"source": chosen.source, "targets": list(chosen.targets), "development": list(chosen.development)}
        tree = {**filled, **tree}
        if "groups" not in tree and isinstance(tree["targets"], list | tuple) and len(chosen.groups) > 1:
            # Of a group as many as are asked for: one language of the table can be run alone.
            here = {group: [c for c in codes if c in tree["targets"]] for group, codes in chosen.groups.items()}
            tree["groups"] = {group: codes for group, codes in here.items() if codes}
        return tree

    @model_validator(mode="after")
    def _disjoint(self) -> "Experiment":
        for names, what in (
            (self.targets, "targets"),
            (self.development, "development"),
            (self.seeds, "seeds"),
        ):
            if len(set(names)) < len(names):
                raise ValueError(f"'{what}' names something twice")
        overlap = set(self.targets) & set(self.development)
        if overlap and self.selection.weight is None and self.evaluation.split in self.selection.splits:
            raise ValueError(
                f"λ would be chosen on the items that are reported: {sorted(overlap)} on '{self.evaluation.split}'"
            )
        if overlap and self.protocol != PAPER:
            raise ValueError(
                f"{sorted(overlap)} stand in both 'targets' and 'development': λ must not be tuned on a test language"
            )
        for group, codes in self.groups.items():
            strange = sorted(set(codes) - set(self.targets))
            if strange or len(set(codes)) < len(codes) or not codes:
                raise ValueError(f"the group '{group}' must name targets, each once; not targets: {strange}")
        if self.source in (*self.targets, *self.development):
            raise ValueError(f"the source language '{self.source}' is also a target or development language")
        return self

    @model_validator(mode="after")
    def _speed_of_prefixes(self) -> "Experiment":
        if lost := self.speed.lost_behind_prefixes if self.adapter.family == "prefix" else ():
            raise ValueError(f"{', '.join(f'speed.{name}' for name in lost)}: not for the structure 'prefix'")
        return self

    @model_validator(mode="after")
    def _own_adapter(self) -> "Experiment":
        if self.adapter.invertible:
            raise ValueError(
                "adapter.invertible: a coupling belongs to language adapters, which the methods madx and madx-graft train "
                "(madx.invertible); an experiment's own adapter has none"
            )
        return self

    @model_validator(mode="after")
    def _fewer_seeds(self) -> "Experiment":
        if self.selection.seeds is not None and not set(self.seeds) >= set(self.selection.seeds) > set():
            raise ValueError(f"'selection.seeds' must be some of {list(self.seeds)}")
        for name, seeds in self.seeds_of.items():
            if name not in self.methods:
                raise ValueError(f"'seeds_of' names '{name}', which is not one of the methods")
            if not seeds or len(set(seeds)) < len(seeds) or not set(seeds) <= set(self.seeds):
                raise ValueError(f"the seeds of '{name}' must be some of {list(self.seeds)}, each once")
        return self

    @property
    def projection_values(self) -> TrainingConfig:
        """Training values of the projected adapters."""
        return self.projection_training or self.training

    @property
    def fusion_values(self) -> TrainingConfig:
        """Training values of the second stage."""
        return self.fusion_training or self.training

    @property
    def reference_values(self) -> TrainingConfig:
        """Training values of the reference adapters."""
        return self.reference_training or self.training

    def stack(self, name: str) -> MadxConfig | LfsftConfig:
        """What language and task adapters are that stand on one another: those of `madx` or `lfsft`."""
        return {"madx": self.madx, "lfsft": self.lfsft}[name]


def parse_override(text: str) -> tuple[list[str], Any]:
    """Reads `a.b=value`; the value is YAML, so that `[sw, th]` is a list.

    Raises:
        ConfigError: There is no `=`, or the value is not YAML.
    """
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise ConfigError(f"'{text}' is not an override", remedy="write key=value, for example targets=[sw,th]")
    try:
        return name.split("."), parse_yaml(value)
    except yaml.YAMLError:
        raise ConfigError(f"the value of '{text}' cannot be read", remedy="write YAML, for example [sw, th]") from None


class _Loader(yaml.SafeLoader):
    """YAML whose floats include `5e-4`, whose `no` is the language Norwegian, not False, and whose merges cannot multiply."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merges `<<`; of mappings that merge mappings each is merged once more, ten times ten times ten."""
        super().flatten_mapping(node)
        if len(node.value) > _MOST_KEYS:
            raise yaml.constructor.ConstructorError(None, None, "merges make a mapping without end", node.start_mark)


_MOST_KEYS = 10_000


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d+(?:[eE][-+]?\d+)?)$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false|True|False)$"), list("tfTF"))


def parse_yaml(text: str) -> Any:
    """Safe YAML with the corrections of `_Loader`.

    Raises:
        yaml.YAMLError: It is none: also where it nests too deeply, or holds a number or date that there is not.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain values only
    except (RecursionError, ValueError, OverflowError) as error:
        raise yaml.YAMLError(f"a value cannot be read ({error})") from None


def _set(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for part in path[:-1]:
        below = tree.get(part)
        if isinstance(below, str) and part == "backbone":
            below = {"model": below}
        tree[part] = below if isinstance(below, dict) else {}
        tree = tree[part]
    tree[path[-1]] = value


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads an experiment and applies `key=value` overrides.

    Raises:
        ConfigError: The file cannot be read, or a key or value is wrong; all mistakes at once.
    """
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("there is no such experiment", where=path, remedy="check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the experiment cannot be read: {error}",
            where=path,
            remedy="make it a text file in UTF-8 that you may read",
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        raise ConfigError(
            f"this is not YAML: {getattr(error, 'problem', error)}",
            where=where,
            remedy="correct the line: blanks, brackets and colons are the usual causes",
        ) from None
    if not isinstance(tree, dict):
        raise ConfigError(
            "an experiment is a mapping of keys to values",
            where=path,
            remedy="write `key: value` lines, as in docs/experiments.md",
        )
    for part in (tree, tree.get("reference")):
        data_dir = part.get("data_dir") if isinstance(part, dict) else None
        if isinstance(part, dict) and isinstance(data_dir, str) and data_dir != "bundled":
            # A path in a file means the same wherever the command is run from.
            part["data_dir"] = str(path.parent / data_dir)
    backbone = tree.get("backbone")
    asks = isinstance(backbone, dict) and backbone.get("trust_remote_code") not in (None, False)
    for override in overrides:
        parts, value = parse_override(override)
        asks = asks and parts != ["backbone", "trust_remote_code"]
        _set(tree, parts, value)
    if asks:  # The file may be somebody else's: that code of the model's is run, is for who runs it to say.
        raise ConfigError(
            "this experiment has Python code that comes with its model executed (backbone.trust_remote_code)",
            where=path,
            remedy="where you trust the model, add backbone.trust_remote_code=true to the command",
        )
    return validated(Experiment, tree, where=path)


def validated(model: type[ConfigType], tree: dict[str, Any], where: str | Path | None = None) -> ConfigType:
    """Builds a config value; every mistake is named, with the nearest right key.

    Raises:
        ConfigError: Something does not fit.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines, remedies = [], []
        for problem in error.errors():
            place = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                lines.append(f"unknown key '{place}'")
                remedies.append(suggestion(str(problem["loc"][-1]), _known_keys(model, problem["loc"][:-1])))
            elif problem["type"] == "missing":
                lines.append(f"missing key '{place}'")
            else:
                message = problem["msg"].removeprefix("Value error, ")
                lines.append(f"{place}: {message}" if place else message)
        remedy = " ".join(dict.fromkeys(remedies)) or _SEE
        raise ConfigError("; ".join(lines), where=where, remedy=remedy) from None


_SEE = "see docs/experiments.md; lingraft schema prints every key with the values that it takes"


def _known_keys(model: Any, loc: Sequence[Any]) -> list[str]:
    """The keys allowed at a place of a config tree."""
    for part in loc:
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            # Below a mapping of names to configs the name itself has no field.
            continue
        kinds = [field.annotation, *get_args(field.annotation)]
        model = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), model)
    return list(model.model_fields)
