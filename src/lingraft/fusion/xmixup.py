"""X-Mixup: in one layer of an encoder, target states are mixed with the source's, aligned by the layer's own attention.

Yang et al., 2022 (arXiv:2205.04182), as their code has it. Between the self-attention and the feed-forward part of a layer,
with h_T and h_S the states of the two texts there, W the layer's own weights, adapters included, and σ the logistic function:

    h_ST = W_o · softmax((W_q h_T)(W_k h_S)ᵀ / √d) · W_v h_S
    mixed = norm(μ · h_T + (1 − μ) · h_ST),    1 − μ = λ0 · σ(w · H + b)

H is the alignment's entropy, read from both sides; μ is one number a text. w and b alone are new, and trained.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from lingraft.config import MixupConfig
from lingraft.errors import BackboneError, UserError
from lingraft.heads import HeadKind
from lingraft.roles import layer_of, plays

if TYPE_CHECKING:
    from lingraft.backbones import Backbone

# What is computed


def _entropy(scores: torch.Tensor, there: torch.Tensor, asking: torch.Tensor) -> torch.Tensor:
    """The entropy of a softmax over the last dimension, in nats, its mean over heads and positions that ask: batch."""
    there, asking = there[:, None, None, :], asking[:, None, :]
    logs = functional.log_softmax(scores.masked_fill(~there, -torch.inf), dim=-1)
    entropy = -(logs.exp() * logs.masked_fill(~there, 0)).sum(-1)
    return (entropy * asking).sum((1, 2)) / (asking.sum((1, 2)) * scores.shape[1])


def alignment(
    query: torch.Tensor, key: torch.Tensor, there: torch.Tensor, source_there: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """How much every target token attends to every source token, and how undecided that is.

    Args:
        query: Of the target, batch × heads × length × width.
        key: Of the source, batch × heads × source length × width.
        there: Which tokens of the target are no padding, batch × length.
        source_there: The same of the source.
        scale: Of the scores, 1/√width for most.

    Returns:
        Weights, batch × heads × length × source length; and entropies, one a text: that of the weights, and that of the
        same scores read from the source's side.
    """
    scores = query @ key.transpose(-1, -2) * scale
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    weights = scores.masked_fill(~source_there[:, None, None, :], -torch.inf).softmax(-1)
    entropy = _entropy(scores, source_there, there) + _entropy(scores.transpose(-1, -2), there, source_there)
    return weights, entropy


def ratio(entropy: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, most: float) -> torch.Tensor:
    """μ, the share that target states keep: 1 − most · σ(weight · entropy + bias), one a text."""
    return 1 - most * torch.sigmoid(weight * entropy + bias)


def mixed(own: torch.Tensor, aligned: torch.Tensor, mu: torch.Tensor) -> torch.Tensor:
    """μ · own + (1 − μ) · aligned, μ one a text; states are batch × length × width."""
    return mu[:, None, None] * own + (1 - mu[:, None, None]) * aligned


# Where it is computed


@dataclass(frozen=True)
class Site:
    """A self-attention sub-layer, residual connection and norm within, and its parts: paths below the base model."""

    path: str
    query: str
    key: str
    value: str
    output: str
    norm: str

    @property
    def behind(self) -> bool:
        """Whether the norm stands behind the sub-layer, beside its output projection (BERT), or before it (T5)."""
        return self.norm.rpartition(".")[0] == self.output.rpartition(".")[0]


def site_of(model: Any, layer: int | None) -> Site:
    """Where the states of an encoder's layer are mixed.

    Args:
        model: An encoder with any head, or an encoder-decoder.
        layer: Its number, from 0; None: the middle one.

    Raises:
        UserError: There is no such layer.
        BackboneError: Its attention is not built as BERT's or T5's.
    """
    modules = {n: m for n, m in model.base_model.named_modules() if not n.startswith("decoder.")}
    layers = {number for n in modules if plays(n, "attention.query") and (number := layer_of(n)) is not None}
    chosen = len(layers) // 2 if layer is None else layer
    # ALBERT goes through one layer many times; DeBERTa's scores are of positions too.
    usual = len(layers) == model.config.num_hidden_layers and not getattr(model.config, "relative_attention", False)
    if usual and chosen not in layers:
        raise UserError(
            f"there is no layer {chosen} to mix in, the layers are 0 to {max(layers)}", remedy="change mixup.layer"
        )
    parts = [
        [n for n in modules if layer_of(n) == chosen and plays(n, f"attention.{role}")]
        for role in ("query", "key", "value", "output")
    ]
    if usual and all(len(found) == 1 for found in parts):
        query, key, value, output = (found[0] for found in parts)
        path = query
        while path:  # Upwards, until the block has a norm in it; the feed-forward part is beyond.
            path = path.rpartition(".")[0]
            inside = [n for n in modules if n.startswith(f"{path}.")]
            norms = [n for n in inside if "norm" in type(modules[n]).__name__.lower()]
            if any(plays(n, "feed_forward") for n in inside):
                break
            if output in inside and len(norms) == 1:
                return Site(path, query, key, value, output, norms[0])
    raise BackboneError(
        f"X-Mixup cannot be put on {type(model).__name__}: its self-attention is not built as BERT's or T5's",
        remedy="use a BERT, RoBERTa, XLM-R or T5 layout, or another method",
    )


@dataclass(frozen=True)
class Texts:
    """Texts to be read.

    Attributes:
        run: Has the model read them once, padded on the right, and returns what is made of it.
        lengths: Their tokens; 0 for a source text that is only there to fill the batch: nothing is mixed in from it.
    """

    run: Callable[[], torch.Tensor]
    lengths: Sequence[int]


@dataclass(frozen=True)
class Read:
    """Texts that were read.

    Attributes:
        value: What `Texts.run` returned.
        there: Which tokens are no padding, batch × length.
        states: The states that are mixed, or were, batch × length × width.
        last: Those of the encoder's last layer.
    """

    value: torch.Tensor
    there: torch.Tensor
    states: torch.Tensor
    last: torch.Tensor


class Mixup(torch.nn.Module):
    """Mixes target states with source states in one layer; holds the ratio's two numbers, in float32.

    Args:
        backbone: An encoder or encoder-decoder.
        config: The layer and the weights of the losses.

    Raises:
        UserError: The backbone is a decoder, or has no such layer.
        BackboneError: Its attention is not built as BERT's or T5's.
    """

    def __init__(self, backbone: "Backbone", config: MixupConfig) -> None:
        super().__init__()
        if backbone.kind == "decoder":
            raise UserError(
                "X-Mixup is for encoders and encoder-decoders: a decoder has read no whole text in its middle layers",
                remedy="use flare, input-fusion or translate-train",
            )
        self.config = config
        self.site = site_of(backbone.model, config.layer)
        self.weight = torch.nn.Parameter(torch.ones((), device=backbone.device))
        self.bias = torch.nn.Parameter(torch.zeros((), device=backbone.device))

    def mix(self, model: Any, own: torch.Tensor, there: torch.Tensor, source: Read) -> torch.Tensor:
        """The sub-layer's output, mixed (batch × length × width); texts without a source keep theirs."""
        base, site = model.base_model, self.site
        query, key, value, output, norm = (
            base.get_submodule(p) for p in (site.query, site.key, site.value, site.output, site.norm)
        )
        core, holder = (base.get_submodule(path.rpartition(".")[0]) for path in (site.query, site.norm))
        heads = model.config.num_attention_heads

        def split(states: torch.Tensor) -> torch.Tensor:
            return states.unflatten(-1, (heads, -1)).transpose(1, 2)

        some = source.there.any(1)
        # A softmax over nothing is NaN, which would get past the choice below into the gradients.
        source_there = source.there | ~some[:, None]
        asks, gives = (states if site.behind else norm(states) for states in (own, source.states))
        queries, keys, values = split(query(asks)), split(key(gives)), split(value(gives))
        # T5 leaves the scale to its weights.
        scale = queries.shape[-1] ** -0.5 if site.behind else 1.0
        weights, entropy = alignment(queries, keys, there, source_there, scale)
        rate = getattr(core.dropout, "p", core.dropout)  # A module, or T5's number.
        weights = functional.dropout(weights, rate, core.training).to(values.dtype)
        aligned = holder.dropout(output((weights @ values).transpose(1, 2).flatten(2)))
        found = mixed(own, aligned, ratio(entropy, self.weight, self.bias, self.config.most))
        found = norm(found.to(own.dtype)) if site.behind else found
        return torch.where(some[:, None, None], found.to(own.dtype), own)

    def read(self, model: Any, texts: Texts, source: Read | None = None) -> Read:
        """Reads texts, mixed with their sources or as they are; gradients flow into both."""
        encoder = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
        kept: dict[str, torch.Tensor] = {}

        def keep(name: str) -> Callable[[Any, Any, Any], None]:
            return lambda module, given, out: kept.update({name: out[0]})

        with ExitStack() as stack:
            if source is not None:
                stack.enter_context(self.mixing(model, source, texts.lengths))
            for name, module in (("states", model.base_model.get_submodule(self.site.path)), ("last", encoder)):
                stack.callback(module.register_forward_hook(keep(name)).remove)
            value = texts.run()
        return Read(value, _there(texts.lengths, kept["last"]), kept["states"], kept["last"])

    @contextmanager
    def mixing(self, model: Any, source: Read, lengths: Sequence[int]) -> Iterator[None]:
        """Has a model mix whatever its encoder reads with a source.

        Args:
            model: The model, its adapter attached.
            source: From `read`.
            lengths: The tokens of the target texts, which the encoder reads padded on the right, in the source's order.
        """

        def after(module: Any, given: Any, out: Any) -> Any:
            return (self.mix(model, out[0], _there(lengths, out[0]), source), *out[1:])

        handle = model.base_model.get_submodule(self.site.path).register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()

    def both(self, model: Any, source: Texts, target: Texts) -> tuple[Read, Read]:
        """Reads source texts as they are, and target texts, in the same order, mixed with them."""
        first = self.read(model, source)
        return first, self.read(model, target, first)

    def logits(self, model: Any, source: Texts, target: Texts, kind: HeadKind) -> torch.Tensor:
        """What a headed encoder answers: the mean of both texts' logits (`config.average`); of spans the target's alone."""
        first, second = self.both(model, source, target)
        if kind == "span" or not self.config.average:
            return second.value
        there = first.there.any(1).view(-1, *[1] * (second.value.dim() - 1))
        return torch.where(there, (first.value + second.value) / 2, second.value)


def _there(lengths: Sequence[int], states: torch.Tensor) -> torch.Tensor:
    """Which of the tokens with these states are no padding, batch × length."""
    return torch.arange(states.shape[1], device=states.device) < torch.tensor(lengths, device=states.device)[:, None]
