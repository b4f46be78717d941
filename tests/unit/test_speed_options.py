"""What changes speed and memory changes nothing else, and says so where it cannot be had."""

import importlib.util
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lingraft import speeding
from lingraft.attaching import peft_config
from lingraft.backbones import Backbone, environment
from lingraft.batching import text_sequences
from lingraft.causal import NEXT_TOKENS
from lingraft.config import AdapterConfig, BackboneConfig, Experiment, SpeedConfig, validated
from lingraft.errors import ConfigError, MissingExtra, UserError
from lingraft.locating import Located, locate
from lingraft.plan import make_plan
from lingraft.prefixes import _recomputes
from lingraft.structures import fresh
from tests.conftest import save_tiny_model

CUDA = torch.device("cuda")
WINDOWS = {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}


def loaded(folder: Path, dtype: str = "float32", **speed: Any) -> Backbone:
    return Backbone(
        locate(BackboneConfig(model=str(folder), dtype=dtype, device="cpu")),  # pyright: ignore[reportArgumentType]
        SpeedConfig.model_validate(speed),
    )


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = WINDOWS if request.param == "gemma3_text" else {}
    return save_tiny_model(tmp_path_factory.mktemp(request.param), request.param, **changes)


def learned(
    backbone: Backbone, family: str = "lora", during: Callable[[Any], None] = lambda model: None, **values: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of some texts and the gradients of an adapter that is not where it started."""
    chosen = text_sequences([[3 + (n * k) % 200 for n in range(length)] for k, length in ((5, 21), (7, 12), (11, 18))])
    made, tensors = fresh(backbone, AdapterConfig.model_validate({"family": family, **values}), 0)
    torch.manual_seed(1)
    moved = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in tensors.items()}
    with backbone.attached(peft_config(made), moved) as model:
        model.train()
        torch.manual_seed(2)
        losses = NEXT_TOKENS.summed(backbone, model.get_base_model(), NEXT_TOKENS.draw(backbone, chosen, 1.0, 3))
        during(model.get_base_model())
        losses.sum().backward()
        return losses.tolist(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# Masks


def test_padding_on_the_right_needs_no_mask(folder: Path):
    backbone = loaded(folder)
    assert backbone.causal
    ids = torch.randint(3, 200, (3, 19), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, length in enumerate((19, 11, 3)):
        ids[row, length:], mask[row, length:] = backbone.pad_id, 0
    with torch.no_grad():
        masked, bare = backbone.hidden(ids, mask), backbone.hidden(ids)
    assert not torch.equal(masked, bare)  # Padding itself, which nobody reads.
    torch.testing.assert_close(masked[mask.bool()], bare[mask.bool()], rtol=1e-5, atol=1e-5)


def test_a_model_that_looks_to_the_right_keeps_its_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save_tiny_model(tmp_path / "model", "gemma3_text", **WINDOWS, use_bidirectional_attention=True)
    backbone = loaded(path)
    assert not backbone.causal
    seen: list[Any] = []
    usual = backbone.hidden
    monkeypatch.setattr(backbone, "hidden", lambda ids, **given: (seen.append(given), usual(ids, **given))[1])
    learned(backbone)
    (given,) = seen
    assert given["attention_mask"].sum(dim=1).tolist() == [21, 12, 18]


# Gradient checkpointing


@pytest.mark.parametrize(
    ("family", "values"),
    [("lora", {"dropout": 0.0}), ("lora", {"dropout": 0.3}), ("bottleneck", {}), ("ia3", {})],
    ids=["lora", "dropout", "bottleneck", "ia3"],
)
@pytest.mark.parametrize("packing", [False, True])
def test_activations_computed_again_give_the_same_bits(
    folder: Path, family: str, values: dict[str, Any], packing: bool
):
    passes: list[int] = []

    def count(model: Any) -> None:
        layer = model.base_model.layers[0]
        layer.mlp.register_forward_pre_hook(lambda *_: passes.append(1))

    losses, slopes = learned(loaded(folder, packing=packing), family, count, **values)
    assert passes == []
    others, same = learned(loaded(folder, packing=packing, gradient_checkpointing=True), family, count, **values)
    assert passes == [1]
    assert others == losses
    assert slopes.keys() == same.keys() and slopes
    assert all(torch.equal(slope, same[name]) for name, slope in slopes.items())


def test_checkpointing_is_of_the_training_alone(folder: Path):
    backbone = loaded(folder, gradient_checkpointing=True)
    hooks = sum(len(m._forward_hooks) for m in backbone.model.modules())
    made, tensors = fresh(backbone, AdapterConfig(), 0)
    with backbone.attached(peft_config(made), tensors):
        backbone.model.train()
        assert _recomputes(backbone.model)
    assert not _recomputes(backbone.model)
    assert sum(len(m._forward_hooks) for m in backbone.model.modules()) == hooks
    assert backbone.rows.segments == ()


def test_a_prefix_is_trained_without_it(folder: Path):
    losses, slopes = learned(loaded(folder), "prefix")
    others, same = learned(loaded(folder, gradient_checkpointing=True), "prefix")
    assert others == losses and all(torch.equal(slope, same[name]) for name, slope in slopes.items())


def test_while_something_fuses_nothing_is_computed_again(folder: Path):
    """A counterpart's states are there in the forward pass alone."""
    passes: list[int] = []
    backbone = loaded(folder, gradient_checkpointing=True)
    backbone.mixup = object()
    learned(
        backbone,
        during=lambda model: model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1)),
    )
    assert passes == []


def test_a_model_that_cannot_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    backbone = loaded(folder, gradient_checkpointing=True)
    monkeypatch.setattr(type(backbone.model), "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match="cannot compute activations again"):
        learned(backbone)


# Compiling

COMPILER = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
needs_compiler = pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler")


@pytest.mark.full
@needs_compiler
@pytest.mark.parametrize(
    ("architecture", "family", "values", "checkpointing"),
    [
        ("llama", "lora", {"dropout": 0.2}, False),
        ("llama", "bottleneck", {}, True),
        ("gemma3_text", "lora", {"dropout": 0.2}, False),
    ],
)
def test_compiled_layers_compute_the_same(
    tmp_path: Path, architecture: str, family: str, values: dict[str, Any], checkpointing: bool
):
    from torch._dynamo.utils import counters

    folder = save_tiny_model(tmp_path / "model", architecture, **(WINDOWS if architecture == "gemma3_text" else {}))
    losses, slopes = learned(loaded(folder), family, **values)
    backbone = loaded(folder, compile=True, gradient_checkpointing=checkpointing)
    before, frames = counters["frames"]["ok"], []
    others, same = learned(backbone, family, lambda model: frames.append(counters["frames"]["ok"]), **values)
    assert frames[0] > before  # Something was compiled, and not given up.
    assert others == pytest.approx(losses, rel=1e-5)
    assert slopes.keys() == same.keys() and slopes
    for name, slope in slopes.items():
        torch.testing.assert_close(same[name], slope, rtol=1e-3, atol=1e-5 * float(slope.abs().max()) + 1e-9)
    assert not any("forward" in vars(module) for module in backbone.model.modules())


@needs_compiler
def test_compiled_layers_are_called_and_taken_off(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """With the compiler replaced by one that counts: which calls go through it."""
    calls: list[int] = []

    def compiled(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        return lambda *args, **given: (calls.append(1), function(*args, **given))[1]

    monkeypatch.setattr(torch, "compile", compiled)
    backbone = loaded(folder, compile=True)
    losses, _ = learned(backbone)
    assert len(calls) == 2
    assert losses == learned(loaded(folder))[0]
    ids = torch.tensor([[5, 6, 7]])
    with backbone.with_adapter(None), torch.no_grad():
        backbone.model.generate(ids, max_new_tokens=3, do_sample=False)
        assert len(calls) == 2  # Calls with a cache go past it.
        backbone.hidden(ids)
        assert len(calls) == 4
    assert not any("forward" in vars(module) for module in backbone.model.modules())
    with torch.no_grad():
        backbone.hidden(ids)
    assert len(calls) == 4


def test_without_a_compiler_it_is_said_before_anything_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speeding.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler") as caught:
        loaded(folder, compile=True)
    assert "apt install g++" in str(caught.value)


def test_a_compiler_that_is_named_must_be_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speeding.shutil, "which", lambda name: "/bin/x" if name == "g++" else None)
    speeding.check_compiler(torch.device("cpu"))
    monkeypatch.setenv("CXX", "none-such")
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        speeding.check_compiler(torch.device("cpu"))


def test_on_a_gpu_it_needs_triton(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speeding.shutil, "which", lambda name: "/bin/x")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs Triton"):
        speeding.check_compiler(CUDA)


# Attention and kernels


def test_attention_is_the_one_that_was_asked_for(folder: Path):
    eager, usual = loaded(folder, attention="eager"), loaded(folder)
    assert environment(eager)["attention"] == "eager"
    assert environment(usual)["attention"] == "sdpa"
    assert learned(eager)[0] == pytest.approx(learned(usual)[0], rel=1e-5)


def test_flash_attention_is_refused_where_it_cannot_be(folder: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="needs a CUDA device, and this is 'cpu'"):
        loaded(folder, attention="flash_attention_2")
    asked = SpeedConfig(attention="flash_attention_2")
    with pytest.raises(UserError, match="computes in 16 bits"):
        speeding.attention(asked, CUDA, torch.float32)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package flash-attn"):
        speeding.attention(asked, CUDA, torch.bfloat16)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert speeding.attention(asked, CUDA, torch.bfloat16) == {"attn_implementation": "flash_attention_2"}


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A package in Liger's place, and what it was called with: the real one needs a GPU."""
    calls: list[dict[str, Any]] = []
    inner = types.SimpleNamespace(
        MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None},
        _apply_liger_kernel_to_instance=lambda **given: calls.append(given),
    )
    package: Any = types.ModuleType("liger_kernel")
    package.__path__, package.__spec__ = [], object()
    within: Any = types.ModuleType("liger_kernel.transformers")
    within.monkey_patch = inner
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", within)
    return calls


def of_type(name: str) -> Any:
    return types.SimpleNamespace(config=types.SimpleNamespace(model_type=name))


@pytest.mark.parametrize("kernels", ["auto", "liger"])
def test_kernels_are_put_in_where_they_can_be(liger: list[dict[str, Any]], kernels: Any):
    model = of_type("llama")
    assert speeding.fuse_kernels(model, SpeedConfig(kernels=kernels), CUDA) == "liger"
    assert liger == [{"model": model, "cross_entropy": False, "fused_linear_cross_entropy": False}]


def test_kernels_are_left_out_where_nobody_asked(liger: list[dict[str, Any]]):
    assert speeding.fuse_kernels(of_type("llama"), SpeedConfig(kernels="none"), CUDA) == "none"
    assert speeding.fuse_kernels(of_type("bloom"), SpeedConfig(), CUDA) == "none"
    assert speeding.fuse_kernels(of_type("llama"), SpeedConfig(), torch.device("cpu")) == "none"
    assert liger == []


def test_kernels_that_cannot_be_had_are_refused(
    folder: Path, liger: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    asked = SpeedConfig(kernels="liger")
    with pytest.raises(UserError, match="need a CUDA device, and this is 'cpu'"):
        loaded(folder, kernels="liger")
    with pytest.raises(UserError, match="no kernels for"):
        speeding.fuse_kernels(of_type("bloom"), asked, CUDA)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="gpu"):
        speeding.fuse_kernels(of_type("llama"), asked, CUDA)
    assert speeding.fuse_kernels(of_type("llama"), SpeedConfig(), CUDA) == "none"
    assert liger == []


def test_the_environment_says_what_was_in_force(folder: Path):
    found = environment(loaded(folder, packing=True))
    assert {k: found[k] for k in ("attention", "kernels", "compile", "packing")} == {
        "attention": "sdpa",
        "kernels": "none",
        "compile": False,
        "packing": True,
    }


# Experiments

TREE = {"name": "a", "backbone": "b", "task": "topics", "targets": ["sw"]}


@pytest.mark.parametrize("name", ["packing", "gradient_checkpointing", "compile"])
def test_an_experiment_with_prefixes_cannot_have_it(name: str):
    tree = TREE | {"speed": {name: True}}
    validated(Experiment, tree)
    with pytest.raises(ConfigError, match=f"speed.{name}: not for the structure 'prefix'"):
        validated(Experiment, tree | {"adapter": {"family": "prefix"}})


def test_texts_of_several_adapters_share_no_row():
    with pytest.raises(ConfigError, match="speed: packing and together"):
        validated(Experiment, TREE | {"speed": {"packing": True, "together": 2}})


def test_speed_is_in_no_key():
    tree = TREE | {
        "backbone": "fake",
        "data_dir": "bundled",
        "development": ["tr"],
        "reference": {"text": "udhr/{language}.txt"},
    }
    changed = SpeedConfig(part_tokens=64, packing=True, gradient_checkpointing=True, compile=True, attention="eager")
    plans = []
    for speed in (SpeedConfig(), changed):
        experiment = validated(Experiment, tree | {"speed": speed.model_dump()})
        plans.append(make_plan(experiment, Located("fake", "fake:1", "gguf", None, experiment.backbone)))
    before, after = ({step.key for step in plan.steps} for plan in plans)
    assert before == after and len(before) > 10
