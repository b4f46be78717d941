"""A few items of every task in the files of its upstream project, all made up, and text in every language.

The languages are ciphers: every letter of an English word is moved along its alphabet by a number that belongs to the
language, and in some languages into that language's script. An answer can be seen in its item: the right alternative
repeats the premise, a mood has its own words, a problem adds two numbers.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lingraft.languages import LANGUAGES
from lingraft.tasks.table import TASKS

ITEMS = 12
"""In every split; of MGSM's exemplars eight, as upstream."""
TEXT = "text/{language}.txt"
"""Running text; parallel text, a sentence a line, is in `PARALLEL`."""
PARALLEL = "text/ntrex128/{language}.txt"

TRANSLATED = "translated/tydiqa/{from}-{to}.{split}.jsonl"
"""TyDiQA's items in another language, which upstream does not have."""

_FIRST_LETTERS = {
    "ar": 0x621,
    "bn": 0x995,
    "el": 0x3B1,
    "hi": 0x905,
    "ru": 0x430,
    "te": 0xC15,
    "th": 0xE01,
    "zh": 0x4E00,
}
_CODES = sorted(LANGUAGES)
_NAMES = ("nia", "omar", "lena", "juma", "rosa", "karl")
_THINGS = ("pears", "ropes", "lamps", "boats", "goats", "hats")
_PLACES = ("garden", "harbour", "market", "kitchen", "tower", "field")
_MOODS = {"positive": "bright", "neutral": "plain", "negative": "dreary"}
_SUBJECTS = {"sports": "goal", "geography": "river", "health": "doctor"}
_SPLITS = ("train", "validation", "test")


def said(text: str, language: str) -> str:
    """English as a language of its own says it; English stays as it is."""
    if language == "en":
        return text
    moved, first = _CODES.index(language) % 25 + 1, _FIRST_LETTERS.get(language, ord("a"))
    return "".join(chr(first + (ord(c) - 97 + moved) % 26) if "a" <= c <= "z" else c for c in text.lower())


def write_all(folder: Path) -> Path:
    """Writes every task's files and the text below a folder, and gives the folder."""
    for language in LANGUAGES:
        lines = [said(_sentence(n), language) for n in range(3 * ITEMS)]
        for pattern in (TEXT, PARALLEL):
            _write(folder / pattern.format(language=language), "\n".join(lines) + "\n")
    for write in (_xcopa, _xnli, _mgsm, _xquad, _tydiqa, _translated, _xlsum, _nusax, _topics):
        write(folder)
    return folder


def _sentence(n: int) -> str:
    return f"{_NAMES[n % 6]} keeps {n + 2} {_THINGS[n // 6 % 6]} near the {_PLACES[(n + n // 6) % 6]}."


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    _write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _tsv(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    _write(path, "".join("\t".join(row) + "\n" for row in (header, *rows)))


def _numbers(split: str) -> range:
    """The items of a split: translations of one another have the same number."""
    first = ITEMS * _SPLITS.index(split)
    return range(first, first + ITEMS)


def _xcopa(folder: Path) -> None:
    def row(n: int, language: str) -> dict[str, Any]:
        right, wrong = (said(f"The {_THINGS[k % 6]} were sold.", language) for k in (n, n + 1))
        return {
            "premise": said(f"{_NAMES[n % 6]} needed the {_THINGS[n % 6]}.", language),
            "choice1": wrong if n % 2 else right,
            "choice2": right if n % 2 else wrong,
            "question": ("cause", "effect")[n // 2 % 2],
            "label": n % 2,
            "idx": n,
        }

    for split, name in (("train", "train"), ("validation", "val")):
        _jsonl(folder / f"copa_en/{name}.jsonl", (row(n, "en") for n in _numbers(split)))
    for code in TASKS["xcopa"].languages:
        for split, name in (("validation", "val"), ("test", "test")):
            _jsonl(folder / f"xcopa/data/{code}/{name}.{code}.jsonl", (row(n, code) for n in _numbers(split)))


def _xnli(folder: Path) -> None:
    def row(n: int, language: str) -> tuple[str, str, str]:
        thing, name = _THINGS[n % 6], _NAMES[n // 3 % 6]
        other = (f"{name} has {thing}.", f"{name} is at sea.", f"{name} has no {thing}.")[n % 3]
        label = ("entailment", "neutral", "contradiction")[n % 3]
        return said(f"{name} has {thing}.", language), said(other, language), label

    languages = TASKS["xnli"].languages
    for code in languages:
        rows = [row(n, code) for n in _numbers("train")]
        # Upstream spells one label differently in its training sets.
        rows = [(*pair, label.replace("contradiction", "contradictory")) for *pair, label in rows]
        path = folder / f"XNLI-MT-1.0/multinli/multinli.train.{code}.tsv"
        _tsv(path, ("premise", "hypo", "label"), rows)
    for split, name in (("validation", "dev"), ("test", "test")):
        items = [(code, n, *row(n, code)) for code in languages for n in _numbers(split)]
        rows = [(code, label, premise, hypothesis, str(n + 1)) for code, n, premise, hypothesis, label in items]
        header = ("language", "gold_label", "sentence1", "sentence2", "pairID")
        _tsv(folder / f"XNLI-1.0/xnli.{name}.tsv", header, rows)


def _mgsm(folder: Path) -> None:
    def asked(n: int, language: str) -> tuple[str, int, int]:
        a, b, thing = n % 5 + 1, n % 3 + 1, _THINGS[n % 6]
        return said(f"{_NAMES[n % 6]} has {a} {thing} and buys {b}. How many now?", language), a, b

    rows = []
    for n in _numbers("train"):
        question, a, b = asked(n, "en")
        rows.append({"question": question, "answer": f"Together {a} + {b} = <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}"})
    _jsonl(folder / "gsm8k/train.jsonl", rows)
    exemplars: dict[str, dict[str, dict[str, str]]] = {}
    for code in TASKS["mgsm"].languages:
        solved = {}
        for n in _numbers("validation")[:8]:
            question, a, b = asked(n, code)
            label, step = said("Question", code), said("Answer", code)
            solved[str(len(solved) + 1)] = {"q": f"{label}: {question}", "a": f"{step}: {a} + {b} = {a + b}."}
        exemplars[code] = solved
        tests = [(question, str(a + b)) for question, a, b in (asked(n, code) for n in _numbers("test"))]
        _tsv(folder / f"mgsm/mgsm_{code}.tsv", tests[0], tests[1:])
    numbers = [a + b for _, a, b in (asked(n, "en") for n in _numbers("validation")[:8])]
    value = {"MGSM_EXEMPLARS": exemplars, "EXEMPLAR_NUMBER_ANSWERS": numbers}
    _write(folder / "mgsm/exemplars.json", json.dumps(value, ensure_ascii=False))


def _questions(path: Path, language: str, numbers: Iterable[int], name: Callable[[int], str]) -> None:
    """SQuAD's form: a paragraph a question."""
    paragraphs = []
    for n in numbers:
        item = _asked(n, language)
        asked = {"id": name(n), "question": item["question"], "answers": json.loads(item["answers"])}
        paragraphs.append({"context": item["context"], "qas": [asked]})
    document = {"version": "1.1", "data": [{"title": "made up", "paragraphs": paragraphs}]}
    _write(path, json.dumps(document, ensure_ascii=False))


def _xquad(folder: Path) -> None:
    _questions(folder / "squad/train-v1.1.json", "en", _numbers("train"), lambda n: f"squad-{n}")
    for code in TASKS["xquad"].languages_of("validation") or ():
        path = folder / f"MLQA_V1/dev/dev-context-{code}-question-{code}.json"
        _questions(path, code, _numbers("validation"), lambda n: f"mlqa-{n}")
    for code in TASKS["xquad"].languages:
        _questions(folder / f"xquad/xquad.{code}.json", code, _numbers("test"), lambda n: f"xquad-{n}")


def _tydiqa(folder: Path) -> None:
    for code in TASKS["tydiqa"].languages:
        name = LANGUAGES[code].name.lower()
        # Enough that some of the training items are among the tenth that is held out.
        for split, numbers in (("train", range(60)), ("dev", _numbers("test"))):
            path = folder / f"tydiqa_goldp/{name}_tydiqa_{split}.json"
            _questions(path, code, numbers, lambda n, name=name, split=split: f"{name}-{split}-{n}")


def _translated(folder: Path) -> None:
    """As a translation model would have written them: rows with the ids of their originals."""
    for code in TASKS["tydiqa"].languages:
        if code == "en":
            continue
        name = LANGUAGES[code].name.lower()
        pairs = (
            ("en", code, "train", "english-train", range(60)),
            (code, "en", "test", f"{name}-dev", _numbers("test")),
        )
        for origin, language, split, prefix, numbers in pairs:
            rows = [{"id": f"{prefix}-{n}", **_asked(n, language)} for n in numbers]
            path = TRANSLATED.replace("{from}", origin).replace("{to}", language).replace("{split}", split)
            _jsonl(folder / path, rows)


def _asked(n: int, language: str) -> dict[str, str]:
    answer, before = (
        said(_PLACES[n % 6], language),
        said(f"{_NAMES[n // 6 % 6]} took {n} {_THINGS[n % 5]} to the ", language),
    )
    return {
        "context": before + answer + said(" by night.", language),
        "question": said(f"Where are the {_THINGS[n % 5]}?", language),
        "answers": json.dumps([{"text": answer, "answer_start": len(before)}], ensure_ascii=False),
    }


def _xlsum(folder: Path) -> None:
    task = TASKS["xlsum"]
    for code in task.languages:
        name = task.names.get(code) or LANGUAGES[code].name.lower().replace(" ", "_")
        for split, theirs in (("train", "train"), ("validation", "val"), ("test", "test")):
            rows = [
                {
                    "id": str(n),
                    "url": f"https://example.org/{n}",
                    "title": said(_THINGS[n % 6], code),
                    "summary": said(f"{_NAMES[n % 6]} sold {_THINGS[n % 6]}.", code),
                    "text": said(f"{_NAMES[n % 6]} sold {_THINGS[n % 6]}. {_sentence(n)}", code),
                }
                for n in _numbers(split)
            ]
            _jsonl(folder / f"XLSum_complete_v2.0/{name}_{theirs}.jsonl", rows)


def _nusax(folder: Path) -> None:
    for code in TASKS["nusax"].languages:
        name = LANGUAGES[code].name.lower().replace(" ", "_")
        for split, theirs in (("train", "train"), ("validation", "valid"), ("test", "test")):
            file = io.StringIO()
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("id", "text", "label"))
            for n in _numbers(split):
                label, word = list(_MOODS.items())[n % 3]
                writer.writerow((n, said(f"A {word} {_PLACES[n % 6]}, {word} all day", code), label))
            _write(folder / f"nusax/sentiment/{name}/{theirs}.csv", file.getvalue())


def _topics(folder: Path) -> None:
    for code, language in LANGUAGES.items():
        for split, theirs in (("train", "train"), ("validation", "dev"), ("test", "test")):
            items = [(n, *list(_SUBJECTS.items())[n % 3]) for n in _numbers(split)]
            rows = [(str(n), label, said(f"The {word} by the {_PLACES[n % 6]}.", code)) for n, label, word in items]
            path = folder / f"sib200/{language.flores}/{theirs}.tsv"
            _tsv(path, ("index_id", "category", "text"), rows)
