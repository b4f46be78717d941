"""Exact match and F1 as MLQA's evaluation has them, by hand and by their laws."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingraft.answers.matching import exact_match, f1, normalised, tokens
from lingraft.answers.normalising import clusters, lowered, unified
from lingraft.errors import DataError

LANGUAGES = [
    "en",
    "de",
    "fr",
    "es",
    "ru",
    "el",
    "tr",
    "ar",
    "hi",
    "th",
    "vi",
    "zh",
    "ja",
    "sw",
    "te",
    "bn",
    "km",
    "lo",
    "my",
    "ko",
]
LANGUAGE = st.sampled_from(LANGUAGES)
# Of all scripts concerned, with what makes trouble: marks, articles, dotted and dotless i, joiners, punctuation.
TEXT = st.text(st.sampled_from("aAtheIİıi Éeلاًـكไมำแ的北京カかदीి్ক্কាំ ្ကြ၁12.,'-€\u200d\u0301")) | st.text(max_size=12)


@given(TEXT, LANGUAGE)
def test_identical_texts_match_entirely(text: str, language: str):
    assert exact_match(text, [text], language) == 1
    assert f1(text, [text], language) == 1


@given(TEXT, TEXT, LANGUAGE)
def test_f1_is_symmetric_and_a_share(a: str, b: str, language: str):
    assert f1(a, [b], language) == f1(b, [a], language)
    assert 0 <= f1(a, [b], language) <= 1
    assert exact_match(a, [b], language) <= f1(a, [b], language)


@given(TEXT, st.lists(TEXT, min_size=1, max_size=3), TEXT, LANGUAGE)
def test_another_reference_never_lowers_a_figure(answer: str, references: list[str], more: str, language: str):
    for figure in (exact_match, f1):
        assert figure(answer, [*references, more], language) >= figure(answer, references, language)


@given(TEXT, LANGUAGE)
def test_how_unicode_spells_a_text_does_not_matter(text: str, language: str):
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert normalised(unicodedata.normalize(form, text), language) == normalised(text, language)


@given(TEXT)
def test_characters_with_their_marks_are_the_text(text: str):
    assert "".join(clusters(text)) == text


@pytest.mark.parametrize(
    ("language", "text", "by_hand"),
    [
        ("en", "The  Cat's a hat!", "cats hat"),
        ("de", "Die Katze, der Hund", "katze hund"),
        ("es", "El gato y unos perros", "gato y perros"),
        ("vi", "Những con mèo của tôi", "con mèo tôi"),
        ("ar", "البيت، والكتاب", "بيت و كتاب"),
        ("hi", "बिल्ली एक जानवर है।", "बिल्ली एक जानवर है"),
        ("zh", "北京（Beijing City）大学。", "北 京 beijing city 大 学"),
        # Not MLQA's: no articles are taken out.
        ("fr", "Le chat de l’hôtel", "le chat de lhôtel"),
        ("ru", "Кошка — «зверь»", "кошка зверь"),
        ("el", "Η ΓΑΤΑ ΤΗΣ", "η γατα της"),
        ("tr", "ISPARTA'NIN İLÇESİ", "ıspartanın ilçesi"),
        ("sw", "Paka wa Nairobi.", "paka wa nairobi"),
        ("te", "పిల్లి, కుక్క", "పిల్లి కుక్క"),
        ("bn", "বিড়াল।", unicodedata.normalize("NFKC", "বিড়াল")),
        # Cut like Chinese.
        ("th", "น้ำ 20 ลิตร", "น้ำ 20 ลิ ต ร"),
        ("ja", "東京タワー（333m）", "東 京 タ ワ ー 333m"),
        ("km", "ខ្មែរ", "ខ្មែ រ"),
        ("lo", "ລາວ", "ລ າ ວ"),
        ("my", "မြန်မာ", "မြ န် မာ"),
    ],
)
def test_what_counts_by_hand(language: str, text: str, by_hand: str):
    assert normalised(text, language) == by_hand


@pytest.mark.parametrize(
    ("language", "answer", "reference", "by_hand"),
    [
        # Common tokens, of the answer's and the reference's.
        ("en", "the big red dog", "a red dog", 2 * 2 / (3 + 2)),
        ("en", "red red dog", "red dog dog", 2 * 2 / (3 + 3)),
        ("de", "im Jahr 1990", "1990", 2 * 1 / (3 + 1)),
        ("es", "la ciudad de París", "París", 2 * 1 / (3 + 1)),
        ("fr", "la ville", "une ville", 2 * 1 / (2 + 2)),
        ("ru", "большой город", "город", 2 * 1 / (2 + 1)),
        ("ar", "البيت الكبير", "بيت", 2 * 1 / (2 + 1)),
        ("hi", "नई दिल्ली", "दिल्ली", 2 * 1 / (2 + 1)),
        ("vi", "thành phố Hà Nội", "Hà Nội", 2 * 2 / (4 + 2)),
        ("zh", "北京大学", "北京", 2 * 2 / (4 + 2)),
        ("ja", "東京都", "東京", 2 * 2 / (3 + 2)),
        ("th", "แมวดำ", "แมว", 2 * 3 / (4 + 3)),
        ("tr", "İstanbul şehri", "istanbul", 2 * 1 / (2 + 1)),
        ("sw", "mji wa Dodoma", "Dodoma", 2 * 1 / (3 + 1)),
        ("te", "హైదరాబాద్ నగరం", "హైదరాబాద్", 2 * 1 / (2 + 1)),
        ("bn", "ঢাকা শহর", "ঢাকা", 2 * 1 / (2 + 1)),
        ("en", "cat", "dog", 0),
    ],
)
def test_f1_by_hand(language: str, answer: str, reference: str, by_hand: float):
    assert f1(answer, [reference], language) == pytest.approx(by_hand)
    assert exact_match(answer, [reference], language) == 0


def test_the_best_reference_counts():
    assert exact_match("Paris", ["Lyon", "paris!"], "fr") == 1
    assert f1("big dog", ["cat", "dog", "small dog"], "en") == pytest.approx(2 / 3)


def test_turkish_i_has_or_lacks_its_dot():
    assert exact_match("IŞIK", ["ışık"], "tr") == 1
    assert exact_match("İZMİR", ["izmir"], "tr") == 1
    assert exact_match("I\u0307zmir", ["izmir"], "tr") == 1
    assert exact_match("IŞIK", ["işik"], "tr") == 0
    assert exact_match("TITLE", ["title"], "en") == 1
    assert lowered("Iİ", "az-Latn") == "ıi"


def test_arabic_is_compared_by_letters_not_by_their_shapes():
    assert exact_match("ﻛﺘﺎﺏ", ["كتاب"], "ar") == 1
    assert exact_match("كـــتاب", ["كتاب"], "ar") == 1
    assert exact_match("\u200fكتاب\u200e", ["كتاب"], "ar") == 1
    # MLQA takes the article out wherever its letters stand.
    assert tokens("بالبيت", "ar") == ["ب", "بيت"]


def test_thai_is_compared_however_its_vowels_were_typed():
    for typed in ("น้ำ", "น้\u0e4d\u0e32", "น\u0e4d้\u0e32"):
        assert unified(typed) == "น้ำ"
        assert tokens(typed, "th") == ["น้ำ"]
    assert unified("ນ\u0ecd\u0eb2") == unified("ນ\u0eb3")


def test_white_space_between_characters_does_not_count():
    assert exact_match("北京 大学", ["北京大学"], "zh") == 1
    assert exact_match("แมว ดำ", ["แมวดำ"], "th") == 1
    assert exact_match("black bird", ["blackbird"], "en") == 0


def test_an_article_alone_is_compared_as_it_is():
    assert exact_match("The", ["the"], "en") == 1
    assert exact_match("the", ["a"], "en") == 0
    assert f1("...", ["!"], "en") == 0


def test_scripts_and_regions_do_not_change_the_language():
    assert tokens("北京", "zh-Hans") == tokens("北京", "zh_TW") == ["北", "京"]


def test_no_reference_is_an_error():
    with pytest.raises(DataError):
        exact_match("x", [], "en")
