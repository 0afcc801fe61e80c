"""The page that judges a run, and the one that compares two: their facts and verdicts."""

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bridgeblip.data.pictures import SHORT_KEY
from bridgeblip.data.questions import Question, content_keys, letter
from bridgeblip.evidence import metrics
from bridgeblip.evidence.answers import margins
from bridgeblip.evidence.figures import confusion_figure, reliability_figure
from bridgeblip.evidence.metrics import Estimate
from bridgeblip.evidence.page import points, render
from bridgeblip.files import atomically, write_text
from bridgeblip.messages import say

DECIMALS = 6  # of probabilities.csv
SHOWN = 12  # questions that a section shows with their pictures
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
        probabilities: (N, choices); rounded as in ``probabilities.csv``.
        flags: of each question, as ``evidence.answers.Answers`` has them.
        blank_probabilities: (N, choices), answered without looking.
        before: (N, choices), answered before training; shown beside the answers that it changed.
        references: accuracies of simpler ways to answer the same questions, by name.
        problems: one row a problem of the data.
        cost: seconds, sizes and the like by name.
        manifest: of a bundle or of weights: where the model comes from; plain values.
        data: the question file, for the title.

    Returns:
        What the JSON holds; ``["verdict"]["sentence"]`` is the judgement in one sentence.
    """
    probabilities = np.asarray(probabilities, dtype=float).round(DECIMALS)
    answers, groups = [q.answer for q in questions], metrics.picture_groups(questions)
    right, sure = probabilities.argmax(-1) == answers, probabilities.max(axis=1)
    margin, surest = margins(probabilities), np.argsort(-sure, kind="stable")
    mistakes, unsure = surest[~right[surest]][:SHOWN], np.argsort(margin, kind="stable")[:SHOWN]
    facts = origin_of(manifest, questions, data)
    facts |= {
        "measures": metrics.measure(answers, probabilities, groups),
        "chance": _chance(questions),
        "references": references or {},
        "blank": _gain(answers, blank_probabilities, probabilities, groups),
        "training": _gain(answers, before, probabilities, groups),
        "orders": None if flags is None else _orders(flags, right, groups),
        "openers": metrics.accuracy_by(metrics.openers(questions), right, groups),
        "choice_lengths": metrics.accuracy_by(metrics.choice_lengths(questions), right, groups),
        "mistakes": [questions[i].id for i in mistakes],
        "least_certain": [questions[i].id for i in unsure],
        "data": _data_notes(questions, groups, flags, facts["learned"]),
        "problems": None if problems is None else problems.to_dict("records"),
        "cost": cost,
    }
    changed = [] if before is None else _changed(questions, np.asarray(before), probabilities)
    return write_page(
        out,
        "report",
        facts,
        judge(facts),
        changed=changed[:: max(1, -(-len(changed) // SHOWN))],  # from all over the set
        mistaken=[(questions[i], probabilities[i], {"sure": 100 * sure[i]}) for i in mistakes],
        uncertain=[(questions[i], probabilities[i], {"apart": 100 * margin[i]}) for i in unsure],
        confusion=confusion_figure(questions, probabilities),
        reliability=reliability_figure(facts["measures"]["reliability"]),
        fewest=metrics.FEWEST_GROUPS,
    )


def _gain(answers, before, after, groups) -> dict[str, Any] | None:
    """What ``metrics.compare`` says of answers; None where there are none from before."""
    return None if before is None else metrics.compare(answers, np.asarray(before), after, groups)


def origin_of(
    manifest: dict[str, Any] | None, questions: Sequence[Question], data: str | Path
) -> dict[str, Any]:
    """Return the facts on model and data: what the title names, "about"; of how many of the
    questions' pictures the model has "learned", None where its manifest has no list of them; and
    the "manifest", that list counted."""
    manifest, learned = manifest or {}, None
    trained = manifest.get("trained", manifest)
    if "pictures" in trained:
        known = set(trained["pictures"])
        keys = set(content_keys(questions)) - {None}
        learned = len({key[:SHORT_KEY] for key in keys} & known)
        trained = trained | {"pictures": len(known)}
    about = {
        "model": Path(
            str(manifest.get("base", trained.get("base", "a model without a name")))
        ).name,
        "data": Path(data).name or f"{len(questions):,} questions",
        "date": f"{date.today():%Y-%m-%d}",
    }
    manifest = manifest | {"trained": trained} if "trained" in manifest else trained
    return {"about": about, "learned": learned, "manifest": manifest}


def _chance(questions: Sequence[Question]) -> dict[str, float]:
    """What answers reach that don't look at a question."""
    counts = np.bincount([q.answer for q in questions])
    always = f"always {letter(counts.argmax())}, the most frequent right letter"
    return {GUESSING: metrics.guessing(questions), always: float(counts.max() / len(questions))}


def _changed(questions: Sequence[Question], first: np.ndarray, second: np.ndarray) -> list[tuple]:
    """Return a card for each answer that two runs don't share: the question, its probabilities in
    the second run, what became of it, and those in the first."""
    cards = []
    for question, before, after in zip(questions, first, second, strict=True):
        right, old, new = map(letter, (question.answer, before.argmax(), after.argmax()))
        what = {old: "spoiled", new: "mended"}.get(right, "still wrong")
        row = {"ID": question.id, "right": right, "first": old, "second": new, "what": what}
        if old != new:
            cards.append((question, after, row, before))
    return cards


def judge(facts: dict[str, Any]) -> tuple[str, str]:
    """Return of what kind a score is, good, doubt or bad, and in one sentence whether to believe
    it."""
    measures, blank, learned = facts["measures"], facts["blank"], facts["learned"]
    score, others = measures["accuracy"], facts["chance"] | facts["references"]
    pictures = measures["pictures"]
    known = say("known", learned=learned, pictures=pictures)
    if score.low is None:
        nothing = say("nothing", pictures=pictures, fewest=metrics.FEWEST_GROUPS)
        return "doubt", nothing + (f" ({known})." if learned else ".")
    if learned and learned >= MANY_LEARNED * pictures:
        return "bad", say("leaked", known=known)
    if measures["collapse"]:
        share = measures["given"][measures["collapse"]] / measures["questions"]
        return "bad", say("collapsed", share=share, letter=measures["collapse"])
    if score.low <= others[GUESSING]:
        return "bad", say("guessing", guessing=others[GUESSING])
    if blank and blank["difference"].low <= 0:
        return "bad", say("blind", blank=blank["first"].value)
    doubts = [known] if learned else []
    if pictures < FEW_PICTURES:
        doubts.append(say("few_pictures", pictures=pictures))
    if not blank:
        doubts.append(say("not_blind_tested"))
    best = max(others, key=others.get)
    if others[best] >= score.low:
        doubts.append(say("not_better", name=best, share=others[best]))
    if doubts:
        return "doubt", say("care", low=score.low, high=score.high, doubts="; ".join(doubts))
    gain = 100 * blank["difference"].value
    return "good", say("believe", low=score.low, high=score.high, points=gain)


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
    table = pd.DataFrame(map(vars, questions)).assign(picture=groups)
    table["right"] = [q.choices[q.answer] for q in questions]
    most = table["choices"].map(len).max()
    filled = table["choices"].map(lambda choices: list(filter(None, choices)))
    table["choices"] = table["choices"].map(sorted).map("\n".join)
    asked = ["picture", "question", "choices"]
    answers = table[[*asked, "right"]].drop_duplicates()
    notes = {
        "questions": len(questions),
        "distinct pictures": table["picture"].nunique(),
        "picture files; the same picture may lie under several names": table["image"].nunique(),
        "questions asked again, word for word, of the same picture": table.duplicated(asked).sum(),
        "of these, with another right answer": answers.duplicated(asked).sum(),
        f"questions with fewer than {most} choices": (filled.map(len) < most).sum(),
        "questions with the same choice twice": (filled.map(set).map(len) < filled.map(len)).sum(),
        "questions without a usable picture in the file": table["image"].isna().sum(),
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
) -> dict[str, Any]:
    """Write the page that says whether one run is better than another, and its numbers as JSON
    beside it.

    Args:
        out: the HTML file; the JSON gets its name, but for the end.
        questions: with answers.
        first: probabilities (N, choices) of one run.
        second: of the other.
        names: of the runs, for the page.

    Returns:
        What the JSON holds; ``["verdict"]["sentence"]`` is the judgement in one sentence.
    """
    answers, groups = [q.answer for q in questions], metrics.picture_groups(questions)
    runs = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    cards = _changed(questions, *runs)
    facts = {
        "date": f"{date.today():%Y-%m-%d}",
        "names": dict(zip(("first", "second"), names, strict=True)),
        "comparison": metrics.compare(answers, *runs, groups),
        "changed": [row for _, _, row, _ in cards],
    }
    verdict = judge_difference(facts["comparison"])
    return write_page(out, "comparison", facts, verdict, shown=cards, count=SHOWN)


def judge_difference(comparison: dict[str, Any]) -> tuple[str, str]:
    """Return of what kind a gain is, good, doubt or bad, and in one sentence whether it is
    noise."""
    change = comparison["difference"]
    if change.low is None:
        pictures = comparison["pictures"]
        return "doubt", f"{say('nothing', pictures=pictures, fewest=metrics.FEWEST_GROUPS)}."
    if not comparison["changed"]:
        count = comparison["questions"]
        return "doubt", f"Both runs give the same letter to all {count:,} questions."
    kind, sentence = "doubt", "The difference may be noise, for its interval holds zero"
    if change.low > 0:
        kind, sentence = "good", "The second run is better, and that is more than noise"
    elif change.high < 0:
        kind, sentence = "bad", "The second run is worse, and that is more than noise"
    interval = f"95% interval {points(change.low)} to {points(change.high)}"
    rows = f"{comparison['gained']} answers mended, {comparison['lost']} spoiled"
    return kind, f"{sentence}: {points(change.value)} points, {interval}; {rows}."


def write_page(
    out: str | Path, template: str, facts: dict[str, Any], verdict: tuple[str, str], **shown: Any
) -> dict[str, Any]:
    """Write a verdict, its kind and its sentence, and the facts as JSON; and the page of them and
    of ``shown``. Return what the JSON holds."""
    out = Path(out)
    facts = {"verdict": {"kind": verdict[0], "sentence": verdict[1]}} | facts
    numbers = json.dumps(
        facts,
        ensure_ascii=False,
        indent=1,
        default=lambda value: vars(value) if isinstance(value, Estimate) else str(value),
    )
    with atomically(out) as page:  # both, or none
        write_text(page, render(template, **facts, **shown))
        write_text(out.with_suffix(".json"), numbers + "\n")
    return facts
