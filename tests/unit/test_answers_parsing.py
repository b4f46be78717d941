"""Labels, numbers and lines read in what models write, in many languages; what cannot be told is said to be so."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingraft.answers.numerals import DECIMAL_COMMA, equal_numbers, numbers_in
from lingraft.answers.parsing import after_marker, parse_label, parse_number, parse_text
from lingraft.errors import ConfigError

CHOICES = {"choice1": ("(A)", "A", "choice1", "1"), "choice2": ("(B)", "B", "choice2", "2")}
NLI = {"entailment": ("entailment", "true"), "contradiction": ("contradiction", "false"), "neutral": ("neutral",)}
YES_NO = {
    "yes": (
        "yes",
        "Ja",
        "sí",
        "да",
        "ναι",
        "evet",
        "نعم",
        "हाँ",
        "ใช่",
        "对",
        "はい",
        "ndiyo",
        "అవును",
        "হ্যাঁ",
        "có",
        "oui",
    )
} | {
    "no": (
        "no",
        "nein",
        "нет",
        "όχι",
        "hayır",
        "لا",
        "नहीं",
        "ไม่ใช่",
        "不对",
        "いいえ",
        "hapana",
        "కాదు",
        "না",
        "không",
        "non",
    )
}
DIGITS = {
    "ascii": "0123456789",
    "thai": "๐๑๒๓๔๕๖๗๘๙",
    "bengali": "০১২৩৪৫৬৭৮৯",
    "devanagari": "०१२३४५६७८९",
    "telugu": "౦౧౨౩౪౫౬౭౮౯",
    "arabic": "٠١٢٣٤٥٦٧٨٩",
    "persian": "۰۱۲۳۴۵۶۷۸۹",
    "burmese": "၀၁၂၃၄၅၆၇၈၉",
    "khmer": "០១២៣៤៥៦៧៨៩",
    "full-width": "０１２３４５６７８９",
}
# What groups digits, what starts decimals, and a language that writes so.
STYLES = [
    ("", ".", None),
    (",", ".", "en"),
    (",", ".", None),
    (",", ".", "sw"),
    (",", ".", "zh"),
    (".", ",", "de"),
    (".", ",", "tr"),
    (".", ",", "el"),
    (".", ",", "id"),
    (".", ",", "vi"),
    (" ", ",", "fr"),
    ("\u00a0", ",", "ru"),
    ("\u202f", ",", "fr"),
    ("\u2009", ".", None),
    ("'", ".", "de"),
    ("’", ".", None),
    ("٬", "٫", "ar"),
    ("٬", "٫", None),
]


def written(value: Decimal, group: str, point: str, digits: str = DIGITS["ascii"], indian: bool = False) -> str:
    """A number as a style writes it."""
    whole, _, decimals = format(abs(value), "f").partition(".")
    head, tail = (whole[:-3], [whole[-3:]]) if indian else (whole, [])
    size = 2 if indian else 3
    while len(head) > size:
        head, tail = head[:-size], [head[-size:], *tail]
    text = group.join([head, *tail] if head else tail) + (point + decimals if decimals else "")
    return ("−" if value < 0 else "") + text.translate(str.maketrans(DIGITS["ascii"], digits))


# --- the marker ---


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("Answer: x", "x"),
        ("answer:x", "x"),
        ("**Answer:** x", "x"),
        ("**Answer**: x", "x"),
        ("ANSWER ： x", "x"),
        ("Answer: y\nAnswer: x", "x"),
        ("所以Answer：x", "x"),
        ("Answer:", ""),
    ],
)
def test_the_last_marker_counts_whatever_its_case_colon_and_markup(text: str, rest: str):
    assert after_marker(text, "Answer:") == (rest, True)


def test_without_its_marker_the_whole_text_is_read_and_said_to_be():
    assert after_marker("the answer is x", "Answer:") == ("the answer is x", False)
    assert after_marker("MyAnswer: x", "Answer:") == ("MyAnswer: x", False)
    assert parse_label("it is (A)", CHOICES, "Answer:").reason.startswith("no 'Answer:', in the whole text")


@pytest.mark.parametrize(
    ("text", "marker"),
    [
        ("Réponse : 4", "Réponse:"),
        ("Re\u0301ponse: 4", "Réponse:"),
        ("RÉPONSE : 4", "réponse:"),
        ("答案：4", "答案:"),
        ("所以答案:4", "答案："),
        ("Die Antwort ist: 4.", "Die Antwort ist"),
        ("cevap  YANIT: 4", "Yanıt:"),
        ("ІТОГ: Ответ: 4", "ответ:"),
        ("คำตอบ: 4", "คำตอบ:"),
        ("#### 4", "####"),
    ],
)
def test_markers_are_found_in_every_language(text: str, marker: str):
    assert after_marker(text, marker)[1]
    assert parse_number(text, marker).value == "4"


# --- labels ---


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("(A)", "choice1"),
        ("(b)", "choice2"),
        ("b", "choice2"),
        ("b.", "choice2"),
        ("**B**", "choice2"),
        ("B because a dog is one", "choice2"),
        ("It is a dog, so B", "choice2"),
        ("Choice2: the rain", "choice2"),
        ("The choice number is 2.", "choice2"),
        ("२", "choice2"),
        ("（Ａ）", "choice1"),
        ("答案是A。", "choice1"),
        ("คำตอบคือB", "choice2"),
        ("10 of them: 2", "choice2"),
        ("2.1 or so, but A", "choice1"),
        ("(A) is better than (B)", "choice1"),
        ("A\nB", "choice1"),
    ],
)
def test_the_first_mention_of_a_choice_counts(text: str, label: str):
    assert parse_label(text, CHOICES).value == label


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Yes, no doubt.", "yes"),
        ("ja!", "yes"),
        ("Nein.", "no"),
        ("SÍ", "yes"),
        ("Нет, это не так", "no"),
        ("Ναι", "yes"),
        ("ΌΧΙ", "no"),
        ("HAYIR", "no"),
        ("EVET.", "yes"),
        ("نعم، هذا صحيح", "yes"),
        ("ﻻ", "no"),
        ("हाँ, सही है", "yes"),
        ("नहीं।", "no"),
        ("ใช่ครับ", "yes"),
        ("ไม่ใช่ครับ", "no"),
        ("这不对", "no"),
        ("对的", "yes"),
        ("いいえ、違います", "no"),
        ("Ndiyo, ni kweli", "yes"),
        ("కాదు", "no"),
        ("হ্যাঁ।", "yes"),
        ("KHÔNG", "no"),
        ("kho\u0302ng", "no"),
        ("Oui ou presque", "yes"),
    ],
)
def test_labels_are_met_in_many_languages(text: str, label: str):
    assert parse_label(text, YES_NO).value == label


def test_a_label_is_not_met_inside_a_longer_word():
    for text in ("untrue", "truest", "falsehood", "neutrality", "entailments"):
        assert parse_label(text, NLI).value is None
    assert parse_label("नहींं", {"no": ("नहीं",)}).value is None
    assert parse_label("ใช่", {"use": ("ใช",)}).value is None
    assert parse_label("ใช้ได้ ใช่", {"yes": ("ใช่",)}).value == "yes"


def test_the_longest_text_counts_at_one_place():
    labels = {"entailment": ("entailment",), "other": ("entailment is impossible", "not entailment")}
    assert parse_label("Entailment is impossible", labels).value == "other"
    assert parse_label("This is not entailment", labels).value == "other"


@pytest.mark.parametrize(
    "text",
    [
        "A or B",
        "(A) or (B)?",
        "either A or B.",
        "A/B",
        "A, B",
        "A, 2",
        "A oder B",
        "A ou B",
        "A o B",
        "A или B",
        "A ή B",
        "A veya B",
        "A ya da B",
        "A أو B",
        "A या B",
        "AหรือB",
        "A hoặc B",
        "A或B",
        "AまたはB",
        "A au B",
        "A లేదా B",
        "A বা B",
    ],
)
def test_a_list_of_labels_is_no_answer(text: str):
    parsed = parse_label(text, CHOICES)
    assert parsed.value is None
    assert "undecided" in parsed.reason


def test_a_list_of_three_is_no_answer_either():
    assert parse_label("entailment, contradiction, and neutral", NLI).value is None
    assert parse_label("entailment, contradiction is out", NLI).value == "entailment"


def test_nothing_and_nothing_fitting_are_no_answers():
    assert parse_label("", CHOICES).value is None
    assert parse_label(" \n", CHOICES).value is None
    assert parse_label("Answer:", CHOICES, "Answer:").value is None
    assert parse_label("I cannot say", CHOICES).value is None
    assert parse_label("A. Answer: none", CHOICES, "Answer:").value is None


def test_a_text_for_two_labels_is_refused():
    with pytest.raises(ConfigError, match="means both"):
        parse_label("x", {"a": ("x",), "b": ("X",)})
    with pytest.raises(ConfigError, match="empty"):
        parse_label("x", {"a": (" ",)})


@given(st.sampled_from(list(CHOICES)), st.integers(0, 3), st.text("xyz ,.!?\n", max_size=20))
def test_a_label_and_what_names_none_is_that_label(label: str, which: int, around: str):
    assert parse_label(f"{CHOICES[label][which]}\n{around}", CHOICES).value == label
    assert parse_label(f"{around}\nAnswer: {CHOICES[label][which]}", CHOICES, "Answer:").value == label


@given(st.text())
def test_any_text_is_parsed_without_an_error(text: str):
    assert parse_label(text, YES_NO, "Answer:").value in {"yes", "no", None}
    number = parse_number(text, "Answer:", "de").value
    assert number is None or equal_numbers(number, number)
    line = parse_text(text).value
    assert line is None or line.strip()


# --- numbers ---


@given(
    st.decimals(-(10**12), 10**12, allow_nan=False, allow_infinity=False, places=2),
    st.sampled_from(sorted(DIGITS)),
    st.sampled_from(STYLES),
    st.booleans(),
)
def test_a_number_is_read_as_it_is_written_in_every_digit_system_and_grouping(value, digits, style, whole):
    group, point, language = style
    value = Decimal(int(value)) if whole else value
    text = written(value, group, point, DIGITS[digits])
    found = parse_number(f"= {text}.", language=language).value
    assert found is not None
    assert Decimal(found) == value, (text, found)


@given(st.integers(0, 10**11), st.sampled_from(["ascii", "devanagari", "bengali", "telugu"]))
def test_indian_groups(value: int, digits: str):
    text = written(Decimal(value), ",", ".", DIGITS[digits], indian=True)
    assert parse_number(text, language="hi").value == str(value)


@given(st.decimals(0, 10**6, allow_nan=False, allow_infinity=False, places=3))
def test_three_decimals_are_told_from_a_group_by_the_language(value: Decimal):
    assert Decimal(parse_number(written(value, ",", "."), language="en").value or "nan") == value
    assert Decimal(parse_number(written(value, ".", ","), language="de").value or "nan") == value


@pytest.mark.parametrize("language", sorted(DECIMAL_COMMA))
def test_where_the_comma_starts_decimals_the_dot_groups(language: str):
    assert parse_number("1.234", language=language).value == "1234"
    assert parse_number("1,234", language=language).value == "1.234"


@pytest.mark.parametrize("language", [None, "en", "sw", "zh", "th", "hi", "ja", "te", "bn"])
def test_elsewhere_it_is_the_other_way_round(language: str | None):
    assert parse_number("1.234", language=language).value == "1.234"
    assert parse_number("1,234", language=language).value == "1234"


@pytest.mark.parametrize(
    ("text", "language", "value"),
    [
        ("She makes $18 every day.", "en", "18"),
        ("It is 3.5.", "en", "3.5"),
        ("Das sind 70.000 €.", "de", "70000"),
        ("Das sind 1,50 €.", "de", "1.5"),
        ("Elle gagne 1 234,50 €.", "fr", "1234.5"),
        ("Son 50 000 dólares", "es", "50000"),
        ("Это 5 600 рублей.", "ru", "5600"),
        ("Είναι 3,5 ευρώ", "el", "3.5"),
        ("Toplam ₺1.250 eder.", "tr", "1250"),
        ("المجموع هو ٣٬٥٠٠ دولار", "ar", "3500"),
        ("कुल १,००,००० रुपये", "hi", "100000"),
        ("รวมเป็น ๑๘ ดอลลาร์", "th", "18"),
        ("Tổng cộng là 1.500.000 đồng", "vi", "1500000"),
        ("一共是３５元。", "zh", "35"),
        ("总共2万美元", "zh", "20000"),
        ("合計は1万2000円です", "ja", "12000"),
        ("1億2345万円", "ja", "123450000"),
        ("Jumla ni 2,125.", "sw", "2125"),
        ("మొత్తం ౧౨ రూపాయలు", "te", "12"),
        ("উত্তর হল ১৬টি", "bn", "16"),
        ("16 - 3 - 4 = 9", "en", "9"),
        ("16-3", "en", "3"),
        ("it fell to -3", "en", "-3"),
        ("it fell to −3 °C", "en", "-3"),
        ("a loss of -$5", "en", "-5"),
        ("between $5-$10", "en", "10"),
        ("up 150%", "en", "150"),
        ("$.50", "en", "0.5"),
        ("0,125", "en", "0.125"),
        ("12345.678", "de", "12345.678"),
        ("007", "en", "7"),
        ("-0", "en", "0"),
        ("1,2,3", "en", "3"),
        ("10²", "en", "10"),
    ],
)
def test_numbers_by_hand(text: str, language: str, value: str):
    assert parse_number(text, language=language).value == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Answer: 18 dollars, not 20", "18"),
        ("Answer: **18**\n\n2 more lines", "18"),
        ("Answer: 3 + 4 = 7", "7"),
        ("Answer: She has 5 eggs and 3 hens, 8 in all", "8"),
        ("7 days. Answer: -$3.50", "-3.5"),
        ("Answer: 4\nAnswer: 5", "5"),
        ("no marker, 4 and 5", "5"),
    ],
)
def test_behind_a_marker_its_own_number_counts_else_the_last(text: str, value: str):
    assert parse_number(text, "Answer:").value == value


@pytest.mark.parametrize("text", ["", "none", "Answer:", "Answer: 3/4", "Answer: ½", "5½", "3⁄4"])
def test_what_is_no_decimal_cannot_be_told(text: str):
    assert parse_number(text, "Answer:").value is None


def test_places_are_places_in_the_text():
    text = "a ١٢ b −$3,5 c"
    assert [text[n.start : n.end] for n in numbers_in(text)] == ["١٢", "−$3,5"]


def test_numbers_are_equal_as_numbers():
    assert equal_numbers("3.50", "3.5")
    assert not equal_numbers("3.5", "35")
    assert not equal_numbers("three", "three")


# --- lines ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("\n\n Paris \nQuestion:", "Paris"),
        ('Answer: "Paris"', "Paris"),
        ("**Answer: Paris**", "Paris"),
        ("«Москва»", "Москва"),
        ("„Berlin“", "Berlin"),
        ("「東京」", "東京"),
        ("“A” and “B”", "“A” and “B”"),
        ("the dogs'", "the dogs'"),
    ],
)
def test_a_text_is_its_first_line_without_quotes(text: str, value: str):
    assert parse_text(text, "Answer:").value == value


def test_a_summary_is_all_lines():
    assert parse_text("Summary: one\n\ntwo\n", "Summary:", whole=True).value == "one\ntwo"


@pytest.mark.parametrize("text", ["", " \n ", '""', "Answer:", "**"])
def test_no_line_is_no_answer(text: str):
    assert parse_text(text, "Answer:").value is None
