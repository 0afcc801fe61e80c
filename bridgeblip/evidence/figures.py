"""Figures: training curves, questions with their pictures, answers."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import ConfusionMatrixDisplay

from bridgeblip import InputError
from bridgeblip.data.pictures import open_picture
from bridgeblip.data.questions import Question, letter, letters
from bridgeblip.evidence.answers import letters_of
from bridgeblip.evidence.metrics import accuracy_of

RIGHT, WRONG, NEUTRAL = "#1a7f37", "#cf222e", "#57606a"
BLUE, LIGHT = "#0969da", "#54aeff"
TEXT_SIZE, LINE = 13, 30  # of a question below its picture: points, and characters a line

# Where a legend touches nothing that is drawn.
BELOW = {"frameon": False, "loc": "upper center", "bbox_to_anchor": (0.5, -0.18)}
SMOOTHING = 0.9  # weight of the past in the smoothed loss


def smoothed(loss: pd.Series) -> pd.Series:
    """An exponential moving average over the steps; the first steps weigh what they are."""
    return loss.ewm(alpha=1 - SMOOTHING).mean()


def training_figure(history: pd.DataFrame, guessing: float = 0.25) -> Figure:
    """Loss by step, raw and smoothed, and validation accuracy from before training to the end.

    Args:
        history: ``step``, ``epoch``, ``loss``, ``accuracy``; epochs from 0, -1 is before training.
            ``low`` and ``high`` bound the accuracy's 95% interval, drawn on ``pictures`` pictures.
        guessing: the accuracy of guessing.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    loss = history.dropna(subset="loss")
    left.plot(loss["step"], loss["loss"], color=LIGHT, alpha=0.5, linewidth=1, label="each step")
    left.plot(loss["step"], smoothed(loss["loss"]), color=BLUE, linewidth=2, label="smoothed")
    left.axhline(-np.log(guessing), color=NEUTRAL, linestyle=":", label="guessing")
    left.set(xlabel="training step", ylabel="cross-entropy", title="Training loss", ylim=(0, None))
    found = history.dropna(subset="accuracy").reindex(
        columns=["epoch", "accuracy", "low", "high", "pictures"]
    )
    if found["low"].notna().any():
        right.vlines(found["epoch"], found["low"], found["high"], color=RIGHT, label="95% interval")
    right.plot(found["epoch"], found["accuracy"], "o-", color=RIGHT, label="accuracy")
    for _, row in found.iterrows():
        right.annotate(f"{row.accuracy:.2f}", (row.epoch, 1.02), ha="center", annotation_clip=False)
    right.axhline(guessing, color=NEUTRAL, linestyle=":", label="guessing")
    pictures = found["pictures"].max()
    title = "Validation" if pd.isna(pictures) else f"Validation on {pictures:.0f} pictures"
    right.set(xlabel="after epoch", ylabel="accuracy", title=title, ylim=(0, 1.1))
    right.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    right.xaxis.set_major_formatter(lambda epoch, _: "before" if epoch == -1 else f"{epoch:.0f}")
    for axes in (left, right):
        axes.legend(**BELOW, ncols=3)
    return figure


def confusion_figure(questions: Sequence[Question], probabilities: np.ndarray) -> Figure:
    """Right letter against given letter; an even diagonal means that no letter is favoured."""
    figure = Figure(figsize=(4.2, 3.8), layout="constrained")
    axes = figure.subplots()
    ConfusionMatrixDisplay.from_predictions(
        [letter(q.answer) for q in questions],
        letters_of(probabilities),
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
    figure = Figure(figsize=(3.6 * columns, 5 * rows), layout="constrained")
    grid = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[3, 2] * rows)
    for axes in grid.ravel():
        axes.axis("off")
    for place, i in enumerate(shown):
        row, column = divmod(place, columns)
        upper, lower = grid[2 * row : 2 * row + 2, column]
        how = {"fontsize": TEXT_SIZE, "parse_math": False}  # a $ in a text is no mathematics
        upper.set_title(questions[i].id, color=NEUTRAL, **how)
        try:
            upper.imshow(open_picture(questions[i].image or ""))
        except InputError:
            upper.text(0.5, 0.5, "no readable picture", ha="center", va="center", color=NEUTRAL)
        text, colour = _caption(questions[i], None if probabilities is None else probabilities[i])
        lower.text(0, 1, text, va="top", color=colour, **how)
    return figure


def _caption(question: Question, probabilities: np.ndarray | None) -> tuple[str, str]:
    """The question with its choices, and the colour of the verdict."""
    given = None if probabilities is None else int(probabilities.argmax())
    lines = textwrap.wrap(question.question, LINE)
    for j, choice in enumerate(question.choices):
        if not choice:
            continue
        sure = "" if probabilities is None else f"  {probabilities[j]:.0%}"
        mark = {given: "▶ "}.get(j, "") + ("✓ " if j == question.answer else "")
        lines += textwrap.wrap(f"{mark}{letter(j)}. {choice}{sure}", LINE)
    for text in question.references[:2]:
        lines += textwrap.wrap(f"✓ {text}", LINE)
    if given is None or question.answer is None:
        return "\n".join(lines), NEUTRAL
    return "\n".join(lines), RIGHT if given == question.answer else WRONG


def answer_figure(probabilities: np.ndarray) -> Figure:
    """How often each letter is given, and how sure the answers are."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    choices = probabilities.shape[1]
    counts = np.bincount(probabilities.argmax(-1), minlength=choices)
    left.bar_label(left.bar(letters(choices), counts, color=LIGHT), label_type="center")
    left.axhline(len(probabilities) / choices, color=NEUTRAL, linestyle=":", label="evenly spread")
    left.set(xlabel="answer given", ylabel="questions", title="Letters")
    left.legend(**BELOW)
    right.hist(probabilities.max(-1), bins=np.linspace(1 / choices, 1, 31), color=LIGHT)
    right.set(xlabel="probability of the answer given", ylabel="questions", title="How sure")
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def reliability_figure(bins: Sequence[dict[str, Any]]) -> Figure:
    """How often answers are right against how sure they are; below, how many are so sure."""
    figure = Figure(figsize=(4.2, 4.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color=NEUTRAL, linestyle=":", label="as often right as sure")
    table = pd.DataFrame([one | vars(one["accuracy"]) for one in bins])
    table = table.drop(columns="accuracy").astype(float)
    if table["low"].notna().any():
        upper.vlines(
            table["confidence"], table["low"], table["high"], color=BLUE, label="95% interval"
        )
    upper.plot(table["confidence"], table["value"], "o-", color=BLUE)
    upper.set(ylabel="share right", xlim=(0, 1), ylim=(0, 1.03))
    upper.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    width = table["up_to"] - table["above"]
    lower.bar(table["above"], table["rows"], width, align="edge", color=LIGHT, edgecolor="white")
    lower.set(xlabel="probability of the answer given", ylabel="answers")
    return figure
