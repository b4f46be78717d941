"""What makes a model that is loaded compute faster or in less memory, and is taken off it again."""

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from lingraft.config import SpeedConfig
from lingraft.errors import MissingExtra, UserError
from lingraft.processes import Sharding

if TYPE_CHECKING:
    import torch

FLASH = "flash_attention_2"


def attention(speed: SpeedConfig, device: "torch.device", dtype: "torch.dtype") -> dict[str, Any]:
    """What loading takes for the attention that is asked for.

    Raises:
        UserError: It cannot be had here.
    """
    import torch

    if speed.attention == "auto":
        return {}
    if speed.attention == FLASH:
        remedy = "use speed.attention=auto, which is fused too"
        if device.type != "cuda":
            raise UserError(f"{FLASH} needs a CUDA device, and this is '{device}'", remedy=remedy)
        if dtype == torch.float32:
            raise UserError(f"{FLASH} computes in 16 bits, and the base is in float32", remedy=remedy)
        if importlib.util.find_spec("flash_attn") is None:
            raise UserError(
                f"{FLASH} needs the package flash-attn", remedy=f"install it for your CUDA and PyTorch, or {remedy}"
            )
    return {"attn_implementation": speed.attention}


def shard(model: Any, device: "torch.device", how: Sharding) -> None:
    """Divides a frozen model's layers among the processes; a layer is gathered while it computes.

    Embeddings, the last norm and heads stay whole: losses and scores read the output embedding outside of the model. Adapters that
    are put on later are whole in every process.

    Args:
        model: A model of transformers', with all of its weights, frozen.
        device: Where the shards go.
        how: How, as the launcher says.

    Raises:
        UserError: The model has no layers that lingraft knows.
        MissingExtra: DeepSpeed is asked for and not installed.
    """
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no layers that lingraft knows to shard", remedy="launch it without sharding"
        )
    if how.deepspeed is not None:
        if importlib.util.find_spec("deepspeed") is None:
            raise MissingExtra("deepspeed", "deepspeed")
        import deepspeed  # pyright: ignore[reportMissingImports]

        # Without anything to train, stage 3 is the fetching and releasing of weights alone.
        deepspeed.initialize(model=torch.nn.ModuleList(layers), config=dict(how.deepspeed))
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=how.reshard)
    divided = {id(p) for layer in layers for p in layer.parameters()}
    whole = {p for p in model.base_model.parameters() if id(p) not in divided}
    # The root: it has the next layer gathered while one computes.
    fully_shard(model.base_model, mesh=mesh, ignored_params=whole)


def fuse_kernels(model: Any, speed: SpeedConfig, device: "torch.device") -> str:
    """Puts Liger's kernels into a model where they are asked for and can be had: norms, gates, rotations.

    Liger replaces some functions of transformers for the whole process.

    Args:
        model: A model of transformers', on its device.
        speed: What is asked.
        device: The device.

    Returns:
        `liger`, or `none`.

    Raises:
        MissingExtra: They are asked for, and not installed.
        UserError: They are asked for, and there is no CUDA device, or none for this model.
    """
    asked = speed.kernels == "liger"
    if speed.kernels == "none":
        return "none"
    if device.type != "cuda":
        if asked:
            raise UserError(
                f"Liger's kernels need a CUDA device, and this is '{device}'", remedy="leave speed.kernels out"
            )
        return "none"
    if importlib.util.find_spec("liger_kernel") is None:
        if asked:
            raise MissingExtra("liger-kernel", "gpu")
        return "none"
    from liger_kernel.transformers import monkey_patch  # pyright: ignore[reportMissingImports]

    if model.config.model_type not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        if asked:
            raise UserError(f"Liger has no kernels for {type(model).__name__}", remedy="leave speed.kernels out")
        return "none"
    # The losses here are lingraft's own, which see the positions that they need and no others.
    monkey_patch._apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    return "liger"


@contextmanager
def sped(model: Any, speed: SpeedConfig, plain: Callable[[], bool]) -> Iterator[None]:
    """Has a model's layers computed as asked; afterwards they are what they were.

    Args:
        model: A model of transformers', with whatever has been put on it.
        speed: What is asked.
        plain: Whether nothing on the model changes from call to call; where something does, layers are computed as usual.

    Raises:
        UserError: The model cannot, or there is no compiler.
    """
    with ExitStack() as stack:
        if speed.gradient_checkpointing:
            stack.enter_context(_recomputing(model, plain))
        if speed.compile:
            stack.enter_context(_compiled(model, plain))
        yield


@contextmanager
def _recomputing(model: Any, plain: Callable[[], bool]) -> Iterator[None]:
    """Has the layers' activations computed again in the backward pass, while the model is in training mode."""
    from torch.utils.checkpoint import checkpoint

    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"{type(model).__name__} cannot compute activations again", remedy="leave speed.gradient_checkpointing out"
        )

    def call(layer: Callable[..., Any], *args: Any) -> Any:
        # What fuses reads a counterpart that is there during the forward pass alone.
        return checkpoint(layer, *args, use_reentrant=False) if plain() else layer(*args)

    # transformers' public switch also has the embeddings' output require a gradient, and leaves its hook behind.
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=call)
    try:
        yield
    finally:
        model._set_gradient_checkpointing(enable=False)


@contextmanager
def _compiled(model: Any, plain: Callable[[], bool]) -> Iterator[None]:
    """Compiles the layers of a model; calls with a cache, as generation makes them, go past what was compiled."""
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no layers that lingraft knows to compile", remedy="leave speed.compile out"
        )
    kept: list[tuple[Any, Any]] = []
    try:
        for layer in layers:
            for module in layer.modules():
                # What stands in a layer's place reads values that change with every batch.
                if module is not layer and "forward" in vars(module):
                    kept.append((module, vars(module)["forward"]))
                    module.forward = torch.compiler.disable(module.forward)
            kept.append((layer, vars(layer).get("forward")))
            layer.forward = _dispatched(layer.forward, torch.compile(layer.forward, dynamic=True), plain)
        yield
    finally:
        for module, forward in reversed(kept):
            if forward is None:
                del module.forward
            else:
                module.forward = forward
        # What was compiled is kept by the layers' class, and does not look for hooks: the next adapter may have some.
        torch.compiler.reset()


def _dispatched(usual: Any, compiled: Any, plain: Callable[[], bool]) -> Callable[..., Any]:
    def forward(*args: Any, **given: Any) -> Any:
        chosen = compiled if plain() and given.get("past_key_values") is None else usual
        return chosen(*args, **given)

    return forward


def check_compiler(device: "torch.device") -> None:
    """Makes sure that something can be compiled at all.

    Raises:
        UserError: A C++ compiler is absent, or on a GPU Triton.
    """
    remedy = "install a C++ compiler (g++ or clang++, on Debian `apt install g++`), or leave speed.compile out"
    own = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([own] if own else ["g++", "clang++", "c++", "cl"])):
        raise UserError("torch.compile needs a C++ compiler, and there is none", remedy=remedy)
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("torch.compile needs Triton on a GPU", remedy="install triton, or leave speed.compile out")
