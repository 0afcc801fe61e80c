"""Numbers that say how good answers are.

Questions about one picture stand or fall together, so every interval is drawn by picture, never by
row.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, stdtrit
from sklearn.metrics import accuracy_score, confusion_matrix

from bridgeblip.data.pictures import picture_keys
from bridgeblip.data.questions import Question, letter

TAIL = 0.025  # on either side of a 95% interval
RESAMPLES = 10_000
DRAW = 100  # resamples at a time: bounds the memory
SEED = 0
BINS = 10  # of the probability of the answer given
COLLAPSE = 0.4  # a letter given so much more often than it is right is a collapse
OPENERS_SHOWN = 12
OPENER_ROWS = 10  # rarer openers are counted together
OTHER_OPENERS = "other openers"
LENGTHS = ((1, "1 word"), (3, "2 to 3 words"), (6, "4 to 6 words"))
LONG = "7 words or more"


@dataclass(frozen=True)
class Estimate:
    """A mean, and the 95% interval for what more pictures of the same kind would give."""

    value: float
    low: float
    high: float

    def __str__(self):
        return f"{self.value:.1%} (95% interval {self.low:.1%} to {self.high:.1%})"


@dataclass(frozen=True)
class Part:
    """How well the questions of one kind are answered."""

    name: str
    rows: int
    accuracy: Estimate


@dataclass(frozen=True)
class Bin:
    """Answers given with a probability above ``above`` and up to ``up_to``."""

    above: float
    up_to: float
    rows: int
    confidence: float
    """Mean probability of the answers given."""
    accuracy: Estimate


@dataclass(frozen=True)
class Measures:
    """What one set of answers is worth."""

    questions: int
    pictures: int
    right: int
    accuracy: Estimate
    weighted: Estimate | None
    """The same with a weight a question; None without weights."""
    confusion: list[list[int]]
    """Rows: the right letter; columns: the letter given."""
    recall: list[Part]
    """Of the questions whose answer is a letter, the share that got it; letters that never are
    right are left out."""
    collapse: str | None
    """The letter that nearly all answers are, though the right ones are not."""
    confidence: float
    """Mean probability of the answers given."""
    calibration_error: float
    """Expected calibration error: how far probability and share right lie apart, a mean over the
    answers."""
    reliability: list[Bin]
    """The bins that hold answers."""


@dataclass(frozen=True)
class Comparison:
    """Two sets of answers to the same questions."""

    questions: int
    pictures: int
    first: Estimate
    second: Estimate
    difference: Estimate
    """Second less first, question by question."""
    changed: int
    """Other letter given."""
    gained: int
    """Wrong in the first, right in the second."""
    lost: int
    """Right in the first, wrong in the second."""


def clustered_mean(
    values: Sequence[float],
    groups: Sequence[Hashable],
    weights: Sequence[float] | None = None,
    least: float = 0.0,
) -> Estimate:
    """Return the mean of ``values`` with the bootstrap interval of resampled groups.

    Percentiles, taken a little further out for few groups, as Student's t asks (Hesterberg 2015,
    "What teachers should know about the bootstrap"). If all groups have the same mean, no resample
    differs from another; then the interval covers the share of other groups that may have gone
    unseen (Clopper and Pearson 1934), so that five pictures out of five do not make a sure 100%.

    Args:
        values: (N,) from ``least`` to 1.
        groups: (N,), equal where rows belong together.
        weights: (N,), not negative and not all 0.
    """
    values = np.asarray(values, dtype=float)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    counted = weights > 0
    names, place = np.unique(np.asarray(groups)[counted], return_inverse=True)
    count = len(names)
    sums, sizes = (
        np.bincount(place, (weights * values)[counted]),
        np.bincount(place, weights[counted]),
    )  # (count,)
    value, means = float(sums.sum() / sizes.sum()), sums / sizes
    if means.min() == means.max():
        unseen = 1 - TAIL ** (1 / count)
        return Estimate(value, value - unseen * (value - least), value + unseen * (1 - value))
    generator = np.random.default_rng(SEED)
    drawn = []
    for _ in range(RESAMPLES // DRAW):
        chosen = generator.integers(count, size=(DRAW, count))
        drawn.append(sums[chosen].sum(1) / sizes[chosen].sum(1))
    tail = ndtr(np.sqrt(count / (count - 1)) * stdtrit(count - 1, TAIL))
    low, high = np.quantile(np.concatenate(drawn), [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


def picture_groups(questions: Sequence[Question]) -> np.ndarray:
    """Return (N,) numbers, equal where the pictures are; a question without a picture has one of
    its own."""
    keys = picture_keys(q.image for q in questions if q.image is not None)
    names = [f"row {row}" if q.image is None else keys[q.image] for row, q in enumerate(questions)]
    return np.unique(names, return_inverse=True)[1]


def measure(
    answers: Sequence[int],
    probabilities: np.ndarray,
    groups: Sequence[Hashable],
    weights: Sequence[float] | None = None,
) -> Measures:
    """Measure answers against the right ones.

    Args:
        answers: (N,) indices of the right choices.
        probabilities: (N, 4), rows that sum to 1.
        groups: (N,), as ``picture_groups`` gives them.
        weights: (N,) of the questions.
    """
    answers, groups = np.asarray(answers), np.asarray(groups)
    given, sure = probabilities.argmax(-1), probabilities.max(-1)
    right = given == answers
    matrix = confusion_matrix(answers, given, labels=range(probabilities.shape[1]))
    excess = (matrix.sum(0) - matrix.sum(1)) / len(answers)  # of each letter: given less right
    bins = reliability(right, sure, groups)
    return Measures(
        questions=len(answers),
        pictures=len(np.unique(groups)),
        right=int(right.sum()),
        accuracy=clustered_mean(right, groups),
        weighted=None if weights is None else clustered_mean(right, groups, weights),
        confusion=matrix.tolist(),
        recall=accuracy_by([letter(i) for i in answers], right, groups),
        collapse=letter(excess.argmax()) if excess.max() > COLLAPSE else None,
        confidence=float(sure.mean()),
        calibration_error=sum(b.rows * abs(b.accuracy.value - b.confidence) for b in bins)
        / len(answers),
        reliability=bins,
    )


def reliability(right: np.ndarray, sure: np.ndarray, groups: np.ndarray) -> list[Bin]:
    """Sort answers (N,) into bins of equal width by their probability; bins without any are left
    out."""
    edges = np.linspace(0, 1, BINS + 1)
    place = np.searchsorted(edges[1:-1], sure)
    return [
        Bin(
            float(edges[i]),
            float(edges[i + 1]),
            int((place == i).sum()),
            float(sure[place == i].mean()),
            clustered_mean(right[place == i], groups[place == i]),
        )
        for i in np.unique(place)
    ]


def accuracy_by(kinds: Sequence[str], right: np.ndarray, groups: np.ndarray) -> list[Part]:
    """Return the accuracy of each kind of question, by name.

    Args:
        kinds: (N,) names.
        right: (N,) bool.
        groups: (N,), as ``picture_groups`` gives them.
    """
    kinds = np.asarray(kinds)
    return [
        Part(
            str(kind),
            int((kinds == kind).sum()),
            clustered_mean(right[kinds == kind], groups[kinds == kind]),
        )
        for kind in np.unique(kinds)
    ]


def openers(questions: Sequence[Question]) -> list[str]:
    """Return the first two words of each question, small; rare ones are put together."""
    first = np.array([" ".join(q.question.lower().split()[:2]).rstrip("?,.:") for q in questions])
    names, counts = np.unique(first, return_counts=True)
    common = names[np.argsort(-counts, kind="stable")][:OPENERS_SHOWN]
    common = set(common) & set(names[counts >= OPENER_ROWS])
    return [str(name) if name in common else OTHER_OPENERS for name in first]


def choice_lengths(questions: Sequence[Question]) -> list[str]:
    """Return how long the longest choice of each question is."""
    words = [max(len(choice.split()) for choice in q.choices) for q in questions]
    return [next((name for most, name in LENGTHS if count <= most), LONG) for count in words]


def guessing(questions: Sequence[Question]) -> float:
    """The accuracy to expect from guessing among the choices that are there."""
    return float(np.mean([1 / sum(q.choice_mask) for q in questions]))


def compare(
    answers: Sequence[int],
    first: np.ndarray,
    second: np.ndarray,
    groups: Sequence[Hashable],
    weights: Sequence[float] | None = None,
) -> Comparison:
    """Compare two sets of probabilities (N, 4) for the same questions; the rest as in
    ``measure``."""
    answers = np.asarray(answers)
    given = first.argmax(-1), second.argmax(-1)
    before, after = (letters == answers for letters in given)
    return Comparison(
        questions=len(answers),
        pictures=len(np.unique(groups)),
        first=clustered_mean(before, groups, weights),
        second=clustered_mean(after, groups, weights),
        difference=clustered_mean(after.astype(float) - before, groups, weights, least=-1.0),
        changed=int((given[0] != given[1]).sum()),
        gained=int((after & ~before).sum()),
        lost=int((before & ~after).sum()),
    )


def accuracy_of(questions: Sequence[Question], probabilities: np.ndarray) -> float:
    """Share of questions whose most probable choice is the answer."""
    return float(accuracy_score([q.answer for q in questions], probabilities.argmax(-1)))
