"""Items and their counterparts in another language: paired by id, and put together into one input."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lingraft.errors import DataError
from lingraft.tasks.items import Example

_BETWEEN = "\n\n"
_SHOWN = 3


@dataclass(frozen=True)
class Pairs:
    """Items that know their counterparts.

    Attributes:
        examples: The items, in their own order; the counterpart, without its answer, is their `source`.
        skipped: The ids of the items that were left out, because they have no counterpart.
    """

    examples: list[Example]
    skipped: tuple[str, ...] = ()


def paired(
    examples: Sequence[Example],
    counterparts: Sequence[Example],
    *,
    missing: Literal["error", "skip"] = "error",
    what: str | None = None,
    numbered: bool | None = None,
) -> Pairs:
    """Gives every item its counterpart: the item of the same id.

    Args:
        examples: The items.
        counterparts: The same items in another language, in any order; nothing of their answers is kept.
        missing: Whether an item without counterpart is an error, and so is a counterpart without item; or both are left out.
        what: What is paired, for the messages: `xquad, train: sw and en`.
        numbered: Whether ids are row numbers and nothing else tells a row that is missing; None: where all ids on both sides are
            their items' places. Rows that were translated item by item carry their ids, whatever these look like: False.

    Raises:
        DataError: The numbers or the ids do not match (see `missing`), an id stands twice, the ids are row numbers and the
            numbers of rows differ, or no item has a counterpart.
    """
    mine, theirs = [e.id for e in examples], [e.id for e in counterparts]
    for side, ids in (("items", mine), ("counterparts", theirs)):
        name, times = next(iter(Counter(ids).most_common(1)), ("", 0))
        if times > 1:
            raise DataError(
                f"the id '{name}' stands {times} times among the {side}",
                where=what,
                remedy="give every item an id of its own",
            )
    if numbered is None:
        numbered = _places(mine) and _places(theirs)
    if numbered and len(mine) != len(theirs):
        raise DataError(
            f"{len(mine)} items cannot be paired with {len(theirs)} counterparts: their ids are row numbers, "
            "and rows may be shifted against one another",
            where=what,
            remedy="give files with ids, or files that have the same rows",
        )
    by_id = {e.id: e.asked for e in counterparts}
    lacking = tuple(name for name in mine if name not in by_id)
    known = set(mine)
    surplus = [name for name in theirs if name not in known]
    if len(lacking) == len(mine) or (missing == "error" and (lacking or surplus)):
        raise DataError(
            f"{len(mine)} items cannot be paired with {len(theirs)} counterparts by their ids: "
            f"{_counted(lacking, 'items have no counterpart')}, {_counted(surplus, 'counterparts belong to no item')}",
            where=what,
            remedy="check that both are of the same split, or translate the items (translation.model); "
            "translation.missing=skip leaves out those without counterpart",
        )
    found = [replace(e, source=by_id[e.id]) for e in examples if e.id in by_id]
    return Pairs(found, lacking)


def _places(ids: Sequence[str]) -> bool:
    return all(name == str(place) for place, name in enumerate(ids))


def _counted(ids: Sequence[str], says: str) -> str:
    names = ", ".join(ids[:_SHOWN]) + (", …" if len(ids) > _SHOWN else "")
    return f"{len(ids)} {says}" + (f" ({names})" if ids else "")


def concatenated(example: Example) -> Example:
    """Input-level fusion: the item with both texts in its input, the source's first.

    The prompt is the source's whole prompt, its cue for the answer included, an empty line, and the item's own; the source's
    answer is in none of it. A prompt that is too long loses the end of the longer of both contexts until it fits. An encoder reads
    the source's parts, and its options where there are some, in front of the item's own first part; the last part and the options
    stay the item's, so that an answer stands where it stood.

    Raises:
        DataError: The item has no counterpart.
    """
    source = example.source
    if source is None:
        raise DataError(
            "this item has no counterpart to be put together with",
            where=example.id,
            remedy="add the item to the source's file, with the same id, or set translation.missing=skip",
        )
    before = source.prompt + _BETWEEN
    cuttable = example.cuttable and (example.cuttable[0] + len(before), example.cuttable[1] + len(before))
    return replace(
        example,
        prompt=before + example.prompt,
        cuttable=cuttable,
        cuttable_before=source.cuttable,
        parts=(*source.parts, *source.options, *example.parts),
        source=None,
    )


def all_concatenated(examples: Iterable[Example]) -> list[Example]:
    """As `concatenated`, for all of them.

    Raises:
        DataError: An item has no counterpart.
    """
    return [concatenated(example) for example in examples]
