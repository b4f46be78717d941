"""FLARE on a loaded model: the first stage merged in, a LoRA on top, and hooks that mix the counterpart's states in.

A hook on PEFT's own `lora_A` turns `A·x_T` into `φ(A·x_S, A·x_T)`; everything else is PEFT's LoRA. Without a counterpart the
hook does nothing, so the layer is the LoRA bit for bit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lingraft import roles
from lingraft.backbones import Backbone
from lingraft.batching import Counterpart, derived_seed
from lingraft.config import FusionConfig
from lingraft.errors import AdapterError, BackboneError
from lingraft.fusion.cache import Request, StateCache
from lingraft.fusion.functions import ELEMENTWISE, Attended, CrossAttention
from lingraft.fusion.sources import Columns, Point, align, beside, evaluating, points, states_of
from lingraft.fusion.stages import SecondStage, second_stage
from lingraft.fusion.xmixup import Mixup
from lingraft.heads import Head
from lingraft.stacks import Adapters, as_stack

if TYPE_CHECKING:
    from lingraft.fusion.translators import TranslationEncoder

EXTRA = "fusion"
"""The name under which tensors beyond LoRA's stand on the model and in their file."""


@dataclass
class _Current:
    """What one batch is mixed with: states by fused layer in the target's columns, and what was read of the target before."""

    states: Mapping[str, torch.Tensor]
    columns: Columns
    causal: bool
    cached: bool
    seen: dict[str, int] = field(default_factory=dict)
    before: dict[str, torch.Tensor] = field(default_factory=dict)


class Fuser:
    """The fused layers of an attached adapter.

    Args:
        backbone: The base model, its first stage merged in.
        wrapped: PEFT's model around it.
        fusion: How it fuses.
        modules: The fused layers.
        places: Where each of them has its source states from.
        translator: For FLARE-MT, the encoder that reads the target text instead.
        cache: Source states that were computed before.
        seed: Draws the initial values of tensors beyond LoRA's.

    Attributes:
        extra: Tensors beyond LoRA's: cross-attention, and FLARE-MT's projection.
    """

    def __init__(
        self,
        backbone: Backbone,
        wrapped: Any,
        fusion: FusionConfig,
        modules: Sequence[str],
        places: Mapping[str, Point],
        *,
        translator: "TranslationEncoder | None" = None,
        cache: StateCache | None = None,
        seed: int = 0,
    ) -> None:
        self.backbone, self.wrapped, self.fusion, self.places = backbone, wrapped, fusion, places
        self.translator, self.cache = translator, cache
        self.extra = torch.nn.ModuleDict()
        self._current: _Current | None = None
        self._continuations: dict[tuple[int, ...], _Continuation] = {}
        self._handles = []
        for module in modules:
            layer: Any = backbone.model.get_submodule(module)
            down = layer.lora_A["default"]
            if fusion.function == "cross_attention":
                draw = _draws(backbone, module, seed)
                self.extra[_key(module)] = CrossAttention(down.out_features, draw)
            hook = self._hook(module, layer.lora_dropout["default"])
            self._handles.append(down.register_forward_hook(hook))
        if translator is not None:
            from lingraft.fusion.translators import projection

            width = int(backbone.model.get_submodule(modules[0]).in_features)  # pyright: ignore[reportArgumentType]
            made = torch.nn.Linear(translator.width, width, bias=False)
            made.weight.data = projection(translator.width, width, (backbone.digest, translator.digest, seed))
            self.extra["projection"] = made
        self.extra.to(backbone.device)

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, module: str, dropout: torch.nn.Module) -> Callable[..., torch.Tensor | None]:
        def hook(down: torch.nn.Linear, args: tuple[torch.Tensor, ...], t: torch.Tensor) -> torch.Tensor | None:
            return None if self._current is None else self._mixed(module, down, dropout, t, self._current)

        return hook

    def _mixed(
        self, module: str, down: torch.nn.Linear, dropout: torch.nn.Module, t: torch.Tensor, now: _Current
    ) -> torch.Tensor:
        """`φ(A·x_S, A·x_T)` in the columns that are mixed, `A·x_T` in others."""
        first = now.seen.get(module, 0) if now.cached else 0
        now.seen[module] = first + t.shape[1]
        if first >= now.columns.where.shape[1]:  # Generation has come to what nothing stands beside.
            return t
        here = slice(first, first + t.shape[1])
        states, where = now.states[module][:, here], now.columns.where[:, here]
        keys = t
        if module in now.before and first:
            keys = torch.cat([now.before[module], t], dim=1)
        if now.cached and self.fusion.function == "cross_attention":
            now.before[module] = keys
        if not torch.is_autocast_enabled(states.device.type):
            states = states.to(down.weight.dtype)
        s = torch.nn.functional.linear(dropout(states), down.weight)
        width = s.shape[1]
        mine = t[:, :width]
        if self.fusion.function == "cross_attention":
            attended = Attended(_longer(now.columns.there, keys.shape[1]), first, now.causal)
            mixed = self.extra[_key(module)](s, keys, attended)
        else:
            mixed = ELEMENTWISE[self.fusion.function](s, mine)
        mixed = torch.where(where[:, :, None].to(mixed.device), mixed.to(t.dtype), mine)
        return mixed if width == t.shape[1] else torch.cat([mixed, t[:, width:]], dim=1)

    @contextmanager
    def reading(
        self,
        rows: Sequence[Counterpart | None],
        prompts: Sequence[int],
        *,
        starts: Sequence[int] | None,
        written: Sequence[int] | None,
        cached: bool,
    ) -> Iterator[None]:
        """Everything that runs inside is mixed with these counterparts; see `fusing`."""
        following = self._following(rows, written) if self._continues else [()] * len(rows)
        # A row without counterpart reads another's, and is mixed with none of it.
        filler = next(row for row in rows if row is not None)
        read = [filler if row is None else row for row in rows]
        if self.translator is not None:
            states, lengths = self._translated(read, self.translator)
        else:
            states, lengths = None, [len(row.ids) for row in read]
        columns = align(
            [None if row is None else length for row, length in zip(rows, lengths, strict=True)],
            prompts,
            starts=starts,
            written=written if self._continues else None,
            continued=[len(ids) for ids in following],
            # A translation encoder knows nothing of the model's padding.
            mask_padding=self.fusion.mask_padding or self.translator is not None,
            causal=self.backbone.kind == "decoder",
        )
        if states is None:
            longer = [
                Counterpart((*row.ids, *more), (*row.types, *more) if row.types else (), row.text)
                for row, more in zip(read, following, strict=True)
            ]
            states = self._states(longer, columns.needed)
        aligned: dict[int, torch.Tensor] = {}
        by_layer: dict[str, torch.Tensor] = {}
        for module, found in states.items():
            if id(found) not in aligned:
                aligned[id(found)] = beside(found, columns)
            by_layer[module] = aligned[id(found)]
        columns = Columns(
            None, columns.where.to(self.backbone.device), columns.there.to(self.backbone.device), columns.needed
        )
        self._current = _Current(by_layer, columns, self.backbone.kind == "decoder", cached)
        try:
            yield
        finally:
            self._current = None

    @property
    def _continues(self) -> bool:
        return self.fusion.decoding == "continuation" and self.backbone.kind == "decoder" and self.translator is None

    def _states(self, rows: Sequence[Counterpart], needed: Sequence[int]) -> Mapping[str, Any]:
        """Source states by fused layer, kept or computed."""
        kept = None
        if self.cache is not None:
            kept = self.cache.get([Request(row.ids, row.types, count) for row, count in zip(rows, needed, strict=True)])
        if kept is not None:
            moved = {name: tensor.to(self.backbone.device) for name, tensor in kept.items()}
            return {module: moved[name_of(place)] for module, place in self.places.items()}
        with self.off():
            found = states_of(self.backbone, list(dict.fromkeys(self.places.values())), rows, max(needed))
        return {module: found[place] for module, place in self.places.items()}

    @contextmanager
    def off(self) -> Iterator[None]:
        """The first stage's model: the adapter and dropout off."""
        now, self._current = self._current, None
        try:
            with self.wrapped.disable_adapter(), evaluating(self.wrapped):
                yield
        finally:
            self._current = now

    def _translated(
        self, rows: Sequence[Counterpart], translator: "TranslationEncoder"
    ) -> tuple[Mapping[str, Any], list[int]]:
        """The translation encoder's states of texts, through the projection: the same for every fused layer."""
        states, mask = translator.states([row.text for row in rows])
        with self.backbone.autocast():
            found = self.extra["projection"](states.to(self.backbone.device).float())
        return dict.fromkeys(self.places, found), mask.sum(dim=1).tolist()

    def _following(self, rows: Sequence[Counterpart | None], written: Sequence[int] | None) -> list[tuple[int, ...]]:
        """What the first stage writes after every source text, the likeliest token each time; kept, as it never changes."""
        wanted = written or [0] * len(rows)
        missing = {
            row.ids: count
            for row, count in zip(rows, wanted, strict=True)
            if row is not None and count and self._short(row.ids, count)
        }
        if missing:
            with self.off():
                self._continuations |= _continued(self.backbone, list(missing), max(missing.values()))
        return [
            self._continuations[row.ids].ids[:count] if row is not None and count else ()
            for row, count in zip(rows, wanted, strict=True)
        ]

    def _short(self, ids: tuple[int, ...], count: int) -> bool:
        """Whether too little of a continuation is known."""
        known = self._continuations.get(ids)
        return known is None or (len(known.ids) < count and not known.ended)


@dataclass(frozen=True)
class _Continuation:
    """What follows a text, and whether it ended there."""

    ids: tuple[int, ...]
    ended: bool


def _continued(backbone: Backbone, rows: Sequence[tuple[int, ...]], count: int) -> dict[tuple[int, ...], _Continuation]:
    """Greedy continuations of rows of ids, up to the end of text, which is not part of them."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), backbone.pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, width - len(row) :] = torch.tensor(row)
        mask[number, width - len(row) :] = 1
    with torch.no_grad(), backbone.autocast(), backbone.greedy(count) as configuration:
        model: Any = backbone.model
        out = model.generate(
            input_ids=ids.to(backbone.device), attention_mask=mask.to(backbone.device), generation_config=configuration
        )
    ends = set(configuration.eos_token_id or [])
    found: dict[tuple[int, ...], _Continuation] = {}
    for row, line in zip(rows, out[:, width:].tolist(), strict=True):
        stop = next((n for n, token in enumerate(line) if token in ends), None)
        found[row] = _Continuation(tuple(line[:stop]), stop is not None)
    return found


def _longer(there: torch.Tensor, width: int) -> torch.Tensor:
    """Which columns hold tokens; those behind the ones that were laid out do."""
    missing = width - there.shape[1]
    return torch.nn.functional.pad(there, (0, missing), value=True) if missing > 0 else there


def name_of(place: Point) -> str:
    """What the states of a place are called in a cache."""
    return f"{place.module}:{'output' if place.output else 'input'}" + (f":{place.norm}" if place.norm else "")


def _key(module: str) -> str:
    return module.replace(".", "/")


def _draws(backbone: Backbone, module: str, seed: int) -> Callable[[str, tuple[int, ...]], torch.Tensor]:
    """Uniform in ±1/√rank, a function of the base, the layer and the seed."""

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        rng = np.random.default_rng(derived_seed("fusion", backbone.digest, module, name, list(shape), seed))
        return torch.from_numpy((rng.uniform(-1, 1, size=shape) / shape[0] ** 0.5).astype(np.float32))

    return draw


@contextmanager
def fusing(
    backbone: Backbone,
    rows: Sequence[Counterpart | None],
    prompts: Sequence[int],
    *,
    starts: Sequence[int] | None = None,
    written: Sequence[int] | None = None,
    cached: bool = False,
) -> Iterator[None]:
    """Mixes a batch with its counterparts, if an adapter that fuses is on the model and there are any.

    Args:
        backbone: The model.
        rows: What is read of every item's counterpart; None: the item is read with plain LoRA.
        prompts: Tokens of every row before its answer: the positions that are mixed.
        starts: Columns of padding on the left of every row.
        written: Columns behind every prompt that an answer takes or may take.
        cached: Whether the model is called again and again on what follows, as generation with a cache does.
    """
    fuser = backbone.fuser
    if fuser is None or all(row is None for row in rows):
        yield
        return
    with fuser.reading(rows, prompts, starts=starts, written=written, cached=cached):
        yield


@contextmanager
def put_on(backbone: Backbone, wrapped: Any, stage: SecondStage, *, seed: int = 0) -> Iterator[torch.nn.Module | None]:
    """Puts what a second stage has beyond LoRA on a model with its LoRA attached.

    Yields:
        The module that holds tensors beyond LoRA's; None: there are none.
    """
    if stage.mixup is not None:
        backbone.mixup = Mixup(backbone, stage.mixup)
        wrapped.add_module(EXTRA, backbone.mixup)
        try:
            yield backbone.mixup
        finally:
            backbone.mixup = None
        return
    if stage.fusion is None:
        yield None
        return
    adapted = [name for name, module in backbone.model.named_modules() if hasattr(module, "lora_A")]
    modules = fused_modules(backbone, stage.fusion, adapted)
    translator = None
    if stage.kind == "fused-mt":
        from lingraft.fusion.translators import TranslationEncoder

        translator = TranslationEncoder(
            stage.fusion.encoder,
            revision=stage.fusion.encoder_revision,
            language=stage.language,
            device=backbone.device,
            dtype=backbone.dtype,
        )
        if stage.encoder and stage.encoder != translator.digest:
            raise AdapterError(
                "the translation encoder is another one than this adapter was trained with",
                where=stage.fusion.encoder,
                remedy="put the right one back, or train again",
            )
        places = {module: Point(module, False, None) for module in modules}
    else:
        with wrapped.disable_adapter():
            places = points(
                backbone, modules, offset=stage.fusion.layer_offset, normalised=stage.fusion.normalize_source
            )
    fuser = Fuser(backbone, wrapped, stage.fusion, modules, places, translator=translator, cache=stage.cache, seed=seed)
    extra = fuser.extra if len(fuser.extra) else None
    if extra is not None:
        wrapped.add_module(EXTRA, extra)
    backbone.fuser = fuser
    try:
        yield extra
    finally:
        backbone.fuser = None
        fuser.close()


def fused_modules(backbone: Backbone, fusion: FusionConfig, among: Sequence[str] | None = None) -> list[str]:
    """The layers that fuse; of an encoder-decoder those of its encoder, as its decoder reads no text.

    Args:
        backbone: The base model.
        fusion: How it fuses.
        among: The layers that have a LoRA; None: nothing is attached, and all linear layers count.

    Raises:
        BackboneError: They read states of different widths, or there are none.
    """
    found = backbone.target_modules(fusion.modules) if among is None else roles.select(among, fusion.modules)
    inside = "encoder." if backbone.kind == "encoder-decoder" else ""
    chosen = sorted(module for module in found if module.startswith(inside))
    widths: set[Any] = {backbone.model.get_submodule(module).in_features for module in chosen}
    if len(widths) != 1:
        raise BackboneError(
            "the layers to fuse read states of different widths" if widths else "there is no layer to fuse",
            where=backbone.located.name,
            remedy="fuse layers that read a block's states, such as attention.query (fusion.modules); others may have plain "
            "LoRA (fusion.plain)",
        )
    return chosen


@contextmanager
def with_adapter(backbone: Backbone, adapter: Adapters, head: Head | None = None) -> Iterator[Any]:
    """The base with an adapter on it, of one stage or of two, or with a stack; see `Backbone.with_adapter`."""
    stack_of = as_stack(adapter)
    stage = second_stage(stack_of[0]) if len(stack_of) == 1 else None
    if stage is None:
        with backbone.with_adapter(stack_of, head) as wrapped:
            yield wrapped
        return
    with ExitStack() as stack:
        stack.enter_context(backbone.merged(stage.first))
        wrapped = stack.enter_context(backbone.with_adapter(stack_of, head))
        extra = stack.enter_context(put_on(backbone, wrapped, stage))
        if extra is not None:
            stage.load(extra)
            extra.to(backbone.device).eval()
        yield wrapped
