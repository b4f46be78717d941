"""Generation and the likelihood of free answers: the plain definitions, whatever the batches; contexts are cut, questions never."""

import pytest
import torch
from transformers import GenerationConfig

from lingraft.backbones import Backbone
from lingraft.batching import answer_sequences
from lingraft.errors import DataError, UserError
from lingraft.evaluation import Asking, ask
from lingraft.generation import ended
from lingraft.metrics import Generated
from lingraft.tasks.items import Example

ITEMS = [
    Example(str(i), f"{'word ' * i}Question: {i}?\nAnswer:", answer=f" {i * 7} apples", references=(f"{i * 7} apples",))
    for i in range(7)
]


def plain_continuation(backbone: Backbone, prompt: str, tokens: int) -> str:
    """Greedy decoding by its definition: one full forward pass a token."""
    ids = [*backbone.prefix, *backbone.encode(prompt)]
    start = len(ids)
    ends = {backbone.tokenizer.eos_token_id}
    while len(ids) - start < tokens:
        with torch.no_grad():
            token = int(backbone.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return backbone.tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_what_is_written_is_the_likeliest_token_each_time(tiny: Backbone) -> None:
    found = ask(tiny, None, ITEMS, Asking(scoring="generation", new_tokens=9, stop=()))
    for said, example in zip(found, ITEMS, strict=True):
        assert isinstance(said, Generated)
        assert said.text == plain_continuation(tiny, example.prompt, 9).lstrip()


def test_the_batch_size_does_not_change_what_is_written(tiny: Backbone) -> None:
    one = ask(tiny, None, ITEMS, Asking(scoring="generation", new_tokens=6, batch_tokens=1))
    many = ask(tiny, None, ITEMS, Asking(scoring="generation", new_tokens=6, batch_tokens=10_000))
    assert [x.text for x in one] == [x.text for x in many]


def test_a_text_ends_at_a_stop_string_and_the_others_of_its_batch_go_on(tiny: Backbone) -> None:
    free = ask(tiny, None, ITEMS, Asking(scoring="generation", new_tokens=12, stop=()))
    letter = next(c for c in free[3].text[1:] if c.strip())
    stopped = ask(tiny, None, ITEMS, Asking(scoring="generation", new_tokens=12, stop=(letter,)))
    assert [x.text for x in stopped] == [ended(x.text, (letter,)) for x in free]
    assert letter not in stopped[3].text


def test_free_answers_have_the_mean_likelihood_of_their_tokens(tiny: Backbone) -> None:
    for said, example in zip(ask(tiny, None, ITEMS, Asking(scoring="gold")), ITEMS, strict=True):
        first, whole = tiny.encode(example.prompt), tiny.encode(example.prompt + example.answer)
        ids = torch.tensor([[*tiny.prefix, *whole]])
        with torch.no_grad():
            table = torch.log_softmax(tiny.model(input_ids=ids).logits[0].float(), dim=-1)
        places = range(len(tiny.prefix) + len(first), ids.shape[1])
        expected = sum(float(table[i - 1, ids[0, i]]) for i in places) / len(places)
        assert isinstance(said, Generated) and said.text is None
        assert said.gold_log_likelihood == pytest.approx(expected, abs=1e-4)


def long(question: str = "Who?") -> Example:
    context = "x" * 300
    prompt = f"Context: {context} Question: {question}\nAnswer:"
    return Example("long", prompt, answer=" x", references=("x",), cuttable=(9, 9 + len(context)))


def test_a_long_prompt_loses_the_end_of_its_context_and_nothing_else(tiny: Backbone) -> None:
    (sequence,) = answer_sequences(tiny, [long()], 64)
    text = tiny.tokenizer.decode([t for t in sequence.ids if t > 2])
    assert sequence.truncated and len(sequence.ids) == 64
    assert text.startswith("Context: xxx") and text.endswith("x Question: Who?\nAnswer: x")
    assert tiny.tokenizer.decode(sequence.ids[sequence.start :]).startswith(" x")


def test_cut_prompts_are_counted_one_by_one(tiny: Backbone) -> None:
    found = ask(tiny, None, [*ITEMS[:2], long()], Asking(scoring="generation", new_tokens=4, max_length=80))
    assert [x.truncated for x in found] == [False, False, True]
    candidates = Example("c", long().prompt, (" a", " b"), 0, cuttable=long().cuttable)
    scored = ask(tiny, None, [candidates], Asking(max_length=80))
    assert scored[0].truncated
    assert not ask(tiny, None, [candidates], Asking(max_length=500))[0].truncated


def test_a_question_that_is_too_long_by_itself_is_said(tiny: Backbone) -> None:
    with pytest.raises(DataError, match="item long is too long for the model even without its context"):
        answer_sequences(tiny, [long("Who? " * 30)], 64)
    with pytest.raises(DataError, match="too long"):
        ask(tiny, None, [long("Who? " * 30)], Asking(scoring="generation", new_tokens=8, max_length=64))


def test_a_candidate_s_score_may_be_the_mean_of_its_tokens(tiny: Backbone) -> None:
    example = Example("n", "Pick:", (" apple pie", " banana"), 0)
    (total,) = ask(tiny, None, [example], Asking(scoring="sequence"))
    (mean,) = ask(tiny, None, [example], Asking(scoring="sequence", normalised=True))
    shared = len(tiny.encode("Pick: "))
    lengths = [len(tiny.encode("Pick:" + c)) - shared for c in example.candidates]
    assert mean.scores == pytest.approx([s / n for s, n in zip(total.scores, lengths, strict=True)], abs=1e-5)


def test_what_is_written_comes_on_top_of_the_prompt_s_room(tiny: Backbone) -> None:
    """A prompt is not cut to make room for a long answer, unless the model has no positions for both."""
    (said,) = ask(tiny, None, [ITEMS[3]], Asking(scoring="generation", new_tokens=64, max_length=64, stop=()))
    assert said.text == plain_continuation(tiny, ITEMS[3].prompt, 64).lstrip() and not said.truncated
    with pytest.raises(UserError, match="no room is left for a prompt"):
        ask(tiny, None, [ITEMS[3]], Asking(scoring="generation", new_tokens=512, max_length=64))


def test_the_model_s_own_defaults_for_sampling_and_penalties_change_nothing(tiny: Backbone) -> None:
    plain = ask(tiny, None, ITEMS, Asking(scoring="generation", new_tokens=8, stop=()))
    own = tiny.model.generation_config
    tiny.model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=1e-4, eos_token_id=2, pad_token_id=0
    )
    try:
        changed = ask(tiny, None, ITEMS, Asking(scoring="generation", new_tokens=8, stop=()))
        assert tiny.model.generation_config.repetition_penalty == 1e-4  # put back
    finally:
        tiny.model.generation_config = own
    assert [x.text for x in changed] == [x.text for x in plain]


def test_a_candidate_that_begins_another_does_not_win_by_being_shorter(tiny: Backbone) -> None:
    example = Example("b", "Pick:", (" a", " ab c"), 0)
    (found,) = ask(tiny, None, [example], Asking(scoring="sequence"))
    assert found.scores[0] < 0  # the end of text has to be likely, too
