"""The page that judges a run, and the one that compares two: their facts and verdicts."""

import json
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bridgeblip.data.pictures import SHORT_KEY, picture_keys
from bridgeblip.data.questions import Question, letter, letters
from bridgeblip.evidence import metrics
from bridgeblip.evidence.answers import margins
from bridgeblip.evidence.figures import confusion_figure, reliability_figure
from bridgeblip.evidence.metrics import Comparison, Estimate
from bridgeblip.evidence.page import points, render
from bridgeblip.files import write_text
from bridgeblip.messages import say

DECIMALS = 6  # of probabilities.csv
SHOWN = 12  # questions that a section shows with their pictures
ROWS_SHOWN = 50  # of a long table
FEW_PICTURES = 30
MANY_LEARNED = 0.1  # of the pictures: the score is then no test
GUESSING = "guessing"
FLAG_FACTS = {
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
    before: np.ndarray | None = None,
    references: dict[str, float] | None = None,
    weights: Sequence[float] | None = None,
    problems: pd.DataFrame | None = None,
    cost: dict[str, Any] | None = None,
    manifest: dict[str, Any] | None = None,
    data: str | Path = "",
) -> dict[str, Any]:
    """Write the page that says whether to believe a score, and its numbers as JSON beside it.

    What is not given is named on the page as not measured.

    Args:
        out: the HTML file; the JSON gets its name, but for the end.
        questions: with answers.
        probabilities: (N, choices); rounded to the decimals of ``probabilities.csv``, so that each
            number can be found again.
        flags: of each question, as ``evidence.answers.Answers`` has them.
        blank_probabilities: (N, choices), answered without looking.
        before: (N, choices), answered before training; shown beside the answers that it changed.
        references: accuracies of simpler ways to answer the same questions, by name.
        weights: (N,) of the questions in the score.
        problems: one row a problem of the data.
        cost: seconds, sizes and the like by name.
        manifest: of a bundle or of weights: where the model comes from; plain values.
        data: the question file, for the title.

    Returns:
        What the JSON holds; ``["verdict"]["sentence"]`` is the judgement in one sentence.
    """
    probabilities = np.asarray(probabilities, dtype=float).round(DECIMALS)
    answers = [q.answer for q in questions]
    groups = metrics.picture_groups(questions)
    right = probabilities.argmax(-1) == answers
    blank = None
    if blank_probabilities is not None:
        blank = metrics.compare(answers, blank_probabilities, probabilities, groups)
    trained = None
    if before is not None:
        before = np.asarray(before, dtype=float)
        trained = metrics.compare(answers, before, probabilities, groups)
    manifest, learned = learned_pictures(manifest, questions)
    sure, margin = probabilities.max(axis=1), margins(probabilities)
    mistakes = [i for i in np.argsort(-sure, kind="stable") if not right[i]][:SHOWN]
    unsure = np.argsort(margin, kind="stable")[:SHOWN]
    facts = {
        "about": model_and_data(manifest, questions, data),
        "measures": metrics.measure(answers, probabilities, groups, weights),
        "chance": _chance(questions),
        "references": references,
        "blank": blank,
        "training": trained,
        "learned": learned,
        "orders": None if flags is None else _orders(flags, right, groups),
        "openers": metrics.accuracy_by(metrics.openers(questions), right, groups),
        "choice_lengths": metrics.accuracy_by(metrics.choice_lengths(questions), right, groups),
        "mistakes": [questions[i].id for i in mistakes],
        "least_certain": [questions[i].id for i in unsure],
        "data": _data_notes(questions, groups, flags, learned),
        "problems": None if problems is None else problems.to_dict("records"),
        "cost": cost,
        "manifest": manifest,
    }
    facts = {"verdict": judge(facts)} | facts
    mistaken = [(questions[i], probabilities[i], 100 * sure[i]) for i in mistakes]
    uncertain = [(questions[i], probabilities[i], 100 * margin[i]) for i in unsure]
    shown = _shown(facts, questions, probabilities)
    shown["changed"] = [] if before is None else _changed(questions, before, probabilities)
    write_page(out, "report", facts, **shown, mistaken=mistaken, uncertain=uncertain)
    return facts


def model_and_data(
    manifest: dict[str, Any] | None, questions: Sequence[Question], data: str | Path
) -> dict[str, str]:
    """What the title names."""
    manifest = manifest or {}
    base = manifest.get("base", manifest.get("trained", {}).get("base", "a model without a name"))
    model = Path(str(base)).name
    data = Path(data).name or f"{len(questions):,} questions"
    return {"model": model, "data": data, "date": f"{date.today():%Y-%m-%d}"}


def learned_pictures(
    manifest: dict[str, Any] | None, questions: Sequence[Question]
) -> tuple[dict[str, Any] | None, int | None]:
    """Return the manifest without its long list of training pictures, and how many pictures of the
    questions are in that list; None where there is no list."""
    trained = (manifest or {}).get("trained", manifest) or {}
    if "pictures" not in trained:
        return manifest, None
    known = set(trained["pictures"])
    keys = picture_keys(q.image for q in questions if q.image is not None).values()
    learned = len({key[:SHORT_KEY] for key in keys} & known)
    counted = trained | {"pictures": len(known)}
    return (manifest | {"trained": counted} if "trained" in manifest else counted), learned


def _chance(questions: Sequence[Question]) -> dict[str, float]:
    """What answers reach that don't look at a question."""
    counts = np.bincount([q.answer for q in questions])
    always = f"always {letter(counts.argmax())}, the most frequent right letter"
    return {GUESSING: metrics.guessing(questions), always: float(counts.max() / len(questions))}


def _shown(
    facts: dict[str, Any], questions: Sequence[Question], probabilities: np.ndarray
) -> dict[str, Any]:
    """What the page shows of the facts in a form of its own: rows of bars, figures, words."""
    measures, about = facts["measures"], facts["about"]
    against = [("this run", measures.accuracy, "")]
    if measures.weighted:
        against.append(("this run, weighted", measures.weighted, "as the weights given ask"))
    for name, share in (facts["chance"] | (facts["references"] or {})).items():
        against.append((name, Estimate(share), _against(measures.accuracy, share)))
    if facts["blank"]:
        against.append(("without looking: blank pictures", facts["blank"].first, ""))
    given = np.sum(measures.confusion, axis=0)
    by_letter = []
    for part in measures.recall:
        times = given[letters(len(given)).index(part.name)]
        note = f"right for {part.rows:,} questions, given to {times:,}"
        by_letter.append((part.name, part.accuracy, note))
    return {
        "title": f"{about['model']} on {about['data']}, {about['date']}",
        "against": against,
        "by_letter": by_letter,
        "confusion": confusion_figure(questions, probabilities),
        "reliability": reliability_figure(measures.reliability),
        "fewest": metrics.FEWEST_GROUPS,
        "rows_shown": ROWS_SHOWN,
    }


def _changed(
    questions: Sequence[Question], before: np.ndarray, after: np.ndarray
) -> list[tuple[Question, np.ndarray, str, np.ndarray]]:
    """Answers that training has changed, from all over the set: what a card shows of them."""
    given = before.argmax(-1), after.argmax(-1)
    rows = np.flatnonzero(given[0] != given[1])
    cards = []
    for i in rows[:: max(1, -(-len(rows) // SHOWN))]:
        first, second = (letter(letters[i]) for letters in given)
        cards.append((questions[i], after[i], f"{first} before, {second} now", before[i]))
    return cards


def _against(score: Estimate, share: float) -> str:
    if score.low is None:
        return ""
    if share < score.low:
        return "beaten"
    return "not reached" if share > score.high else "no difference shown"


def judge(facts: dict[str, Any]) -> dict[str, str]:
    """Say in one sentence whether to believe a score, and of what kind that is: good, doubt or
    bad."""
    measures, blank, learned = facts["measures"], facts["blank"], facts["learned"]
    score, others = measures.accuracy, facts["chance"] | (facts["references"] or {})
    known = say("known", learned=learned, pictures=measures.pictures)
    if score.low is None:
        more = f" ({known})" if learned else ""
        return _verdict("doubt", f"{_nothing(measures.pictures)}{more}.")
    if learned and learned >= MANY_LEARNED * measures.pictures:
        return _verdict("bad", say("leaked", known=known))
    if measures.collapse:
        given = np.array(measures.confusion).sum(0) / measures.questions
        share = given[letters(len(given)).index(measures.collapse)]
        return _verdict("bad", say("collapsed", share=share, letter=measures.collapse))
    if score.low <= others[GUESSING]:
        return _verdict("bad", say("guessing", guessing=others[GUESSING]))
    if blank and blank.difference.low <= 0:
        return _verdict("bad", say("blind", blank=blank.first.value))
    doubts = [known] if learned else []
    if measures.pictures < FEW_PICTURES:
        doubts.append(say("few_pictures", pictures=measures.pictures))
    if not blank:
        doubts.append(say("not_blind_tested"))
    best = max(others, key=others.get)
    if others[best] >= score.low:
        doubts.append(say("not_better", name=best, share=others[best]))
    if doubts:
        reasons = "; ".join(doubts)
        return _verdict("doubt", say("care", low=score.low, high=score.high, doubts=reasons))
    gain = 100 * blank.difference.value
    return _verdict("good", say("believe", low=score.low, high=score.high, points=gain))


def _nothing(pictures: int) -> str:
    return say("nothing", pictures=pictures, fewest=metrics.FEWEST_GROUPS)


def _verdict(kind: str, sentence: str) -> dict[str, str]:
    return {"kind": kind, "sentence": sentence}


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
    questions: Sequence[Question],
    groups: np.ndarray,
    flags: Sequence[Sequence[str]] | None,
    learned: int | None,
) -> dict[str, int]:
    """Count what a reader should know of the questions, by what it is."""
    table = pd.DataFrame({"picture": groups, "question": [q.question for q in questions]})
    table["choices"] = ["\n".join(sorted(q.choices)) for q in questions]
    table["right"] = [q.choices[q.answer] for q in questions]
    table["file"] = [q.image for q in questions]
    filled = pd.Series([[c for c in q.choices if c] for q in questions])
    most = max(len(q.choices) for q in questions)
    asked = ["picture", "question", "choices"]
    answers = table[[*asked, "right"]].drop_duplicates()
    notes = {
        "questions": len(questions),
        "distinct pictures": table["picture"].nunique(),
        "picture files; the same picture may lie under several names": table["file"].nunique(),
        "questions asked again, word for word, of the same picture": table.duplicated(asked).sum(),
        "of these, with another right answer": answers.duplicated(asked).sum(),
        f"questions with fewer than {most} choices": (filled.map(len) < most).sum(),
        "questions with the same choice twice": (filled.map(set).map(len) < filled.map(len)).sum(),
        "questions without a usable picture in the file": table["file"].isna().sum(),
    }
    if learned is not None:
        notes["pictures that the model has learned from"] = learned
    for word, what in FLAG_FACTS.items():
        if flags is not None:
            notes[what] = sum(word in words for words in flags)
    return {what: int(count) for what, count in notes.items()}


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
        first: probabilities (N, choices) of one run.
        second: of the other.
        names: of the runs, for the page.
        weights: (N,) of the questions in the score.

    Returns:
        What the JSON holds; ``["verdict"]["sentence"]`` is the judgement in one sentence.
    """
    answers = np.array([q.answer for q in questions])
    runs = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    comparison = metrics.compare(answers, *runs, metrics.picture_groups(questions), weights)
    before, after = (p.argmax(-1) for p in runs)
    changed, shown = [], {"mended": [], "spoiled": [], "still wrong": []}
    for i in np.flatnonzero(before != after):
        what = "still wrong"
        if answers[i] in (before[i], after[i]):
            what = "mended" if after[i] == answers[i] else "spoiled"
        row = {
            "ID": questions[i].id,
            "right": letter(answers[i]),
            "first": letter(before[i]),
            "second": letter(after[i]),
            "what": what,
        }
        changed.append(row)
        note = "{first} in the first run, {second} in the second; right is {right}"
        shown[what].append((questions[i], runs[1][i], note.format(**row)))
    facts = {
        "verdict": judge_difference(comparison),
        "date": f"{date.today():%Y-%m-%d}",
        "names": dict(zip(("first", "second"), names, strict=True)),
        "weighted": weights is not None,
        "comparison": comparison,
        "changed": changed,
    }
    title = f"{names[0]} against {names[1]}, {facts['date']}"
    write_page(out, "comparison", facts, title=title, shown=shown, count=SHOWN)
    return facts


def judge_difference(comparison: Comparison) -> dict[str, str]:
    """Say in one sentence whether a gain is noise, and of what kind that is: good, doubt or bad."""
    change = comparison.difference
    if change.low is None:
        return _verdict("doubt", f"{_nothing(comparison.pictures)}.")
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


def write_page(out: str | Path, template: str, facts: dict[str, Any], **shown: Any) -> None:
    """Write the facts as JSON, and the page of facts and ``shown``."""
    out = Path(out)
    numbers = json.dumps(
        facts,
        ensure_ascii=False,
        indent=1,
        default=lambda v: asdict(v) if is_dataclass(v) else str(v),
    )
    write_text(out.with_suffix(".json"), numbers + "\n")
    write_text(out, render(template, **facts, **shown))
