"""Files of forms that a suffix does not explain: SQuAD's nested JSON, MGSM's table without a header and its exemplars."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lingraft.errors import DataError
from lingraft.tasks.sources import Row, parse_json, read_text, row_of


def squad_rows(path: Path) -> list[Row]:
    """A row a question of SQuAD v1.1 JSON: id, title, context, question, and answers as JSON text.

    Raises:
        DataError: The file is missing, not JSON or not of this form.
    """
    value = parse_json(read_text(path), path)
    if not isinstance(value, dict) or not isinstance(value.get("data"), list):
        raise DataError(
            "this is not SQuAD's form (there is no list 'data')",
            where=path,
            remedy="give a file in the form of SQuAD 1.1, or declare the task's fields for rows",
        )
    rows = [
        row_of({**question, "title": title, "context": context}, f"{path}, item {question['id']}")
        for title, context, question in _questions(value["data"], path)
    ]
    if not rows:
        raise DataError("this file has no questions", where=path, remedy="give a file that has some")
    return rows


def _questions(articles: list[Any], path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    place = f"{path}, at its beginning"
    try:
        for number, article in enumerate(articles):
            place = f"{path}, article {number}"
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    place = f"{path}, article {number}, after item {question['id']}"
                    yield article.get("title", ""), paragraph["context"], question
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"this is not SQuAD's form ({type(error).__name__}: {error})",
            where=place,
            remedy="correct the entry: paragraphs have a context and qas, qas an id, a question and answers",
        ) from None


def numbered_rows(path: Path) -> list[Row]:
    """MGSM's test files: question and number, separated by a tab, unquoted and without a header.

    Raises:
        DataError: The file is missing, or a line has not two columns.
    """
    rows = []
    for line, text in enumerate(read_text(path).split("\n"), 1):
        if text.strip():
            values = text.rstrip("\r").split("\t")
            if len(values) != 2:
                raise DataError(
                    f"this line has {len(values)} columns, not a question and a number",
                    where=f"{path}:{line}",
                    remedy="write the question, a tab, and the number",
                )
            rows.append(Row(dict(zip(("question", "number"), values, strict=True)), f"{path}:{line}"))
    return rows


def exemplar_rows(path: Path) -> list[Row]:
    """MGSM's worked exemplars of all languages: language, number in the list, question, answer and its number.

    Upstream they are literals in a Python file, which is read and never run; the same in JSON will do.

    Raises:
        DataError: The file is missing or not of this form.
    """
    text = read_text(path)
    value = _literals(text, path) if path.suffix == ".py" else parse_json(text, path)
    try:
        numbers = value["EXEMPLAR_NUMBER_ANSWERS"]
        return [
            row_of(
                {"language": code, "index": index, "question": pair["q"], "answer": pair["a"], "number": number},
                f"{path}, {code} {index}",
            )
            for code, pairs in value["MGSM_EXEMPLARS"].items()
            for (index, pair), number in zip(pairs.items(), numbers, strict=True)
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"this file does not hold MGSM's exemplars ({type(error).__name__}: {error})",
            where=path,
            remedy="download exemplars.py of MGSM again",
        ) from None


def _literals(text: str, path: Path) -> dict[str, Any]:
    try:
        assigned = [node for node in ast.parse(text).body if isinstance(node, ast.Assign)]
        return {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in assigned
            if isinstance(node.targets[0], ast.Name)
        }
    except (
        SyntaxError,
        ValueError,
        TypeError,
        RecursionError,
        MemoryError,
    ) as error:  # Parsing nests as deeply as what is read.
        raise DataError(
            f"these are not literals ({error})", where=path, remedy="download exemplars.py of MGSM again"
        ) from None
