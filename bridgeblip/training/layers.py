"""Which decoder layers stay, by name or by index, and what they are cut for: the parameter budget.

Nothing heavy is imported, so that the command line is quick.
"""

from collections.abc import Sequence

from bridgeblip import InputError

BUDGET_LIMIT = 3_000_000_000
"""The usual rule: all parameters of all models loaded for inference, summed, stay under three
billion."""

LAYER_SELECTIONS = {
    "every-third": (0, 3, 6, 9, 12, 15, 18, 21),
    "every-second-8": (0, 2, 4, 6, 8, 10, 12, 14),
    "first-8": (0, 1, 2, 3, 4, 5, 6, 7),
    "first-4-even": (0, 2, 4, 6),
    "every-third-with-last": (0, 3, 6, 9, 12, 15, 18, 23),
    "even-with-last": (0, 3, 7, 10, 13, 16, 20, 23),
}
"""Ways to cut a 24-layer decoder, by name."""

# The widths that the published settings belong to: rank 96 on the 2048-wide T5-XL.
REFERENCE_RANK = 96
REFERENCE_WIDTH = 2048


def decoder_layers(selection: str | Sequence[int]) -> list[int]:
    """Return the layer indices of a selection's name, of a text like "0,3,6", or of a list.

    Raises:
        InputError: if the text is neither a known name nor a list of numbers.
    """
    parts = selection
    if isinstance(selection, str):
        parts = LAYER_SELECTIONS.get(selection, selection.split(","))
    try:
        return [int(part) for part in parts]
    except (TypeError, ValueError):
        names = ", ".join(LAYER_SELECTIONS)
        raise InputError(
            f"layer selection {selection!r} is unknown: expected {names}, or indices like 0,3,6"
        ) from None


def check_decoder_layers(layers: Sequence[int], available: int) -> list[int]:
    """Return ``layers`` as a list of plain indices, or refuse them with the reason.

    Raises:
        InputError: if the selection is empty, repeated, unsorted or outside ``range(available)``.
    """
    chosen = [int(i) for i in layers]
    outside = [i for i in chosen if not 0 <= i < available]
    if outside:
        raise InputError(
            f"decoder layers {outside} do not exist: the base has {available}, numbered 0 to "
            f"{available - 1}"
        )
    if not chosen or chosen != sorted(set(chosen)):
        raise InputError(
            f"decoder layers {chosen}: expected at least one index, in rising order, none repeated"
        )
    return chosen


def rank_for(rank: int, width: int) -> int:
    """The share of a decoder's width that ``rank`` has of 2048, at least 1; 0 stays 0."""
    return 0 if rank == 0 else max(1, round(rank * width / REFERENCE_WIDTH))
