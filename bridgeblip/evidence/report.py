"""What people look at: the training curve, questions beside their pictures, and the page that
judges a run."""

import json
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bridgeblip.data.questions import Question, letter, letters
from bridgeblip.evidence import metrics
from bridgeblip.evidence.figures import confusion_figure, reliability_figure
from bridgeblip.evidence.metrics import Comparison
from bridgeblip.evidence.page import comparison_page, points, report_page
from bridgeblip.files import write_text

DECIMALS = 6  # of probabilities.csv
SHOWN = 12  # questions that a section shows with their pictures
FEW_PICTURES = 30
GUESSING = "guessing"
FLAG_NOTES = {
    "blank": "questions answered without looking",
    "shortened": "questions whose text was shortened",
}  # flags of probabilities.csv that speak of the data


def write_report(
    out: str | Path,
    questions: Sequence[Question],
    probabilities: np.ndarray,
    *,
    flags: Sequence[Sequence[str]] | None = None,
    blank_probabilities: np.ndarray | None = None,
    references: dict[str, float] | None = None,
    weights: Sequence[float] | None = None,
    problems: pd.DataFrame | None = None,
    cost: dict[str, Any] | None = None,
    manifest: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the page that says whether to believe a score, and its numbers as JSON beside it.

    What is not given is named on the page as not measured.

    Args:
        out: the HTML file; the JSON gets its name, but for the end.
        questions: with answers.
        probabilities: (N, 4); rounded to the decimals of ``probabilities.csv``, so that each number
            can be found again.
        flags: of each question, as ``inference.Answers`` has them.
        blank_probabilities: (N, 4), answered without looking.
        references: accuracies of simpler ways to answer the same questions, by name.
        weights: (N,) of the questions in the score.
        problems: one row a problem of the data.
        cost: seconds, sizes and the like by name.
        manifest: where the model comes from; plain values.

    Returns:
        What the JSON holds; ``["verdict"]["sentence"]`` is the judgement in one sentence.
    """
    probabilities = np.asarray(probabilities, dtype=float).round(DECIMALS)
    answers, groups = [q.answer for q in questions], metrics.picture_groups(questions)
    right = probabilities.argmax(-1) == answers
    measures = metrics.measure(answers, probabilities, groups, weights)
    blank = (
        None
        if blank_probabilities is None
        else metrics.compare(answers, blank_probabilities, probabilities, groups)
    )
    counts = np.bincount(answers, minlength=probabilities.shape[1])
    chance = {
        GUESSING: metrics.guessing(questions),
        f"always {letter(counts.argmax())}, the most frequent right letter": float(
            counts.max() / len(answers)
        ),
    }
    ordered = np.sort(probabilities, axis=1)
    mistakes = [i for i in np.argsort(-ordered[:, -1], kind="stable") if not right[i]]
    facts = {
        "measures": measures,
        "chance": chance,
        "references": references,
        "blank": blank,
        "orders": None if flags is None else _orders(flags, right, groups),
        "openers": metrics.accuracy_by(metrics.openers(questions), right, groups),
        "choice_lengths": metrics.accuracy_by(metrics.choice_lengths(questions), right, groups),
        "mistakes": [questions[i].id for i in mistakes[:SHOWN]],
        "least_certain": [
            questions[i].id
            for i in np.argsort(ordered[:, -1] - ordered[:, -2], kind="stable")[:SHOWN]
        ],
        "data": _data_notes(questions, groups, flags),
        "problems": None if problems is None else problems.to_dict("records"),
        "cost": cost,
        "manifest": manifest,
    }
    facts = {"verdict": judge(facts)} | facts
    figures = confusion_figure(questions, probabilities), reliability_figure(measures.reliability)
    _write(out, report_page(facts, questions, probabilities, *figures), facts)
    return facts


def judge(facts: dict[str, Any]) -> dict[str, str]:
    """Say in one sentence whether to believe a score, and of what kind that is: good, doubt or
    bad."""
    measures, blank = facts["measures"], facts["blank"]
    score, others = measures.accuracy, facts["chance"] | (facts["references"] or {})
    if measures.collapse:
        given = (
            sum(row[letters(len(row)).index(measures.collapse)] for row in measures.confusion)
            / measures.questions
        )
        return _verdict(
            "bad", f"Don't believe this score: {given:.0%} of all answers are {measures.collapse}."
        )
    guessing = others[GUESSING]
    if score.low <= guessing:
        return _verdict(
            "bad",
            f"Don't believe this score: its interval reaches down to guessing, {guessing:.1%}.",
        )
    if blank and blank.difference.low <= 0:
        return _verdict(
            "bad",
            f"Don't believe that it looks at the pictures: without them it scores "
            f"{blank.first.value:.1%}.",
        )
    doubts = []
    if measures.pictures < FEW_PICTURES:
        doubts.append(f"{measures.pictures} pictures are few")
    if not blank:
        doubts.append("whether it looks at the pictures was not measured")
    best = max(others, key=others.get)
    if others[best] >= score.low:
        doubts.append(f"it is not shown to beat '{best}', {others[best]:.1%}")
    if doubts:
        return _verdict(
            "doubt",
            f"Believe it with care, between {score.low:.1%} and {score.high:.1%}: "
            f"{_listed(doubts)}.",
        )
    looking = f"looking at the pictures is worth {100 * blank.difference.value:.1f} points"
    return _verdict(
        "good",
        f"Believe it, for questions and pictures like these: between {score.low:.1%} and "
        f"{score.high:.1%}, better than "
        f"each simpler way below, and {looking}.",
    )


def _verdict(kind: str, sentence: str) -> dict[str, str]:
    return {"kind": kind, "sentence": sentence}


def _listed(texts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


def _orders(
    flags: Sequence[Sequence[str]], right: np.ndarray, groups: np.ndarray
) -> dict[str, Any]:
    """What asking again with the choices in other orders showed."""
    again = np.array(["permuted" in words for words in flags])
    depends = np.array(["order" in words for words in flags])
    kinds = np.where(depends, "the answer depends on the order", "the same answer in every order")
    kinds = np.where(again, kinds, "asked in one order only")
    consistent = metrics.clustered_mean(~depends[again], groups[again]) if again.any() else None
    parts = metrics.accuracy_by(kinds, right, groups)
    return {"asked_again": int(again.sum()), "consistent": consistent, "accuracy": parts}


def _data_notes(
    questions: Sequence[Question], groups: np.ndarray, flags: Sequence[Sequence[str]] | None
) -> dict[str, int]:
    """Count what a reader should know of the questions, by what it is."""
    table = pd.DataFrame({"picture": groups, "question": [q.question for q in questions]})
    table["choices"] = ["\n".join(sorted(q.choices)) for q in questions]
    table["right"] = [q.choices[q.answer] for q in questions]
    same = ["picture", "question", "choices"]
    notes = {
        "questions": len(questions),
        "distinct pictures": int(table["picture"].nunique()),
        "picture files; the same picture may lie under several names": len(
            {q.image for q in questions if q.image}
        ),
        "questions asked again, word for word, of the same picture": int(
            table.duplicated(same).sum()
        ),
        "of these, with another right answer": int(
            (table.drop_duplicates()[same].duplicated()).sum()
        ),
        "questions with fewer than four choices": sum(not all(q.choices) for q in questions),
        "questions with the same choice twice": sum(
            len(set(filter(None, q.choices))) < sum(map(bool, q.choices)) for q in questions
        ),
        "questions without a usable picture in the file": sum(q.image is None for q in questions),
    }
    for word, what in FLAG_NOTES.items():
        if flags is not None:
            notes[what] = sum(word in words for words in flags)
    return notes


def write_comparison(
    out: str | Path,
    questions: Sequence[Question],
    first: np.ndarray,
    second: np.ndarray,
    *,
    names: tuple[str, str] = ("first", "second"),
    weights: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Write the page that says whether one run is better than another, and its numbers as JSON
    beside it.

    Args:
        out: the HTML file; the JSON gets its name, but for the end.
        questions: with answers.
        first: probabilities (N, 4) of one run.
        second: of the other.
        names: of the runs, for the page.
        weights: (N,) of the questions in the score.

    Returns:
        What the JSON holds; ``["verdict"]["sentence"]`` is the judgement in one sentence.
    """
    answers, runs = (
        np.array([q.answer for q in questions]),
        [np.asarray(p, dtype=float) for p in (first, second)],
    )
    comparison = metrics.compare(answers, *runs, metrics.picture_groups(questions), weights)
    before, after = (p.argmax(-1) for p in runs)
    changed = [
        {
            "ID": questions[i].id,
            "right": letter(answers[i]),
            "first": letter(before[i]),
            "second": letter(after[i]),
            "what": "mended"
            if after[i] == answers[i]
            else "spoiled"
            if before[i] == answers[i]
            else "still wrong",
        }
        for i in np.flatnonzero(before != after)
    ]
    facts = {
        "verdict": judge_difference(comparison),
        "names": dict(zip(("first", "second"), names, strict=True)),
        "weighted": weights is not None,
        "comparison": comparison,
        "changed": changed,
    }
    _write(out, comparison_page(facts, questions, runs[1], SHOWN), facts)
    return facts


def judge_difference(comparison: Comparison) -> dict[str, str]:
    """Say in one sentence whether a gain is noise, and of what kind that is: good, doubt or bad."""
    change = comparison.difference
    interval = (
        f"{points(change.value)} points, 95% interval {points(change.low)} to {points(change.high)}"
    )
    rows = f"{comparison.gained} answers mended, {comparison.lost} spoiled"
    if not comparison.changed:
        return _verdict(
            "doubt", f"Both runs give the same letter to all {comparison.questions:,} questions."
        )
    if change.low > 0:
        return _verdict(
            "good", f"The second run is better, and that is more than noise: {interval}; {rows}."
        )
    if change.high < 0:
        return _verdict(
            "bad", f"The second run is worse, and that is more than noise: {interval}; {rows}."
        )
    return _verdict(
        "doubt", f"The difference may be noise, for its interval holds zero: {interval}; {rows}."
    )


def _write(out: str | Path, html: str, facts: dict[str, Any]) -> None:
    out = Path(out)
    numbers = json.dumps(
        facts,
        ensure_ascii=False,
        indent=1,
        default=lambda v: asdict(v) if is_dataclass(v) else str(v),
    )
    write_text(out.with_suffix(".json"), numbers + "\n")
    write_text(out, html)
