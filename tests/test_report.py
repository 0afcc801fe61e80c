import io

import numpy as np
import pandas as pd
import pytest

from bridgeblip.report import accuracy_of, answer_figure, confusion_figure, question_sheet, training_figure


@pytest.fixture
def probabilities(questions):
    values = np.full((len(questions), 4), 0.1)
    given = [q.answer if i % 4 else (q.answer + 1) % 4 for i, q in enumerate(questions)]
    values[np.arange(len(questions)), given] = 0.7
    return values


def texts(figure) -> str:
    figure.savefig(io.BytesIO(), format="png")  # it can be drawn
    return "\n".join(text.get_text() for axes in figure.axes for text in [*axes.texts, axes.title])


def test_accuracy(questions, probabilities):
    assert accuracy_of(questions, probabilities) == 0.75


def test_figures_say_what_they_show(questions, probabilities):
    assert "75.0% of 72 right" in texts(confusion_figure(questions, probabilities))
    sheet = texts(question_sheet(questions[:6], probabilities[:6]))
    for question in questions[:6]:
        assert question.id in sheet and question.choices[0] in sheet
    assert sheet.count("▶") == 6 and sheet.count("✓") == 6 and "70%" in sheet
    assert "▶" not in texts(question_sheet(questions[:3]))
    texts(answer_figure(probabilities))


def test_training_figure_starts_before_training():
    rows = [{"step": 0, "epoch": 0.0, "accuracy": 0.3}]
    rows += [{"step": i, "epoch": i / 10, "loss": 2 / i} for i in range(1, 11)]
    history = pd.DataFrame([*rows, {"step": 10, "epoch": 1.0, "accuracy": 0.9}])
    drawn = texts(training_figure(history))
    assert "0.30" in drawn and "0.90" in drawn
