"""Modules chosen by name, by the end of their path, or by what they do in any architecture."""

import pytest

from lingraft.errors import UserError
from lingraft.roles import ROLES, plays, select

LLAMA = tuple(
    f"model.layers.{layer}.{name}"
    for layer in (0, 1)
    for name in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
)
BERT = (
    "bert.encoder.layer.0.attention.self.query",
    "bert.encoder.layer.0.attention.self.key",
    "bert.encoder.layer.0.attention.self.value",
    "bert.encoder.layer.0.attention.output.dense",
    "bert.encoder.layer.0.intermediate.dense",
    "bert.encoder.layer.0.output.dense",
)
T5 = (
    "decoder.block.0.layer.0.SelfAttention.q",
    "decoder.block.0.layer.1.EncDecAttention.q",
    "decoder.block.0.layer.1.EncDecAttention.o",
    "decoder.block.0.layer.2.DenseReluDense.wi_0",
    "decoder.block.0.layer.2.DenseReluDense.wi_1",
    "decoder.block.0.layer.2.DenseReluDense.wo",
)
LEAVES = {
    "q_proj": "attention.query",
    "k_proj": "attention.key",
    "v_proj": "attention.value",
    "o_proj": "attention.output",
    "gate_proj": "feed_forward.gate",
    "up_proj": "feed_forward.input",
    "down_proj": "feed_forward.output",
}
EXPECTED = {module: LEAVES[module.rsplit(".", 1)[1]] for module in LLAMA}
EXPECTED |= dict(
    zip(
        BERT,
        (
            "attention.query",
            "attention.key",
            "attention.value",
            "attention.output",
            "feed_forward.input",
            "feed_forward.output",
        ),
        strict=True,
    )
)
EXPECTED |= dict(
    zip(
        T5,
        (
            "attention.query",
            "attention.query",
            "attention.output",
            "feed_forward.gate",
            "feed_forward.input",
            "feed_forward.output",
        ),
        strict=True,
    )
)
OTHERS = {
    "distilbert.transformer.layer.0.attention.q_lin": "attention.query",
    "distilbert.transformer.layer.0.attention.k_lin": "attention.key",
    "distilbert.transformer.layer.0.attention.v_lin": "attention.value",
    "distilbert.transformer.layer.0.attention.out_lin": "attention.output",
    "distilbert.transformer.layer.0.ffn.lin1": "feed_forward.input",
    "distilbert.transformer.layer.0.ffn.lin2": "feed_forward.output",
    "deberta.encoder.layer.0.attention.self.query_proj": "attention.query",
    "deberta.encoder.layer.0.attention.self.key_proj": "attention.key",
    "deberta.encoder.layer.0.attention.self.value_proj": "attention.value",
    "gpt_neox.layers.0.attention.query_key_value": "attention.query_key_value",
    "gpt_neox.layers.0.attention.dense": "attention.output",
    "gpt_neox.layers.0.mlp.dense_h_to_4h": "feed_forward.input",
    "gpt_neox.layers.0.mlp.dense_4h_to_h": "feed_forward.output",
    "transformer.h.0.self_attention.query_key_value": "attention.query_key_value",
    "transformer.h.0.self_attention.dense": "attention.output",
    "model.layers.0.self_attn.qkv_proj": "attention.query_key_value",
    "model.layers.0.mlp.gate_up_proj": "feed_forward.input",
    "model.layers.0.attn.Wqkv": "attention.query_key_value",
    "model.layers.0.attn.Wo": "attention.output",
    "model.layers.0.mlp.Wi": "feed_forward.input",
    "model.layers.0.mlp.Wo": "feed_forward.output",
}
EXPECTED |= OTHERS
PARTS = [role for role in ROLES if "." in role]


@pytest.mark.parametrize("module", EXPECTED)
def test_every_linear_layer_plays_its_one_role_and_the_group_of_it(module: str) -> None:
    role = EXPECTED[module]
    assert [r for r in PARTS if plays(module, r)] == [role]
    assert {group for group in ("attention", "feed_forward") if plays(module, group)} == {role.split(".")[0]}


@pytest.mark.parametrize(
    "module",
    [
        "lm_head",
        "model.embed_tokens",
        "score",
        "my_self_attn.q_proj",
        "xq_proj",
        "bert.pooler.dense",
        "classifier.dense",
        "lm_head.dense",
        "",
    ],
)
def test_other_modules_play_no_role(module: str) -> None:
    assert not any(plays(module, role) for role in ROLES)


def test_each_path_end_belongs_to_one_role() -> None:
    ends = [end for role in PARTS for end in ROLES[role]]
    assert len(ends) == len(set(ends))


@pytest.mark.parametrize("modules", [LLAMA, BERT, T5, ()])
@pytest.mark.parametrize("chosen", ["all", ["all"], " all "])
def test_all_selects_every_module(modules: tuple[str, ...], chosen: str | list[str]) -> None:
    assert select(modules, chosen) == modules


@pytest.mark.parametrize(
    ("modules", "chosen", "names"),
    [
        (LLAMA, "q_proj", ("q_proj",)),
        (LLAMA, "q_proj,v_proj", ("q_proj", "v_proj")),
        (LLAMA, " v_proj , q_proj ", ("q_proj", "v_proj")),
        (LLAMA, ["v_proj", "q_proj"], ("q_proj", "v_proj")),
        (LLAMA, ("attention.query", "attention.value"), ("q_proj", "v_proj")),
        (LLAMA, "attention.query,q_proj", ("q_proj",)),
        (LLAMA, "attention", ("q_proj", "k_proj", "v_proj", "o_proj")),
        (LLAMA, "feed_forward", ("gate_proj", "up_proj", "down_proj")),
        (LLAMA, "1.self_attn.q_proj", ("1.self_attn.q_proj",)),
        (LLAMA, "model.layers.0.mlp.up_proj", ("layers.0.mlp.up_proj",)),
        (BERT, "attention.output", ("attention.output.dense",)),
        (BERT, "feed_forward.output", ("0.output.dense",)),
        (T5, "attention.query", ("SelfAttention.q", "EncDecAttention.q")),
    ],
)
def test_a_choice_selects_these_in_the_order_of_the_model(
    modules: tuple[str, ...], chosen: str | list[str], names: tuple[str, ...]
) -> None:
    found = select(modules, chosen)
    assert found == tuple(m for m in modules if m.endswith(names))
    assert found


@pytest.mark.parametrize(
    ("chosen", "named"),
    [
        ("q_prj", "q_proj"),
        ("attention.qery", "attention.query"),
        ("q_proj,nothing_like_it", "nothing_like_it"),
        ("proj", "proj"),
        ("", "''"),
        ("q_proj,", "''"),
        ("all,q_proj", "'all'"),
    ],
)
def test_a_choice_that_matches_nothing_is_an_error_that_lists_what_there_is(chosen: str, named: str) -> None:
    with pytest.raises(UserError) as caught:
        select(LLAMA, chosen)
    assert named in str(caught.value)
    for known in (*LEAVES, *LEAVES.values()):
        assert known in str(caught.value.remedy)


def test_a_role_that_the_architecture_lacks_is_an_error() -> None:
    with pytest.raises(UserError, match=r"feed_forward\.gate"):
        select(BERT, "feed_forward.gate")
