"""Which decoder layers stay, by name or by index, and what they are cut for: the parameter budget.

Nothing heavy is imported, so that the command line is quick.
"""

from collections.abc import Callable, Sequence

from bridgeblip import InputError

BUDGET_LIMIT = 3_000_000_000
"""The usual rule: all parameters of all models loaded for inference, summed, stay under three
billion."""


def evenly(depth: int, count: int) -> list[int]:
    """So many of a decoder's layers, spread evenly, the first and the last among them."""
    return [round(place * (depth - 1) / max(count - 1, 1)) for place in range(count)]


def block(depth: int, count: int) -> list[int]:
    """So many of a decoder's layers, one block left out before the last (Gromov et al. 2024)."""
    return [*range(count - 1), depth - 1]


LAYER_SELECTIONS: dict[str, Callable[[int], Sequence[int]]] = {
    "every-third": lambda depth: range(0, depth, 3),
    "every-second-8": lambda depth: range(0, depth // 3 * 2, 2),
    "first-8": lambda depth: range(depth // 3),
    "first-4-even": lambda depth: range(0, depth // 3, 2),
    "every-third-with-last": lambda depth: [*range(0, depth - 3, 3), depth - 1],
    "even-with-last": lambda depth: evenly(depth, depth // 3),
}
"""Ways to cut a decoder, by name; the numbers in the names are those of 24 layers."""

COUNTED = {"even": evenly, "block": block}
"""Ways that a count belongs to, such as block-18."""

# The widths that the published settings belong to: rank 96 on the 2048-wide T5-XL.
REFERENCE_RANK = 96
REFERENCE_WIDTH = 2048


def decoder_layers(selection: str | Sequence[int], depth: int = 24) -> list[int]:
    """Return the layer indices of a selection's name in a decoder of ``depth``, of a text like
    "0,3,6", or of a list.

    Raises:
        InputError: if the text is neither a known name nor a list of numbers, or the decoder has
            fewer layers.
    """
    parts = selection
    if isinstance(selection, str):
        kind, _, count = selection.rpartition("-")
        if selection in LAYER_SELECTIONS:
            parts = LAYER_SELECTIONS[selection](depth)
        elif kind in COUNTED and count.isdecimal():
            if not 0 < int(count) <= depth:
                raise InputError(f"layer selection {selection!r}: the decoder has {depth} layers")
            parts = COUNTED[kind](depth, int(count))
        else:
            parts = selection.split(",")
    try:
        return [int(part) for part in parts]
    except (TypeError, ValueError):
        names = ", ".join(LAYER_SELECTIONS)
        raise InputError(
            f"layer selection {selection!r} is unknown: expected {names}, even-N, block-N, or "
            f"indices like 0,3,6"
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
