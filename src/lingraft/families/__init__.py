"""The table of families: a structure, the spaces it can be merged in, and the operators of each."""

from lingraft.algebra import Family
from lingraft.errors import UserError, suggestion
from lingraft.families.lora import LoraFactors, LoraProduct

FAMILIES: dict[str, dict[str, Family]] = {
    "lora": {"factors": LoraFactors(), "product": LoraProduct()},
}


def family(structure: str, space: str) -> Family:
    """The operators of a structure in a space.

    Raises:
        UserError: There is no such structure or space.
    """
    if structure not in FAMILIES:
        raise UserError(
            f"adapters of the structure '{structure}' cannot be merged",
            remedy=suggestion(structure, FAMILIES),
        )
    spaces = FAMILIES[structure]
    if space not in spaces:
        raise UserError(f"'{structure}' has no space '{space}'", remedy=suggestion(space, spaces))
    return spaces[space]
