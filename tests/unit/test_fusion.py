"""FLARE: φ and its gradients, alignment, no leakage, and one result however a text is read: trained, scored or written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lingraft import encoding, generation, likelihood, transduction
from lingraft.adapter import Adapter
from lingraft.backbones import Backbone
from lingraft.batching import Counterpart, TokenSequence, answer_sequences
from lingraft.config import FUSION_FUNCTIONS, AdapterConfig, BackboneConfig, FusionConfig, MixupConfig, TrainingConfig
from lingraft.errors import AdapterError
from lingraft.evaluation import Asking, ask, predict
from lingraft.fusion.attaching import fused_modules, fusing, with_adapter
from lingraft.fusion.functions import ELEMENTWISE, Attended, CrossAttention
from lingraft.fusion.sources import align, points
from lingraft.fusion.stages import SecondStage, second_adapter, second_stage
from lingraft.heads import Head
from lingraft.locating import locate
from lingraft.stepping import batch_loss
from lingraft.tasks.items import Example
from lingraft.tasks.pairs import concatenated
from lingraft.training import train
from tests.conftest import save_tiny_model

DECODERS = ("llama", "gemma3_text", "qwen2")
ARCHITECTURES = (*DECODERS, "bert", "xlm-roberta", "modernbert", "t5", "mt5")
FAST = TrainingConfig(learning_rate=5e-3, epochs=6, batch_size=4, warmup=0, max_length=64)
SHORT = TrainingConfig(learning_rate=1e-3, epochs=1, batch_size=4, warmup=0, max_length=64)
FIRST = AdapterConfig(rank=4, dropout=0)
FUSION = FusionConfig(plain="all")
QKV = ("attention.query_key_value",)
TEXTS = ("maji ni mazuri", "jua ni kali sana leo", "mvua", "watu wengi wanapenda muziki", "mto mkubwa", "nyumba")
ENGLISH = ("water is good", "the sun is hot", "rain falls today", "many like music", "a large river", "a house")


def items(labels: tuple[str, ...] = (" yes", " no")) -> list[Example]:
    """Pairs of texts; the source is a text of its own, of another length."""
    found = []
    for n, (target, source) in enumerate(zip(TEXTS, ENGLISH, strict=True)):
        beside = Example(str(n), f"{source}\nAnswer:", labels, n % 2, parts=(source,))
        found.append(Example(str(n), f"{target}\nAnswer:", labels, n % 2, parts=(target,), source=beside.asked))
    return found


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Backbone] = {}

    def get(architecture: str) -> Backbone:
        if architecture not in made:
            folder = save_tiny_model(tmp_path_factory.mktemp(architecture), architecture)
            made[architecture] = Backbone(locate(BackboneConfig(model=str(folder), dtype="float32", device="cpu")))
        return made[architecture]

    return get


@pytest.fixture(scope="module")
def stages(backbones: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """First and second stages, trained once for an architecture and a way to fuse."""
    made: dict[Any, Path] = {}

    def get(architecture: str, fusion: FusionConfig | None = FUSION, kind: str = "fused", free: bool = False) -> Path:
        if architecture == "modernbert" and fusion is not None:  # One layer makes queries, keys and values there.
            fusion = fusion.model_copy(update={"modules": QKV})
        key = (architecture, fusion, kind, free)
        if key not in made:
            backbone = backbones(architecture)
            out = tmp_path_factory.mktemp("stage")
            second = None
            if kind != "first":
                second = SecondStage(
                    Adapter.load(get(architecture, None, "first", free)),
                    kind,
                    fusion,
                    MixupConfig() if kind == "mixup" else None,
                    language="sw",
                )
            adapter = FIRST if second is None else second_adapter(FIRST, fusion or FUSION)
            train(
                backbone,
                sequences(backbone, spoken() if free else items()),
                out,
                adapter=adapter,
                training=SHORT if second is None else FAST,
                head=head(backbone),
                second=second,
            )
            made[key] = out
        return made[key]

    return get


def head(backbone: Backbone) -> Head | None:
    return Head("classification", 2) if backbone.kind == "encoder" else None


def sequences(backbone: Backbone, examples: list[Example]) -> list[Any]:
    if backbone.kind == "decoder":
        return answer_sequences(backbone, examples, 64)
    if backbone.kind == "encoder":
        return encoding.labelled_sequences(backbone, examples, Head("classification", 2), 64).sequences
    return transduction.answer_sequences(backbone, examples, 64, 16).sequences


def spoken() -> list[Example]:
    """The same with answers in free text, of different lengths, which are the source text."""
    return [replace(e, candidates=(), answer=f" {s}") for e, s in zip(items(), ENGLISH, strict=True)]


def without(examples: list[Example]) -> list[Example]:
    return [replace(e, source=None) for e in examples]


# φ


@pytest.mark.parametrize("name", [*ELEMENTWISE, "cross_attention"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(2, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    if name != "cross_attention":
        assert torch.autograd.gradcheck(ELEMENTWISE[name], (s, t))
        return
    module = CrossAttention(4, lambda _, shape: torch.randn(shape, generator=generator)).double()
    there = torch.tensor([[True] * 5, [True, True, True, False, False]])
    for causal in (False, True):
        attended = Attended(there, causal=causal)
        assert torch.autograd.gradcheck(lambda s, t, attended=attended: module(s, t, attended), (s, t))


@pytest.mark.parametrize("function", FUSION_FUNCTIONS)
@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_gradients_of_the_whole_layer_are_those_of_finite_differences(
    tmp_path: Path, stages: Any, architecture: str, function: str
) -> None:
    """A, B and what cross-attention adds, through source and target at once, along random directions, in float64."""
    folder = save_tiny_model(tmp_path, architecture)
    backbone = Backbone(locate(BackboneConfig(model=str(folder), dtype="float32", device="cpu")))
    adapter = Adapter.load(stages(architecture, FUSION.model_copy(update={"function": function})))
    adapter = replace(adapter, sidecar={k: v for k, v in adapter.sidecar.items() if k != "backbone"})
    with with_adapter(backbone, adapter) as wrapped:
        wrapped.double()
        parameters = [p for n, p in wrapped.named_parameters() if "lora_" in n or n.startswith("fusion.")]
        for parameter in parameters:
            parameter.requires_grad_()
        one, two = torch.tensor([[5, 9, 7, 11, 6]]), Counterpart((8, 6, 12, 10), (0, 0, 0, 0))

        def value() -> torch.Tensor:
            with fusing(backbone, [two], [4], written=[1]):
                states = backbone.model.base_model(input_ids=one, attention_mask=torch.ones_like(one)).last_hidden_state
            return states.sin().sum()

        value().backward()
        generator = torch.Generator().manual_seed(0)
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, direction, strict=True) if p.grad is not None)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for parameter, way in zip(parameters, direction, strict=True):
                    parameter += sign * 1e-4 * way
                ends.append(float(value()))
                for parameter, way in zip(parameters, direction, strict=True):
                    parameter -= sign * 1e-4 * way
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-4)


def test_the_functions_by_hand() -> None:
    s, t = torch.tensor([[[1.0, -2.0]]]), torch.tensor([[[-3.0, 4.0]]])
    expected = {"add": [-2, 2], "mul": [-3, -8], "add_relu": [1, 4], "mul_relu": [0, 0]}
    assert {name: mix(s, t)[0, 0].tolist() for name, mix in ELEMENTWISE.items()} == expected
    assert set(expected) | {"cross_attention"} == set(FUSION_FUNCTIONS)


def test_cross_attention_reads_what_it_may() -> None:
    module = CrossAttention(2, lambda name, shape: torch.zeros(shape))
    module.value.weight.data = torch.eye(2)
    t = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [100.0, 0.0]]])
    there = torch.tensor([[True, True, False]])
    mixed = module(torch.zeros(1, 3, 2), t, Attended(there))
    assert mixed[0, :2, 0].tolist() == [2.0, 2.0]  # The mean of what is there: queries and keys are zero.
    causal = module(torch.zeros(1, 3, 2), t, Attended(there, causal=True))
    assert causal[0, :2, 0].tolist() == [1.0, 2.0]


# Alignment


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_alignment_is_by_token_index_whatever_the_padding_side(data: st.DataObject) -> None:
    prompts = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    sources = [data.draw(st.none() | st.integers(1, 9)) for _ in prompts]
    masked = data.draw(st.booleans())
    left = [max(prompts) - p for p in prompts]
    on_right = align(sources, prompts, mask_padding=masked)
    on_left = align(sources, prompts, starts=left, mask_padding=masked)
    assert on_left.index is not None or not any(left)
    for row, (prompt, source) in enumerate(zip(prompts, sources, strict=True)):
        shifted = on_left.where[row, left[row] : left[row] + prompt]
        assert shifted.tolist() == on_right.where[row, :prompt].tolist()
        count = 0 if source is None else min(prompt, source) if masked else prompt
        assert int(on_right.where[row].sum()) == count
        if on_left.index is not None:
            assert on_left.index[row][on_left.where[row]].tolist() == list(range(count))
        assert not on_left.where[row, : left[row]].any()


# Nothing changes where nothing shall


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("function", ["add_relu", "cross_attention"])
def test_without_a_source_it_is_lora_bit_for_bit(backbones: Any, stages: Any, architecture: str, function: str) -> None:
    backbone = backbones(architecture)
    fused = Adapter.load(stages(architecture, FUSION.model_copy(update={"function": function})))
    plain = replace(fused, sidecar={k: v for k, v in fused.sidecar.items() if k != "second"})
    alone = without(items())
    with backbone.merged(Adapter.load(fused.path / "stage1")):
        expected = ask(backbone, plain, alone, Asking(max_length=64))
    found = ask(backbone, fused, alone, Asking(max_length=64))
    assert found == expected
    assert [p.scores for p in ask(backbone, fused, items(), Asking(max_length=64))] != [p.scores for p in expected]


def test_weights_are_given_back_bit_for_bit(backbones: Any, stages: Any) -> None:
    backbone = backbones("llama")
    before = {n: p.clone() for n, p in backbone.model.named_parameters()}
    predict(backbone, Adapter.load(stages("llama")), items())
    after = dict(backbone.model.named_parameters())
    assert list(before) == list(after) and all(torch.equal(before[n], after[n]) for n in before)


def test_a_small_first_stage_is_not_lost_in_bfloat16(tmp_path: Path, backbones: Any, stages: Any) -> None:
    """Rounded into the weights most of a small update would be lost; what it adds must be what it adds on top."""
    folder = save_tiny_model(tmp_path)
    half = Backbone(locate(BackboneConfig(model=str(folder), dtype="bfloat16", device="cpu")))
    first = Adapter.load(stages("llama", None, "first"))
    small = replace(
        first,
        sidecar={k: v for k, v in first.sidecar.items() if k != "backbone"},
        read=lambda module: first.read(module).map(lambda tensor: tensor * 0.05),
    )
    ids = torch.tensor([[5, 9, 7, 11]])
    layer = half.model.get_submodule(next(iter(small.layout)))
    states = torch.randn(1, 4, layer.in_features, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    site = small.site(next(iter(small.layout)))
    a, b = (torch.from_numpy(site.tensors[role]) for role in ("A", "B"))
    with torch.no_grad():
        before, weight = layer(states).float(), layer.weight.clone()
        with half.merged(small):
            added = layer(states).float() - before
            assert torch.equal(layer.weight, weight)
            half.hidden(ids, torch.ones_like(ids))
        assert torch.equal(layer(states).float(), before)
    expected = site.scaling * (states.float() @ a.T @ b.T)
    # What comes out is rounded to bfloat16, too: within its last digit.
    assert torch.allclose(added, expected, atol=float(before.abs().max()) / 128)


def test_merged_is_peft_on_top(backbones: Any, stages: Any) -> None:
    backbone, first = backbones("llama"), Adapter.load(stages("llama", None, "first"))
    attached = predict(backbone, first, without(items()))
    with backbone.merged(first):
        merged = predict(backbone, None, without(items()))
    assert np.allclose([p.scores for p in attached], [p.scores for p in merged], atol=1e-5)


# No leakage


def test_no_label_reaches_a_prompt_through_the_source(backbones: Any, stages: Any) -> None:
    """The counterpart is the prompt alone, and no state of the prompt changes with a label: by value and by gradient."""
    backbone = backbones("llama")
    labelled = items((" yes", " nay"))
    for example in labelled:
        told = example.source
        assert told is not None
        assert (told.candidates, told.answer, told.references, told.span, told.gold) == ((), "", (), None, 0)
    other = [replace(e, gold=1 - e.gold) for e in labelled]
    mine, theirs = (sequences(backbone, made) for made in (labelled, other))
    assert [s.source for s in mine] == [s.source for s in theirs]
    assert all(s.ids != t.ids and s.ids[: s.start] == t.ids[: t.start] for s, t in zip(mine, theirs, strict=True))
    for function in FUSION_FUNCTIONS:
        for decoding in ("lora", "continuation"):
            fusion = FusionConfig(plain="all", function=function, decoding=decoding, mask_padding=True)
            adapter = Adapter.load(stages("llama", fusion))
            with with_adapter(backbone, adapter):
                states = [_states(backbone, [s])[0] for s in (mine[0], theirs[0])]
                start = mine[0].start
                assert torch.equal(states[0][:start], states[1][:start])
                gradient = _embedding_gradient(backbone, mine[0])
                assert float(gradient[start:].abs().max()) == 0, (function, decoding)
                assert float(gradient[:start].abs().max()) > 0


def _states(backbone: Backbone, part: list[TokenSequence]) -> torch.Tensor:
    ids = torch.tensor([s.ids for s in part])
    beside = fusing(
        backbone, [s.source for s in part], [s.start for s in part], written=[len(s.ids) - s.start for s in part]
    )
    with torch.no_grad(), beside:
        return backbone.hidden(ids, torch.ones_like(ids))


def _embedding_gradient(backbone: Backbone, sequence: TokenSequence) -> torch.Tensor:
    """How the prompt's states depend on every token read."""
    embedding = backbone.model.get_input_embeddings()
    held: list[torch.Tensor] = []

    def keep(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor | None:
        if not torch.is_grad_enabled():
            return None  # The source's own pass.
        held.append(out.detach().requires_grad_())
        return held[-1]

    handle = embedding.register_forward_hook(keep)
    ids = torch.tensor([sequence.ids])
    beside = fusing(backbone, [sequence.source], [sequence.start], written=[len(sequence.ids) - sequence.start])
    try:
        with torch.enable_grad(), beside:
            backbone.hidden(ids, torch.ones_like(ids))[0, : sequence.start].square().sum().backward()
    finally:
        handle.remove()
    gradient = held[-1].grad
    assert gradient is not None
    return gradient[0]


# Trained, scored, written: one result


@pytest.mark.parametrize("architecture", DECODERS)
@pytest.mark.parametrize("function", ["add_relu", "mul", "cross_attention"])
@pytest.mark.parametrize("decoding", ["lora", "continuation"])
def test_generation_with_a_cache_is_generation_without(
    backbones: Any, stages: Any, architecture: str, function: str, decoding: str
) -> None:
    backbone = backbones(architecture)
    fusion = FusionConfig(plain="all", function=function, decoding=decoding, mask_padding=decoding != "lora")
    adapter = Adapter.load(stages(architecture, fusion, free=True))
    examples = items()
    rows = [[*backbone.prefix, *backbone.encode(e.prompt)] for e in examples]
    order = sorted(range(len(rows)), key=lambda n: -len(rows[n]))
    rows, examples = [rows[n] for n in order], [examples[n] for n in order]
    beside = [likelihood.counterpart(backbone, e, 64) for e in examples]
    with with_adapter(backbone, adapter), torch.inference_mode():
        cached = generation._continued(backbone, rows, beside, 12, ())
        uncached = generation._continued(backbone, rows, beside, 12, (), cached=False)
        alone = [generation._continued(backbone, [r], [b], 12, ())[0] for r, b in zip(rows, beside, strict=True)]
        unfused = generation._continued(backbone, rows, [None] * len(rows), 12, ())
    assert cached == uncached == alone
    assert cached != unfused


@pytest.mark.parametrize("function", FUSION_FUNCTIONS)
@pytest.mark.parametrize("decoding", ["lora", "continuation"])
def test_what_is_written_is_what_scoring_finds_likeliest(
    backbones: Any, stages: Any, function: str, decoding: str
) -> None:
    """The states at every position, prompt and answer, are the same when a text is scored as when it was written."""
    backbone = backbones("llama")
    fusion = FusionConfig(plain="all", function=function, decoding=decoding, mask_padding=True)
    adapter = Adapter.load(stages("llama", fusion, free=True))
    example = items()[1]
    prompt = [*backbone.prefix, *backbone.encode(example.prompt)]
    beside = likelihood.counterpart(backbone, example, 64)
    assert beside is not None
    with with_adapter(backbone, adapter), torch.inference_mode(), backbone.greedy(8) as configuration:
        ids = torch.tensor([prompt])
        with fusing(backbone, [beside], [len(prompt)], written=[8], cached=True):
            out = backbone.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=configuration
            )
        whole = tuple(out[0].tolist())
        states = _states(backbone, [TokenSequence(whole, len(prompt), source=beside)])
        logits = states[0] @ backbone.model.get_output_embeddings().weight.T
    assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == list(whole[len(prompt) :])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("function", ["add_relu", "cross_attention"])
def test_a_batch_is_its_items(backbones: Any, stages: Any, architecture: str, function: str) -> None:
    backbone = backbones(architecture)
    adapter = Adapter.load(stages(architecture, FUSION.model_copy(update={"function": function})))
    together = ask(backbone, adapter, items(), Asking(max_length=64))
    one_by_one = [ask(backbone, adapter, [e], Asking(max_length=64))[0] for e in items()]
    assert np.allclose([p.scores for p in together], [p.scores for p in one_by_one], atol=2e-5)


@pytest.mark.parametrize("architecture", ["llama", "bert", "t5"])
def test_attention_back_ends_agree(backbones: Any, stages: Any, architecture: str) -> None:
    backbone, adapter = backbones(architecture), Adapter.load(stages(architecture))
    scores = {}
    for implementation in ("eager", "sdpa"):
        backbone.model.set_attn_implementation(implementation)
        for headed in backbone._headed.values():
            headed.model.set_attn_implementation(implementation)
        scores[implementation] = [p.scores for p in ask(backbone, adapter, items(), Asking(max_length=64))]
    assert np.allclose(scores["eager"], scores["sdpa"], atol=2e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("normalised", [True, False])
def test_source_states_are_the_models_own(backbones: Any, architecture: str, offset: int, normalised: bool) -> None:
    backbone = backbones(architecture)
    modules = fused_modules(backbone, FusionConfig(modules=QKV) if architecture == "modernbert" else FusionConfig())
    assert modules and all("cross" not in m.lower() and "EncDec" not in m for m in modules)
    places = points(backbone, modules, offset=offset, normalised=normalised)
    prenorm = architecture not in ("bert", "xlm-roberta")
    has_norm = {m: p.norm is not None for m, p in places.items()}
    if offset == 1 and normalised and architecture != "modernbert":
        assert all(has_norm.values()) == prenorm
    if offset == 0:
        assert not any(has_norm.values())


# Training, files


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("function", FUSION_FUNCTIONS)
def test_it_learns_on_every_architecture(backbones: Any, stages: Any, architecture: str, function: str) -> None:
    folder = stages(architecture, FUSION.model_copy(update={"function": function}))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert sum(losses[-3:]) < sum(losses[:3])
    second = Adapter.load(folder).sidecar["second"]
    assert second["fusion"]["function"] == function
    assert (folder / "fusion.safetensors").exists() == (function == "cross_attention")
    assert (folder / "stage1" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_plain_peft_opens_it_as_the_lora_it_is(backbones: Any, stages: Any, architecture: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    backbone, folder = backbones(architecture), stages(architecture)
    loader = AutoModelForCausalLM if backbone.kind == "decoder" else AutoModelForSequenceClassification
    model = loader.from_pretrained(backbone.folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(folder / "stage1")).merge_and_unload()
    model = PeftModel.from_pretrained(model, str(folder)).eval()
    example = without(items())[0]
    ours = ask(backbone, Adapter.load(folder), [example], Asking(scoring="sequence", max_length=64))[0]
    if backbone.kind == "encoder":
        ids = backbone.tokenizer(example.parts[0], return_tensors="pt")
        scores = model(**ids).logits[0].log_softmax(-1)
        assert np.allclose(scores.tolist(), ours.scores, atol=1e-4)
        return
    found = []
    for candidate in example.candidates:
        whole = [*backbone.prefix, *backbone.encode(example.prompt + candidate)]
        logits = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        start = len(backbone.prefix) + len(backbone.encode(example.prompt)) + 1  # the blank both begin with
        found.append(sum(float(logits[n - 1, whole[n]]) for n in range(start, len(whole))))
    assert np.allclose(found, ours.scores, atol=1e-4)


@pytest.mark.parametrize("architecture", ["bert", "xlm-roberta", "t5", "mt5"])
def test_x_mixup_learns_and_reads_the_counterpart(backbones: Any, stages: Any, architecture: str) -> None:
    backbone = backbones(architecture)
    folder = stages(architecture, None, "mixup")
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-3:]) < sum(losses[:3])
    adapter = Adapter.load(folder)
    asking = Asking(max_length=64)
    found, alone = (ask(backbone, adapter, made, asking) for made in (items(), without(items())))
    assert [p.scores for p in found] != [p.scores for p in alone]
    one_by_one = [ask(backbone, adapter, [e], asking)[0] for e in items()]
    assert np.allclose([p.scores for p in found], [p.scores for p in one_by_one], atol=2e-5)
    if backbone.kind == "encoder-decoder":
        assert all(
            isinstance(g.text, str) for g in ask(backbone, adapter, items(), replace(asking, scoring="generation"))
        )


def test_another_first_stage_is_refused(stages: Any, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(stages("llama"), folder)
    # By its weights, or by what they are multiplied with.
    config = folder / "stage1" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 16', '"lora_alpha": 64'))
    with pytest.raises(AdapterError, match="another one than this adapter was trained on"):
        second_stage(Adapter.load(folder))
    shutil.copyfile(stages("llama") / "stage1" / "adapter_config.json", config)
    shutil.copyfile(stages("llama") / "adapter_model.safetensors", folder / "stage1" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="another one than this adapter was trained on"):
        second_stage(Adapter.load(folder))
    shutil.rmtree(folder / "stage1")
    with pytest.raises(AdapterError, match="missing"):
        second_stage(Adapter.load(folder))


def test_training_that_was_stopped_goes_on_to_the_same_bytes(backbones: Any, stages: Any, tmp_path: Path) -> None:
    backbone = backbones("llama")
    fusion = FUSION.model_copy(update={"function": "cross_attention"})
    whole = stages("llama", fusion)

    class Stopped(Exception):
        pass

    def stop(done: int, total: int, loss: float) -> None:
        if done == 5:
            raise Stopped

    second = SecondStage(Adapter.load(whole / "stage1"), "fused", fusion, language="sw")
    options: dict[str, Any] = {"adapter": second_adapter(FIRST, fusion), "training": FAST, "second": second}
    with pytest.raises(Stopped):
        train(backbone, sequences(backbone, items()), tmp_path, progress=stop, checkpoint_seconds=0, **options)
    train(backbone, sequences(backbone, items()), tmp_path, **options)
    for name in ("adapter_model.safetensors", "fusion.safetensors"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_a_part_of_a_batch_without_counterpart_is_lora(backbones: Any, stages: Any) -> None:
    backbone, adapter = backbones("llama"), Adapter.load(stages("llama"))
    mixed = [e if n % 2 else replace(e, source=None) for n, e in enumerate(items())]
    found = predict(backbone, adapter, mixed)
    fused, alone = predict(backbone, adapter, items()), predict(backbone, adapter, without(items()))
    expected = [fused[n] if n % 2 else alone[n] for n in range(len(mixed))]
    assert np.allclose([p.scores for p in found], [p.scores for p in expected], atol=2e-5)


def test_losses_add_up_over_parts(backbones: Any, stages: Any) -> None:
    """Batches are read in parts of near-equal length: what is mixed does not depend on how they are divided."""
    backbone, adapter = backbones("llama"), Adapter.load(stages("llama"))
    made = sequences(backbone, items())
    with with_adapter(backbone, adapter), torch.no_grad():
        whole = batch_loss(backbone, made)
        terms = [len(s.ids) - s.start for s in made]
        parts = [batch_loss(backbone, [s]) * n for s, n in zip(made, terms, strict=True)]
    assert whole == pytest.approx(sum(parts) / sum(terms), abs=1e-5)


# Both texts in one input


def questions() -> list[Example]:
    """Questions whose contexts are longer than the room, in both languages."""
    context = " ".join(f"w{n}" for n in range(60))
    prompt = f"Context: {context}\nQuestion: why?\nAnswer:"
    span = (9, 9 + len(context))
    source = Example(
        "0", prompt, answer=" w3", references=("w3",), cuttable=span, parts=("why?", context), span=(9, 11)
    )
    return [replace(source, source=source.asked)]


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_of_two_contexts_in_one_prompt_the_longer_loses_its_end(backbones: Any, architecture: str) -> None:
    backbone, (example,) = backbones(architecture), [concatenated(e) for e in questions()]
    whole = len(backbone.encode(example.prompt))
    if backbone.kind == "decoder":
        ids = answer_sequences(backbone, [example], whole // 2)[0].ids
    else:
        ids = transduction.read(backbone, example, whole // 2)[0]
    text = backbone.decode(ids)
    assert len(ids) == whole // 2
    assert text.count("why?") == 2 and text.count("Answer:") == 2
    first, second = (part.split("Question")[0] for part in text.split("Context: ")[1:])
    assert abs(len(first) - len(second)) <= 2 and "w59" not in text


def test_windows_beside_a_long_counterpart_keep_the_question(backbones: Any) -> None:
    backbone, (example,) = backbones("bert"), [concatenated(e) for e in questions()]
    rows = encoding.labelled_sequences(backbone, [example], Head("span"), 64).sequences[0].rows
    texts = [backbone.decode(row.ids) for row in rows]
    assert all("why?" in text.replace(" ", "") for text in texts)
    assert all(row.truncated for row in rows)


def test_a_translation_encoder_reads_what_a_row_reads(backbones: Any) -> None:
    backbone = backbones("bert")
    example = replace(questions()[0], source=None)
    example = replace(example, source=example.asked)
    rows = encoding._item(backbone, example, Head("span"), 64, True)
    assert len(rows) > 2
    for row in rows:
        assert row.source is not None
        inside = example.parts[1][row.offsets[0][0] : row.offsets[-1][1]]
        assert row.source.text == f"why?\n{inside}"
    choice = Example("0", "", (" a", " b"), 0, parts=("why",), options=("rain", "sun"))
    choice = replace(choice, source=choice.asked)
    read = encoding._item(backbone, choice, Head("multiple_choice"), 64, False)
    assert [row.source.text for row in read if row.source] == ["why\nrain", "why\nsun"]


def test_another_translation_encoder_is_refused(backbones: Any, stages: Any, tmp_path: Path) -> None:
    backbone, encoder, out = backbones("bert"), tmp_path / "encoder", tmp_path / "out"
    save_tiny_model(encoder, "bert")
    out.mkdir()
    fusion = FusionConfig(encoder=str(encoder))
    second = SecondStage(Adapter.load(stages("bert", None, "first")), "fused-mt", fusion, language="sw")
    itself = [replace(e, source=e.asked) for e in without(items())]
    train(
        backbone,
        sequences(backbone, itself),
        out,
        adapter=second_adapter(FIRST, fusion),
        training=SHORT,
        head=head(backbone),
        second=second,
    )
    adapter = Adapter.load(out)
    found, alone = (ask(backbone, adapter, made, Asking(max_length=64)) for made in (itself, without(itself)))
    assert [p.scores for p in found] != [p.scores for p in alone]
    save_tiny_model(encoder, "bert", initializer_range=0.3)
    with pytest.raises(AdapterError, match="translation encoder is another one"):
        ask(backbone, adapter, itself, Asking(max_length=64))
