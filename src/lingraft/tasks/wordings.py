"""The wordings of every task.

`default` is the AdaMergeX paper's zero-shot wording with one final cue, the same in training and evaluation and without a
blank behind it. `paper` is what that paper's published evaluation code asks (its cues end in a blank, so answers start
without one). `flare` is the wording of the FLARE paper's three tasks, without the blank behind its cues. `xlt` fills the six
slots of Huang et al. (2023, arXiv 2305.07004, appendix); a constraint is written without the brackets that mark it as optional
there. `xlt-adamergex` is the AdaMergeX code's own XLT, which departs from it: no blank after `for`, other slots, no line that
asks for a format (XL-Sum has half of one), and 16 tokens of room in three tasks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from lingraft.prompts import Prompt, xlt

TOPIC_NAMES = ("science/technology", "travel", "politics", "sports", "health", "entertainment", "geography")
SENTIMENTS = ("positive", "neutral", "negative")
RELATIONS = ("entailment", "neutral", "contradiction")

# What follows a solved problem when a model asks itself the next one.
_NEXT = ("\nQuestion:", "\nLet's think step by step.", "\n\n\n")


def _or(names: Sequence[str], last: str) -> str:
    return ", ".join(names[:-1]) + f", {last} {names[-1]}"


def _among(what: str, names: Sequence[str]) -> str:
    return f"The {what} can be chosen from {_or(names, 'and')}"


def _paper(template: str, tokens: int = 16, stop: tuple[str, ...] = ("\n",)) -> Prompt:
    return Prompt(template, new_tokens=tokens, stop=stop, lead="")


def _adamergex(template: str, tokens: int = 16) -> Prompt:
    return Prompt(template, new_tokens=tokens, stop=(), generate=True, lead="")


_RETELL = (
    "You should retell the question in English.\nYou should answer the question in English in one or a few words.\n"
    "You should step-by-step answer the request."
)
_JUDGE = "judge whether the hypothesis is true (entailment), false (contradiction), or undetermined (neutral) given the premise"
_PLAUSIBLE = "Here is a premise and a question. Help me pick the more plausible option."
_SYNONYMS = {"entailment": ("true",), "neutral": ("undetermined",), "contradiction": ("false",)}
_IN_WORDS = "in one or a few words in {language_name}"

# The last line of GSM8K's solutions, which models trained on them write too.
_LAST = "####"
MGSM = {
    "default": Prompt(
        "Let's think step by step. Question: {question}\nAnswer:", marker=_LAST, new_tokens=512, stop=_NEXT
    ),
    "paper": replace(_paper("Let's think step by step.\n\nQuestion: {question}\nAnswer: ", 512, _NEXT), marker=_LAST),
    "xlt": xlt(
        "an arithmetic reasoning",
        "Request: {question}",
        "retell the request",
        "do step-by-step answer to obtain a number answer",
        "answer",
        tokens=512,
    ),
    "xlt-adamergex": replace(
        _adamergex(
            f"I want you to act as act as an arithmetic reasoning expert for{{language_name}}\n{_RETELL}\n\n"
            "Question: {question}\nAnswer: ",
            512,
        ),
        marker=_LAST,
    ),
}

_LETTERS = {"0": ("A", "choice1"), "1": ("B", "choice2")}
_LETTERED = "Premise: {premise}\nQuestion: What is the {question}?\n(A) {choice1}\n(B) {choice2}\nAnswer: "
XCOPA = {
    "default": Prompt(
        _PLAUSIBLE + " Premise: {premise} Question: What is the {question}? (A) {choice1} (B) {choice2}\nAnswer:",
        readings=_LETTERS,
    ),
    "paper": replace(_paper(f"{_PLAUSIBLE} Answer with (A) or (B).\n{_LETTERED}"), readings=_LETTERS),
    "xlt": replace(
        xlt(
            "a commonsense reasoning",
            "Here is a premise: {premise}. What is the {question}? Help me pick the more plausible option: "
            "-choice1: {choice1}, -choice2: {choice2}",
            "retell the premise and the options",
            "do step-by-step answer to pick a choice",
            "choice number",
        ),
        answers={"0": "choice1", "1": "choice2"},
        readings={"0": ("choice 1", "1", "(A)"), "1": ("choice 2", "2", "(B)")},
    ),
    "xlt-adamergex": replace(
        _adamergex(
            f"I want you to act as a commonsense reasoning expert for{{language_name}}\n{_RETELL} {_PLAUSIBLE} "
            f"Answer with (A) or (B).\n{_LETTERED}"
        ),
        readings=_LETTERS,
    ),
}

XNLI = {
    "default": Prompt(
        f"You should {_JUDGE}. Premise: {{premise}} Hypothesis: {{hypothesis}}\nRelationship:", readings=_SYNONYMS
    ),
    "paper": _paper(
        f"You should {_JUDGE}. {_among('relationship', ('entailment', 'contradiction', 'neutral'))}.\n"
        "Premise: {premise}\nHypothesis: {hypothesis}\nRelationship: "
    ),
    "xlt": replace(
        xlt(
            "a natural language inference",
            "Premise: {premise}\nHypothesis: {hypothesis}",
            "retell the premise and hypothesis",
            f"{_JUDGE}. {_among('relationship', ('entailment', 'contradiction', 'neutral'))}",
            "relationship",
        ),
        readings=_SYNONYMS,
    ),
    "xlt-adamergex": _adamergex(
        "I want you to act as a natural language inference expert for{language_name}.\nPremise: {premise}\n"
        "Hypothesis: {hypothesis}\nYou should retell the premise and hypothesis in English.\n"
        f"You should {_JUDGE.replace('false (', 'false(')}. "
        f"{_among('relationship', ('entailment', 'contradiction', 'neutral'))}.\n"
        "You should step-by-step answer the request. Answer by entailment, contradiction or neutral.\nRelationship: "
    ),
    "flare": Prompt("Premise: {premise}\nHypothesis: {hypothesis}\nLabel:"),
}

_EXTRACT = Prompt("{context} Question: {question}\nAnswer:")
_FLARE_EXTRACT = Prompt("Context: {context}\nQuestion: {question}\nAnswer:")
# MKQA's slots with the context before the question: the XLT paper has no task of extraction.
_XLT_EXTRACT = xlt(
    "a question answering",
    "Context: {context}\nQuestion: {question}",
    "retell the question",
    "answer the question in English in one or a few words",
    "answer",
    _IN_WORDS,
)
XQUAD = {
    "default": _EXTRACT,
    "paper": _paper("Question: {context}{question}\nAnswer: "),
    "xlt": _XLT_EXTRACT,
    "xlt-adamergex": _adamergex(
        f"I want you to act as a question answering expert for{{language_name}}\n{_RETELL}\n"
        "Question: {context}{question}\nAnswer: "
    ),
    "flare": _FLARE_EXTRACT,
}
TYDIQA = {"default": _EXTRACT, "xlt": _XLT_EXTRACT, "flare": _FLARE_EXTRACT}

XLSUM = {
    "default": Prompt("Summarize the context in one sentence. Title: {title} Context: {text}\nSummary:", new_tokens=64),
    "paper": _paper("Title: {title}\nContext: {text}\nSummary: ", 64),
    "xlt": xlt(
        "a multilingual summarization",
        "Text: {text}",
        "repeat the entire text",
        "think step-by-step to summarize the entire text in a maximum of two sentences",
        "summary",
        "into one sentence in {language_name}",
    ),
    "xlt-adamergex": _adamergex(
        "I want you to act as a multilingual summarization expert for{language_name}.\nTitle: {title}\nContext: {text}\n"
        "You should repeat the entire text in English. You should think step-by-step to summarize the entire text in a "
        "maximum of two sentences . You should step-by-step answer the request. You should tell me the summary into one "
        "sentence in {language_name}.\nSummary: ",
        64,
    ),
}

# The XLT paper has neither task: these slots are ours, after its own.
_TOPIC_WORDS = {"science/technology": ("science and technology", "science", "technology"), "sports": ("sport",)}
TOPICS = {
    "default": Prompt("Text: {text}\nTopic:", new_tokens=8, readings=_TOPIC_WORDS),
    "xlt": replace(
        xlt(
            "a topic classification",
            "Text: {text}",
            "retell the text",
            f"choose the topic of the text. {_among('topic', TOPIC_NAMES)}",
            "topic",
        ),
        readings=_TOPIC_WORDS,
    ),
}
NUSAX = {
    "default": Prompt("Text: {text}\nSentiment:", new_tokens=8),
    "xlt": xlt(
        "a sentiment analysis",
        "Text: {text}",
        "retell the text",
        f"judge whether the sentiment of the text is {_or(SENTIMENTS, 'or')}. {_among('sentiment', SENTIMENTS)}",
        "sentiment",
    ),
    "flare": Prompt("{text}\nSentiment:", new_tokens=8),
}

WORDINGS: Mapping[str, Mapping[str, Prompt]] = MappingProxyType(
    {
        "mgsm": MGSM,
        "xcopa": XCOPA,
        "xnli": XNLI,
        "xquad": XQUAD,
        "tydiqa": TYDIQA,
        "xlsum": XLSUM,
        "topics": TOPICS,
        "nusax": NUSAX,
    }
)
