"""How often the intervals of ``evidence.metrics`` hold the truth, by simulation."""

from itertools import product

import numpy as np
import pandas as pd

from bridgeblip.evidence.metrics import clustered_difference, clustered_mean

PICTURES = (10, 20)
QUESTIONS = 4  # a picture
ACCURACIES = (0.5, 0.8, 0.95)
CORRELATIONS = (0.0, 0.3, 0.9)  # of right and wrong within a picture
CHANGES = (0.05, 0.2, 1.0)  # share of the answers that a second run gives anew
WANTED = 0.93


def draw_answers(generator, pictures, accuracy, correlation, questions=QUESTIONS) -> np.ndarray:
    """Return right or wrong (pictures, questions); each picture has a difficulty of its own."""
    if correlation == 0:
        return generator.random((pictures, questions)) < accuracy
    spread = 1 / correlation - 1
    chance = generator.beta(accuracy * spread, (1 - accuracy) * spread, (pictures, 1))
    return generator.random((pictures, questions)) < chance


def coverage_grid(runs=1000, seed=0, interval=clustered_mean) -> pd.DataFrame:
    """Return one row a cell: how often the interval of an accuracy held it, and its mean width."""
    generator, rows = np.random.default_rng(seed), []
    for pictures, accuracy, correlation in product(PICTURES, ACCURACIES, CORRELATIONS):
        groups = np.repeat(np.arange(pictures), QUESTIONS)
        drawn = [
            interval(draw_answers(generator, pictures, accuracy, correlation).ravel(), groups)
            for _ in range(runs)
        ]
        rows.append((pictures, accuracy, correlation, *_summary(drawn, accuracy)))
    names = ["pictures", "accuracy", "correlation", "coverage", "width"]
    return pd.DataFrame(rows, columns=names)


def difference_grid(runs=1000, seed=0) -> pd.DataFrame:
    """The same of the difference between two runs, of which the second guesses some answers
    anew."""
    generator, rows = np.random.default_rng(seed), []
    cells = product(PICTURES, ACCURACIES, CORRELATIONS, CHANGES)
    for pictures, accuracy, correlation, change in cells:
        groups = np.repeat(np.arange(pictures), QUESTIONS)
        drawn = []
        for _ in range(runs):
            first = draw_answers(generator, pictures, accuracy, correlation)
            again = draw_answers(generator, pictures, 0.6, correlation)
            changed = draw_answers(generator, pictures, change, correlation) if change < 1 else True
            second = np.where(changed, again, first).astype(float)
            drawn.append(clustered_difference((second - first).ravel(), groups))
        truth = change * (0.6 - accuracy)
        rows.append((pictures, accuracy, correlation, change, *_summary(drawn, truth)))
    names = ["pictures", "accuracy", "correlation", "changed", "coverage", "width"]
    return pd.DataFrame(rows, columns=names)


def _summary(drawn, truth) -> tuple[float, float]:
    low, high = np.array([(estimate.low, estimate.high) for estimate in drawn]).T
    return ((low <= truth) & (truth <= high)).mean(), (high - low).mean()
