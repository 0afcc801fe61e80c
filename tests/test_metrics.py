import json
import os
from dataclasses import replace

import numpy as np
import pytest
from interval_coverage import WANTED, coverage_grid, difference_grid
from scipy.stats import bootstrap
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score

from bridgeblip.evidence import metrics
from bridgeblip.evidence.metrics import (
    LONG,
    OTHER_OPENERS,
    Estimate,
    accuracy_by,
    choice_lengths,
    clustered_difference,
    clustered_mean,
    compare,
    guessing,
    measure,
    openers,
    picture_groups,
)

RUNS = os.environ.get("BRIDGEBLIP_RUNS")  # of each cell of the simulation


def draw_run(generator, pictures, skill, likeness, sizes=(4, 4)):
    """Right or wrong by row, and the picture of each row; ``likeness`` is the correlation within a
    picture."""
    size = generator.integers(sizes[0], sizes[1] + 1, pictures)
    spread = 1 / likeness - 1
    chance = generator.beta(skill * spread, (1 - skill) * spread, pictures)
    groups = np.repeat(np.arange(pictures), size)
    return generator.random(len(groups)) < chance[groups], groups


@pytest.fixture
def run():
    """300 answers about 75 pictures; letter D is seldom right."""
    generator = np.random.default_rng(3)
    right, groups = draw_run(generator, 75, 0.7, 0.3)
    answers = generator.choice(4, len(right), p=[0.4, 0.3, 0.2, 0.1])
    given = np.where(right, answers, (answers + generator.integers(1, 4, len(right))) % 4)
    scores = generator.normal(size=(len(right), 4))
    scores[np.arange(len(right)), given] = scores.max(1) + generator.exponential(1.5, len(right))
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    return answers, probabilities, groups


def test_intervals_cover_what_they_promise():
    """Every cell of a simulation, with few pictures and with answers that stand and fall
    together."""
    grid = coverage_grid(runs=int(RUNS or 400))
    assert len(grid) == 18 and grid["coverage"].min() >= WANTED, grid
    typical = grid[(grid["pictures"] == 20) & (grid["accuracy"] == 0.8)]
    assert typical["width"].max() <= 0.40


def test_the_simulation_finds_intervals_that_do_not_cover():
    def by_row(right, groups):
        off = 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / len(right))
        return Estimate(right.mean(), right.mean() - off, right.mean() + off)

    assert coverage_grid(runs=100, interval=by_row)["coverage"].min() < 0.5


def test_intervals_of_differences_cover():
    grid = difference_grid(runs=int(RUNS or 150))
    assert len(grid) == 54 and grid["coverage"].min() >= (WANTED if RUNS else 0.92), grid


@pytest.mark.parametrize(
    "pictures, skill, likeness, sizes", [(60, 0.6, 0.5, (4, 4)), (213, 0.85, 0.3, (1, 7))]
)
def test_intervals_of_many_pictures_cover(pictures, skill, likeness, sizes):
    generator, covered, runs = np.random.default_rng(5), 0, 400
    for _ in range(runs):
        right, groups = draw_run(generator, pictures, skill, likeness, sizes)
        estimate = clustered_mean(right, groups)
        covered += estimate.low <= skill <= estimate.high
    assert 0.93 <= covered / runs <= 0.985


def test_interval_is_near_the_bootstrap_of_whole_pictures(run):
    answers, probabilities, groups = run
    right = probabilities.argmax(1) == answers
    sums, sizes = np.bincount(groups, right), np.bincount(groups)
    expected = bootstrap(
        (sums, sizes),
        lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        random_state=np.random.default_rng(1),
    ).confidence_interval
    found = clustered_mean(right, groups)
    assert found.value == pytest.approx(sums.sum() / sizes.sum())
    assert found.low == pytest.approx(expected.low, abs=0.02)
    assert found.high == pytest.approx(expected.high, abs=0.02)


def test_fewer_than_ten_pictures_have_no_interval():
    few = clustered_mean([1, 0] * 18, np.repeat(np.arange(9), 4))
    assert (few.value, few.low, few.high) == (0.5, None, None) and "too few" in str(few)
    assert clustered_mean([1, 0] * 20, np.repeat(np.arange(10), 4)).low is not None
    assert clustered_difference([1, 0] * 18, np.repeat(np.arange(9), 4)) == few


def test_no_interval_is_surer_than_its_pictures():
    """Where all pictures agree, the interval is that of as many coin tosses."""
    groups = np.repeat(np.arange(10), 4)
    right = clustered_mean(np.ones(40), groups)
    assert (right.value, right.high) == (1, 1) and right.low == pytest.approx(0.025 ** (1 / 10))
    wrong = clustered_mean(np.zeros(40), groups)
    assert (wrong.low, wrong.high) == (0, pytest.approx(1 - right.low))
    nothing = clustered_difference(np.zeros(40), groups)
    assert nothing.low == -nothing.high and nothing.high == pytest.approx(wrong.high)


def test_a_gain_without_a_loss_is_sure():
    """A loss that never happened is as sure as the gains are many."""
    values, groups = np.zeros(240), np.repeat(np.arange(40), 6)
    values[::9] = 1
    found = clustered_difference(values, groups)
    assert found.value == pytest.approx(27 / 240) and found.low > 0.06
    back = clustered_difference(-values, groups)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))


def test_measures_equal_scikit_learn(run):
    answers, probabilities, groups = run
    given = probabilities.argmax(1)
    found = measure(answers, probabilities, groups)
    assert (
        found["accuracy"].value
        == accuracy_score(answers, given)
        == found["right"] / found["questions"]
    )
    assert (found["questions"], found["pictures"], found["collapse"]) == (300, 75, None)
    assert found["confusion"] == confusion_matrix(answers, given).tolist()
    assert [part["accuracy"].value for part in found["recall"]] == pytest.approx(
        recall_score(answers, given, average=None)
    )
    assert [part["rows"] for part in found["recall"]] == np.bincount(answers).tolist()
    share, sure = calibration_curve(given == answers, probabilities.max(1), n_bins=10)
    assert [b["accuracy"].value for b in found["reliability"]] == pytest.approx(share)
    assert [b["confidence"] for b in found["reliability"]] == pytest.approx(sure)
    rows = np.array([b["rows"] for b in found["reliability"]])
    assert found["calibration_error"] == pytest.approx((rows * np.abs(share - sure)).sum() / 300)
    assert rows.sum() == 300 and found["confidence"] == pytest.approx(probabilities.max(1).mean())
    json.dumps(found, default=vars)  # plain numbers only


def test_letters_that_are_never_right_have_no_recall():
    probabilities = np.full((4, 4), 0.25) + np.eye(4) * 0.01
    found = measure([0, 1, 1, 0], probabilities, [1, 2, 3, 4])
    assert [part["name"] for part in found["recall"]] == ["A", "B"]


@pytest.mark.parametrize("letter, share, expected", [(1, 1.0, "B"), (2, 0.9, "C"), (2, 0.3, None)])
def test_collapse_to_one_letter_is_called_out(letter, share, expected):
    answers = np.arange(400) % 4
    given = np.where(np.arange(400) // 4 < 100 * share, letter, answers)
    assert measure(answers, np.eye(4)[given], np.arange(400))["collapse"] == expected


def test_parts_are_measured_apart():
    parts = accuracy_by(["b", "a", "b", "b"], np.array([True, False, False, True]), np.arange(4))
    assert [(part["name"], part["rows"]) for part in parts] == [("a", 1), ("b", 3)]
    assert [part["accuracy"].value for part in parts] == [0, pytest.approx(2 / 3)]


def test_openers_and_lengths(questions):
    texts = (
        ["What is, it?"] * 12
        + ["what IS shown"] * 3
        + ["이 사진에 무엇이 있나요?"] * 10
        + ["Why?"] * 2
        + [""]
    )
    asked = [replace(questions[0], question=text) for text in texts]
    assert openers(asked) == ["what is"] * 15 + ["이 사진에"] * 10 + [OTHER_OPENERS] * 3
    many = [replace(questions[0], question=f"opener {i // 10}") for i in range(200)]
    assert len(set(openers(many))) == metrics.OPENERS_SHOWN + 1
    lengths = [
        ("a", "b", "c", ""),
        ("a", "two words", "c", "d"),
        ("a b c d", "", "", "e"),
        ("a", "b", "c", "d " * 9),
    ]
    asked = [replace(questions[0], choices=choices) for choices in lengths]
    assert choice_lengths(asked) == ["1 word", "2 to 3 words", "4 to 6 words", LONG]
    assert guessing(asked) == pytest.approx((1 / 3 + 1 / 4 + 1 / 2 + 1 / 4) / 4)


def test_pictures_are_told_apart_by_content(questions):
    assert len({q.image for q in questions}) == 72  # each is stored under a name of its own
    groups = picture_groups(questions)
    assert len(set(groups)) == 12 and (groups.reshape(12, 6) == groups[::6, None]).all()
    lost = [replace(questions[0], image=None), questions[1], replace(questions[2], image=None)]
    assert len(set(picture_groups(lost))) == 3


def test_comparison_is_paired(run):
    answers, first, groups = run
    second = first.copy()
    wrong = np.flatnonzero(first.argmax(1) != answers)[::6]
    assert len(wrong) == 14
    second[wrong] = np.eye(4)[answers[wrong]]
    right = np.flatnonzero(first.argmax(1) == answers)[::150]
    second[right] = np.eye(4)[(answers[right] + 1) % 4]
    found = compare(answers, first, second, groups)
    assert (found["changed"], found["gained"], found["lost"]) == (16, 14, 2)
    assert (
        found["difference"].value
        == pytest.approx(12 / 300)
        == found["second"].value - found["first"].value
    )
    assert (
        found["difference"].high - found["difference"].low
        < found["second"].high - found["second"].low
    )
    assert found["difference"].low > 0
    back = compare(answers, second, first, groups)["difference"]
    assert back.value == -found["difference"].value and back.high == pytest.approx(
        -found["difference"].low, abs=0.004
    )
    same = compare(answers, first, first, groups)
    assert (same["changed"], same["difference"].value) == (0, 0) and same["difference"].high > 0
