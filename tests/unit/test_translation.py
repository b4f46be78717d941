"""Translation models: tiny random ones of every kind, compared with transformers' own use of them."""

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingraft.errors import BackboneError, MissingExtra, UserError
from lingraft.translation import Translator, located_translator, pieces, translation_digest
from tests.conftest import byte_tokenizer, save_tiny_model

SIZES = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "init_std": 1.0,
}
TEXTS = ["how are you", "a", "the boat left at seven", "yes, we can.", "b2b", "no", "who sings", "a cup of tea"]


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def random_model(kind: str, words: int, **changes: Any) -> Any:
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(kind, vocab_size=words, **{**SIZES, **changes})
    torch.manual_seed(0)
    return transformers.AutoModelForSeq2SeqLM.from_config(config)


@pytest.fixture(scope="module")
def nllb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three languages, and an end of text that some texts reach."""
    from transformers import NllbTokenizer

    folder = tmp_path_factory.mktemp("nllb")
    signs = ["<s>", "<pad>", "</s>", "<unk>", "▁", *string.ascii_letters, *string.digits, *".,!?\"'"]
    vocabulary = {sign: number for number, sign in enumerate(signs)}
    tokenizer = NllbTokenizer(
        vocab=vocabulary, merges=[], additional_special_tokens=["eng_Latn", "swh_Latn", "zho_Hans"]
    )
    tokenizer.save_pretrained(folder)
    model = random_model("m2m_100", len(tokenizer), pad_token_id=1, bos_token_id=0, eos_token_id=2)
    model.model.shared.weight.data[2] *= 1.5
    # Values that a checkpoint may bring, and that are not asked for.
    model.generation_config.update(num_beams=5, repetition_penalty=1.7, max_length=20)
    return save(model, folder)


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one pair, with a tokenizer of bytes."""
    return save_marian(tmp_path_factory.mktemp("marian"))


def save_marian(folder: Path, signs: tuple[str, ...] = ()) -> Path:
    tokenizer, words = byte_tokenizer("t5")
    tokenizer.add_tokens(list(signs))
    tokenizer.save_pretrained(folder)
    words += len(signs)
    special = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "forced_eos_token_id": None}
    model = random_model("marian", words, decoder_vocab_size=words, **special)
    model.final_logits_bias[0, 2] = 10
    return save(model, folder)


def made(folder: Path, source: str = "en", target: str = "sw", **options: Any) -> Translator:
    return Translator(str(folder), source, target, **{"device": "cpu", **options})


def by_transformers(folder: Path, text: str, target: str | None, beams: int, bound: int) -> tuple[str, bool]:
    """One text's translation by the library's own means, and whether it came to its end."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder)
    options: dict[str, Any] = {
        "num_beams": beams,
        "max_new_tokens": bound,
        "max_length": None,
        "repetition_penalty": 1.0,
    }
    if target:
        tokenizer.src_lang = "eng_Latn"
        options["forced_bos_token_id"] = tokenizer.convert_tokens_to_ids(target)
    else:
        options["bad_words_ids"] = [[tokenizer.pad_token_id]]
    ids = model.generate(**tokenizer(text, return_tensors="pt"), do_sample=False, **options)[0]
    return tokenizer.decode(ids, skip_special_tokens=True).strip(), tokenizer.eos_token_id in ids[1:].tolist()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["nllb", "marian"])
def test_texts_are_translated_as_transformers_does_one_by_one(kind: str, beams: int, request: pytest.FixtureRequest):
    folder = request.getfixturevalue(kind)
    translator = made(folder, beams=beams, batch_tokens=40 * beams)
    found = translator.translate(TEXTS)
    bounds = [min(62, 3 * len(translator.tokenizer(text)["input_ids"]) + 20) for text in TEXTS]
    target = "swh_Latn" if kind == "nllb" else None
    expected = [by_transformers(folder, text, target, beams, bound) for text, bound in zip(TEXTS, bounds, strict=True)]
    ended = [known for known, end in expected if end]
    assert [text for text, (_, end) in zip(found, expected, strict=True) if end] == ended
    if beams == 1:
        assert found == [text for text, _ in expected]
        assert 0 < len(ended) < len(TEXTS)
        assert translator.cut == len(TEXTS) - len(ended)


@pytest.mark.parametrize("kind", ["nllb", "marian"])
def test_neither_the_batch_nor_a_second_time_changes_a_translation(kind: str, request: pytest.FixtureRequest):
    folder = request.getfixturevalue(kind)
    whole = made(folder).translate(TEXTS)
    assert made(folder, batch_tokens=1).translate(TEXTS) == whole
    translator = made(folder)
    assert [translator.translate([text])[0] for text in reversed(TEXTS)][::-1] == whole
    assert translator.translate(TEXTS) == whole


def test_what_is_written_depends_on_both_languages(nllb: Path):
    said = {pair: made(nllb, *pair).translate(TEXTS) for pair in (("en", "sw"), ("en", "zh"), ("zh", "sw"))}
    assert len({tuple(texts) for texts in said.values()}) == 3


def test_texts_that_stand_twice_are_translated_once_and_empty_ones_not_at_all(nllb: Path):
    told: list[tuple[int, int]] = []
    translator = made(nllb)
    once = translator.translate(["a", "no"])
    found = translator.translate(["no", "", "a", " \n", "no"], lambda *done: told.append(done))
    assert found == [once[1], "", once[0], " \n", once[1]]
    assert told[-1] == (2, 2)
    assert translator.translate([]) == []


def test_a_long_text_is_translated_whole_in_pieces(nllb: Path):
    translator = made(nllb)
    first, second = "The boat left at seven and nobody saw it go.", "Who sings now, the cup or the tea that is in it?"
    assert translator.translate([f"{first} {second}"]) == [" ".join(translator.translate([first, second]))]
    assert translator.translate([f"{first}\n\n{second}"]) == ["\n\n".join(translator.translate([first, second]))]
    chinese = made(nllb, "en", "zh")
    assert chinese.translate([f"{first} {second}"]) == ["".join(chinese.translate([first, second]))]
    long = "x" * 300
    parts = [part for part, _ in pieces(long, lambda text: len(translator.tokenizer(text)["input_ids"]) <= 64)]
    assert "".join(parts) == long
    assert translator.translate([long]) == [" ".join(translator.translate(parts))]


# Dividing texts.


@given(st.text() | st.text(st.sampled_from('ab. \n。!”"?\t')), st.integers(1, 12))
def test_pieces_put_together_are_the_text_and_each_fits(text: str, room: int):
    found = pieces(text, lambda piece: len(piece) <= room)
    assert "".join(piece + behind for piece, behind in found) == text
    assert all(len(piece) <= room for piece, _ in found)
    assert all(not behind or behind.isspace() for _, behind in found)
    assert len(found) == 1 or len(text) > room


@pytest.mark.parametrize(
    ("text", "room", "expected"),
    [
        ("One. Two.\nThree. Four.", 12, [("One. Two.", "\n"), ("Three. Four.", "")]),
        ('He said "go." She did.', 14, [('He said "go."', " "), ("She did.", "")]),
        ("一。二三。四", 4, [("一。", ""), ("二三。四", "")]),
        ("no end of a sentence", 12, [("no end of", " "), ("a sentence", "")]),
        ("abcdef", 3, [("abc", ""), ("def", "")]),
        ("3.50 and 4.50", 8, [("3.50", " "), ("and 4.50", "")]),
    ],
)
def test_texts_are_divided_at_lines_then_sentences_then_words(text: str, room: int, expected: list[tuple[str, str]]):
    assert pieces(text, lambda piece: len(piece) <= room) == expected


# Which model, and which languages.


def refused(action: Callable[[], object], kind: type[UserError], match: str) -> UserError:
    with pytest.raises(kind, match=match) as caught:
        action()
    return caught.value


@pytest.mark.parametrize(("source", "target", "code"), [("en", "bbc", "bbc"), ("mad", "en", "mad"), ("en", "xx", "xx")])
def test_a_language_that_the_model_does_not_know_is_named(nllb: Path, source: str, target: str, code: str):
    refused(lambda: made(nllb, source, target), UserError, f"does not know the language '{code}'")


def test_a_marian_model_of_many_languages_is_told_which(tmp_path: Path):
    folder = save_marian(tmp_path, (">>swh<<", ">>xho<<"))
    swahili, xhosa = (made(folder, "en", code) for code in ("sw", "xh"))
    signs = [t.tokenizer.convert_tokens_to_ids(f">>{code}<<") for t, code in ((swahili, "swh"), (xhosa, "xho"))]
    assert [t._ids("a")[0] for t in (swahili, xhosa)] == signs
    assert swahili.translate(TEXTS) != xhosa.translate(TEXTS)
    refused(lambda: made(folder, "en", "th"), UserError, "does not know the language 'th'")


def test_the_languages_codes_are_filled_into_the_models_name(marian: Path, tmp_path: Path):
    (tmp_path / "opus-en-sw").symlink_to(marian)
    translator = Translator(f"{tmp_path}/opus-{{source}}-{{target}}", "en", "sw", device="cpu")
    assert translator.located.path == tmp_path / "opus-en-sw"
    commit = "0" * 40
    located = located_translator("Some/opus-{source}-{target}", "sw", "en", revision=commit)
    assert (located.name, located.digest) == ("Some/opus-sw-en", f"hub:Some/opus-sw-en@{commit}")


def test_the_digest_tells_everything_apart_that_a_translation_depends_on(nllb: Path, marian: Path):
    located = located_translator(str(nllb), "en", "sw")
    assert made(nllb).digest == translation_digest(located, "en", "sw")
    half = located_translator(str(nllb), "en", "sw", dtype="bfloat16")
    found = {
        translation_digest(located, "en", "sw"),
        translation_digest(located, "en", "zh"),
        translation_digest(located, "zh", "sw"),
        translation_digest(located, "en", "sw", 2),
        translation_digest(half, "en", "sw"),
        translation_digest(located_translator(str(marian), "en", "sw"), "en", "sw"),
    }
    assert len(found) == 6
    elsewhere = located_translator(str(nllb), "en", "sw", device="cpu")
    assert translation_digest(elsewhere, "en", "sw") in found


def test_other_models_are_refused(tmp_path: Path):
    refused(lambda: made(save_tiny_model(tmp_path / "t5", "t5")), UserError, "no translation model .*t5")
    refused(lambda: made(tmp_path / "none"), BackboneError, "no such model folder")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    refused(lambda: made(tmp_path / "x.gguf"), UserError, "no translation model")


def test_pickled_weights_are_not_opened_and_missing_ones_not_drawn(nllb: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    for path in nllb.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    gone = "model.encoder.layers.0.fc1.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, weights, {"format": "pt"})
    refused(lambda: made(tmp_path), BackboneError, gone)
    weights.rename(tmp_path / "pytorch_model.bin")
    refused(lambda: made(tmp_path), BackboneError, "pickles")


@pytest.mark.parametrize(("kind", "tokenizer"), [("marian", "MarianTokenizer"), ("m2m_100", "M2M100Tokenizer")])
def test_a_tokenizer_that_needs_sentencepiece_says_so(
    kind: str, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import transformers

    save(random_model(kind, 80, pad_token_id=1, eos_token_id=2), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer}))

    def absent(*_: Any, **__: Any) -> None:
        raise ImportError(f"{tokenizer} requires the SentencePiece library")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", absent)
    error = refused(lambda: made(tmp_path), MissingExtra, "sentencepiece")
    assert error.remedy == "pip install 'lingraft[translation]'"


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model of a few sentences."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("spoken")
    (folder / "text.txt").write_text("\n".join([*TEXTS, string.ascii_letters, string.digits] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "sp"), vocab_size=80, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sp.model"))
    own = [model.id_to_piece(number) for number in range(3, model.get_piece_size())]
    found = ["<s>", "<pad>", "</s>", "<unk>", *own]
    (folder / "vocab.json").write_text(json.dumps({piece: n for n, piece in enumerate(found)}))
    return folder


@pytest.mark.parametrize("kind", ["m2m_100", "marian"])
def test_models_with_sentencepiece_translate_as_transformers_does(kind: str, spoken: Path, tmp_path: Path):
    import transformers

    files = {"vocab": str(spoken / "vocab.json")}
    if kind == "marian":
        files |= {"source_spm": str(spoken / "sp.model"), "target_spm": str(spoken / "sp.model")}
        tokenizer: Any = transformers.MarianTokenizer(**files, source_lang="en", target_lang="sw")
    else:
        tokenizer = transformers.M2M100Tokenizer(files["vocab"], str(spoken / "sp.model"))
    tokenizer.save_pretrained(tmp_path)
    # The languages of M2M-100 and eight spare tokens stand behind its vocabulary.
    words = len(tokenizer) + (108 if kind == "m2m_100" else 0)
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    start = pad if kind == "marian" else end
    special = {"pad_token_id": pad, "eos_token_id": end, "decoder_start_token_id": start, "forced_eos_token_id": None}
    save(random_model(kind, words, decoder_vocab_size=words, **special), tmp_path)
    translator = made(tmp_path)
    reread: Any = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model: Any = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    options: dict[str, Any] = {"bad_words_ids": [[pad]]}
    if kind == "m2m_100":
        reread.src_lang = "en"
        options["forced_bos_token_id"] = reread.get_lang_id("sw")
        refused(lambda: made(tmp_path, "en", "bbc"), UserError, "does not know the language 'bbc'")
    for text in TEXTS:
        ids = reread(text, return_tensors="pt")
        bound = min(62, 3 * ids["input_ids"].shape[1] + 20)
        written = model.generate(**ids, max_new_tokens=bound, do_sample=False, num_beams=1, **options)[0]
        # M2M-100's tokenizer takes the language it was told to begin with for text.
        expected = reread.decode(written, skip_special_tokens=True).removeprefix("__sw__").strip()
        assert translator.translate([text]) == [expected]
