"""A loaded, frozen base model, to which adapters are attached and from which they are detached in place."""

import importlib.util
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lingraft import processes, roles
from lingraft.adapter import Adapter
from lingraft.attaching import REMEDY, TOP, Part, load, part, peft_config, settle, stacked, tensors_of
from lingraft.config import SpeedConfig
from lingraft.errors import AdapterError, BackboneError, MissingExtra, UserError
from lingraft.fitting import base_digest
from lingraft.heads import AUTO_CLASSES, Head, head_of
from lingraft.locating import Located, architecture_of, materialise
from lingraft.rows import Rows
from lingraft.speeding import attention, check_compiler, fuse_kernels, shard, sped
from lingraft.stacks import Adapters, as_stack, check_stack

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


_LOADERS = {
    "decoder": "AutoModelForCausalLM",
    "encoder": "AutoModelForMaskedLM",
    "encoder-decoder": "AutoModelForSeq2SeqLM",
}


@dataclass(frozen=True)
class Headed:
    """An encoder with a head; its layers are those of every other head on the same backbone.

    Attributes:
        model: The model of transformers' own class.
        modules: The paths of the modules that are trained and saved with an adapter: the head, and a pooler that the checkpoint
            has no weights for.
        drawn: The names of their parameters that the checkpoint has no weights for.
    """

    model: "PreTrainedModel"
    modules: tuple[str, ...]
    drawn: frozenset[str]


class Backbone:
    """A loaded, frozen base model with its tokenizer; adapters are attached and detached in place.

    Args:
        located: What `locate` found.
        speed: How fast and in how much memory it computes.

    Attributes:
        kind: `decoder`, `encoder` or `encoder-decoder`.
        model: The language model; of an encoder the masked one, whose head may be without weights. `headed` gives others.
        rows: What the adapters' layers are told of the batch.
        fuser: What mixes a counterpart's states in by FLARE, while such an adapter is on the model; else None.
        mixup: The same for X-Mixup.
        sharded: Whether every process holds a part of the layers only (FSDP, DeepSpeed's stage 3).
        causal: Whether no position of a decoder depends on what stands on its right, so that padding there needs no mask.
        kernels: Whose fused kernels compute: `liger` or `none`.

    Raises:
        BackboneError: The model cannot be loaded, or is of a layout that is not served.
        MissingExtra: The training extra is not installed, or what a quantised base or fused kernels take.
        UserError: What was asked for in `speed` cannot be had here.
    """

    def __init__(self, located: Located, speed: SpeedConfig | None = None) -> None:
        training_stack()
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import torch
        from transformers import AutoTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self.located = located
        self.speed = speed or SpeedConfig()
        self.kind = architecture_of(located)
        if self.speed.packing and self.kind != "decoder":
            raise UserError(
                f"texts are packed for decoders, and {located.name} is an {self.kind}", remedy="leave speed.packing out"
            )
        self.device = torch.device(device_name(located.config.device))
        processes.start(self.device)
        self.folder = processes.in_turn(lambda: materialise(located))
        divided = processes.sharding()
        self.sharded = divided is not None
        self.dtype: torch.dtype = getattr(torch, located.config.dtype)
        self.scale = 1.0
        self.rows = Rows()
        self.fuser: Any = None
        self.mixup: Any = None
        self.causal = False
        self._fronted = False
        self._headed: dict[Head, Headed] = {}
        quantised = _quantisation(located.config, self.dtype)
        if self.sharded and (quantised or self.speed.compile):
            what = "a quantised base" if quantised else "speed.compile"
            raise UserError(f"{what}: not with a sharded base", remedy="leave it out, or launch without sharding")
        self._attention = attention(self.speed, self.device, self.dtype)
        if self.speed.compile:
            check_compiler(self.device)
        remote = located.config.trust_remote_code
        model, self._missing = self._read(_LOADERS[self.kind], **quantised)
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=remote, local_files_only=True)
        except (ValueError, KeyError, OSError, ImportError) as error:
            raise BackboneError(
                f"the model cannot be loaded: {error}",
                where=self.folder,
                remedy="download the model again; if it is new, update transformers",
            ) from error
        self.model: PreTrainedModel = model.eval().requires_grad_(False)
        if divided is not None:
            shard(model, self.device, divided)
        if not quantised:  # A quantised one was loaded to its device, where it stays.
            torch.nn.Module.to(model, self.device)
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self.kernels = fuse_kernels(self.model, self.speed, self.device)
        self._check_head()
        if self.speed.packing:
            self._check_packing()

    def _read(self, loader: str, **options: Any) -> "tuple[PreTrainedModel, frozenset[str]]":
        """A model of one of transformers' automatic classes, and the names of its parameters that are not in the checkpoint.

        Raises:
            BackboneError: It cannot be loaded.
        """
        import torch
        import transformers

        config = self.located.config
        # What is not in the checkpoint is drawn from the global state, which shall not notice.
        with nullcontext() if self.kind == "decoder" else torch.random.fork_rng(devices=[]):
            try:
                model, found = getattr(transformers, loader).from_pretrained(
                    self.folder,
                    dtype=self.dtype,
                    use_safetensors=True,
                    trust_remote_code=config.trust_remote_code,
                    local_files_only=True,
                    output_loading_info=True,
                    **self._attention,
                    **options,
                )
            except (ValueError, KeyError, OSError, ImportError) as error:
                raise BackboneError(
                    f"the model cannot be loaded: {error}",
                    where=self.folder,
                    remedy="download the model again; if it is new, update transformers",
                ) from error
        wrong = (entry[0] for entry in found.get("mismatched_keys", ()))
        return model, frozenset([*found["missing_keys"], *wrong])

    @property
    def digest(self) -> str:
        """The digest of weights and tokenizer."""
        return self.located.digest

    @property
    def prefix(self) -> list[int]:
        """The ids a text starts with: the tokenizer's own beginning-of-text token, where it adds one.

        None for encoders and encoder-decoders, whose special tokens depend on what is read.
        """
        if self.kind != "decoder":
            return []
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

    def hidden(
        self,
        input_ids: "torch.Tensor",
        attention_mask: "torch.Tensor | None" = None,
        position_ids: "torch.Tensor | None" = None,
    ) -> "torch.Tensor":
        """The states before the output embedding (batch × length × width), adapters included.

        Args:
            input_ids: batch × length.
            attention_mask: batch × length, 0 where padding stands; None: on the right, if anywhere. A decoder that is `causal` then
                computes without a mask, which PyTorch's fused attention is faster at.
            position_ids: batch × length, where several texts stand in a row: each counts from 0, and sees itself alone.
        """
        given: dict[str, Any] = {} if position_ids is None else {"position_ids": position_ids}
        return self._before_output(
            self.model.base_model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **given
            ).last_hidden_state
        )

    @property
    def packs(self) -> bool:
        """Whether texts are packed into rows now: it was asked for, nothing on the model stands beside or before a text, and all
        rows are of one adapter.
        """
        return self.speed.packing and self.fuser is None and not self._fronted and not self.rows.lanes

    def _check_packing(self) -> None:
        """Makes sure that packed texts do not see one another, and are read as they are alone.

        Raises:
            UserError: They are not.
        """
        import torch

        remedy = "leave speed.packing out"
        first, other, second = (
            torch.arange(start, start + 6, device=self.device)[None] % len(self.tokenizer) for start in (1, 9, 17)
        )
        places = torch.arange(6, device=self.device).repeat(2)[None]
        try:
            with torch.no_grad():
                alone = self.hidden(second)
                packed, changed = (
                    self.hidden(torch.cat([text, second], dim=1), position_ids=places)[:, 6:] for text in (first, other)
                )
        except TypeError as error:  # It takes no positions.
            raise UserError(
                f"texts cannot be packed for {type(self.model).__name__}: {error}", remedy=remedy
            ) from error
        # By the norm: in 16 bits a single number of a deep model's states may be off by a lot.
        apart = float((packed.float() - alone.float()).norm() / alone.float().norm())
        if not torch.equal(packed, changed) or not apart < (1e-3 if self.dtype == torch.float32 else 0.1):
            raise UserError(
                f"texts cannot be packed for {type(self.model).__name__}: one would see another, or stand elsewhere",
                remedy=remedy,
            )

    def _before_output(self, states: "torch.Tensor") -> "torch.Tensor":
        """What the output embedding itself gets: a coupling behind the embeddings is inverted in front of it."""
        inverse = getattr(self.model.get_output_embeddings(), "inverse", None)
        return states if inverse is None else inverse(states)

    @property
    def softcap(self) -> float | None:
        """The bound of the logits, where the architecture has one (Gemma 2)."""
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    def autocast(self) -> Any:
        """Half precision where the base has it: adapters and heads are in float32."""
        import torch

        half = self.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device.type, self.dtype) if half else nullcontext()

    @contextmanager
    def greedy(self, new_tokens: int) -> Iterator[Any]:
        """Generation that takes the likeliest token each time and nothing from the model's own defaults but its special tokens.

        transformers fills what a configuration leaves open from the model's: a repetition penalty that ships with it, too.

        Args:
            new_tokens: At most so many tokens.

        Yields:
            The configuration to generate with.
        """
        from transformers import GenerationConfig

        model: Any = self.model
        own = model.generation_config
        ends = getattr(own, "eos_token_id", None)
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        end = self.tokenizer.eos_token_id
        values: dict[str, Any] = {
            "eos_token_id": sorted({*ends, *([end] if isinstance(end, int) else [])}) or None,
            "pad_token_id": self.pad_id,
        }
        start = getattr(own, "decoder_start_token_id", None)
        if start is None:
            start = getattr(model.config, "decoder_start_token_id", None)
        if start is not None:
            values["decoder_start_token_id"] = start
        model.generation_config = GenerationConfig(**values)
        try:
            yield GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=new_tokens, **values)
        finally:
            model.generation_config = own

    @property
    def longest(self) -> int | None:
        """The most tokens the model has positions for; None where there is no such bound."""
        config: Any = self.model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        if positions is None or self.kind == "encoder-decoder":
            return None
        # RoBERTa's positions start behind the one of the padding token.
        taken = config.pad_token_id + 1 if "roberta" in config.model_type or config.model_type == "camembert" else 0
        return int(positions) - taken

    def headed(self, head: Head) -> Headed:
        """The encoder with a head on it, of the class that plain PEFT would be given; loaded once, its layers shared.

        Raises:
            UserError: The model is no encoder.
            BackboneError: The checkpoint has no weights for a masked-language-modelling head, or its layout has no such head.
        """
        if self.kind != "encoder":
            raise UserError(
                f"{type(self.model).__name__} is no encoder: it takes no head",
                where=self.located.name,
                remedy="leave the head out, or choose an encoder such as xlm-roberta-base",
            )
        if head not in self._headed:
            self._headed[head] = self._with_head(head) if head.trained else self._with_language_model()
        return self._headed[head]

    def _with_language_model(self) -> Headed:
        if missing := self._missing:
            raise BackboneError(
                f"this checkpoint has no weights for masked language modelling: {len(missing)} tensors, "
                f"first {min(missing)}",
                where=self.located.name,
                remedy="take a labelled reference task (reference.task=task), or a checkpoint with its language model's head",
            )
        self._check_masked_head()
        return Headed(self.model, (), frozenset())

    def _with_head(self, head: Head) -> Headed:
        sizes = {"num_labels": head.labels or 2} if head.kind in ("classification", "span") else {}
        model, missing = self._read(AUTO_CLASSES[head.kind], ignore_mismatched_sizes=True, **sizes)
        base: Any = model.base_model
        for name, child in self.model.base_model.named_children():
            if name != "pooler":
                setattr(base, name, child)
        mine = model.base_model_prefix
        modules = [n for n, m in model.named_children() if n != mine and any(True for _ in m.parameters())]
        if any(name.startswith(f"{mine}.pooler.") for name in missing):
            modules.append(f"{mine}.pooler")
        model.eval().requires_grad_(False)
        for path in modules:  # What is trained is in full precision.
            model.get_submodule(path).float().to(self.device)
        if getattr(base, "pooler", None) is not None:
            base.pooler.to(self.device)
        inside = tuple(f"{path}." for path in modules)
        return Headed(model, tuple(modules), frozenset(n for n in missing if n.startswith(inside)))

    def masked_head(self) -> "tuple[Any, torch.Tensor, torch.Tensor | None]":
        """What stands between an encoder's states and its logits: a map of states, the output embedding, its bias.

        Raises:
            BackboneError: lingraft does not know the layout's head.
        """
        model: Any = self.model
        output = model.get_output_embeddings()
        found = next((transform for name, transform in _TRANSFORMS.items() if hasattr(model, name)), None)
        if found is None or output is None:
            raise BackboneError(
                f"the architecture {type(model).__name__} has a language model's head that lingraft does not know",
                remedy="take a labelled reference task: reference.task=task",
            )
        return lambda states: self._before_output(found(model, states)), output.weight, output.bias

    def _check_masked_head(self) -> None:
        """As `_check_head`: states through the transform and the output embedding must be the model's own logits."""
        import torch

        from lingraft.losses import project

        ids = torch.tensor([[1, 2, 3, 4]], device=self.device)
        transform, weight, bias = self.masked_head()
        with torch.no_grad():
            expected = self.model(input_ids=ids).logits[0].float()
            states = self.model.base_model(input_ids=ids).last_hidden_state[0]
            self._agree(expected, project(transform(states), weight, bias=bias))

    def _check_head(self) -> None:
        """Makes sure that states times the output embedding are the model's own logits.

        Losses and scores project only the positions they need, past the model's own forward; an architecture that does
        more than a linear map and a soft cap there must be refused, not approximated. An encoder's head is checked when it
        is asked for.
        """
        import torch

        from lingraft.losses import project

        if self.kind == "encoder":
            return
        head = self.model.get_output_embeddings()
        if head is None or getattr(head, "bias", None) is not None:
            raise BackboneError(
                f"the architecture {type(self.model).__name__} has no plain output embedding",
                remedy="choose a decoder of a known layout: Llama, Gemma, Qwen or Mistral",
            )
        ids = torch.tensor([[*self.prefix, 1, 2, 3]], device=self.device)
        with torch.no_grad():
            if self.kind == "decoder":
                expected = self.model(input_ids=ids).logits[0, -1].float()
                states = self.hidden(ids)
                ours = project(states[0, -1:], head.weight, self.softcap)[0]
                other = ids.clone()
                other[0, -1] = 4
                self.causal = torch.equal(states[0, :-1], self.hidden(other)[0, :-1])
            else:
                expected = self.model(input_ids=ids, decoder_input_ids=ids).logits[0].float()
                read = self.model.get_encoder()(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
                states = self.answering(read, torch.ones_like(ids), ids)[0]
                # T5 of the first kind scales the states before the embedding, the later ones and mT5 do not.
                scaled = states * states.shape[-1] ** -0.5
                wrong, right = (float((project(s, head.weight) - expected).abs().max()) for s in (states, scaled))
                self.scale = states.shape[-1] ** -0.5 if right < wrong else 1.0
                ours = project(states * self.scale, head.weight)
        self._agree(expected, ours)

    def _agree(self, expected: "torch.Tensor", ours: "torch.Tensor") -> None:
        import torch

        if not torch.allclose(expected, ours, rtol=0.02, atol=0.02 * float(expected.abs().max())):
            raise BackboneError(
                f"the architecture {type(self.model).__name__} changes its logits in a way lingraft does not know",
                remedy="use a Llama, Gemma, Qwen or Mistral layout, an encoder or T5",
            )

    def answering(
        self, read: "torch.Tensor", attention_mask: "torch.Tensor", decoder_ids: "torch.Tensor"
    ) -> "torch.Tensor":
        """An encoder-decoder's states before the output embedding (batch × length × width), adapters included.

        Args:
            read: The encoder's states.
            attention_mask: Of what the encoder read, batch × length.
            decoder_ids: What the decoder reads.
        """
        model: Any = self.model
        states = model.get_decoder()(
            input_ids=decoder_ids, encoder_hidden_states=read, encoder_attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        return self._before_output(states * self.scale if self.scale != 1 else states)

    @contextmanager
    def attached(
        self,
        peft_config: Any,
        tensors: Mapping[str, "torch.Tensor"] | None = None,
        head: Head | None = None,
        beneath: Sequence[Part] = (),
        *,
        merged: bool = False,
    ) -> Iterator[Any]:
        """Attaches a PEFT adapter and takes it off again; the base is the same before and after.

        Args:
            peft_config: A PEFT configuration.
            tensors: The adapter's tensors by PEFT's names, those of a head among them; None: PEFT's initial ones.
            head: The head of an encoder; None: its language model.
            beneath: Adapters it stands on, the lowest first.
            merged: A sparse difference is added into the weights meanwhile.

        Yields:
            The PEFT model.

        Raises:
            AdapterError: A tensor fits nowhere, or a place gets none.
        """
        from peft import PeftModel, get_peft_model
        from peft.utils.error import NoMatchingPeftModuleError

        from lingraft.modules.lowrank import quicken
        from lingraft.prefixes import in_front

        with self.bare(head) as model, stacked(model, beneath) as names:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # get_peft_model wants the task of a prefix, of which PEFT has no name for some.
                plain = peft_config.is_prompt_learning and peft_config.task_type is None
                try:
                    wrapped: Any = PeftModel(model, peft_config) if plain else get_peft_model(model, peft_config)
                except NoMatchingPeftModuleError as error:
                    raise AdapterError(f"the adapter does not fit this base model: {error}", remedy=REMEDY) from error
            if tensors is not None:
                load(wrapped, tensors)
            settle(model, [*names, TOP], beneath, merged=[*names, TOP] if merged else names)
            quicken(model, self.rows)
            learned = getattr(wrapped, "prompt_encoder", None)
            try:
                if learned is None:
                    with self.sped(model):
                        yield wrapped
                else:
                    self._fronted = True
                    with in_front(model, learned.to(self.device)["default"].embedding.weight):
                        yield wrapped
            finally:
                self._fronted, self.rows.segments = False, ()

    @contextmanager
    def sped(self, model: Any) -> Iterator[None]:
        """A model computes as `speed` says, with whatever has been put on it before."""
        from lingraft.dropping import quick_dropout

        with (
            quick_dropout(model, self.rows),
            sped(model, self.speed, lambda: self.fuser is None and self.mixup is None),
        ):
            yield

    @contextmanager
    def bare(self, head: Head | None = None) -> Iterator[Any]:
        """The model that adapters are put on; afterwards it is in evaluation mode, frozen, and its head the one it had."""
        model, heads = self.model, ()
        if head is not None and head.trained:
            headed = self.headed(head)
            model, heads = headed.model, headed.modules
        own = {path: model.get_submodule(path) for path in heads}
        try:
            yield model
        finally:
            for path, module in own.items():  # PEFT trained a copy, and would leave it there.
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, module)
            model.eval().requires_grad_(False)

    @contextmanager
    def with_adapter(self, adapter: Adapters, head: Head | None = None) -> Iterator[Any]:
        """The base with an adapter on it, or several that stand on one another, in evaluation mode; None: the base alone.

        Args:
            adapter: The adapter, or adapters, the lowest first.
            head: The head of an encoder; None: the one the top adapter was trained with.

        Yields:
            The PEFT model, or None.

        Raises:
            AdapterError: The adapter belongs to another base model, or the adapters cannot stand on one another.
        """
        stack = as_stack(adapter)
        if not stack:
            with self.sped(self.model.eval()):
                yield None
            return
        check_stack(stack)
        for one in stack:
            self.check_belongs(one)
            if one.structure == "sparse":
                self.check_whole("a sparse difference")
        *lower, top = stack
        if self.kind == "encoder" and head is None:
            head = head_of(top)
        beneath = [part(one) for one in lower]
        with self.attached(peft_config(top.peft_config), tensors_of(top), head, beneath, merged=True) as wrapped:
            wrapped.eval()
            yield wrapped

    def check_whole(self, what: str) -> None:
        """Makes sure that this process has the base's weights, where something is to be written into them.

        Raises:
            UserError: It has a part of them only.
        """
        if self.sharded:
            raise UserError(f"{what}: not with a sharded base", remedy="launch it without FSDP and DeepSpeed's stage 3")

    def check_belongs(self, adapter: Adapter) -> None:
        """Makes sure that an adapter was trained on this base model, where it says on which.

        Raises:
            AdapterError: It was not.
        """
        theirs = base_digest(adapter)
        if theirs and theirs != self.digest:
            raise AdapterError(
                f"the adapter belongs to another base model ({theirs[:40]}…, this one is {self.digest[:40]}…)",
                where=adapter.path,
                remedy="give the base model it was trained on",
            )

    @contextmanager
    def merged(self, adapter: Adapter) -> Iterator[None]:
        """The base with a LoRA's updates in its weights; afterwards the weights are what they were, bit for bit.

        Weights in less than 32 bits stay as they are, and the update is added to what they give: a small one would be lost where
        it is less than half of a weight's last digit.

        Raises:
            AdapterError: The adapter is no LoRA, belongs to another base model, or fits nowhere.
            UserError: The base is sharded.
        """
        import torch

        self.check_whole("a second stage on a merged first one")
        if adapter.structure != "lora":
            raise AdapterError(
                f"{adapter.structure} cannot be merged into the weights",
                where=adapter.path,
                remedy="evaluate with the adapter beside the model instead",
            )
        self.check_belongs(adapter)
        kept: dict[str, torch.Tensor] = {}
        handles: list[Any] = []
        try:
            for module in adapter.layout:
                site = adapter.site(module)
                a, b = (torch.from_numpy(site.tensors[role]).to(self.device) for role in ("A", "B"))
                layer = self._layer_for(module, (b.shape[0], a.shape[1]), adapter)
                if type(layer) is torch.nn.Linear and layer.weight.dtype == torch.float32:
                    kept[module] = layer.weight.detach().to("cpu", copy=True)
                    layer.weight.data.copy_(layer.weight.float() + site.scaling * (b @ a))
                else:
                    handles.append(
                        layer.register_forward_hook(_adding(a.to(self.dtype), (site.scaling * b).to(self.dtype)))
                    )
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, weight in kept.items():
                self.model.get_submodule(module).weight.data.copy_(weight)  # pyright: ignore[reportCallIssue, reportArgumentType]

    def _layer_for(self, module: str, shape: tuple[int, int], adapter: Adapter) -> Any:
        try:
            layer: Any = self.model.get_submodule(module)
            fits = (layer.out_features, layer.in_features) == shape
        except AttributeError:
            fits = False
        if not fits:
            raise AdapterError(
                f"the adapter does not fit this base model at '{module}'",
                where=adapter.path,
                remedy="use the base model the adapter was trained on",
            )
        return layer

    def target_modules(self, chosen: str | Sequence[str]) -> list[str]:
        """The paths of the linear layers that names and roles choose, sorted.

        Of a decoder `all` are all but the output embedding, of others those that play a role: no head, no pooler.

        Raises:
            UserError: A name or role matches no linear layer, or `all` was asked for where a layer plays none that is known.
        """
        import torch

        model = self.model
        head = model.get_output_embeddings()
        linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
        if self.kind == "encoder":
            inside = f"{model.base_model_prefix}."
            linear = [n for n in linear if n.startswith(inside) and not n.startswith(f"{inside}pooler.")]
        if not linear:
            raise UserError(
                f"{type(model).__name__} has no linear layers to adapt",
                remedy="choose another base model, or name its modules: adapter.modules",
            )
        if self.kind != "decoder" and (chosen == "all" or list(chosen) == ["all"]):
            strange = [n for n in linear if roles.layer_of(n) is not None and not roles.plays_any(n)]
            linear = [n for n in linear if roles.plays_any(n)]
            if strange or not linear:  # Some of the layers for all of them would be a choice that nobody made.
                raise UserError(
                    f"not all layers of {type(model).__name__} play a role that lingraft knows: {', '.join(strange[:3])} …",
                    remedy="name the modules to adapt by the ends of their paths (adapter.modules)",
                )
        return sorted(roles.select(linear, chosen))


def _bert(model: Any, states: Any) -> Any:
    return model.cls.predictions.transform(states)


def _roberta(model: Any, states: Any) -> Any:
    from torch.nn.functional import gelu

    return model.lm_head.layer_norm(gelu(model.lm_head.dense(states)))


def _distilbert(model: Any, states: Any) -> Any:
    return model.vocab_layer_norm(model.activation(model.vocab_transform(states)))


def _electra(model: Any, states: Any) -> Any:
    return model.generator_predictions(states)


def _modernbert(model: Any, states: Any) -> Any:
    return model.head(states)


_TRANSFORMS = {
    "cls": _bert,
    "lm_head": _roberta,
    "vocab_transform": _distilbert,
    "generator_predictions": _electra,
    "head": _modernbert,
}
"""By the name of a part of the head, what a masked language model does to states before the output embedding."""


def _quantisation(config: Any, dtype: Any) -> dict[str, Any]:
    """What loading takes for a base in fewer bits.

    Raises:
        MissingExtra: bitsandbytes is not installed.
        UserError: There is no CUDA device for it.
    """
    import torch

    kind = getattr(config, "quantization", "none")
    if kind == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra("bitsandbytes", "quantization")
    device = device_name(config.device)
    if not device.startswith("cuda"):
        raise UserError(
            f"a base in {kind} needs a CUDA device, and this is '{device}'", remedy="use quantization=none here"
        )
    from transformers import BitsAndBytesConfig

    made = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        if kind == "nf4"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    return {"quantization_config": made, "device_map": {"": torch.device(device)}}


def _adding(a: "torch.Tensor", b: "torch.Tensor") -> Any:
    """A hook that adds `b·a·x` to what a layer gives for x."""

    def hook(layer: Any, args: tuple[Any, ...], out: Any) -> Any:
        return out + (args[0].to(a.dtype) @ a.T @ b.T).to(out.dtype)

    return hook


def device_name(name: str) -> str:
    """A device of this machine: of `auto`, a GPU, this process's own where there are several, or the processor.

    Raises:
        UserError: There is no such device.
    """
    import torch

    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"the device '{name}' is not available", remedy="use device=auto or device=cpu")
    if name in ("auto", "cuda") and torch.cuda.is_available():
        if processes.world() == 1:
            return "cuda"
        number, there = processes.local_rank(), torch.cuda.device_count()
        if number >= there:
            raise UserError(
                f"process {number} of this host has no GPU: there are {there}",
                remedy=f"launch {there} processes on this host",
            )
        return f"cuda:{number}"
    if name.startswith("cuda:") and processes.local_world() > 1:
        raise UserError(
            f"all processes of this host would compute on '{name}'", remedy="use device=auto or device=cuda"
        )
    if name != "auto":
        return name
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
        from importlib.metadata import version

        import torch
        import transformers

        found |= {
            "device": torch.cuda.get_device_name() if backbone.device.type == "cuda" else str(backbone.device),
            "threads": torch.get_num_threads(),
            "dtype": str(backbone.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": version("peft"),
            "attention": str(getattr(backbone.model.config, "_attn_implementation", None)),
            "kernels": backbone.kernels,
            "compile": backbone.speed.compile,
            "packing": backbone.speed.packing,
            **processes.described(),
        }
    return found
