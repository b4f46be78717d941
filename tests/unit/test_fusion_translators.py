"""Frozen encoders of target-language text: the states are transformers' own, whatever a text is batched with."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lingraft.config import BackboneConfig
from lingraft.errors import BackboneError, MissingExtra, UserError
from lingraft.fusion.translators import TranslationEncoder, projection
from lingraft.locating import locate
from tests.conftest import save_tiny_model

TEXTS = ["habari", "abba aab ab", "a"]
SIZES = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2}
SIZES |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def save_nllb(folder: Path, longest: int = 64) -> Path:
    """A random NLLB of three languages; its words are letters."""
    words = {t: i for i, t in enumerate(["<s>", "<pad>", "</s>", "<unk>", "▁", *LETTERS])}
    tags = ["eng_Latn", "swh_Latn", "yor_Latn"]
    tokenizer = transformers.NllbTokenizer(
        vocab=words, merges=[], additional_special_tokens=tags, model_max_length=longest
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.M2M100Config(vocab_size=len(tokenizer), **SIZES)
    transformers.M2M100ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def opened(folder: Path, language: str = "sw", dtype: torch.dtype = torch.float32) -> TranslationEncoder:
    return TranslationEncoder(str(folder), language=language, device="cpu", dtype=dtype)


@pytest.fixture(scope="module")
def nllb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_nllb(tmp_path_factory.mktemp("nllb"))


@pytest.fixture(scope="module", params=["nllb", "bert", "xlm-roberta", "mt5"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(request.param)
    return save_nllb(made) if request.param == "nllb" else save_tiny_model(made, request.param)


def encoder_of(folder: Path) -> Any:
    """The encoder as transformers gives it, with all its weights from the file."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    return (model.encoder if model.config.is_encoder_decoder else model).eval()


def test_states_are_those_of_every_text_alone(folder: Path) -> None:
    encoder, theirs = opened(folder), encoder_of(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if hasattr(tokenizer, "src_lang"):
        tokenizer.src_lang = "swh_Latn"
    states, mask = encoder.states(TEXTS)
    assert states.shape == (*mask.shape, encoder.width)
    for row, text in enumerate(TEXTS):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            alone = theirs(input_ids=ids).last_hidden_state[0]
        length = len(alone)
        assert mask[row].tolist() == [1] * length + [0] * (mask.shape[1] - length)
        assert torch.allclose(states[row, :length], alone, atol=1e-5)
    assert float(states[0, :3].std()) > 0


def test_it_is_frozen_and_the_trained_map_still_learns(folder: Path) -> None:
    encoder = opened(folder)
    before = torch.get_rng_state()
    first, mask = encoder.states(TEXTS)
    assert torch.equal(torch.get_rng_state(), before), "reading draws nothing"
    assert not first.requires_grad
    weight = torch.nn.Parameter(projection(encoder.width, 8, ("test", 0)))
    loss = (torch.nn.functional.linear(first, weight) * mask[:, :, None]).square().sum()
    loss.backward()
    assert weight.grad is not None and float(weight.grad.abs().sum()) > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder.states(TEXTS)[0], first), "whoever asks reads the same"


def test_loading_draws_nothing_from_the_global_state(folder: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    opened(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_digest_is_that_of_the_files(nllb: Path) -> None:
    encoder = opened(nllb)
    assert encoder.digest == locate(BackboneConfig(model=str(nllb))).digest
    assert encoder.width == 16


def test_the_dtype_is_that_of_the_states(nllb: Path) -> None:
    half = opened(nllb, dtype=torch.bfloat16).states(TEXTS)[0]
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), opened(nllb).states(TEXTS)[0], atol=0.1)


def test_nllb_reads_the_target_language_by_its_tag(nllb: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(nllb)
    for language, tag in (("sw", "swh_Latn"), ("yo", "yor_Latn"), ("yor_Latn", "yor_Latn")):
        ids = opened(nllb, language)._ids("aba")
        assert tokenizer.convert_ids_to_tokens(ids) == [tag, "▁", "a", "b", "a", "</s>"]
    same, other = (opened(nllb, language).states(TEXTS)[0] for language in ("sw", "yo"))
    assert not torch.allclose(same, other, atol=1e-3)


@pytest.mark.parametrize("language", ["de", "xx", "a"])
def test_a_language_that_nllb_does_not_know_is_refused(nllb: Path, language: str) -> None:
    with pytest.raises(UserError, match=f"does not know the language '{language}") as raised:
        opened(nllb, language)
    assert "fusion.encoder" in str(raised.value)


def test_an_encoder_by_itself_is_told_of_no_language(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, "bert")
    first, second = (opened(folder, language).states(TEXTS)[0] for language in ("sw", "xx"))
    assert torch.equal(first, second)


def test_what_is_too_long_loses_its_end_and_is_counted_once(tmp_path: Path) -> None:
    encoder = opened(save_nllb(tmp_path, longest=8))
    assert encoder.longest == 8
    long, same = "abcdefghij", "abcdefxyz"
    states, mask = encoder.states([long, "a", long])
    assert encoder.truncated == 1
    assert states.shape[1] == 8 and mask.sum(dim=1).tolist() == [8, 4, 8]
    # Tag, space, five letters, end of text: what both begin with is all that is left of either.
    assert torch.equal(encoder.states([same])[0][0], encoder.states([long])[0][0])
    assert encoder.truncated == 2
    encoder.states(["abcde"])
    assert encoder.truncated == 2, "eight tokens fit"


def test_the_bound_is_the_positions_or_the_tokenizers(tmp_path: Path) -> None:
    # 513 positions, of which RoBERTa's first is the padding token's.
    assert opened(save_tiny_model(tmp_path / "roberta", "xlm-roberta")).longest == 512
    assert opened(save_tiny_model(tmp_path / "bert", "bert", max_position_embeddings=40)).longest == 40
    assert opened(save_tiny_model(tmp_path / "mt5", "mt5")).longest is None
    assert opened(save_nllb(tmp_path / "nllb", longest=100)).longest == 64


def test_texts_as_long_as_the_bound_can_be_read(tmp_path: Path) -> None:
    for name in ("xlm-roberta", "bert"):
        encoder = opened(save_tiny_model(tmp_path / name, name))
        assert encoder.states(["b" * 600])[0].shape[1] == encoder.longest
        assert encoder.truncated == 1


def test_a_checkpoint_without_the_encoders_weights_is_refused(nllb: Path, tmp_path: Path) -> None:
    for file in nllb.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(nllb / "model.safetensors")
    without = {n: t for n, t in weights.items() if "decoder.layers" not in n}
    save_file(without, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(opened(tmp_path).states(TEXTS)[0], opened(nllb).states(TEXTS)[0]), "the decoder is not needed"
    save_file({n: t for n, t in without.items() if "encoder.layers.1.fc1" not in n}, tmp_path / "model.safetensors")
    with pytest.raises(BackboneError, match=r"lacks weights of its encoder: 2 tensors, first .*layers\.1\.fc1\.bias"):
        opened(tmp_path)


def test_pickles_decoders_and_damaged_folders_are_refused(nllb: Path, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="no encoder") as raised:
        opened(save_tiny_model(tmp_path / "llama"))
    assert "NLLB" in str(raised.value)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for file in nllb.glob("*.json"):
        (pickled / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(nllb / "model.safetensors"), pickled / "pytorch_model.bin")
    with pytest.raises(BackboneError, match="pickles"):
        opened(pickled)
    (pickled / "pytorch_model.bin").unlink()
    (pickled / "model.safetensors").write_bytes((nllb / "model.safetensors").read_bytes())
    config = json.loads((nllb / "config.json").read_text())
    (pickled / "config.json").write_text(json.dumps({**config, "encoder_ffn_dim": 48}))
    with pytest.raises(BackboneError, match="cannot be loaded"):
        opened(pickled)
    (pickled / "config.json").write_text(json.dumps(config))
    (pickled / "tokenizer.json").write_text("{")
    with pytest.raises(BackboneError, match="tokenizer cannot be loaded"):
        opened(pickled)


def test_a_tokenizer_that_needs_sentencepiece_says_so(
    nllb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lingraft.fusion import translators

    for file in nllb.iterdir():
        if "token" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "source.spm").write_bytes(b"")
    found = translators.importlib.util.find_spec
    monkeypatch.setattr(
        translators.importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else found(name)
    )
    with pytest.raises(MissingExtra, match="sentencepiece"):
        opened(tmp_path)


def trained_pieces(folder: Path) -> Path:
    pieces = pytest.importorskip("sentencepiece", reason="the tokenizers of M2M-100 and Marian need sentencepiece")
    folder.mkdir(parents=True, exist_ok=True)
    sentences = [f"{a}{b} {b}{c} {c}{a}{b}" for a in "abcdef" for b in "ghijk" for c in "lmnop"]
    (folder / "text.txt").write_text("\n".join(sentences))
    pieces.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "pieces"), vocab_size=40, minloglevel=2
    )
    return folder / "pieces.model"


def test_m2m100_reads_the_target_language_by_its_code(tmp_path: Path) -> None:
    model = trained_pieces(tmp_path / "spm")
    import sentencepiece  # pyright: ignore[reportMissingImports]

    own = sentencepiece.SentencePieceProcessor(model_file=str(model))
    words = ["<s>", "<pad>", "</s>", "<unk>", *(own.id_to_piece(n) for n in range(3, own.get_piece_size()))]
    (tmp_path / "vocab.json").write_text(json.dumps({w: n for n, w in enumerate(words)}))
    tokenizer = transformers.M2M100Tokenizer(str(tmp_path / "vocab.json"), str(model))
    folder = tmp_path / "m2m"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.M2M100Config(vocab_size=len(words) + 120, **SIZES)
    transformers.M2M100ForConditionalGeneration(config).save_pretrained(folder)
    encoder = opened(folder, "sw")
    ids = encoder._ids("ag gl")
    assert ids[0] == tokenizer.get_lang_id("sw") and ids[-1] == tokenizer.eos_token_id
    assert encoder.states(["ag gl", "bh"])[0].shape == (2, len(ids), 16)
    with pytest.raises(UserError, match="does not know"):
        opened(folder, "nij")


def test_marian_is_told_of_no_language(tmp_path: Path) -> None:
    model = trained_pieces(tmp_path / "spm")
    import sentencepiece  # pyright: ignore[reportMissingImports]

    own = sentencepiece.SentencePieceProcessor(model_file=str(model))
    words = ["</s>", "<unk>", *(own.id_to_piece(n) for n in range(3, own.get_piece_size())), "<pad>"]
    (tmp_path / "vocab.json").write_text(json.dumps({w: n for n, w in enumerate(words)}))
    tokenizer = transformers.MarianTokenizer(str(model), str(model), str(tmp_path / "vocab.json"))
    folder = tmp_path / "marian"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    pad = len(words) - 1
    config = transformers.MarianConfig(
        vocab_size=len(words), pad_token_id=pad, eos_token_id=0, decoder_start_token_id=pad, **SIZES
    )
    whole = transformers.MarianMTModel(config).eval()
    whole.save_pretrained(folder)
    encoder = opened(folder, "xx")
    states, mask = encoder.states(["ag gl", "bh"])
    with torch.no_grad():
        # The positions are not in the file, and must be those of the model that was saved.
        alone = whole.get_encoder()(**tokenizer("bh", return_tensors="pt")).last_hidden_state[0]
    assert torch.allclose(states[1, : int(mask[1].sum())], alone, atol=1e-5)
    assert (encoder.longest, encoder.width) == (64, 16)


def test_the_first_map_is_uniform_and_a_function_of_its_seed_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1]
    first = projection(64, 48, ("base", 3))
    assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(np.random.get_state()[1], before[1])
    assert first.shape == (48, 64) and first.dtype == torch.float32
    bound = 1 / math.sqrt(64)
    assert 0.99 * bound < float(first.abs().max()) <= bound
    # 3,072 draws: the mean's and the deviation's own deviations are about a fiftieth of the bound and less.
    assert abs(float(first.mean())) < 0.05 * bound
    assert float(first.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert torch.equal(projection(64, 48, ("base", 3)), first)
    assert not torch.equal(projection(64, 48, ("base", 4)), first)


def test_a_real_encoder_reads_many_languages_alike() -> None:
    """Multilingual E5 is trained to give a sentence and its translation near means."""
    found = os.environ.get("LINGRAFT_E5")
    if not found or not Path(found).is_dir():
        pytest.skip("LINGRAFT_E5 names no folder with multilingual-e5-small")
    encoder = opened(Path(found), "de")
    texts = ["The cat sleeps.", "Die Katze schläft.", "Taxes rise in May.", "Im Mai steigen die Steuern."]
    states, mask = encoder.states(texts)
    assert (encoder.width, encoder.longest, encoder.truncated) == (384, 512, 0)
    means = (states * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1)[:, None]
    near = torch.nn.functional.normalize(means, dim=1) @ torch.nn.functional.normalize(means, dim=1).T
    assert near[0, 1] > near[0, 3] and near[2, 3] > near[2, 1]
