"""Numbers that say how good answers are.

Questions about one picture stand or fall together, so every interval is drawn by picture, never by
row.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import betaincinv, ndtri, stdtrit
from sklearn.metrics import confusion_matrix

from bridgeblip.data.questions import Question, content_keys, letter, letters

TAIL = 0.025  # on either side of a 95% interval
FEWEST_GROUPS = 10  # with an interval: fewer say nothing
TINY = 1e-12  # what is smaller is rounding
BINS = 10  # of the probability of the answer given
COLLAPSE = 0.4  # a letter given so much more often than it is right is a collapse
OPENERS_SHOWN = 12
OPENER_ROWS = 10  # rarer openers are counted together
OTHER_OPENERS = "other openers"
LENGTHS = ((1, "1 word"), (3, "2 to 3 words"), (6, "4 to 6 words"))
LONG = "7 words or more"


@dataclass(frozen=True)
class Estimate:
    """A mean, and the 95% interval for what more pictures of the same kind would give; no interval
    where too few pictures say nothing."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self):
        if self.low is None:
            return f"{self.value:.1%} (too few pictures for an interval)"
        return f"{self.value:.1%} (95% interval {self.low:.1%} to {self.high:.1%})"


def clustered_mean(values: Sequence[float], groups: Sequence[Hashable]) -> Estimate:
    """Return the mean of ``values`` and its interval, for which a group is one draw.

    The interval is Clopper and Pearson's for as many independent values as the sample is worth,
    after Korn and Graubard 1998, "Confidence intervals for proportions with small expected number
    of positive counts estimated from survey data": the variance between the groups says how many
    those are, Student's t takes off what so few groups leave unsure. They are never fewer than the
    groups, so that twenty pictures out of twenty do not make a sure 100%, and never more than the
    values. It covers the truth in at least 93% of draws from ten groups on; with fewer there is
    none.

    Args:
        values: (N,) from 0 to 1.
        groups: (N,), equal where rows belong together.
    """
    value, _, draws = _sample(values, groups)
    return _interval(value, draws)


def clustered_difference(values: Sequence[float], groups: Sequence[Hashable]) -> Estimate:
    """Return the mean of paired differences, from -1 to 1, and its interval.

    What was gained and what was lost are shares with the interval of ``clustered_mean`` each, put
    together after Zou and Donner 2008, "Construction of confidence limits about effect measures: a
    general approach". The rest as in ``clustered_mean``.
    """
    values = np.asarray(values, dtype=float)
    gained, up, gained_draws = _sample(values.clip(min=0), groups)
    lost, down, lost_draws = _sample((-values).clip(min=0), groups)
    _, _, draws = _sample(np.abs(values), groups)
    if draws is None:
        return Estimate(gained - lost)
    # What never happened tells nothing of how it clusters: take it from all that changed.
    gain = _interval(gained, gained_draws if gained else draws)
    loss = _interval(lost, lost_draws if lost else draws)
    spread = np.sqrt((up**2).sum() * (down**2).sum())
    correlation = min(0.0, (up * down).sum() / max(spread, TINY))  # where one gains, none is lost
    ends = []
    for a, b in ((gained - gain.low, loss.high - lost), (gain.high - gained, lost - loss.low)):
        ends.append(float(np.sqrt(a**2 + b**2 - 2 * correlation * a * b)))
    value = gained - lost
    return Estimate(value, value - ends[0], value + ends[1])


def _sample(
    values: Sequence[float], groups: Sequence[Hashable]
) -> tuple[float, np.ndarray, float | None]:
    """Return the mean; what each group adds to its deviation; and as how many independent values
    the sample counts, None with too few groups."""
    values = np.asarray(values, dtype=float)
    _, place, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    value = float(values.mean())
    residuals = np.bincount(place, values - value) / len(values)
    count = len(sizes)
    if count < FEWEST_GROUPS:
        return value, residuals, None
    variance = count / (count - 1) * (residuals**2).sum()
    variance *= (stdtrit(count - 1, TAIL) / ndtri(TAIL)) ** 2
    fewest = len(values) ** 2 / (sizes**2).sum()  # Kish's effective number of groups
    draws = np.clip(value * (1 - value) / max(variance, TINY), fewest, len(values))
    return value, residuals, float(draws)


def _interval(value: float, draws: float | None) -> Estimate:
    """Clopper and Pearson's, for a share of so many draws."""
    if draws is None:
        return Estimate(value)
    hits, misses = value * draws, (1 - value) * draws
    low = betaincinv(hits, misses + 1, TAIL) if hits > TINY else 0.0
    high = betaincinv(hits + 1, misses, 1 - TAIL) if misses > TINY else 1.0
    return Estimate(value, float(low), float(high))


def picture_groups(questions: Sequence[Question]) -> np.ndarray:
    """Return (N,) numbers, equal where the pictures are; a question without a picture has one of
    its own."""
    names = [key or f"row {row}" for row, key in enumerate(content_keys(questions))]
    return np.unique(names, return_inverse=True)[1]


def measure(
    answers: Sequence[int], probabilities: np.ndarray, groups: Sequence[Hashable]
) -> dict[str, Any]:
    """Measure answers against the right ones.

    Args:
        answers: (N,) indices of the right choices.
        probabilities: (N, choices), rows that sum to 1.
        groups: (N,), as ``picture_groups`` gives them.

    Returns:
        "questions", "pictures" and how many are "right"; the "accuracy"; the "confusion", a row a
        right letter, a column a letter given; how often each letter is "given"; the "recall" of
        each that is right somewhere, as ``accuracy_by`` has it;
        the letter of a "collapse", which nearly all answers are, though the right ones are not; the
        mean probability of the answers given, "confidence"; how far it and the share right lie
        apart, a mean over the answers, the expected "calibration_error", by the bins of their
        "reliability".
    """
    answers, groups = np.asarray(answers), np.asarray(groups)
    given, sure = probabilities.argmax(-1), probabilities.max(-1)
    right = given == answers
    matrix = confusion_matrix(answers, given, labels=range(probabilities.shape[1]))
    excess = (matrix.sum(0) - matrix.sum(1)) / len(answers)  # of each letter: given less right
    bins, error = reliability(right, sure, groups), 0.0
    for one in bins:
        error += one["rows"] * abs(one["accuracy"].value - one["confidence"]) / len(answers)
    return {
        "questions": len(answers),
        "pictures": len(np.unique(groups)),
        "right": int(right.sum()),
        "accuracy": clustered_mean(right, groups),
        "confusion": matrix.tolist(),
        "given": dict(zip(letters(len(matrix)), matrix.sum(0).tolist(), strict=True)),
        "recall": accuracy_by(list(map(letter, answers)), right, groups),
        "collapse": letter(excess.argmax()) if excess.max() > COLLAPSE else None,
        "confidence": float(sure.mean()),
        "calibration_error": error,
        "reliability": bins,
    }


def reliability(right: np.ndarray, sure: np.ndarray, groups: np.ndarray) -> list[dict[str, Any]]:
    """Sort answers (N,) into bins of equal width by their probability, "above" and "up_to"; say of
    each that holds "rows" their mean probability, "confidence", and their "accuracy"."""
    edges, bins = np.linspace(0, 1, BINS + 1), []
    place = np.searchsorted(edges[1:-1], sure)
    for i in np.unique(place):
        held = place == i
        found = {"above": float(edges[i]), "up_to": float(edges[i + 1]), "rows": int(held.sum())}
        found["confidence"] = float(sure[held].mean())
        bins.append(found | {"accuracy": clustered_mean(right[held], groups[held])})
    return bins


def accuracy_by(
    kinds: Sequence[str], right: np.ndarray, groups: np.ndarray
) -> list[dict[str, Any]]:
    """Return the "accuracy" of each kind of question, its "name" and how many "rows" are of it.

    Args:
        kinds: (N,) names.
        right: (N,) bool.
        groups: (N,), as ``picture_groups`` gives them.
    """
    kinds, parts = np.asarray(kinds), []
    for kind in np.unique(kinds):
        held = kinds == kind
        accuracy = clustered_mean(right[held], groups[held])
        parts.append({"name": str(kind), "rows": int(held.sum()), "accuracy": accuracy})
    return parts


def openers(questions: Sequence[Question]) -> list[str]:
    """Return the first two words of each question, small; rare ones are put together."""
    first = [" ".join(q.question.lower().split()[:2]).rstrip("?,.:") for q in questions]
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
) -> dict[str, Any]:
    """Compare two sets of probabilities (N, choices) for the same questions.

    Args:
        answers, groups: as in ``measure``.

    Returns:
        "questions", and "pictures"; the accuracies of "first" and "second", and their
        "difference", second less first, question by question; how many answers have "changed",
        were "gained", wrong in the first and right in the second, or "lost".
    """
    answers = np.asarray(answers)
    given = first.argmax(-1), second.argmax(-1)
    before, after = given[0] == answers, given[1] == answers
    return {
        "questions": len(answers),
        "pictures": len(np.unique(groups)),
        "first": clustered_mean(before, groups),
        "second": clustered_mean(after, groups),
        "difference": clustered_difference(after.astype(float) - before, groups),
        "changed": int((given[0] != given[1]).sum()),
        "gained": int((after & ~before).sum()),
        "lost": int((before & ~after).sum()),
    }


def accuracy_of(questions: Sequence[Question], probabilities: np.ndarray) -> float:
    """Share of questions whose most probable choice is the answer."""
    return float(np.mean(probabilities.argmax(-1) == [q.answer for q in questions]))
