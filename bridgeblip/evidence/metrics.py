"""Numbers that say how good answers are.

Questions about one picture stand or fall together, so every interval is drawn by picture, never by
row.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv, ndtri, stdtrit
from sklearn.metrics import confusion_matrix

from bridgeblip.data.pictures import picture_keys
from bridgeblip.data.questions import Question, letter

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
    # Mean probability of the answers given.
    confidence: float
    accuracy: Estimate


@dataclass(frozen=True)
class Measures:
    """What one set of answers is worth."""

    questions: int
    pictures: int
    right: int
    accuracy: Estimate
    # The same with a weight a question; None without weights.
    weighted: Estimate | None
    # Rows: the right letter; columns: the letter given.
    confusion: list[list[int]]
    # Of the questions whose answer is a letter, the share that got it; letters that never are
    # right are left out.
    recall: list[Part]
    # The letter that nearly all answers are, though the right ones are not.
    collapse: str | None
    # Mean probability of the answers given.
    confidence: float
    # Expected calibration error: how far probability and share right lie apart, a mean over
    # the answers.
    calibration_error: float
    # The bins that hold answers.
    reliability: list[Bin]


@dataclass(frozen=True)
class Comparison:
    """Two sets of answers to the same questions."""

    questions: int
    pictures: int
    first: Estimate
    second: Estimate
    # Second less first, question by question.
    difference: Estimate
    # Other letter given.
    changed: int
    # Wrong in the first, right in the second.
    gained: int
    # Right in the first, wrong in the second.
    lost: int


def clustered_mean(
    values: Sequence[float], groups: Sequence[Hashable], weights: Sequence[float] | None = None
) -> Estimate:
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
        weights: (N,), not negative and not all 0.
    """
    value, _, draws = _sample(values, groups, weights)
    return _interval(value, draws)


def clustered_difference(
    values: Sequence[float], groups: Sequence[Hashable], weights: Sequence[float] | None = None
) -> Estimate:
    """Return the mean of paired differences, from -1 to 1, and its interval.

    What was gained and what was lost are shares with the interval of ``clustered_mean`` each, put
    together after Zou and Donner 2008, "Construction of confidence limits about effect measures: a
    general approach". The rest as in ``clustered_mean``.
    """
    values = np.asarray(values, dtype=float)
    gained, up, gained_draws = _sample(values.clip(min=0), groups, weights)
    lost, down, lost_draws = _sample((-values).clip(min=0), groups, weights)
    _, _, draws = _sample(np.abs(values), groups, weights)
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
    values: Sequence[float], groups: Sequence[Hashable], weights: Sequence[float] | None
) -> tuple[float, np.ndarray, float | None]:
    """Return the mean; what each group adds to its deviation; and as how many independent values
    the sample counts, None with too few groups."""
    values = np.asarray(values, dtype=float)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    counted = weights > 0
    values, weights = values[counted], weights[counted]
    _, place = np.unique(np.asarray(groups)[counted], return_inverse=True)
    value = float((weights * values).sum() / weights.sum())
    sizes = np.bincount(place, weights)
    residuals = np.bincount(place, weights * (values - value)) / weights.sum()
    count = len(sizes)
    if count < FEWEST_GROUPS:
        return value, residuals, None
    variance = count / (count - 1) * (residuals**2).sum()
    variance *= (stdtrit(count - 1, TAIL) / ndtri(TAIL)) ** 2
    # Kish's effective numbers of groups and of values: unequal weights count for less.
    fewest = sizes.sum() ** 2 / (sizes**2).sum()
    most = weights.sum() ** 2 / (weights**2).sum()
    return value, residuals, float(np.clip(value * (1 - value) / max(variance, TINY), fewest, most))


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
        probabilities: (N, choices), rows that sum to 1.
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
        recall=accuracy_by(list(map(letter, answers)), right, groups),
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
    """Compare two sets of probabilities (N, choices) for the same questions; the rest as in
    ``measure``."""
    answers = np.asarray(answers)
    counted = np.ones(len(answers)) if weights is None else np.asarray(weights)
    given = first.argmax(-1), second.argmax(-1)
    before, after = (letters == answers for letters in given)
    return Comparison(
        questions=len(answers),
        pictures=len(np.unique(np.asarray(groups)[counted > 0])),
        first=clustered_mean(before, groups, weights),
        second=clustered_mean(after, groups, weights),
        difference=clustered_difference(after.astype(float) - before, groups, weights),
        changed=int((given[0] != given[1]).sum()),
        gained=int((after & ~before).sum()),
        lost=int((before & ~after).sum()),
    )


def accuracy_of(questions: Sequence[Question], probabilities: np.ndarray) -> float:
    """Share of questions whose most probable choice is the answer."""
    return float(np.mean(probabilities.argmax(-1) == [q.answer for q in questions]))
