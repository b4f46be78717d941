"""Do lingraft's likelihoods, greedy texts and answer metrics agree with lm-evaluation-harness's on the same requests?

    .venv/bin/python benchmarks/lm_eval_agreement.py --lm-eval PYTHON --data-dir DIR [--items 100] [--texts 40]

PYTHON is the interpreter of an environment of its own with lm-eval and torch. Both sides load the same folder of weights
in float32 on the CPU and get the same prompts; lm-eval is asked through its `LM` interface, its metrics and its filters.
Its XQuAD needs `transformers<5`: `--squad PYTHON` names an environment that has it (default: that of `--lm-eval`).
"""

# pyright: reportMissingImports=false
import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import commit, processor, table, versions

if TYPE_CHECKING:
    from lingraft.backbones import Backbone
    from lingraft.tasks.items import Example

# lingraft is imported inside functions: the other environment, which runs this file too, does not have it.

LABELS = (("xcopa", "sw"), ("xcopa", "th"), ("topics", "en"), ("topics", "sw"), ("xnli", "sw"))
WRITTEN = ("en", "de", "hi", "th", "zh")
MATCHED = ("en", "es", "de", "hi", "vi", "ar", "zh")
"""The languages for which MLQA has rules that XQuAD has, too."""
COUNTED = ("en", "de", "fr", "ru", "sw", "th", "bn", "zh")
MARGIN = 1e-3
"""Nats: where lm-eval's two best candidates are nearer than this, rounding decides which is chosen."""
EXACT_ITEMS = 3
"""Items of every task that lm-eval is also asked in float64."""

FORMS = (
    ("18", "{n}", True),
    ("The answer is 18.", "The answer is {n}.", True),
    ("3 + 4 = 18, so 18%", "3 + 4 = {n}, so {n}%", True),
    ("**$18**", "**${n}**", True),
    ("20-18", "20-{n}", True),
    ("18.00", "{n}.00", True),
    ("18 (not five...)", "{n} (not five...)", True),
    ("thousands as the language groups them", "{own}", True),
    ("thousands as English groups them", "{english}", True),
    ("the language's own digits", "{digits}", True),
    ("1.8 for 18", "{tenth}", False),
    ("-18 for 18", "-{n}", False),
    ("18/7 for 18", "{n}/7", False),
    ("185 for 18", "{n}5", False),
    ("no number", "...", False),
)
"""How a number may be written: as the table shows it, its form, and whether it is the number of the data."""
GROUPING = {"de": ".", "fr": "\u202f", "ru": "\u00a0"}
DIGITS = {"th": "๐๑๒๓๔๕๖๗๘๙", "bn": "০১২৩৪৫৬৭৮৯"}


# --- the other side -------------------------------------------------------------------------------------------------


def theirs(asked: dict[str, Any]) -> dict[str, Any]:
    """What lm-eval says to requests; runs under the other interpreter."""
    found: dict[str, Any] = {"versions": versions("lm_eval", "transformers", "torch", "tokenizers")}
    if "model" in asked:
        import torch
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        torch.set_num_threads(asked["threads"])
        # `auto` would be the type the weights are stored in. Generation is batched by nothing: no padding to differ by.
        lm = HFLM(pretrained=asked["model"], dtype=asked["dtype"], device="cpu", batch_size=1)

        def instances(kind: str, arguments: list[Any]) -> list[Any]:
            return [Instance(kind, {}, tuple(given), number) for number, given in enumerate(arguments)]

        answers = lm.loglikelihood(instances("loglikelihood", asked.get("likelihood", [])))
        found["likelihood"] = [score for score, _ in answers]
        found["context"] = [lm.tok_encode(prompt) for prompt, _ in asked.get("likelihood", [])]
        found["generate"] = lm.generate_until(instances("generate_until", asked.get("generate", [])))
    if asked.get("mlqa"):
        from lm_eval.tasks.mlqa.utils import process_results_lang

        found["mlqa"] = [process_results_lang({"answers": r}, [text], lang) for text, r, lang in asked["mlqa"]]
    if asked.get("squad"):
        try:
            from lm_eval.tasks.xquad.utils import process_results_qa
        except ImportError as error:
            found["squad_error"] = str(error)
        else:
            found["squad"] = [process_results_qa({"answers": {"text": r}}, [text]) for text, r, _ in asked["squad"]]
    if asked.get("numbers"):
        found["numbers"] = their_numbers(asked["numbers"])
    return found


def their_numbers(pairs: list[tuple[str, str]]) -> list[tuple[str, bool]]:
    """The number lm-eval's MGSM reads in a text, and whether it takes it for the right one: pattern and options from its task."""
    import lm_eval
    import yaml
    from lm_eval.api.metrics import exact_match_fn
    from lm_eval.filters.extraction import RegexFilter

    assert lm_eval.__file__ is not None
    task = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks" / "mgsm" / "direct" / "direct_yaml").read_text())
    steps = next(f["filter"] for f in task["filter_list"] if f["name"] == "flexible-extract")
    options = {k: v for k, v in next(s for s in steps if s["function"] == "regex").items() if k != "function"}
    metric = next(m for m in task["metric_list"] if m["metric"] == "exact_match")
    ignored = {k: v for k, v in metric.items() if k.startswith("ignore_")}
    read = [answers[0] for answers in RegexFilter(**options).apply([[text] for text, _ in pairs], [])]
    return [
        (said, bool(exact_match_fn(predictions=[said], references=[right], **ignored)["exact_match"]))
        for said, (_, right) in zip(read, pairs, strict=True)
    ]


def ask(python: Path, asked: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Runs this file under the other interpreter."""
    requests, answers = folder / "requests.json", folder / "answers.json"
    requests.write_text(json.dumps(asked, ensure_ascii=False))
    # Nothing is fetched: all that is asked for lies on the disk.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([str(python), __file__, "--theirs", str(requests), str(answers)], check=True, env=environment)
    return json.loads(answers.read_text())


# --- our side -------------------------------------------------------------------------------------------------------


@dataclass
class Labels:
    """One task in one language: what both say of every item's candidates."""

    name: str
    ours: list[list[float]]
    theirs: list[list[float]]
    exact: list[list[float]]
    """What lm-eval says in float64, of the first items."""

    def row(self) -> list[str]:
        pairs = list(zip(self.ours, self.theirs, strict=True))
        differing = [t for o, t in pairs if best(o) != best(t)]
        near = sum(margin(t) < MARGIN for t in differing)
        between = [most_apart(o, t) for o, t in pairs]
        of_ours = [most_apart(o, e) for o, e in zip(self.ours, self.exact, strict=False)]
        of_theirs = [most_apart(t, e) for t, e in zip(self.theirs, self.exact, strict=False)]
        figures = [f"{max(d):.1e}" if d else "" for d in (between, of_ours, of_theirs)]
        counts = [len(pairs), len(pairs) - len(differing), near, len(differing) - near]
        return [self.name, *map(str, counts), *figures]


def best(scores: Sequence[float]) -> int:
    """The likeliest candidate; the first of equals, as both sides have it."""
    return max(range(len(scores)), key=lambda i: scores[i])


def margin(scores: Sequence[float]) -> float:
    first, second = sorted(scores, reverse=True)[:2]
    return first - second


def most_apart(some: Sequence[float], others: Sequence[float]) -> float:
    """The largest difference, in nats, between two sides' differences of two candidates: a shift of all cancels."""
    shifts = [a - b for a, b in zip(some, others, strict=True)]
    return max(shifts) - min(shifts)


def items(task: str, language: str, data: Path, limit: int | None = None) -> "list[Example]":
    from lingraft.tasks.items import subset
    from lingraft.tasks.table import find_task

    found = find_task(task)
    return subset(found.examples(found.sources(language, "test", data), language=language), limit)


def scored_by_auto(backbone: "Backbone", example: "Example") -> list[str]:
    """The candidates as far as `auto` reads them: up to the first token that differs, where that is another for each.

    Raises:
        AssertionError: No text ends there, so that lm-eval cannot be asked.
    """
    whole = [backbone.encode(example.prompt + c) for c in example.candidates]
    shared = next(i for i in range(min(map(len, whole))) if len({ids[i] for ids in whole}) > 1)
    firsts = [ids[: shared + 1] for ids in whole]
    if len({ids[-1] for ids in firsts}) < len(firsts):
        return list(example.candidates)
    texts = [backbone.decode(ids) for ids in firsts]
    assert [backbone.encode(text) for text in texts] == firsts, "a token's text is not read as that token"
    return [text.removeprefix(example.prompt) for text in texts]


def regrouped(values: Iterable[float], like: Sequence[Sequence[float]]) -> list[list[float]]:
    remaining = iter(values)
    return [[next(remaining) for _ in scores] for scores in like]


def labels(backbone: "Backbone", python: Path, data: Path, limit: int, request: dict[str, Any], folder: Path) -> str:
    """Label likelihood, whole candidates and as `auto` scores them."""
    from lingraft.evaluation import predict

    ways: list[tuple[str, list[Any], list[list[float]]]] = []
    for task, language in LABELS:
        examples = items(task, language, data, limit)
        for scoring in ("sequence", "auto"):
            ours = [list(p.scores) for p in predict(backbone, None, examples, scoring=scoring, max_length=4096)]
            scored = [e.candidates if scoring == "sequence" else scored_by_auto(backbone, e) for e in examples]
            asked = [(e.prompt, c) for e, candidates in zip(examples, scored, strict=True) for c in candidates]
            ways.append((f"{task} {language}, {scoring}", asked, ours))
            print(ways[-1][0], "asked of lingraft", flush=True)
    said = ask(python, {**request, "likelihood": [pair for _, asked, _ in ways for pair in asked]}, folder)
    contexts = [[*backbone.prefix, *backbone.encode(prompt)] for _, asked, _ in ways for prompt, _ in asked]
    assert contexts == said["context"], "the two sides read different tokens"
    firsts = [sum(len(s) for s in ours[:EXACT_ITEMS]) for _, _, ours in ways]
    few = [pair for (_, asked, _), n in zip(ways, firsts, strict=True) for pair in asked[:n]]
    exact = iter(ask(python, {**request, "likelihood": few, "dtype": "float64"}, folder)["likelihood"])
    values = iter(said["likelihood"])
    found = [
        Labels(name, ours, regrouped(values, ours), regrouped(exact, ours[:EXACT_ITEMS])) for name, _, ours in ways
    ]
    return likelihood_section(found)


def likelihood_section(found: Sequence[Labels]) -> str:
    """Both ways of every task, one after the other."""
    same = ", ".join(
        f"{whole.name.split(',')[0]} {sum(best(a) == best(b) for a, b in zip(first.ours, whole.theirs, strict=True))}"
        f" of {len(whole.ours)}"
        for whole, first in zip(found[::2], found[1::2], strict=True)
    )
    header = [
        "",
        "items",
        "same answer",
        "excused",
        "another answer",
        "apart",
        "ours from exact",
        "lm-eval's from exact",
    ]
    return f"""## Label likelihood

{table(header, [f.row() for f in found])}

`sequence`: `predict(..., scoring="sequence")` and lm-eval on whole candidates, its `multiple_choice`. `auto`: lingraft's
default, and lm-eval on candidates that end with the first token that differs, which is all that `auto` scores.
Excused: another answer, but lm-eval's two best are less than {MARGIN:g} nats apart. *Apart*: the largest difference, in nats,
between the two sides' difference of two candidates (lingraft starts to count where candidates differ, which shifts an item's
scores alike). *From exact*: the same against lm-eval in float64, the first {EXACT_ITEMS} items of every row. In float32 and over a
vocabulary of 262,144, lm-eval's `log_softmax` makes a token too likely by up to 6e-5 (median 2e-5), lingraft's `logsumexp` by
up to 2e-6, both against float64 on the same logits: this shows where candidates have different numbers of tokens.

`auto` answers another question than whole candidates do. It chooses what lm-eval chooses from whole ones in: {same}.
"""


def texts(backbone: "Backbone", python: Path, data: Path, limit: int, request: dict[str, Any], folder: Path) -> str:
    """Greedy texts, as the task asks for them and without a stop."""
    from lingraft.evaluation import Asking
    from lingraft.evaluation import ask as ask_ours
    from lingraft.tasks.table import find_task

    task = find_task("xquad")
    prompts = [e for language in WRITTEN for e in items("xquad", language, data, limit // len(WRITTEN))]
    rows, differing = [], []
    for tokens, stop in ((task.new_tokens(), task.stop()), (32, ())):
        name = f"{tokens} tokens, {'until ' + ' '.join(map(repr, stop)) if stop else 'no stop'}"
        asking = Asking(scoring="generation", new_tokens=tokens, stop=stop, max_length=4096)
        ours = [said.text or "" for said in ask_ours(backbone, None, prompts, asking)]  # pyright: ignore[reportAttributeAccessIssue]
        print(name, "asked of lingraft", flush=True)
        options = {"until": list(stop), "max_gen_toks": tokens, "do_sample": False}
        theirs = ask(python, {**request, "generate": [(e.prompt, options) for e in prompts]}, folder)["generate"]
        other = [(e.id, o, t) for e, o, t in zip(prompts, ours, theirs, strict=True) if o != t.lstrip()]
        at_once = [found for found in other if not found[2].strip()]
        rows.append([name, *map(str, (len(ours), len(ours) - len(other), len(at_once), len(other) - len(at_once)))])
        differing += [f"- {name}, {i}: {o!r} / {t!r}" for i, o, t in other if t.strip()]
    return "\n".join(
        [
            "## Greedy texts",
            "",
            table(["", "prompts", "same text", "lm-eval stops before any text", "another text"], rows),
            "",
            f"XQuAD in {', '.join(WRITTEN)}. lingraft writes in padded batches, lm-eval one prompt at a time. White space before a "
            "text is none of it here: where a text begins with a line break, lm-eval's ends there and is empty, lingraft's "
            "goes on (`generation.ended`).",
            *differing,
            "",
        ]
    )


# --- metrics --------------------------------------------------------------------------------------------------------

Triple = tuple[str, list[str], str]
"""A text, the right answers, the language."""


def answers(data: Path) -> list[Triple]:
    """Texts that are right, right but for marks and case, nearly right, and wrong: six for every item of XQuAD."""
    found: list[Triple] = []
    for language in MATCHED:
        examples = items("xquad", language, data)
        for example, other in zip(examples, [*examples[1:], examples[0]], strict=True):
            right, context = example.references[0], example.prompt
            place = context.find(right)
            around = context[max(0, place - 40) : place + len(right) + 40]
            start, wrong = " ".join(context.split()[:8]), other.references[0]
            said = (right, f"“{right.upper()}”.", around, f"{wrong}, {right}", wrong, start)
            found += [(text, list(example.references), language) for text in said]
    return found


def spelled(text: str, language: str) -> str:
    from lingraft.answers.normalising import unified

    return unified(text)


def without_articles(text: str, language: str) -> str:
    """Arabic text without `ال` in any place, as MLQA's own script has it; its marks are taken out first there, too."""
    text = spelled(text, language)
    if language != "ar":
        return text
    return "".join(c for c in text if not unicodedata.category(c).startswith("P")).replace("ال", " ")


def plain_marks(text: str, language: str) -> str:
    """Without punctuation outside ASCII, which SQuAD's own rule leaves in."""
    return "".join(c for c in text if c.isascii() or not unicodedata.category(c).startswith("P"))


Changes = Mapping[str, Callable[[str, str], str]]
"""Why figures may differ: what has to be done to the texts that lm-eval reads for them to be the same."""
SAME: Changes = {"same": lambda text, language: text}
MLQA_CHANGES: Changes = {**SAME, "Unicode spelling": spelled, "Arabic article inside words": without_articles}
SQUAD_CHANGES: Changes = {
    **SAME,
    "punctuation outside ASCII": plain_marks,
    "Unicode spelling": lambda text, language: plain_marks(spelled(text, language), language),
}


def explained(
    python: Path, kind: str, triples: list[Triple], changes: Changes, folder: Path
) -> tuple[dict[str, Counter[str]], str | None]:
    """By language, how many texts have lingraft's figures after each change; why, where lm-eval cannot be asked."""
    from lingraft.answers.matching import exact_match, f1

    ours = [(exact_match(*triple), f1(*triple)) for triple in triples]
    found: dict[str, Counter[str]] = {language: Counter() for _, _, language in triples}
    left = list(range(len(triples)))
    for reason, change in changes.items():
        changed = [
            (change(t, lang), [change(r, lang) for r in right], lang) for t, right, lang in (triples[n] for n in left)
        ]
        if not changed:
            break
        said = ask(python, {kind: changed}, folder)
        if kind not in said:
            return found, str(said[f"{kind}_error"])
        agreed = {
            n
            for n, theirs in zip(left, said[kind], strict=True)
            if max(abs(ours[n][0] - theirs["exact_match"]), abs(ours[n][1] - theirs["f1"])) < 1e-9
        }
        found_here = Counter(triples[n][2] for n in agreed)
        for language, count in found_here.items():
            found[language][reason] = count
        left = [n for n in left if n not in agreed]
    return found, None


def matching(python: Path, squad: Path, data: Path, folder: Path) -> str:
    """Exact match and F1."""
    triples = answers(data)
    by_language, _ = explained(python, "mlqa", triples, MLQA_CHANGES, folder)
    english, error = explained(squad, "squad", [t for t in triples if t[2] == "en"], SQUAD_CHANGES, folder)
    rows = [(f"mlqa {language}", counts, MLQA_CHANGES) for language, counts in by_language.items()]
    if error is None:
        rows.append(("xquad en (SQuAD's rule)", english["en"], SQUAD_CHANGES))
    names = list(dict.fromkeys([*MLQA_CHANGES, *SQUAD_CHANGES]))
    total = len(triples) // len(MATCHED)
    body = [
        [name, str(total), *(str(counts[r]) if r in changes else "" for r in names), str(total - counts.total())]
        for name, counts, changes in rows
    ]
    return f"""## Exact match and F1

{table(["", "texts", *names, "unexplained"], body)}

Six texts for every item of XQuAD: the right answer; the same in capitals, quotation marks and a full stop; the answer with 40
characters on both sides; another answer before it; another answer; the first eight words. *Same*: both figures agree to 1e-9.
A text that differs stands under the first change (they add up) after which they agree. {
        f"lm-eval's xquad could not be imported: {error}." if error else ""
    }

- Spelling: lingraft brings both texts to NFKC without characters that show nothing; lm-eval compares code points.
- Arabic: MLQA's own script takes `ال` out anywhere, and so does lingraft; lm-eval's copy of it only at the start of a word.
- SQuAD's rule takes out ASCII punctuation only, lingraft all (as MLQA).
"""


def numbers(python: Path, data: Path, folder: Path) -> str:
    """Numbers read in texts: invented ones around MGSM's numbers, and GSM8K's solutions."""
    from lingraft.answers.numerals import equal_numbers
    from lingraft.answers.parsing import parse_number

    cases: list[tuple[str, str, str, str | None, str]] = []
    for language in COUNTED:
        for example in items("mgsm", language, data):
            right = example.references[0]
            n = right.replace(",", "")
            grouped = f"{int(n):,}"
            for name, form, _ in FORMS:
                if ("own" in form or "english" in form) and "," not in grouped:
                    continue
                if "digits" in form and language not in DIGITS:
                    continue
                own = grouped.replace(",", GROUPING.get(language, ","))
                digits = n.translate(str.maketrans("0123456789", DIGITS.get(language, "0123456789")))
                tenth = f"{n[:-1] or 0}.{n[-1]}"
                text = form.format(n=n, own=own, english=grouped, digits=digits, tenth=tenth)
                cases.append((name, text, right, None, language))
    for line in (data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines():
        solution = re.sub("<<.*?>>", "", json.loads(line)["answer"])
        reasoning, _, right = solution.partition("\n#### ")
        cases.append(("GSM8K's solutions, with their last line", solution, right, "####", "en"))
        cases.append(("GSM8K's solutions, without it", reasoning, right, None, "en"))
    said = ask(python, {"numbers": [(text, right) for _, text, right, _, _ in cases]}, folder)["numbers"]
    counts: dict[str, Counter[tuple[bool, bool]]] = {}
    for (name, text, right, marker, language), (_, theirs) in zip(cases, said, strict=True):
        read, wanted = parse_number(text, marker, language).value, parse_number(right).value
        ours = read is not None and wanted is not None and equal_numbers(read, wanted)
        counts.setdefault(name, Counter())[ours, theirs] += 1
    wrong = {name for name, _, right in FORMS if not right}
    body = [
        [name, "no" if name in wrong else "yes" if name in {f[0] for f in FORMS} else "mostly", str(c.total())]
        + [str(c[key]) for key in ((True, True), (False, False), (True, False), (False, True))]
        for name, c in counts.items()
    ]
    header = [
        "text",
        "is it the number?",
        "texts",
        "both say so",
        "both deny it",
        "only lingraft says so",
        "only lm-eval does",
    ]
    return f"""## Numbers

{table(header, body)}

lm-eval: `flexible-extract` and `exact_match` of its MGSM; lingraft: `parse_number` with the language. The numbers are those of
MGSM in {", ".join(COUNTED)}. GSM8K's reasoning does not always end with the result: what both deny there is mostly that.

- lm-eval drops all punctuation before it compares: 1.8 and -18 are 18, and 18.00 is 1800.
- It takes dots alone for a number, and knows ASCII's digits only. Digits grouped by spaces are several numbers to it.
- lingraft reads a comma or dot before three digits as the language does: 70,000 in German, French or Russian text is 70. A
  model that keeps English grouping there loses by it.
"""


def main() -> None:
    if sys.argv[1:2] == ["--theirs"]:
        requests, said = Path(sys.argv[2]), Path(sys.argv[3])
        said.write_text(json.dumps(theirs(json.loads(requests.read_text())), ensure_ascii=False))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm-eval", type=Path, required=True, help="the Python that has lm-eval")
    parser.add_argument("--squad", type=Path, help="the Python that has lm-eval with transformers<5")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--items", type=int, default=100, help="items of every task and language")
    parser.add_argument("--texts", type=int, default=40, help="prompts that are continued")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/lm-eval-agreement.md"))
    options = parser.parse_args()

    import torch

    from lingraft.backbones import Backbone
    from lingraft.config import BackboneConfig
    from lingraft.locating import locate, materialise

    # A machine's name for one interpreter may be a link into another: the path as given finds its packages.
    python, data = options.lm_eval.absolute(), options.data_dir
    squad = (options.squad or options.lm_eval).absolute()
    torch.set_num_threads(options.threads)
    backbone = Backbone(locate(BackboneConfig(model=options.model, revision=None, dtype="float32", device="cpu")))
    request = {"model": str(materialise(backbone.located)), "dtype": "float32", "threads": options.threads}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        theirs_are, squads_are = (ask(p, {}, folder)["versions"] for p in (python, squad))
        parts = [
            numbers(python, data, folder),
            matching(python, squad, data, folder),
            texts(backbone, python, data, options.texts, request, folder),
            labels(backbone, python, data, options.items, request, folder),
        ]
    sides = {
        "lingraft": {"python": platform.python_version(), **versions("torch", "transformers", "tokenizers")},
        "lm-eval": theirs_are,
        "lm-eval for its xquad": squads_are,
    }
    listed = [
        f"- {side}: {', '.join(f'{name} {number}' for name, number in them.items())}" for side, them in sides.items()
    ]
    heading = [
        "# Agreement with lm-evaluation-harness",
        "",
        "    .venv/bin/python benchmarks/lm_eval_agreement.py --lm-eval PYTHON --squad PYTHON --data-dir DIR"
        f" --items {options.items} --texts {options.texts}",
        "",
        f"{time.strftime('%B %Y')}; commit {commit()}; {os.cpu_count()} cores of {processor()}, {options.threads} thread(s). "
        f"Both sides load the same folder of {backbone.located.name} in float32 on the CPU.",
        "",
        *listed,
        "",
    ]
    parts.append("\n".join(heading))
    text = "\n".join(reversed(parts))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
