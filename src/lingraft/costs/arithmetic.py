"""Operations, bytes and hours of reading, writing and training.

Operations are counted as by Kaplan et al. 2020 (arXiv:2001.08361, section 2.1): two for every weight a token meets, and attention
beside it. A frozen base is gone through once more on the way back, for the activations' sake; its own weights get no gradient.
Saved activations are counted in the manner of Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1), for attention that keeps
no matrix of scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from lingraft import roles
from lingraft.config import AdapterConfig
from lingraft.costs.shapes import Linear, Shape, reader_of
from lingraft.errors import UserError, suggestion


@dataclass(frozen=True)
class Work:
    """What a model reads and writes in a step.

    Attributes:
        items: Texts.
        tokens: Tokens read, those of answers included; of an encoder-decoder, of the input alone.
        length: Tokens of one text, which each of them attends to.
        scored: Positions whose next token is compared with the whole vocabulary.
        outputs: Of an encoder-decoder: tokens of the output.
        output_length: Of an encoder-decoder: tokens of one output.
        written: Tokens the model writes, one after the other.
        longest: Tokens of the longest text.
    """

    items: float = 0
    tokens: float = 0
    length: float = 0
    scored: float = 0
    outputs: float = 0
    output_length: float = 0
    written: float = 0
    longest: float = 0


def inference_flops(shape: Shape, work: Work) -> float:
    """Operations of reading and writing: two for every weight met, attention in full (no half for a causal one)."""
    read, out = shape.met
    dense = 2 * (read * work.tokens + out * work.outputs) + 2 * shape.vocabulary * shape.width * work.scored
    # What is written goes through the model as what is read does, token by token, and every one is projected.
    written = 2 * ((out or read) + shape.vocabulary * shape.width) * work.written
    return dense + written + _attention(shape, work) + _attention_written(shape, work)


def training_flops(shape: Shape, work: Work, trained: float = 0, *, beneath: float = 0, whole: bool = False) -> float:
    """Operations of training an adapter on a frozen base: forward, and back through the activations.

    The base's linear layers are gone through twice, attention three times (its backward pass has four products for two); the
    output embedding twice, as `losses` makes its gradient at once; the adapter's own `trained` numbers three times.

    Args:
        shape: The base's sizes.
        work: What is read.
        trained: Numbers of the adapter.
        beneath: Numbers of frozen adapters that it stands on.
        whole: The base's own weights get gradients too, as sparse differences need them.
    """
    read, out = shape.met
    met = read * work.tokens + out * work.outputs
    projected = shape.vocabulary * shape.width * work.scored
    # The adapter's numbers lie in the two stacks as the base's weights do.
    own = (6 * trained + 4 * beneath) * met / (read + out)
    return (6 if whole else 4) * met + 4 * projected + 3 * _attention(shape, work) + own


def _attention(shape: Shape, work: Work) -> float:
    """Scores and the weighted sum: 4 operations for every feature of every pair of tokens that may look at each other."""
    inner = shape.layers * work.tokens * work.length
    cross = shape.output_layers * work.outputs * (work.output_length + work.length)
    return 4.0 * shape.attention * (inner + cross)


def _attention_written(shape: Shape, work: Work) -> float:
    each = work.written / work.items if work.items else 0.0
    return 4.0 * shape.attention * (shape.output_layers or shape.layers) * work.written * (work.length + each / 2)


_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_QUANTISED = {"int8": 1.0, "nf4": 0.5 + 4 / 64}
"""Bytes of a weight of a linear layer; in NF4 every 64 weights share a float32 (Dettmers et al. 2023, section 3)."""
CHUNK = 256
"""Positions whose logits are held at a time: `losses.CHUNK`, which imports torch."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step; what a driver and an allocator take beside it (half a GiB or more) is not in it."""

    weights: float
    adapter: float
    activations: float
    logits: float
    sources: float = 0.0

    @property
    def total(self) -> float:
        """All together."""
        return self.weights + self.adapter + self.activations + self.logits + self.sources


def peak_memory(
    shape: Shape,
    adapter: AdapterConfig | None,
    dtype: str,
    batch_size: int,
    length: float,
    *,
    quantization: str = "none",
    output_length: float = 0,
    source_length: float = 0,
    beneath: float = 0,
) -> Memory:
    """Bytes of a training step, without gradient checkpointing; without an adapter, of reading alone.

    The adapter costs 16 bytes a number: weight, gradient and Adam's two moments in float32. Saved in every block for a token:
    queries, keys, values and attention's output; what norms read and what the feed-forward part multiplies; and a copy (and a
    dropout mask) of what every adapted layer reads. The term that grows with the square of the length is left out, but for
    encoder-decoders, whose position bias keeps them from attention without it.

    Args:
        shape: The base's sizes.
        adapter: Its configuration; None: nothing is trained.
        dtype: Of weights and activations.
        batch_size: Texts at a time.
        length: Tokens of one text, padding included.
        quantization: `none`, `int8` or `nf4`: of the linear layers' weights.
        output_length: Of an encoder-decoder: tokens of one output.
        source_length: Tokens of one text whose states are held, layer by layer, while the other one is read.
        beneath: Numbers of frozen adapters that are on the model too, in float32.
    """
    size = _BYTES[dtype]
    sources = shape.layers * batch_size * source_length * shape.width * size
    weights = (shape.parameters - shape.projections) * size + shape.projections * _QUANTISED.get(quantization, size)
    logits = min(CHUNK, batch_size * length) * shape.vocabulary * (size + 4)
    if adapter is None:
        held = batch_size * length * size * (2 * shape.attention + 3 * shape.width + 3 * shape.feed_forward)
        return Memory(weights, 4 * beneath, held, logits, sources)
    tokens, outputs = batch_size * length, batch_size * output_length
    block = size * (2 * shape.attention + 2 * shape.key_value) + shape.width + 4 * shape.normalised
    block += size * shape.feed_forward * (3 if shape.gated else 2)
    copy = size + (1 if adapter.family == "lora" and adapter.dropout else 0)
    layers = [] if adapter.family in ("prefix", "bottleneck") else _adapted(shape, adapter)
    saved = block * (shape.layers * tokens + shape.output_layers * outputs)
    saved += sum(layer.inputs * copy * (outputs if layer.of_output else tokens) for layer in layers)
    if shape.kind == "encoder-decoder":
        # Scores in float32, their softmax, and what dropout leaves of it.
        pairs = shape.layers * tokens * length + shape.output_layers * outputs * (length + output_length)
        saved += 12 * shape.heads * pairs
    held = _changing(shape, adapter, size) if adapter.family == "sparse" else 16 * adapter_parameters(shape, adapter)
    return Memory(weights, held + 4 * beneath, saved, logits, sources)


def _changing(shape: Shape, adapter: AdapterConfig, size: int) -> float:
    """Bytes that learning a sparse difference takes beside the model, in the dearer one of its two phases.

    Where all numbers learn, 16 bytes each (the difference, its gradient, Adam's two moments) and the start value; where only their
    gradients are summed, 4 and the gradient; where K learn, 20 (an index too) and the start value. Beside them stand for a moment
    one matrix's gradient, and a copy of an input embedding that the output embedding has too.
    """
    numbers, entries = changeable(shape, adapter), adapter_parameters(shape, adapter)
    first = (16.0 + size if adapter.select == "change" else 4.0 + size) * numbers
    copy = shape.vocabulary * shape.width * size if shape.tied and adapter.modules == "all" else 0
    second = (20.0 + size) * entries + copy
    gradient = size * max(layer.inputs * layer.outputs for layer in shape.linear)
    return gradient + max(first, second)


@dataclass(frozen=True)
class Device:
    """An accelerator, by its data sheet: operations a second (dense, 16 bits) and bytes a second from its memory."""

    peak: float
    bandwidth: float


DEVICES = {
    "A100": Device(312e12, 2.0e12),
    "H100": Device(989e12, 3.35e12),
    "H200": Device(989e12, 4.8e12),
}


def gpu_hours(flops: float, device: str = "H100", utilisation: float = 0.4) -> float:
    """Hours of arithmetic on one accelerator.

    Args:
        flops: Operations.
        device: One of `DEVICES`.
        utilisation: The share of its peak that is reached; 0.4 is usual for large matrix products.

    Raises:
        UserError: The device is not known.
    """
    return flops / (_device(device).peak * utilisation) / 3600


def _device(name: str) -> Device:
    if name not in DEVICES:
        raise UserError(f"unknown device '{name}'", remedy=suggestion(name, DEVICES))
    return DEVICES[name]


def writing_hours(shape: Shape, written: float, dtype: str, device: str = "H100", batch_size: int = 16) -> float:
    """Hours that writing takes at least: every token of a batch needs all weights from memory once."""
    return written / batch_size * shape.parameters * _BYTES[dtype] / _device(device).bandwidth / 3600


def stored_bytes(shape: Shape, modules: str | Sequence[str], tokens: float) -> float:
    """Bytes of source states on disk: two for every feature of every token, once for all fused layers that read the same."""
    chosen = _chosen(reader_of(shape).linear, modules if isinstance(modules, str) else tuple(modules))
    fused = {layer.path.rpartition(".")[0] for layer in chosen}
    return 2.0 * tokens * len(fused) * shape.width


def adapter_parameters(shape: Shape, config: AdapterConfig) -> int:
    """How many numbers of an adapter are trained.

    Raises:
        UserError: The base has none of the modules.
    """
    if config.family == "sparse":
        return min(config.entries, changeable(shape, config))
    chosen = _adapted(shape, config)
    if config.family == "lora":
        return config.rank * sum(layer.inputs + layer.outputs for layer in chosen)
    if config.family == "ia3":
        inside = [roles.plays(layer.path, "feed_forward") for layer in chosen]
        return sum(x.inputs if scaled else x.outputs for x, scaled in zip(chosen, inside, strict=True))
    if config.family == "prefix":
        return config.tokens * 2 * shape.key_value * (shape.layers + shape.output_layers)
    sizes = [(layer.outputs, max(1, int(layer.outputs / config.reduction))) for layer in chosen]
    return sum(2 * width * small + width + small for width, small in sizes) + _coupling(shape, config)


def _coupling(shape: Shape, config: AdapterConfig) -> int:
    """Numbers of an invertible coupling: two networks from half the width to a quarter and back (MAD-X)."""
    if not config.invertible:
        return 0
    half, inner = shape.width // 2, max(1, shape.width // 4)
    return 2 * (2 * half * inner + half + inner)


def changeable(shape: Shape, config: AdapterConfig) -> int:
    """How many of the base's numbers a sparse difference may change: of linear layers that are named their weights, else all.

    The few numbers of norms, and of a pooler, are not told from those of biases and positions, and are counted with them.
    """
    if config.modules != "all":
        try:
            return sum(layer.inputs * layer.outputs for layer in _adapted(shape, config))
        except UserError:  # Embeddings can be named too.
            pass
    return shape.vocabulary * shape.width + shape.projections + shape.rest


_PLACES = {
    "ia3": ("attention.key", "attention.value", "feed_forward.output"),
    "pfeiffer": ("feed_forward.output",),
    "houlsby": ("attention.output", "feed_forward.output"),
    "madx": ("feed_forward.output",),
}
"""Where structures sit that name no modules; as in `structures`, which imports torch."""


def _adapted(shape: Shape, config: AdapterConfig) -> list[Linear]:
    modules: str | tuple[str, ...] = config.modules
    if config.family == "bottleneck":
        modules = _PLACES[config.positions]
    elif config.family == "ia3" and modules == "all":
        modules = _PLACES["ia3"]
    chosen = _chosen(shape.linear, modules)
    if config.family != "bottleneck" or not config.leave_out_last:
        return chosen
    last: dict[bool, int] = {}
    for layer in chosen:  # By stack: an encoder-decoder has two.
        last[layer.of_output] = max(last.get(layer.of_output, 0), roles.layer_of(layer.path) or 0)
    return [layer for layer in chosen if (roles.layer_of(layer.path) or 0) < last[layer.of_output]]


@lru_cache(maxsize=64)
def _chosen(linear: tuple[Linear, ...], modules: str | tuple[str, ...]) -> list[Linear]:
    paths = set(roles.select([layer.path for layer in linear], modules))
    return [layer for layer in linear if layer.path in paths]
