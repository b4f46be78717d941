"""What one step asks of a machine: laws over all kinds of steps and known models, and worked figures."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingraft.config import Experiment, ResourcesConfig, SpeedConfig, validated
from lingraft.costs import needs_of
from lingraft.costs.arithmetic import peak_memory
from lingraft.costs.needs import LOADING, OVERHEAD, SPARE, size_of
from lingraft.costs.shapes import KNOWN, shape_of
from lingraft.locating import locate
from lingraft.plan import Plan, Step, make_plan

SHAPES = {name: shape_of(config) for name, config in KNOWN.items()}
BACKBONES = sorted(name for name in SHAPES if "nllb" not in name)
LLAMA = SHAPES["NousResearch/Llama-2-7b-hf"]


def planned(model: Path, **changes: Any) -> Plan:
    tree = {
        "name": "needs",
        "backbone": {"model": str(model), "dtype": "bfloat16", "device": "cpu"},
        "task": "topics",
        "targets": ["sw"],
        "development": ["vi"],
        "reference": {"text": "udhr/{language}.txt", "segment_tokens": 64, "max_segments": 10},
        "methods": ["vanilla", "eng-ft", "adamergex", "control-add", "madx", "lfsft"],
        "selection": {"weights": [1.0]},
        "data_dir": "bundled",
    }
    experiment = validated(Experiment, {**tree, **changes})
    return make_plan(experiment, locate(experiment.backbone))


@pytest.fixture(scope="module")
def plan(tiny_folder: Path) -> Plan:
    return planned(tiny_folder)


def on(plan: Plan, device: str, **changes: Any) -> Experiment:
    backbone = plan.experiment.backbone.model_copy(update={"device": device})
    return plan.experiment.model_copy(update={"backbone": backbone, **changes})


def of_kind(plan: Plan, kind: str) -> Step:
    return next(step for step in plan.steps if step.kind == kind and not step.config.get("initial"))


def test_steps_without_a_model_need_no_gpu_and_little_else(plan: Plan) -> None:
    light = [step for step in plan.steps if step.kind not in LOADING]
    assert {step.kind for step in light} == {"score", "select", "merge", "compare"}
    given = on(plan, "cuda", resources=ResourcesConfig(cpus=16, gpus=4, memory="900GB"))
    for step in light:
        needs = needs_of(step, given, LLAMA)
        assert (needs.cpus, needs.gpus, needs.gpu_memory) == (1, 0, 0)
        # Three adapters and one site, whatever the base weighs.
        assert needs.memory is not None and needs.memory < 4e9


@pytest.mark.parametrize(
    "device, here, gpus", [("cpu", True, 0), ("cuda", False, 1), ("auto", True, 1), ("auto", False, 0)]
)
def test_where_a_step_computes(plan: Plan, device: str, here: bool, gpus: int) -> None:
    needs = needs_of(of_kind(plan, "train"), on(plan, device), LLAMA, accelerator=here)
    assert needs.gpus == gpus
    assert needs.memory is not None and needs.memory > 2 * LLAMA.parameters
    assert needs.gpu_memory == 0 if not gpus else needs.gpu_memory > 2 * LLAMA.parameters


def test_more_at_once_never_needs_less(plan: Plan) -> None:
    steps = [step for step in plan.steps if step.kind in LOADING]

    @settings(deadline=None)
    @given(st.sampled_from(range(len(steps))), st.sampled_from(BACKBONES), st.integers(16, 8192), st.integers(1, 8192))
    def check(number: int, name: str, tokens: int, more: int) -> None:
        step, shape = steps[number], SHAPES[name]

        def memory(**speed: Any) -> int:
            return needs_of(step, on(plan, "cpu", speed=SpeedConfig(**speed)), shape).memory or 0

        whole = memory(part_tokens=tokens + more)
        assert memory(part_tokens=tokens) <= whole and whole >= (OVERHEAD + 2 * shape.parameters) * SPARE
        assert memory(part_tokens=tokens + more, gradient_checkpointing=True) <= whole
        if step.kind == "train":
            assert memory(part_tokens=tokens, together=2) > memory(part_tokens=tokens)

    check()


def test_a_training_worked_by_hand(tiny_folder: Path) -> None:
    plan = planned(tiny_folder, methods=["eng-ft"], training={"batch_size": 4, "max_length": 256})
    step = of_kind(plan, "train")
    # Four texts of 256 tokens fit one part of 4,096; of 512 tokens, two go through at a time.
    whole = peak_memory(LLAMA, plan.experiment.adapter, "bfloat16", 4, 256).total
    assert needs_of(step, on(plan, "cpu"), LLAMA).memory == pytest.approx(1.25 * (0.6e9 + whole), rel=1e-3)
    half = peak_memory(LLAMA, plan.experiment.adapter, "bfloat16", 2, 256).total
    small = on(plan, "cpu", speed=SpeedConfig(part_tokens=512))
    assert needs_of(step, small, LLAMA).memory == pytest.approx(1.25 * (0.6e9 + half), rel=1e-3)


def test_what_the_user_says_goes_first(plan: Plan) -> None:
    given = on(plan, "auto", resources=ResourcesConfig(cpus=6, gpus=2, memory="24GB"))
    needs = needs_of(of_kind(plan, "predict"), given, LLAMA)
    assert (needs.cpus, needs.gpus, needs.memory) == (6, 2, 24 * 10**9)
    none = on(plan, "auto", resources=ResourcesConfig(gpus=0))
    assert needs_of(of_kind(plan, "train"), none, LLAMA).gpu_memory == 0
    assert size_of("1.5TB") == 1_500_000_000_000 and size_of("500MB") == 500_000_000


def test_of_a_model_of_unknown_sizes_no_memory_is_said(plan: Plan) -> None:
    for step in plan.steps:
        needs = needs_of(step, on(plan, "cuda"), None)
        assert (needs.memory is None) == (step.kind in LOADING) == (needs.gpu_memory is None)
        named = needs_of(step, on(plan, "cuda", resources=ResourcesConfig(memory="8GB")), None)
        assert named.memory == (8 * 10**9 if step.kind in LOADING else needs.memory)


def test_texts_that_are_written_need_room_for_their_keys_and_values(plan: Plan) -> None:
    step = of_kind(plan, "predict")
    asked = Step(
        "predict", {**step.config, "scoring": "generation", "new_tokens": 64, "stop": [], "limit": None}, step.inputs
    )
    read, written = (needs_of(s, on(plan, "cuda"), LLAMA).gpu_memory for s in (step, asked))
    # At most 4 GiB of them: half a MB a token.
    assert read is not None and written is not None and read + 4e9 < written < read + 12e9
    few = Step("predict", {**asked.config, "limit": 1}, step.inputs)
    assert (needs_of(few, on(plan, "cuda"), LLAMA).gpu_memory or 0) < read + 1e9


def test_a_translation_needs_what_its_own_model_needs(plan: Plan, tmp_path: Path) -> None:
    config = {"model": "facebook/nllb-200-3.3B", "dtype": "bfloat16"}
    needs = needs_of(Step("translate", config), on(plan, "cuda"), None)
    assert needs.gpu_memory is not None and 2 * 3.3e9 < needs.gpu_memory < 4 * 3.3e9
    assert needs_of(Step("translate", {**config, "model": str(tmp_path)}), on(plan, "cuda"), LLAMA).memory is None


def test_every_known_model_fits_what_is_usual(plan: Plan) -> None:
    """A 7B model in bfloat16 trains LoRA on one GPU of 40 GB; an XLM-R does on one of 8 GB."""
    step, given = of_kind(plan, "train"), on(plan, "cuda", speed=SpeedConfig(part_tokens=2048))
    assert (needs_of(step, given, LLAMA).gpu_memory or 0) < 40e9
    assert (needs_of(step, given, SHAPES["FacebookAI/xlm-roberta-base"]).gpu_memory or 0) < 8e9


def test_second_stages_read_two_texts(tiny_folder: Path) -> None:
    fused = planned(
        tiny_folder, methods=["flare"], translation={"model": "facebook/nllb-200-3.3B", "revision": "0" * 40}
    )
    second = next(step for step in fused.steps if "second" in step.config)
    alone = Step("train", {k: v for k, v in second.config.items() if k not in ("counterpart", "second")})
    more, less = (needs_of(step, on(fused, "cpu"), LLAMA).memory or 0 for step in (second, alone))
    assert more > less
