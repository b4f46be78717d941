"""What is found out before the first step: whether the data that steps will read can be read, and fit together."""

from collections.abc import Sequence

from lingraft.config import FusionConfig
from lingraft.digests import digest_value
from lingraft.errors import DataError
from lingraft.execution import fusing
from lingraft.languages import name_of
from lingraft.plan import Step
from lingraft.session import Session


def check_data(steps: Sequence[Step], session: Session) -> None:
    """Reads all data that steps will read: a wrong label in the last test file is found before the first training.

    Raises:
        DataError: Something is wrong with them.
    """
    wanted = {
        (s.config["task"]["task"], s.config["language"], s.config["split"], s.config.get("prompt", "default"))
        for s in steps
        if "split" in s.config and not {"second", "places", "into"} & set(s.config)
    }
    for task, language, split, prompt in sorted(wanted):
        session.examples(session.task(task), language, split, None, prompt)
    _check_pairs(steps, session)
    _check_layers(steps, session)
    _check_states(steps, session)
    read = {s.config["language"] for s in steps if "reference" in s.config}
    projected = {s.config["language"] for s in steps if "projected" in s.config}
    if projected:
        projected.add(session.experiment.source)  # Its labels may be finished already.
    for language in sorted(read - projected):
        next(iter(session.lines(language)), None)
    counts = {language: len(session.parallel(language)) for language in sorted(projected)}
    if len(set(counts.values())) > 1:
        raise DataError(
            "the reference text is not parallel: it has "
            + ", ".join(f"{count} lines in {name_of(language)}" for language, count in counts.items()),
            remedy="projected labels need text whose lines are translations of one another",
        )


def _check_pairs(steps: Sequence[Step], session: Session) -> None:
    """Makes sure that items and counterparts that are there already fit together; what is translated first is read later."""
    seen: set[str] = set()
    for step in steps:
        config = step.config
        if not {"second", "counterpart"} & set(config) or {"items", "counterparts"} & set(step.inputs):
            continue
        parts = {name: config.get(name) for name in ("task", "prompt", "language", "split", "counterpart")}
        key = digest_value([parts, "second" in config])
        if key not in seen:
            seen.add(key)
            session.asked(step, None)


def _check_layers(steps: Sequence[Step], session: Session) -> None:
    """Makes sure that second stages find the layers they mix in: said now, not after the first stage's training.

    Raises:
        UserError: The base model has no such layers.
    """
    seconds = {digest_value(s.config["second"]): s.config["second"] for s in steps if "second" in s.config}
    for second in seconds.values():
        if "mixup" in second:
            from lingraft.fusion.xmixup import site_of

            site_of(session.backbone.model, second["mixup"]["layer"])
        elif "fusion" in second:
            from lingraft.fusion.attaching import fused_modules
            from lingraft.fusion.stored import places_of

            # A translation encoder's states are the same for every layer.
            find = places_of if second["kind"] == "fused" else fused_modules
            find(session.backbone, FusionConfig(**second["fusion"]))


def _check_states(steps: Sequence[Step], session: Session) -> None:
    """Makes sure that source states are not too large, where their items are there already.

    Raises:
        UserError: They are.
    """
    for step in steps:
        if step.kind == "states" and "items" not in step.inputs:
            from lingraft.fusion.cache import check_size
            from lingraft.fusion.stored import states_size

            sequences, fusion = fusing(step, session)
            size = states_size(session.backbone, sequences, fusion)
            check_size(size, session.experiment.fusion.cache_limit * 1e9, where=step.label)
