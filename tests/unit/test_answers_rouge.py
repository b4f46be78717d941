"""ROUGE-L in languages that the usual tokenizer does not see."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingraft.answers import rouge
from lingraft.answers.normalising import unified
from lingraft.answers.rouge import SEGMENTERS, STEMMERS, rouge_l, segmentation, tokenizer
from lingraft.errors import DataError, MissingExtra, UserError

pytest.importorskip("rouge_score", reason="the extra 'rouge' is not installed")

SENTENCES = {
    "en": "The black cat sleeps in the garden.",
    "de": "Die schwarze Katze schläft im Garten.",
    "fr": "Le chat noir dort dans le jardin.",
    "es": "El gato negro duerme en el jardín.",
    "ru": "Чёрная кошка спит в саду.",
    "el": "Η μαύρη γάτα κοιμάται στον κήπο.",
    "tr": "Siyah kedi IŞIKTA uyuyor.",
    "ar": "القطة السوداء تنام في الحديقة.",
    "hi": "काली बिल्ली बगीचे में सोती है।",
    "th": "แมวดำนอนอยู่ในสวน",
    "vi": "Con mèo đen ngủ trong vườn.",
    "zh": "黑猫在花园里睡觉。",
    "ja": "黒い猫が庭で眠っている。",
    "sw": "Paka mweusi analala bustanini.",
    "te": "నల్ల పిల్లి తోటలో నిద్రపోతోంది.",
    "bn": "কালো বিড়াল বাগানে ঘুমায়।",
    "km": "ឆ្មាខ្មៅដេកក្នុងសួន។",
    "lo": "ແມວດຳນອນຢູ່ໃນສວນ",
    "my": "ကြောင်မည်းသည် ဥယျာဉ်ထဲတွင် အိပ်နေသည်။",
    "ko": "검은 고양이가 정원에서 잔다.",
    "am": "ጥቁሯ ድመት በአትክልት ስፍራ ትተኛለች።",
}
PACKAGES = {"zh": ["jieba"], "ja": ["fugashi", "ipadic"], "th": ["pythainlp"]}


@pytest.mark.parametrize("language", SENTENCES)
def test_a_sentence_and_itself_have_1_and_nothing_in_common_0(language: str):
    assert rouge_l(SENTENCES[language], [SENTENCES[language]], language) == 1.0
    other = SENTENCES["en" if language != "en" else "ru"]
    assert rouge_l(SENTENCES[language], [other], language) == 0.0


@pytest.mark.parametrize("language", ["th", "zh", "ar", "te", "el"])
def test_the_usual_tokenizer_sees_nothing_there(language: str):
    from rouge_score.rouge_scorer import RougeScorer

    plain = RougeScorer(["rougeL"]).score(SENTENCES[language], SENTENCES[language])["rougeL"].fmeasure
    assert plain == 0.0
    assert rouge_l(SENTENCES[language], [SENTENCES[language]], language) == 1.0


def test_in_english_it_is_the_usual_figure():
    from rouge_score.rouge_scorer import RougeScorer

    answer, reference = "A cat, black as coal, is sleeping in a garden", SENTENCES["en"]
    usual = RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
    assert 0 < usual < 1
    assert rouge_l(answer, [reference], "en") == usual
    stemmed = RougeScorer(["rougeL"], use_stemmer=True).score(reference, answer)["rougeL"].fmeasure
    assert rouge_l(answer, [reference], "en", stem=True) == stemmed > usual


@pytest.mark.parametrize(
    ("language", "answer", "reference", "by_hand"),
    [
        # The common subsequence, of the answer's and the reference's tokens.
        ("en", "the cat sat", "the cat on a mat sat", 2 * 3 / (3 + 6)),
        ("fr", "l'eau froide", "l’eau chaude", 2 * 2 / (3 + 3)),
        ("de", "Katze Hund", "Hund Katze", 2 * 1 / (2 + 2)),
        ("zh", "黑猫睡觉", "黑猫在睡觉", 2 * 4 / (4 + 5)),
        ("ja", "猫が寝る", "猫が走る", 2 * 3 / (4 + 4)),
        ("th", "แมวดำ", "แมวน้ำ", 2 * 3 / (4 + 4)),
        ("tr", "IŞIK VAR", "ışık yok", 2 * 1 / (2 + 2)),
        ("ar", "كتاب جديد", "كـتاب", 2 * 1 / (2 + 1)),
        ("hi", "काली बिल्ली", "बिल्ली।", 2 * 1 / (2 + 1)),
        ("my", "မြန်မာ", "မြန်", 2 * 2 / (3 + 2)),
        ("sw", "paka mweusi", "paka mweupe", 2 * 1 / (2 + 2)),
        ("vi", "con mèo", "con chó", 2 * 1 / (2 + 2)),
    ],
)
def test_rouge_l_by_hand(language: str, answer: str, reference: str, by_hand: float):
    assert rouge_l(answer, [reference], language) == pytest.approx(by_hand)


TEXT = st.text(st.sampled_from("ab Iıแมำ猫がकी.,كـ်မ12"), max_size=12)


@given(TEXT, TEXT, TEXT, st.sampled_from(sorted(SENTENCES)))
@settings(max_examples=60)
def test_laws(a: str, b: str, c: str, language: str):
    figure = rouge_l(a, [b], language)
    assert 0 <= figure <= 1
    assert rouge_l(b, [a], language) == pytest.approx(figure)
    assert rouge_l(a, [b, c], language) == max(figure, rouge_l(a, [c], language))
    if unified(a).strip():
        assert rouge_l(a, [a], language) == 1


def test_what_cuts_a_language_does_not_depend_on_what_is_installed():
    assert segmentation("th") == segmentation("zh-Hans") == segmentation("km", "words") == "characters"
    assert segmentation("th", "words") == "words (pythainlp)"
    assert segmentation("tr") == segmentation("tr", "words") == "whitespace"
    assert all(segmentation(language, "words") == f"words ({package})" for language, package in SEGMENTERS.items())
    with pytest.raises(UserError, match="segmentation"):
        segmentation("th", "syllables")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("language", "words"),
    [
        ("th", ["แมว", "ดำ", "นอน"]),
        ("zh", ["黑猫", "睡觉"]),
        ("ja", ["猫", "が", "寝る"]),
    ],
)
def test_words_by_dictionary(language: str, words: list[str]):
    # Found, not imported: importing is what is tested.
    if not all(find_spec(package) for package in PACKAGES[language]):
        pytest.skip("the extra 'rouge-words' is not installed")
    assert tokenizer(language, "words")("".join(words) + "。") == words
    assert rouge_l(SENTENCES[language], [SENTENCES[language]], language, "words") == 1.0


@pytest.fixture
def forgetful():
    """Nothing that was imported before is remembered, before and after."""
    caches = (rouge._scorer, rouge._segmenter, rouge._stemmer)
    for function in caches:
        function.cache_clear()
    yield
    for function in caches:
        function.cache_clear()


@pytest.mark.parametrize("language", PACKAGES)
def test_words_without_their_package_are_an_error_never_characters(language: str, monkeypatch, forgetful):
    for package in [*PACKAGES[language], "pythainlp.tokenize"]:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=PACKAGES[language][-1]) as caught:
        rouge_l("x", ["x"], language, "words")
    assert "rouge-words" in str(caught.value)
    assert rouge_l("x", ["x"], language) == 1.0


def test_without_rouge_score_or_stemmers_the_extra_is_named(monkeypatch, forgetful):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "snowballstemmer", None)
        with pytest.raises(MissingExtra, match="snowballstemmer"):
            rouge_l("x", ["x"], "de", stem=True)
        # Swahili has no stemmer, so none is missing.
        assert rouge_l("x", ["x"], "sw", stem=True) == 1.0
    rouge._scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(MissingExtra, match="rouge-score"):
        rouge_l("x", ["x"], "en")


def test_every_stemmer_of_the_table_exists():
    available = pytest.importorskip("snowballstemmer").algorithms()
    assert set(STEMMERS.values()) <= set(available)


def test_stems_meet_where_words_do_not():
    pytest.importorskip("snowballstemmer")
    for language, a, b in [
        ("de", "Häuser", "Häusern"),
        ("ru", "книга", "книги"),
        ("tr", "kitaplar", "kitap"),
        ("ar", "كتاب", "الكتاب"),
    ]:
        assert rouge_l(a, [b], language) == 0
        assert rouge_l(a, [b], language, stem=True) == 1


def test_no_reference_is_an_error():
    with pytest.raises(DataError):
        rouge_l("x", [], "en")


def test_reading_answers_imports_nothing_heavy():
    code = (
        "import sys, lingraft.answers.scoring; "
        "print([m for m in ('torch', 'transformers', 'rouge_score', 'nltk', 'jieba', 'pythainlp') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
