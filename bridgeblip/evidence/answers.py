"""What a model makes of questions: probabilities, flags, problems."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bridgeblip.data.questions import letter

FLAGS = ("blank", "unread", "shortened", "permuted", "order")


@dataclass(frozen=True)
class Answers:
    """What a bundle makes of questions, row by row in their order."""

    probabilities: np.ndarray
    """(rows, choices), fp32; a missing choice has 0."""
    flags: list[list[str]]
    """Words about a row: "blank": answered without its picture; "unread": it has characters that
    the model's vocabulary lacks; "shortened": its prompt was cut to what the model reads;
    "permuted": averaged over the orders of its choices; "order": which choice wins depends on that
    order."""
    problems: list[str]
    """Why a row could not be answered as it stands; empty where it could."""


def margins(probabilities: np.ndarray) -> np.ndarray:
    """How far the two best of each row are apart, 0 to 1."""
    best = np.sort(probabilities.astype(np.float64), axis=-1)
    return best[:, -1] - best[:, -2]


def choose_permutation_margin(
    single: np.ndarray, averaged: np.ndarray, answers: Sequence[int]
) -> float | None:
    """Return the margin below which averaging over the orders of the choices pays, or None where it
    does not.

    Args:
        single: probabilities (rows, choices) of validation questions, asked once:
            ``permute_below=0``.
        averaged: the same, all averaged over the orders: ``permute_below=2``.
        answers: indices of the right choices.

    A gain counts if it is at least twice its standard error, were each changed row a coin's toss.
    """
    distance = margins(single)
    order = distance.argsort(kind="stable")
    right = [
        (probabilities.argmax(-1) == answers)[order].astype(int)
        for probabilities in (single, averaged)
    ]
    gains = right[1] - right[0]
    best = int(
        gains.cumsum().argmax()
    )  # the first of equals: as few rows as possible are asked again
    gain, changed = gains[: best + 1].sum(), np.abs(gains[: best + 1]).sum()
    if gain <= 0 or gain < 2 * changed**0.5:
        return None
    return float(np.nextafter(distance[order][best], 2))


def letters_of(probabilities: np.ndarray) -> list[str]:
    """The letter of the largest probability of each row."""
    return [letter(i) for i in probabilities.argmax(-1)]


def kept_folder(out: str | Path) -> Path:
    """Where the finished windows of a submission that is not written yet lie."""
    return Path(out).with_name(f".{Path(out).name}.windows")
