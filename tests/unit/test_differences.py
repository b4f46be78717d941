"""Learning differences in place: it is ordinary training of the whole model with masked gradients, and leaves no trace."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model, set_peft_model_state_dict
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from lingraft import differences
from lingraft.differences import Gathered, Learned, Weight, parts_of, trainable_weights
from lingraft.errors import AdapterError, UserError
from lingraft.modules.sparse import KINDS, SparseConfig, parted
from lingraft.selecting import largest
from tests.conftest import save_tiny_model

KIND = {
    "bert": (AutoModelForMaskedLM, {}),
    "xlm-roberta": (AutoModelForMaskedLM, {}),
    "llama": (AutoModelForCausalLM, {"tie_word_embeddings": False}),
    "tied": (AutoModelForCausalLM, {"tie_word_embeddings": True}),
    "gemma3_text": (AutoModelForCausalLM, {"tie_word_embeddings": True, "head_dim": 8}),
    "t5": (AutoModelForSeq2SeqLM, {}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: save_tiny_model(tmp_path_factory.mktemp(name), "llama" if name == "tied" else name, **changes)
        for name, (_, changes) in KIND.items()
    }


def loaded(folders: Mapping[str, Path], name: str, dtype: torch.dtype = torch.float32) -> Any:
    return KIND[name][0].from_pretrained(folders[name], dtype=dtype).eval().requires_grad_(False)


def batch(seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 200, (2, 7), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def untied(model: Any) -> Any:
    """A copy whose output embedding has a weight of its own, so that ordinary training leaves it alone."""
    made = copy.deepcopy(model)
    output = made.get_output_embeddings()
    frozen = nn.Parameter(output.weight.detach().clone(), requires_grad=False)
    output.weight = frozen
    return made


def parameter_of(model: Any, site: str) -> nn.Parameter:
    module, kind = parted(site)
    return getattr(model.get_submodule(module), kind)


def drawn_support(weights: Mapping[str, Weight], seed: int = 0) -> dict[str, torch.Tensor]:
    """A third of the entries of every other weight, two entries of the others, none of the last but one."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for number, (site, weight) in enumerate(weights.items()):
        size = weight.parameter.numel()
        count = max(1, size // 3) if number % 2 == 0 or "embed" in site or site == "shared" else 2
        found[site] = torch.randperm(size, generator=generator)[:count].sort().values
    found[list(weights)[-2]] = torch.empty(0, dtype=torch.int64)
    return found


def train_by_hand(
    model: Any,
    support: Mapping[str, torch.Tensor] | None,
    sites: list[str],
    *,
    steps: int,
    clip: float,
    parts: int = 1,
    l1: float = 0.0,
) -> dict[str, torch.Tensor]:
    """Ordinary training of whole weights, their gradients times a mask; gives what changed, flat."""
    parameters = {site: parameter_of(model, site).requires_grad_(True) for site in sites}
    start = {site: p.detach().clone() for site, p in parameters.items()}
    masks = {}
    for site, parameter in parameters.items():
        masks[site] = torch.ones_like(parameter) if support is None else torch.zeros_like(parameter)
        if support is not None:
            masks[site].view(-1)[support[site]] = 1
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0)
    for step in range(steps):
        for number in range(parts):
            (model(**batch(step * parts + number)).loss / parts).backward()
        for site, parameter in parameters.items():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad += l1 / 1000 * (parameter.detach() - start[site]).sign()
            parameter.grad *= masks[site]
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), clip)
        optimizer.step()
        optimizer.zero_grad()
    return {site: (p.detach() - start[site]).view(-1) for site, p in parameters.items()}


def train_in_place(model: Any, learned: Learned, *, steps: int, clip: float, parts: int = 1, l1: float = 0.0) -> None:
    parameters = list(learned.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0)
    for step in range(steps):
        for number in range(parts):
            (model(**batch(step * parts + number)).loss / parts).backward()
        learned.penalty(l1, 1000)
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        learned.refresh()
        optimizer.zero_grad()


# Which weights


@pytest.mark.parametrize("name", sorted(KIND))
def test_all_are_the_bodys_weights_and_biases_but_those_of_norms(folders: dict[str, Path], name: str) -> None:
    model = loaded(folders, name)
    weights = trainable_weights(model)
    assert list(weights) == sorted(weights)
    found = {id(weight.parameter) for weight in weights.values()}
    assert len(found) == len(weights)
    output = model.get_output_embeddings()
    inside = {"bert": "bert.", "xlm-roberta": "roberta.", "t5": ""}.get(name, "model.")
    named = list(model.named_parameters(remove_duplicate=False))
    expected = {
        id(p)
        for path, p in named
        if path.startswith(inside) and path != "lm_head.weight" and "norm" not in path.lower()
    }
    assert found == expected
    embedding = next(w for w in weights.values() if w.parameter is model.get_input_embeddings().weight)
    assert embedding.tied == (model.get_input_embeddings().weight is output.weight) == (name != "llama")
    assert all(holder is not output for holder in embedding.holders)
    assert len(embedding.holders) == (3 if name == "t5" else 1)


def test_modules_are_chosen_by_names_and_roles_with_their_biases(folders: dict[str, Path]) -> None:
    model = loaded(folders, "bert")
    some = trainable_weights(model, "attention.query")
    assert list(some) == [f"bert.encoder.layer.{n}.attention.self.query{end}" for n in (0, 1) for end in ("", ".bias")]
    assert list(trainable_weights(model, ["word_embeddings"])) == ["bert.embeddings.word_embeddings"]
    with pytest.raises(UserError, match="no module is called 'up_proj'"):
        trainable_weights(model, "up_proj")


def test_a_parameter_that_is_no_weight_is_not_left_out_in_silence(folders: dict[str, Path]) -> None:
    model = loaded(folders, "llama")
    model.model.layers[0].mlp.gate = nn.Parameter(torch.ones(3))
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.gate"):
        trainable_weights(model)
    assert len(trainable_weights(model, "attention.query")) == 2


def test_quantised_weights_are_refused(folders: dict[str, Path]) -> None:
    model = loaded(folders, "llama")
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(AdapterError, match="quantised"):
        trainable_weights(model)


def test_adapters_on_the_model_are_seen_through(folders: dict[str, Path]) -> None:
    model = loaded(folders, "tied")
    before = trainable_weights(model)
    entries = {"model.embed_tokens": 9, "model.layers.0.mlp.up_proj": 4}
    wrapped = get_peft_model(model, SparseConfig(entries=entries))
    through = trainable_weights(model)
    assert list(through) == list(before)
    assert {site: id(w.parameter) for site, w in through.items()} == {s: id(w.parameter) for s, w in before.items()}
    assert through["model.embed_tokens"].tied
    wrapped.merge_adapter()
    # The merged adapter has given the input embedding a weight of its own.
    assert not trainable_weights(model)["model.embed_tokens"].tied
    wrapped.unmerge_adapter()


# Learning is masked training


@pytest.mark.parametrize("name", sorted(KIND))
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])
def test_it_is_ordinary_training_with_masked_gradients(folders: dict[str, Path], name: str, dense: bool) -> None:
    model = loaded(folders, name)
    reference = untied(model)
    weights = trainable_weights(model)
    if name == "t5":
        reference.encoder.embed_tokens.weight = reference.decoder.embed_tokens.weight = reference.shared.weight
    support = None if dense else drawn_support(weights)
    # A sharp clip and a large penalty, so that both matter.
    options: dict[str, Any] = {"steps": 4, "clip": 0.7, "parts": 2, "l1": 2.0}
    expected = train_by_hand(reference, support, list(weights), **options)
    with Learned(weights, support) as learned:
        train_in_place(model, learned, **options)
        live = {site: w.parameter.detach().clone() for site, w in learned.weights.items()}
    assert set(learned.parameters) == set(weights) - (set() if dense else {list(weights)[-2]})
    for site, values in learned.parameters.items():
        where = slice(None) if support is None else support[site]
        # A key's bias has no effect, so what little gradient it has is noise, which Adam enlarges.
        if site.endswith(("key.bias", "k_proj.bias")):
            continue
        torch.testing.assert_close(values.detach(), expected[site][where], rtol=0, atol=2e-5)
        assert float(values.detach().abs().max()) > 1e-4
        torch.testing.assert_close(live[site], parameter_of(reference, site).detach(), rtol=0, atol=2e-5)


def test_in_bfloat16_the_weights_are_the_rounded_sums_and_small_steps_add_up(folders: dict[str, Path]) -> None:
    model = loaded(folders, "bert", torch.bfloat16)
    weights = trainable_weights(model)
    support = drawn_support(weights)
    start = {site: w.parameter.detach().clone().view(-1) for site, w in weights.items()}
    with Learned(weights, support) as learned:
        train_in_place(model, learned, steps=2, clip=1.0)
        for site, values in learned.parameters.items():
            assert values.dtype == torch.float32
            expected = start[site].clone()
            expected[support[site]] = (start[site][support[site]].float() + values.detach()).bfloat16()
            assert torch.equal(weights[site].parameter.detach().view(-1), expected)
        # Steps of a thousandth of what a weight's last digit counts.
        site = "bert.encoder.layer.0.intermediate.dense"
        values, flat = learned.parameters[site], weights[site].parameter.detach().view(-1)
        values.data.zero_()
        step = start[site][support[site]].float().abs() / 2**17
        for _ in range(2048):
            values.data += step
        learned.refresh()
        moved = flat[support[site]].float().abs() - start[site][support[site]].float().abs()
        assert float((moved != 0).float().mean()) > 0.99


@pytest.mark.parametrize("name", ["bert", "tied", "gemma3_text", "t5"])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])
def test_embeddings_sparse_gradients_are_the_dense_ones(folders: dict[str, Path], name: str, dense: bool) -> None:
    model = loaded(folders, name)
    reference = untied(model)
    if name == "t5":
        reference.encoder.embed_tokens.weight = reference.decoder.embed_tokens.weight = reference.shared.weight
    whole = reference.get_input_embeddings().weight.requires_grad_(True)
    for seed in (1, 2):
        reference(**batch(seed)).loss.backward()
    site, weight = next(
        (s, w) for s, w in trainable_weights(model).items() if w.holders[0] is model.get_input_embeddings()
    )
    support = None if dense else {site: torch.arange(5, weight.parameter.numel(), 3)}
    with Learned({site: weight}, support) as learned:
        for seed in (1, 2):
            seen: list[bool] = []
            handle = weight.parameter.register_post_accumulate_grad_hook(
                lambda p, seen=seen: seen.append(p.grad is None)
            )
            model(**batch(seed)).loss.backward()
            handle.remove()
            assert seen == [True]  # Dropped at once.
        got = learned.parameters[site].grad
        assert got is not None
        expected = whole.grad.view(-1) if support is None else whole.grad.view(-1)[support[site]]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.integers(0, 6), max_size=10),
    width=st.integers(1, 5),
    chosen=st.sets(st.integers(0, 34), min_size=1),
    seed=st.integers(0, 99),
)
def test_rows_of_a_gradient_reach_their_entries(rows: list[int], width: int, chosen: set[int], seed: int) -> None:
    size = 7 * width
    indices = torch.tensor(sorted({c % size for c in chosen}), dtype=torch.int32)
    values = torch.randn(len(rows), width, generator=torch.Generator().manual_seed(seed))
    numbers = torch.tensor([rows], dtype=torch.int64)
    gradient = torch.sparse_coo_tensor(numbers, values, (7, width), check_invariants=True)
    dense = gradient.to_dense().view(-1)
    some, every = torch.ones(len(indices)), torch.ones(size)
    differences._add_rows(some, gradient.coalesce(), indices)
    differences._add_rows(every, gradient.coalesce(), None)
    torch.testing.assert_close(some, 1 + dense[indices.long()])
    torch.testing.assert_close(every, 1 + dense)


def test_chunks_do_not_show(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for chunk in (1 << 22, 7):
        monkeypatch.setattr(differences, "CHUNK", chunk)
        model = loaded(folders, "bert")
        before = {n: t.clone() for n, t in model.state_dict().items()}
        weights = trainable_weights(model)
        with Learned(weights, drawn_support(weights)) as learned:
            train_in_place(model, learned, steps=2, clip=1.0, l1=1.0)
        results.append(torch.cat([v.detach() for v in learned.parameters.values()]))
        assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())
    assert torch.equal(*results)


# Leaving no trace


@pytest.mark.parametrize("name", sorted(KIND))
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_closing_restores_everything_also_after_an_exception(
    folders: dict[str, Path], name: str, dense: bool, dtype: torch.dtype
) -> None:
    model = loaded(folders, name, dtype)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    parameters = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
    output = model.get_output_embeddings().weight
    fixed = output.detach().clone()
    weights = trainable_weights(model)
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        Learned(weights, None if dense else drawn_support(weights)) as learned,
    ):
        train_in_place(model, learned, steps=1, clip=1.0)
        assert model.get_output_embeddings().weight is output
        assert torch.equal(output, fixed)
        embedding = next(w for w in weights.values() if model.get_input_embeddings() in w.holders)
        assert embedding.parameter is not output
        assert all(holder.weight is embedding.parameter for holder in embedding.holders)
        assert not torch.equal(embedding.parameter, fixed)
        with torch.no_grad():
            for values in learned.parameters.values():
                values.fill_(torch.nan)
        learned.refresh()
        model(**batch(0)).loss.backward()
        raise RuntimeError("on purpose")
    after = model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)} == parameters
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(m.sparse for m in model.modules() if isinstance(m, nn.Embedding))
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    learned.close()


def test_the_output_embedding_gives_the_same_logits_throughout(folders: dict[str, Path]) -> None:
    model = loaded(folders, "tied")
    states = torch.randn(4, 32)
    expected = model.get_output_embeddings()(states)
    with Learned(trainable_weights(model)) as learned:
        train_in_place(model, learned, steps=2, clip=1.0)
        assert torch.equal(model.get_output_embeddings()(states), expected)
        assert not torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_a_failure_at_the_start_leaves_the_model_alone(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(folders, "tied")
    parameters = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
    weights = trainable_weights(model)

    def failing(self: Learned, site: str) -> Any:
        if site == list(weights)[-1]:
            raise MemoryError
        return lambda gradient: None

    monkeypatch.setattr(Learned, "_gatherer", failing)
    with pytest.raises(MemoryError):
        Learned(weights)
    assert {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)} == parameters
    assert not any(p.requires_grad for p in model.parameters())


# What was learned, put on a model


@pytest.mark.parametrize("name", ["bert", "tied", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_learned_model_is_the_one_with_the_adapter(folders: dict[str, Path], name: str, dtype: torch.dtype) -> None:
    model = loaded(folders, name, dtype)
    weights = trainable_weights(model)
    ids = batch(9)
    with Learned(weights, drawn_support(weights)) as learned:
        train_in_place(model, learned, steps=2, clip=1.0)
        with torch.no_grad():
            expected = model(**ids).logits
    entries = {site: len(indices) for site, indices in learned.indices.items()}
    wrapped = get_peft_model(model, SparseConfig(entries=entries))
    result = set_peft_model_state_dict(wrapped, learned.tensors())
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "sparse_" in key]
    with torch.no_grad():
        assert torch.equal(wrapped(**ids).logits, expected)
        wrapped.merge_adapter()
        assert torch.equal(wrapped(**ids).logits, expected)
        wrapped.unmerge_adapter()


def test_it_learns_on_top_of_a_merged_adapter_in_the_adapters_own_values(folders: dict[str, Path]) -> None:
    model = loaded(folders, "tied")
    plain = loaded(folders, "tied")
    entries = {"model.embed_tokens": 300, "model.layers.0.mlp.up_proj": 50}
    wrapped = get_peft_model(model, SparseConfig(entries=entries))
    torch.manual_seed(1)
    state = {}
    for site, count in entries.items():
        weight = parameter_of(plain, site)
        start = f"base_model.model.{site}.sparse_"
        state[f"{start}indices"] = torch.randperm(weight.numel())[:count].sort().values
        state[f"{start}values"] = torch.randn(count)
        state[f"{start}shape"] = torch.tensor(weight.shape)
    set_peft_model_state_dict(wrapped, state)
    wrapped.merge_adapter()
    reference = untied(plain)
    for site in entries:
        flat = parameter_of(reference, site).data.view(-1)
        flat[state[f"base_model.model.{site}.sparse_indices"]] += state[f"base_model.model.{site}.sparse_values"]
    weights = trainable_weights(model)
    support = drawn_support(weights, 3)
    expected = train_by_hand(reference, support, list(weights), steps=3, clip=1.0)
    with Learned(weights, support) as learned:
        train_in_place(model, learned, steps=3, clip=1.0)
    for site, values in learned.parameters.items():
        torch.testing.assert_close(values.detach(), expected[site][support[site]], rtol=0, atol=2e-5)
    wrapped.unmerge_adapter()
    restored, untouched = wrapped.unload().state_dict(), plain.state_dict()
    assert all(torch.equal(restored[name], untouched[name]) for name in untouched)


def test_rows_of_one_token_are_summed_in_float32() -> None:
    embedding = nn.Embedding(4, 2).to(torch.bfloat16)
    weights = {"embedding": Weight((embedding,), "weight")}
    for support in (None, {"embedding": [2, 3]}):
        with Learned(weights, support) as learned:
            embedding(torch.ones(2000, dtype=torch.long)).sum().backward()
            found = learned.parameters["embedding"].grad
            assert found is not None and float(found.max()) == 2000  # In bfloat16 the sum stays at 256.
    with Gathered(weights) as gathered:
        embedding(torch.ones(2000, dtype=torch.long)).sum().backward()
        gathered.absorb()
        assert float(gathered.values["embedding"].max()) == 2000


@pytest.mark.parametrize("wrong", [[3, 2], [2, 2], [-1, 2], [0, 64 * 32]])
def test_indices_that_are_not_ascending_within_the_weight_are_refused(
    folders: dict[str, Path], wrong: list[int]
) -> None:
    model = loaded(folders, "bert")
    with pytest.raises(ValueError, match="ascending"):
        Learned(trainable_weights(model), {"bert.encoder.layer.0.intermediate.dense": wrong})
    with pytest.raises(ValueError, match="no such weight"):
        Learned({}, {"x": [1]})
    assert not any(p.requires_grad for p in model.parameters())


# Memory


@pytest.mark.parametrize("name", ["bert", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_entry_takes_twenty_bytes_and_its_start(folders: dict[str, Path], name: str, dtype: torch.dtype) -> None:
    model = loaded(folders, name, dtype)
    weights = trainable_weights(model)
    support = drawn_support(weights)
    count = sum(map(len, support.values()))
    with Learned(weights, support) as learned:
        parameters = list(learned.parameters.values())
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        model(**batch(1)).loss.backward()
        optimizer.step()
        held = [*learned.indices.values(), *parameters, *(p.grad for p in parameters if p.grad is not None)]
        held += [s[m] for s in optimizer.state.values() for m in ("exp_avg", "exp_avg_sq")]
        assert sum(t.untyped_storage().nbytes() for t in held) == 20 * count
        assert not [p for p in model.parameters() if p.grad is not None]
        memory = learned.memory
        assert memory.total - memory.start - memory.copies == 20 * count
        assert (
            memory.start == sum(t.untyped_storage().nbytes() for t in learned._start.values()) == dtype.itemsize * count
        )
        assert memory.copies == model.get_input_embeddings().weight.numel() * dtype.itemsize


def test_where_all_entries_learn_each_takes_sixteen_bytes_and_its_start(folders: dict[str, Path]) -> None:
    model = loaded(folders, "tied", torch.bfloat16)
    weights = trainable_weights(model)
    count = sum(w.parameter.numel() for w in weights.values())
    embedding = model.get_input_embeddings().weight.numel()
    with Learned(weights) as learned:
        # The tied embedding's start is the output embedding; instead there is the copy.
        assert learned.memory.total == (16 + 2) * count
        assert learned.memory.copies == 2 * embedding


# Selecting by gradients


@pytest.mark.parametrize("name", ["bert", "tied", "gemma3_text", "t5"])
def test_gathered_gradients_are_summed_by_magnitude_step_by_step(folders: dict[str, Path], name: str) -> None:
    model = loaded(folders, name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    reference = untied(model)
    if name == "t5":
        reference.encoder.embed_tokens.weight = reference.decoder.embed_tokens.weight = reference.shared.weight
    weights = trainable_weights(model)
    expected = {site: torch.zeros(w.parameter.numel()) for site, w in weights.items()}
    for site in weights:
        parameter_of(reference, site).requires_grad_(True)
    with Gathered(weights) as gathered:
        for step in range(3):
            for part in range(2):
                reference(**batch(2 * step + part)).loss.backward()
                model(**batch(2 * step + part)).loss.backward()
            for site in weights:
                if (gradient := parameter_of(reference, site).grad) is not None:
                    expected[site] += gradient.view(-1).abs()
            reference.zero_grad()
            gathered.absorb()
            assert not [p for p in model.parameters() if p.grad is not None]
    for site, sums in gathered.values.items():
        torch.testing.assert_close(sums, expected[site], rtol=1e-4, atol=1e-6)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())
    assert not any(p.requires_grad for p in model.parameters())


def test_what_moved_most_is_selected_through_ranges() -> None:
    torch.manual_seed(0)
    values = {"b": torch.randn(5, 7).bfloat16(), "a": nn.Parameter(torch.randn(11))}
    parts = parts_of(values)
    assert [(p.name, p.size) for p in parts] == [("b", 35), ("a", 11)]
    whole = torch.cat([t.detach().float().view(-1) for t in values.values()])
    read = np.concatenate([p.read(n, min(n + 4, p.size)) for p in parts for n in range(0, p.size, 4)])
    assert np.array_equal(read, whole.numpy())
    chosen = largest(parts, 6)
    expected = whole.abs().topk(6).indices.sort().values
    assert [*chosen["b"].tolist(), *(chosen["a"] + 35).tolist()] == expected.tolist()


def test_sites_are_named_alike_everywhere() -> None:
    from lingraft.layouts.sparse import tensor_name

    for site in ("a.q", "a.q.bias"):
        module, kind = parted(site)
        assert tensor_name(site, "values") == f"base_model.model.{module}.{KINDS[kind]}values"
