"""Figures: training curves, questions with their pictures, answers."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from sklearn.metrics import ConfusionMatrixDisplay

from bridgeblip.data.questions import Question, letter, letters
from bridgeblip.evidence.metrics import Bin, accuracy_of

RIGHT, WRONG, NEUTRAL = "#1a7f37", "#cf222e", "#57606a"

SMOOTHING = 0.9  # weight of the past in the smoothed loss


def smoothed(loss: pd.Series) -> pd.Series:
    """An exponential moving average over the steps; the first steps weigh what they are."""
    return loss.ewm(alpha=1 - SMOOTHING).mean()


def training_figure(history: pd.DataFrame, guessing: float = 0.25) -> Figure:
    """Loss by step, raw and smoothed, and validation accuracy from before training to the end."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    loss = history.dropna(subset="loss")
    left.plot(
        loss["step"], loss["loss"], color="#54aeff", alpha=0.35, linewidth=1, label="each step"
    )
    left.plot(loss["step"], smoothed(loss["loss"]), color="#0969da", linewidth=2, label="smoothed")
    left.axhline(-np.log(guessing), color=NEUTRAL, linestyle=":", label="guessing")
    left.set(xlabel="training step", ylabel="cross-entropy", title="Training loss", ylim=(0, None))
    left.legend(frameon=False)
    accuracy = history.dropna(subset="accuracy")
    right.plot(accuracy["epoch"], accuracy["accuracy"], "o-", color=RIGHT)
    for _, row in accuracy.iterrows():
        right.annotate(
            f"{row.accuracy:.2f}",
            (row.epoch, row.accuracy),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
        )
    right.axhline(guessing, color=NEUTRAL, linestyle=":", label="guessing")
    right.set(
        xlabel="epoch (0: sliced, not yet bridged)",
        ylabel="accuracy",
        title="Validation",
        ylim=(0, 1.08),
    )
    right.legend(frameon=False, loc="lower right")
    return figure


def confusion_figure(questions: Sequence[Question], probabilities: np.ndarray) -> Figure:
    """Right letter against given letter; an even diagonal means that no letter is favoured."""
    figure = Figure(figsize=(4.2, 3.8), layout="constrained")
    axes = figure.subplots()
    ConfusionMatrixDisplay.from_predictions(
        [letter(q.answer) for q in questions],
        [letter(i) for i in probabilities.argmax(-1)],
        labels=letters(probabilities.shape[1]),
        cmap="Blues",
        colorbar=False,
        ax=axes,
    )
    share = accuracy_of(questions, probabilities)
    axes.set(
        xlabel="answer given", ylabel="right answer", title=f"{share:.1%} of {len(questions)} right"
    )
    return figure


def question_sheet(
    questions: Sequence[Question],
    probabilities: np.ndarray | None = None,
    count: int = 8,
    columns: int = 4,
) -> Figure:
    """Pictures with question and choices, ``count`` of them from all over the set.

    The answer given is marked, green if right, red if wrong; a tick stands at the right one, if
    known.
    """
    shown = range(0, len(questions), max(1, -(-len(questions) // count)))
    rows = max(1, -(-len(shown) // columns))
    figure = Figure(figsize=(3.2 * columns, 4.6 * rows), layout="constrained")
    grid = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[3, 2] * rows)
    for axes in grid.ravel():
        axes.axis("off")
    for place, i in enumerate(shown):
        row, column = divmod(place, columns)
        _draw_picture(grid[2 * row, column], questions[i].image)
        grid[2 * row, column].set_title(questions[i].id, fontsize=9, color=NEUTRAL)
        text, colour = _caption(questions[i], None if probabilities is None else probabilities[i])
        grid[2 * row + 1, column].text(0, 1, text, va="top", fontsize=9, color=colour)
    return figure


def _draw_picture(axes: Axes, path: Path | None) -> None:
    try:
        with Image.open(path) as picture:
            axes.imshow(ImageOps.exif_transpose(picture).convert("RGB"))
    except (AttributeError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        axes.text(0.5, 0.5, "no readable picture", ha="center", va="center", color=NEUTRAL)


def _caption(question: Question, probabilities: np.ndarray | None) -> tuple[str, str]:
    """The question with its choices, and the colour of the verdict."""
    given = None if probabilities is None else int(probabilities.argmax())
    lines = textwrap.wrap(question.question, 36)
    for j, choice in enumerate(question.choices):
        sure = "" if probabilities is None else f"  {probabilities[j]:.0%}"
        mark = {given: "▶ "}.get(j, "") + ("✓ " if j == question.answer else "")
        lines += textwrap.wrap(f"{mark}{letter(j)}. {choice}{sure}", 36)
    if given is None or question.answer is None:
        return "\n".join(lines), NEUTRAL
    return "\n".join(lines), RIGHT if given == question.answer else WRONG


def answer_figure(probabilities: np.ndarray) -> Figure:
    """How often each letter is given, and how sure the answers are."""
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    choices = probabilities.shape[1]
    counts = np.bincount(probabilities.argmax(-1), minlength=choices)
    left.bar_label(left.bar(letters(choices), counts, color="#54aeff"))
    left.axhline(len(probabilities) / choices, color=NEUTRAL, linestyle=":", label="evenly spread")
    left.set(
        xlabel="answer given", ylabel="questions", title="Letters", ylim=(0, counts.max() * 1.3)
    )
    left.legend(frameon=False, loc="upper right")
    right.hist(probabilities.max(-1), bins=np.linspace(1 / choices, 1, 31), color="#54aeff")
    right.set(xlabel="probability of the answer given", ylabel="questions", title="How sure")
    return figure


def reliability_figure(bins: Sequence[Bin]) -> Figure:
    """How often answers are right against how sure they are; below, how many are so sure."""
    figure = Figure(figsize=(4.2, 4.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color=NEUTRAL, linestyle=":", label="as often right as sure")
    share = np.array([[b.accuracy.value, b.accuracy.low, b.accuracy.high] for b in bins]).T
    sure = [b.confidence for b in bins]
    upper.errorbar(
        sure,
        share[0],
        np.abs(share[1:] - share[0]),
        fmt="o-",
        color="#0969da",
        elinewidth=1,
        capsize=3,
    )
    upper.set(ylabel="share right", xlim=(0, 1), ylim=(0, 1.03))
    upper.legend(frameon=False, loc="upper left")
    lower.bar([b.above for b in bins], [b.rows for b in bins], [b.up_to - b.above for b in bins], align="edge",
              color="#54aeff", edgecolor="white")  # fmt: skip
    lower.set(xlabel="probability of the answer given", ylabel="answers")
    return figure
