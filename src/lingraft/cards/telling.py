"""The sections of a model card, for people: Markdown in which names out of files are text."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lingraft.cards.facts import HOW, Facts, base_model, mapping, texts
from lingraft.escaping import in_markdown
from lingraft.languages import name_of

_DIGEST = re.compile(r"[\w.:@/-]{1,200}", re.ASCII)
NAMES = {
    "lora": "LoRA",
    "ia3": "(IA)³",
    "prefix": "prefix",
    "bottleneck": "bottleneck",
    "invertible": "invertible coupling",
    "sparse": "sparse difference",
}
_OWN = frozenset({"bottleneck", "invertible", "sparse"})
"""Structures that PEFT opens only once lingraft is imported."""
USES: Mapping[str, tuple[str, str]] = {
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    "SEQ_2_SEQ_LM": ("text2text-generation", "AutoModelForSeq2SeqLM"),
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
    "QUESTION_ANS": ("question-answering", "AutoModelForQuestionAnswering"),
    "multiple_choice": ("multiple-choice", "AutoModelForMultipleChoice"),
    "masked_lm": ("fill-mask", "AutoModelForMaskedLM"),
}
"""By PEFT's name of a task, or the kind of a head that it has no name for: the hub's name, and transformers' class."""
_PAPERS: Mapping[str, str] = {
    "adamergex": "Zhao et al. (2025), *AdaMergeX: Cross-Lingual Transfer with Large Language Models via Adaptive Adapter Merging*, "
    "<https://arxiv.org/abs/2402.18913>",
    "arimerge": "Zhang et al. (2023), *Composing Parameter-Efficient Modules with Arithmetic Operations*, "
    "<https://arxiv.org/abs/2306.14870>",
    "flare": "*Language Fusion for Parameter-Efficient Cross-lingual Transfer* (2025), <https://arxiv.org/abs/2501.06892>",
    "x-mixup": "Yang et al. (2022), *Enhancing Cross-lingual Transfer by Manifold Mixup*, <https://arxiv.org/abs/2205.04182>",
    "mad-x": "Pfeiffer et al. (2020), *MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer*, "
    "<https://arxiv.org/abs/2005.00052>",
    "lf-sft": "Ansell et al. (2022), *Composable Sparse Fine-Tuning for Cross-Lingual Transfer*, <https://arxiv.org/abs/2110.07560>",
    "ties": "Yadav et al. (2023), *TIES-Merging*, <https://arxiv.org/abs/2306.01708>",
    "dare": "Yu et al. (2024), *Language Models are Super Mario* (DARE), <https://arxiv.org/abs/2311.03099>",
    "knots": "Stoica et al. (2025), *Model merging with SVD to tie the KnOTS*, <https://arxiv.org/abs/2410.19735>",
}
_DATA_LICENCES: Mapping[str, str] = {
    "Davlan/sib200": "Apache-2.0, text CC BY-SA 4.0",
    "aps/super_glue": "its parts' own",
    "cambridgeltl/xcopa": "CC BY 4.0",
    "facebook/xnli": "CC BY-NC 4.0",
    "indonlp/NusaX-senti": "CC BY-SA 4.0",
    "openai/gsm8k": "MIT",
    "juletxara/mgsm": "CC BY 4.0",
    "rajpurkar/squad": "CC BY-SA 4.0",
    "google/xquad": "CC BY-SA 4.0",
    "facebook/mlqa": "CC BY-SA 3.0",
    "google-research-datasets/tydiqa": "Apache-2.0",
    "csebuetnlp/xlsum": "CC BY-NC-SA 4.0",
}
_BASE_LICENCES = {
    "google/gemma": "the Gemma Terms of Use (<https://ai.google.dev/gemma/terms>)",
    "meta-llama/": "Llama's community licence",
}
_TEXT = frozenset({"clm", "mlm", "prefix-lm", "span-corruption"})
"""Tasks that need no labels."""
_LARGEST = 1e300
"""Of a number that is written as one: a file may hold integers beyond all floats."""
_ROLES = {
    "task": "T, the task's adapter",
    "target_ref": "R_t, the target language's reference",
    "source_ref": "R_s, the source language's reference",
    "divergence": "the divergence R_t − R_s",
}


def sections(facts: Facts) -> list[str]:
    """A card's blocks, headings included, in order."""
    said = [
        f"# {_title(facts)}",
        _sentence(facts),
        "## How it was made",
        *_made(facts),
        "## How to use it",
        _use(facts),
    ]
    if facts.scores:
        said += ["## Scores", *_scored(facts)]
    said += ["## Limits", _bullets(_limits(facts)), "## Licences", _bullets(_licences(facts))]
    said += ["## Where it comes from", _bullets(_origins(facts))]
    if papers := [_PAPERS[name] for name in facts.published if name in _PAPERS]:
        said += ["## To be cited", _bullets(papers)]
    return said


def _named(code: str) -> str:
    return f"{in_markdown(name_of(code))} ({in_markdown(code)})" if name_of(code) != code else in_markdown(code)


def _title(facts: Facts) -> str:
    title = in_markdown(plain_title(facts))
    return title[:1].upper() + title[1:]


def _sentence(facts: Facts) -> str:
    base = base_model(facts.config, facts.notes)
    on = f"[{base}](https://huggingface.co/{base})" if base else "a base model that is not on the hub"
    if facts.kind == "divergence":
        said = (
            f"What leads an adapter on {on} from one language to another: it is added to any task's adapter of the same shape, and "
            "is of no use alone."
        )
    elif facts.kind == "stack":
        said = f"Adapters on {on} that stand on one another, in folders of their own."
    else:
        said = f"An adapter on {on}: the base model's own weights are not in it and not changed by it."
    return said + " Made with lingraft, which grafts what a language model can do in one language onto another."


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _number(value: Any) -> str:
    """A number out of a file, or what there is in its place."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > _LARGEST:
        return in_markdown(str(value)[:80])
    return f"{value:g}"


def _digest(value: Any) -> str:
    return f"`{value}`" if isinstance(value, str) and _DIGEST.fullmatch(value) else "not known"


def _learned(part: Mapping[str, Any]) -> str:
    """What a part has learned, as far as it is known."""
    task, code = part.get("task"), part.get("language")
    task = in_markdown(task) if isinstance(task, str) else None
    said = {"clm": "language modelling on plain text", "mlm": "masked language modelling on plain text"}.get(
        str(task), task
    )
    return ", ".join([*([said] if said else []), *([_named(code)] if isinstance(code, str) else [])])


def _made(facts: Facts) -> list[str]:
    """How it came about, and from what."""
    made, how, said = facts.provenance, facts.how, []
    if facts.method:
        said.append(f"Method: {in_markdown(facts.method)}.")
    if how == "train":
        said.append(_trained(facts))
    elif how in ("transfer", "cross", "arimerge", "arimerge-add"):
        said.append(_merged(facts))
    elif how == "divergence":
        said.append("R_t − R_s: the difference of two adapters that learned the same in two languages.")
    elif how:
        said.append(f"Combined from several adapters ({in_markdown(how)}).")
    elif "converted" in made:
        said.append("Converted from a sparse difference in the files of composable-sft.")
    elif facts.made_of:
        said.append("Merged from the adapters below.")
    else:
        said.append("How it was made is not noted in its folder.")
    if rows := _inputs(facts):
        said.append(_bullets(rows))
    if second := facts.second:
        said.append(_stages(second))
    if below := facts.beneath:
        rows = [
            f"{in_markdown(str(one.get('structure')))}, {_learned(one) or 'language not known'}, {_digest(one.get('digest'))}"
            for one in below
        ]
        said += ["It was trained on top of these, which must be beneath it, the lowest first:", _bullets(rows)]
    if facts.kind == "stack":
        said.append(
            f"Its parts, the lowest first: {', '.join(in_markdown(name) for name in texts(facts.notes.get('parts')))}."
        )
    return said


def _trained(facts: Facts) -> str:
    made = facts.provenance
    what = _learned({"task": facts.learned or None, "language": made.get("language")})
    values = mapping(made.get("training"))
    names = {"epochs": "epochs", "learning_rate": "learning rate", "batch_size": "batch size"}
    said = [f"{title} {_number(values[name])}" for name, title in names.items() if name in values]
    seed = [f"seed {_number(made['seed'])}"] if "seed" in made else []
    return f"Trained on {what or 'data that are not noted'} ({', '.join([*said, *seed]) or 'how is not noted'})."


_ARIMERGE = {
    "arimerge": "`λ · T + (1 − λ) · (R_t − R_s)`",
    "arimerge-add": "`λ · T + (1 − λ) · R_t`",
}
_OWN_RULES = {
    "ratio": "`T ⊙ (1 + λ · (R_t ⊘ R_s − 1))`",
    "layer": "`(I + λ · (R_t R_s⁺ − I)) T`",
    "flat": "`(I + λ · (R_t R_s⁺ − I)) T`, all layers as one",
    "literal": "`λ · R_t R_s⁺ T`",
    "inverse": "T, turned from R_s to R_t through pseudo-inverses on both sides of the bottleneck,",
    "cross": "T and R_t against R_s, by the rule of the other kind of structure,",
}
"""By space, the formulas of merges that are no sum."""


def _merged(facts: Facts) -> str:
    made, how = facts.provenance, facts.how
    rule = _ARIMERGE.get(how) or _OWN_RULES.get(str(made.get("space")), "`T + λ · (R_t − R_s)`")
    formula = "`L_s + λ · (L_t − L_s)`" if "spaces" in made else rule
    said = [f"{formula} with λ = {_number(made.get('weight'))}"]
    if isinstance(made.get("space"), str):
        said.append(f"{in_markdown(made['space'])} space")
    said.append(f"modules: {in_markdown(', '.join(texts(made.get('modules'))) or str(made.get('modules', 'all')))}")
    if made.get("out_rank") is not None:
        said.append(f"compressed to rank {_number(made['out_rank'])}")
    found = given if isinstance(given := made.get("rules"), list) else []
    rules = [f"{in_markdown(str(r[0]))} {_number(r[1])}" for r in found if isinstance(r, list | tuple) and len(r) == 2]
    said += [f"λ of its own for {', '.join(rules)}"] if rules else []
    text = f"Merged: {', '.join(said)}."
    if made.get("weight") == 0 and how in ("transfer", "cross") and "spaces" not in made:
        text += " At λ = 0 nothing is added: this is the task's adapter itself."
    return text


def _inputs(facts: Facts) -> list[str]:
    """The adapters that a merge or divergence is made of, with their digests."""
    inputs, parts = facts.provenance.get("inputs"), facts.made_of
    order: tuple[str, ...] = ("task", "target_ref", "source_ref")
    known: dict[str, Mapping[str, Any]] = {}
    if len(parts) in (2, 3):
        known = dict(zip(order[3 - len(parts) :], parts, strict=True))
    if inputs is None and facts.how in HOW and known:
        inputs = {name: part.get("digest") for name, part in known.items()}
    if isinstance(inputs, Mapping):
        names = [*(n for n in _ROLES if n in inputs), *sorted(str(n) for n in set(inputs) - set(_ROLES))]
        return [
            ": ".join(
                [
                    _ROLES.get(n, in_markdown(n)),
                    *([learned] if (learned := _learned(known.get(n, {}))) else []),
                    _digest(inputs[n]),
                ]
            )
            for n in names
        ]
    if isinstance(inputs, list):
        rows = [mapping(entry) for entry in inputs]
        return [f"weight {_number(row.get('weight'))}: {_digest(row.get('digest'))}" for row in rows]
    return [
        f"{in_markdown(str(p.get('structure')))}: {_learned(p) or 'what it learned is not noted'}, {_digest(p.get('digest'))}"
        for p in parts
    ]


def _stages(second: Mapping[str, Any]) -> str:
    kinds = {
        "lora": "LoRA on top of a first stage",
        "fused": "a second stage on top of a first: representations of the source language's text are mixed into it (FLARE)",
        "fused-mt": "a second stage on top of a first: a translation encoder's representations are mixed into it (FLARE-MT)",
        "mixup": "a second stage on top of a first: states of the two languages are mixed in it (X-Mixup)",
    }
    kind = kinds.get(str(second.get("kind")), "a second stage on top of a first")
    fusion = mapping(second.get("fusion")).get("function")
    with_ = f", by {in_markdown(fusion)}" if isinstance(fusion, str) else ""
    return f"It is {kind}{with_}. The first stage is in the folder `stage1`, digest {_digest(second.get('stage1'))}."


def _use(facts: Facts) -> str:
    """Code that runs, once the two names in capitals are filled in."""
    base = base_model(facts.config, facts.notes) or "BASE"
    if facts.kind == "divergence":
        lines = [
            "from lingraft import Adapter, Divergence",
            "",
            'grafted = Adapter.load("TASK_ADAPTER") + 0.5 * Divergence.load("THIS_FOLDER")',
            'grafted.save("GRAFTED")  # an ordinary PEFT folder',
        ]
        return f"```python\n{chr(10).join(lines)}\n```"
    if facts.config is None or facts.beneath:
        below = "".join(" --adapter BENEATH" for _ in facts.beneath)
        return (
            "PEFT alone does not put adapters beneath one another; lingraft does:\n\n"
            f"```sh\nlingraft evaluate --model {base}{below} --adapter THIS_FOLDER \\\n"
            "  --task TASK --language LANGUAGE --out SCORES\n```"
        )
    _, auto = USES.get(facts.use, ("", "AutoModel"))
    labels = mapping(facts.notes.get("head")).get("labels")
    more = f", num_labels={labels}" if isinstance(labels, int) and not isinstance(labels, bool) and labels > 0 else ""
    own = bool(_OWN & set(facts.structures))
    lines = [
        *(["import lingraft  # tells PEFT of this kind of adapter"] if own else []),
        "from peft import PeftModel",
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{base}")',
        f'model = {auto}.from_pretrained("{base}"{more})',
        *(
            ['model = PeftModel.from_pretrained(model, "THIS_FOLDER", subfolder="stage1").merge_and_unload()']
            if facts.second
            else []
        ),
        'model = PeftModel.from_pretrained(model, "THIS_FOLDER")',
    ]
    said = f"```python\n{chr(10).join(lines)}\n```\n\n`THIS_FOLDER` is this folder, or its name on the hub."
    if facts.second.get("kind") not in (None, "lora"):
        said += (
            "\n\nIn PEFT alone it answers as plain LoRA, with nothing mixed in. With its counterparts lingraft asks it:\n\n"
            f"```sh\nlingraft evaluate --model {base} --adapter THIS_FOLDER --task TASK --language LANGUAGE --out SCORES\n```"
        )
    return said


def _scored(facts: Facts) -> list[str]:
    rows = [
        "| task | language | split | figure | value | 95 % interval | against Eng-FT |",
        "|---|---|---|---|---|---|---|",
    ]
    for score in facts.scores:
        cells = [in_markdown(score.task), _named(score.language), in_markdown(score.split), in_markdown(score.metric)]
        cells += [f"{100 * score.value:.1f}", f"[{_percent(score.interval)}]" if score.interval else ""]
        if score.difference:
            value, low, high, p = score.difference
            cells.append(
                f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}], p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"
            )
        else:
            cells.append("")
        rows.append(f"| {' | '.join(cells)} |")
    notes = ["In percent. Intervals are bootstrapped over items and cover no other source of variation."]
    if items := {score.items for score in facts.scores if score.items}:
        notes.append(f"Items asked: {', '.join(map(str, sorted(items)))}.")
    if any(score.seeds > 1 for score in facts.scores):
        most = max(score.seeds for score in facts.scores)
        notes.append(f"The value is this adapter's; intervals and differences are of the mean over {most} seeds.")
    elif facts.scores:
        notes.append("One seed.")
    if facts.warning:
        notes.append(in_markdown(facts.warning))
    return ["\n".join(rows), " ".join(notes)]


def _percent(interval: tuple[float, float]) -> str:
    return ", ".join(f"{100 * bound:.1f}" for bound in interval)


def _limits(facts: Facts) -> list[str]:
    said = ["It fits this base model alone; on another one its numbers mean nothing."]
    if facts.kind == "adapter":
        said.append("What it was not measured on is not known; what the base model gets wrong, it may get wrong, too.")
    if facts.how in ("transfer", "cross", "arimerge", "arimerge-add"):
        plain = len(facts.made_of) == 3 and all(part.get("task") in _TEXT for part in facts.made_of[1:])
        own = "Its weights have seen no labels in the target language. " if plain else ""
        said.append(f"{own}A graft may gain nothing, or harm.")
    if str(mapping(facts.notes.get("backbone")).get("digest")).startswith("gguf-"):
        said.append(
            "It was made for the base model's weights as a GGUF file holds them, rounded to few bits: with the original weights "
            "its answers may differ."
        )
    if not facts.scores and facts.kind == "adapter":
        said.append("No scores are noted.")
    return said


def _licences(facts: Facts) -> list[str]:
    said = ["The adapter's own licence is not given here: whoever publishes it says so (`license:` above)."]
    if base := base_model(facts.config, facts.notes):
        known = next((text for start, text in _BASE_LICENCES.items() if base.startswith(start)), None)
        said.append(
            f"The base model has {known or 'a licence of its own, on its card'}, which holds for what is made of it."
        )
    else:
        said.append("The base model's licence holds for what is made of it.")
    said += [f"Data {name}: {_DATA_LICENCES.get(name, 'see its card')}." for name in facts.datasets]
    return said


def _origins(facts: Facts) -> list[str]:
    made, backbone = facts.provenance, mapping(facts.notes.get("backbone"))
    said = []
    if backbone.get("digest"):
        said.append(f"Base weights and tokenizer: {_digest(backbone['digest'])}")
    said += [f"{in_markdown(name)}: {_digest(digest)}" for name, digest in sorted(facts.digests.items())]
    if isinstance(facts.notes.get("init_sha256"), str):
        said.append(f"Initial weights: {_digest(facts.notes['init_sha256'])}")
    if "seed" in made:
        said.append(f"Seed: {_number(made['seed'])}")
    if isinstance(made.get("step"), str):
        said.append(f"Step of the experiment: {_digest(made['step'])}")
    said.append(f"lingraft {in_markdown(str(made['lingraft']))}" if "lingraft" in made else "lingraft")
    return said


def plain_title(facts: Facts) -> str:
    """What it is, in a few words, not escaped."""
    task, codes = facts.learned, facts.spoken
    what = {"divergence": "divergence", "stack": "stack of adapters"}.get(facts.kind) or (
        f"{NAMES.get(facts.structures[0], 'adapter')} adapter" if facts.structures else "adapter"
    )
    if facts.kind == "divergence":
        between = [p.get("language") for p in facts.made_of[:2]]
        if len(between) == 2 and all(isinstance(code, str) for code in between):
            return f"From {name_of(str(between[1]))} to {name_of(str(between[0]))}: a divergence"
        return "A divergence between two languages"
    subject = (
        task
        if task not in ("", "clm", "mlm")
        else {"clm": "language modelling", "mlm": "masked language modelling"}.get(task)
    )
    return ", ".join([subject or what, *([f"in {name_of(codes[0])}"] if codes else []), *([what] if subject else [])])
