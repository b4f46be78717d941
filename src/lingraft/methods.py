"""The table of methods: what a method trains, merges and tunes. A row is a method; the planner turns rows into steps."""

from dataclasses import dataclass, replace
from typing import Literal

from lingraft.config import FUSION_FUNCTIONS
from lingraft.errors import UserError, suggestion

Reference = Literal[
    "target", "source", "other", "initial", "projected-target", "projected-source", "projected-other", "task"
]
CRITERIA = {
    "labels": "the mean log-likelihood of the gold labels on the development languages",
    "entropy": "the least mean entropy of the answers to the target's own items, labels unread",
    "likelihood": "the greatest log-likelihood of the target's own items as text, labels unread",
    "norms": "‖ΔT‖ / ‖ΔR_t − ΔR_s‖, so that what is added is as large as what it is added to; no data at all",
}
"""By what a method's λ is chosen. All but the first choose for each target language, without a label in any."""


@dataclass(frozen=True)
class Method:
    """One way to get a model for a target language.

    Attributes:
        name: What users write.
        title: What tables print.
        says: One line on what it does.
        adapter: What is evaluated: nothing, the task's adapter in the `source` or the `target` language, one trained on the
            source's task `sequential`ly after the target's reference task, T trained on with `projected` labels, a `graft`, a
            `second` stage, trained in the target language on top of a first one that is merged in, or a `stack`: the target's
            language adapter and on it a task adapter that was trained on the source's.
        references: For a graft, whose difference is added: the reference adapter of the target, the source or another language,
            or the `initial` adapter, which is untrained (LoRA: an update of zero); the same of T trained on with projected
            labels, where T itself (`task`) is what training began with.
        space: For a graft, where it is merged; None for the structure's own rule.
        rule: For a graft, how it is merged: a method of `merging.Graft`.
        neutral: For a graft, the weight at which it is the task's adapter itself: 0, but 1 for AriMerge.
        criterion: For a graft, by what its weight is chosen: one of `CRITERIA`.
        prompt: The wording it is asked in, where that is the method; None: the experiment's. Training has the experiment's.
        reads: What of an item's counterpart in the source language is read, in the second stage and when asked: none of it
            (`alone`), `beside` the item, `concatenated` with it as one input, `instead` of it, or for a translation encoder the
            item `itself`.
        second: For a second stage, what it is: plain `lora`, `fused` with the counterpart's states or (`fused-mt`) with a
            translation encoder's, or `mixup`.
        first: For a second stage, the first: the task's adapter in the `source` language, or a graft, by its name.
        function: For a fused second stage, φ; None: the experiment's.
        stack: What language and task adapters are that stand on one another: MAD-X's or LF-SFT's. A graft of these is one of what
            lies beneath: `L_s + λ(L_t − L_s)`, so that λ = 0 is the source's language adapter and λ = 1 the target's.
    """

    name: str
    title: str
    says: str
    adapter: Literal["none", "source", "target", "sequential", "projected", "graft", "second", "stack"]
    references: tuple[Reference, Reference] = ("target", "source")
    space: str | None = None
    rule: str = "transfer"
    neutral: float = 0.0
    criterion: str = "labels"
    prompt: str | None = None
    reads: Literal["alone", "beside", "concatenated", "instead", "itself"] = "alone"
    second: Literal["lora", "fused", "fused-mt", "mixup"] | None = None
    first: str = "source"
    function: str | None = None
    stack: Literal["madx", "lfsft"] | None = None


_ROWS = (
    Method("vanilla", "Vanilla", "the base model, no adapter", "none"),
    Method("eng-ft", "Eng-FT", "the task's adapter from the source language, as it is (λ = 0)", "source"),
    Method(
        "xlt",
        "XLT (Vanilla)",
        "the base model, asked with cross-lingual-thought prompting: retell in English, think, answer",
        "none",
        prompt="xlt",
    ),
    Method(
        "xlt-eng-ft",
        "XLT (Eng-FT)",
        "the source's adapter, asked with cross-lingual-thought prompting",
        "source",
        prompt="xlt",
    ),
    Method(
        "xlt-adamergex",
        "XLT (Vanilla), AdaMergeX's wording",
        "as xlt, with the prompts of the AdaMergeX authors' code, for replication",
        "none",
        prompt="xlt-adamergex",
    ),
    Method(
        "xlt-adamergex-eng-ft",
        "XLT (Eng-FT), AdaMergeX's wording",
        "as xlt-eng-ft, with the prompts of the AdaMergeX authors' code, for replication",
        "source",
        prompt="xlt-adamergex",
    ),
    Method("tgt-ft", "Tgt-FT", "an adapter trained on the target's own labels: the ceiling", "target"),
    Method(
        "adamergex", "AdaMergeX", "T + λ(R_t − R_s) by the structure's own rule (LoRA: A and B separately)", "graft"
    ),
    Method(
        "adamergex-product",
        "AdaMergeX (product)",
        "T + λ(R_t − R_s) in the weight updates, exact (LoRA)",
        "graft",
        space="product",
    ),
    Method(
        "adamergex-cross",
        "AdaMergeX (cross rule)",
        "the rule of another structure: LoRA multiplied, the others added",
        "graft",
        space="cross",
    ),
    Method(
        "arimerge",
        "AriMerge",
        "coefficients λ and 1 − λ, which sum to 1, on task and references (LoRA, (IA)³); λ = 1 is Eng-FT",
        "graft",
        rule="arimerge",
        neutral=1.0,
    ),
    Method(
        "control-add",
        "control: no subtraction",
        "T + λ·R_t: the source's reference is not subtracted",
        "graft",
        ("target", "initial"),
    ),
    Method(
        "control-other",
        "control: other language",
        "T + λ(R_other − R_s): another language's divergence",
        "graft",
        ("other", "source"),
    ),
    Method(
        "control-sequential",
        "control: sequential",
        "the task trained on top of the target's reference adapter",
        "sequential",
    ),
    Method(
        "madx",
        "MAD-X",
        "the task's adapter, trained on top of the source's language adapter, on top of the target's (Pfeiffer et al. 2020)",
        "stack",
        stack="madx",
    ),
    Method(
        "lfsft",
        "LF-SFT",
        "the task's sparse difference, learned beside the source language's, beside the target's (Ansell et al. 2022)",
        "stack",
        stack="lfsft",
    ),
    Method(
        "madx-graft",
        "MAD-X, grafted languages",
        "MAD-X on L_s + λ(L_t − L_s), between and beyond the language adapters; λ = 1 is MAD-X",
        "graft",
        stack="madx",
    ),
    Method(
        "lfsft-graft",
        "LF-SFT, grafted languages",
        "LF-SFT on L_s + λ(L_t − L_s), between and beyond the languages' sparse differences; λ = 1 is LF-SFT",
        "graft",
        stack="lfsft",
    ),
    Method(
        "projection",
        "Projection",
        "P_t: T trained on with its own labels, given to the source side of parallel text, on the target side",
        "projected",
    ),
    Method(
        "projection-graft",
        "Projection, grafted",
        "T + λ(P_t − T) in the weight updates: how far to go towards projection, or beyond it (LoRA)",
        "graft",
        ("projected-target", "task"),
        space="product",
    ),
    Method(
        "adamergex-projected",
        "AdaMergeX (projected labels)",
        "T + λ(P_t − P_s) in the weight updates: projected labels as the reference task (LoRA)",
        "graft",
        ("projected-target", "projected-source"),
        space="product",
    ),
    Method(
        "control-projected-source",
        "control: source's projection",
        "T + λ(P_s − T): T trained on with its own labels in its own language, so nothing of the target's (LoRA)",
        "graft",
        ("projected-source", "task"),
        space="product",
    ),
    Method(
        "control-projected-other",
        "control: other language's projection",
        "T + λ(P_other − T): another language's projection (LoRA)",
        "graft",
        ("projected-other", "task"),
        space="product",
    ),
    Method(
        "translate-test",
        "Translate-test",
        "the source's adapter, asked in the source language: the items' translations",
        "source",
        reads="instead",
    ),
    Method(
        "translate-train",
        "LoRA (translate-train)",
        "a second stage on the target's training items, without fusion: what the methods below are measured against",
        "second",
        second="lora",
    ),
    Method(
        "input-fusion",
        "Input-level fusion",
        "a second stage that reads both texts in one input",
        "second",
        reads="concatenated",
        second="lora",
    ),
    Method(
        "x-mixup",
        "X-Mixup",
        "a second stage in which one layer's states are mixed with the counterpart's, aligned by attention (Yang et al. 2022)",
        "second",
        reads="beside",
        second="mixup",
    ),
    Method(
        "flare",
        "FLARE",
        "a second stage whose LoRA bottlenecks mix the text's states with its counterpart's",
        "second",
        reads="beside",
        second="fused",
    ),
    Method(
        "flare-mt",
        "FLARE-MT",
        "as flare, with the states of a translation encoder that reads the target text: no translation is needed",
        "second",
        reads="itself",
        second="fused-mt",
    ),
    Method(
        "flare-graft",
        "FLARE on AdaMergeX",
        "as flare, on a first stage that is AdaMergeX's graft for the language",
        "second",
        reads="beside",
        second="fused",
        first="adamergex",
    ),
)

METHODS = {row.name: row for row in _ROWS}


def method(name: str) -> Method:
    """A row of the table, one whose weight is chosen by another criterion (`adamergex-product:entropy`), or with another φ
    (`flare:mul`).

    Raises:
        UserError: There is no such method, criterion or function, or the method has no weight to choose.
    """
    row, colon, criterion = name.partition(":")
    if row not in METHODS:
        raise UserError(f"unknown method '{row}'", remedy=suggestion(row, METHODS))
    if not colon:
        return METHODS[row]
    if METHODS[row].second in ("fused", "fused-mt"):
        return _with_function(METHODS[row], name, criterion)
    if criterion not in CRITERIA:
        raise UserError(f"unknown criterion '{criterion}' in '{name}'", remedy=suggestion(criterion, CRITERIA))
    found = METHODS[row]
    if found.adapter != "graft":
        raise UserError(f"'{name}': the method '{row}' has no weight to choose", remedy="leave the criterion out")
    if criterion == "labels":
        return found
    if criterion == "norms" and found.rule != "transfer":
        raise UserError(
            f"'{name}': the ratio of norms has no meaning where coefficients sum to 1",
            remedy="choose another criterion: leave :norms out, or write :entropy or :likelihood",
        )
    if criterion == "norms" and found.stack is not None:
        raise UserError(
            f"'{name}': the ratio of norms has no meaning where the task's adapter is not what is merged",
            remedy="choose another criterion: leave :norms out, or write :entropy or :likelihood",
        )
    return replace(
        found,
        name=name,
        title=f"{found.title}, λ by {criterion}",
        says=f"{found.says}; λ by {CRITERIA[criterion]}",
        criterion=criterion,
    )


def _with_function(row: Method, name: str, function: str) -> Method:
    if function not in FUSION_FUNCTIONS:
        raise UserError(
            f"unknown fusion function '{function}' in '{name}'", remedy=suggestion(function, FUSION_FUNCTIONS)
        )
    return replace(
        row, name=name, title=f"{row.title}, {function}", says=f"{row.says}; φ is {function}", function=function
    )
