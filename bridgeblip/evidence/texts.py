"""Texts against the ones that count as right: captions by COCO's measures, answers as VQA compares
them; their files, and the page that judges them."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bridgeblip import InputError
from bridgeblip.data.formats import holds_json, load_json
from bridgeblip.data.questions import Question
from bridgeblip.data.tables import read_table
from bridgeblip.evidence import metrics
from bridgeblip.evidence.answers import id_column
from bridgeblip.evidence.captions import cider, meteor, score_captions, tokenized
from bridgeblip.evidence.report import origin_of, write_page

SHOWN = 12  # questions that a section shows with their pictures
MAIN = {"caption": "CIDEr", "answer": "exact"}  # what a task's model is chosen by

# VQA's own comparison: https://github.com/GT-Vision-Lab/VQA, vqaEval.py
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
ARTICLES = {"a", "an", "the"}
CONTRACTIONS = {
    word.replace("'", ""): word
    for word in (
        "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's "
        "how'd how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't "
        "not've o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd "
        "someone'll someone's something'd something'll that's there'd there're there's they'd "
        "they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's "
        "where'd where's where've who'd who'll who's who've why'll why're why's won't would've "
        "wouldn't y'all you'd you'll you're you've"
    ).split()
}


def normalized(answer: str) -> str:
    """Return an answer as VQA compares it: small letters, no articles and punctuation, numbers as
    digits, contractions with their apostrophe."""
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    plain = answer
    for sign in PUNCTUATION:
        alone = f"{sign} " in answer or f" {sign}" in answer or COMMA_IN_NUMBER.search(answer)
        plain = plain.replace(sign, "" if alone else " ")
    plain = re.sub(r"\.(?!\d)", "", plain)
    words = [NUMBERS.get(word, word) for word in plain.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def exact(references: Sequence[Sequence[str]], texts: Sequence[str]) -> np.ndarray:
    """Return (N,) bool: whether a text is one of its references as VQA compares them."""
    pairs = zip(references, texts, strict=True)
    return np.array([normalized(text) in set(map(normalized, row)) for row, text in pairs], bool)


def score_answers(references: Sequence[Sequence[str]], texts: Sequence[str]) -> dict[str, float]:
    """Return the share of answers that are ``exact``; and of rows whose right answer is a number,
    the ``mean error`` of the answers that are numbers, and the ``numbers missed``: how many are
    none."""
    scores = {"exact": float(exact(references, texts).mean())}
    errors, missed = [], 0
    for row, text in zip(references, texts, strict=True):
        right, given = _number(row[0]), _number(text)
        if right is not None and given is not None:
            errors.append(abs(right - given))
        missed += right is not None and given is None
    if errors or missed:
        scores["numbers missed"] = missed
    return scores | ({"mean error": float(np.mean(errors))} if errors else {})


def _number(text: str) -> float | None:
    try:
        value = float(normalized(text) if not re.fullmatch(r"\s*-.*", text) else text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def read_texts(path: str | Path, questions: Sequence[Question]) -> list[str]:
    """Return the texts of questions, in their order, from COCO's result form or a CSV of ID and
    answer.

    Raises:
        InputError: if the file is of another form, or has no text for a question or two.
    """
    path = Path(path)
    if not path.is_file() or not holds_json(path):
        table = read_table(path)
        if len(table.columns) < 2:
            raise InputError(f"{path} has one column, {table.columns[0]}: expected ID and answer")
        rows = list(zip(table[id_column(table)], table.iloc[:, -1], strict=True))
    else:
        try:
            rows = [
                (
                    str(row.get("image_id", row.get("question_id"))),
                    row.get("caption", row.get("answer")),
                )
                for row in load_json(path)
            ]
        except (AttributeError, TypeError) as error:
            raise InputError(
                f"{path} can't be read ({error}); expected a list of image_id and caption"
            ) from error
    found = dict(rows)
    lacking = [question.id for question in questions if not isinstance(found.get(question.id), str)]
    if lacking or len(found) < len(rows):
        fault = f"no text for {len(lacking)} of {len(questions)} questions, such as {lacking[:1]}"
        raise InputError(f"{path} has {fault if lacking else 'an ID twice'}: predict again")
    return [found[question.id] for question in questions]


def write_text_report(
    out: str | Path,
    task: str,
    questions: Sequence[Question],
    texts: Sequence[str],
    *,
    before: Sequence[str] | None = None,
    manifest: dict[str, Any] | None = None,
    data: str | Path = "",
) -> dict[str, Any]:
    """Write the page that says what texts are worth, and its numbers as JSON beside it.

    Args:
        out: the HTML file; the JSON gets its name, but for the end.
        task: caption or answer.
        questions: with references.
        texts: (N,) written by the model.
        before: (N,) to compare with, such as the base's own.
        manifest: of a run: where the model comes from; plain values.
        data: the file of the questions, for the title.

    Returns:
        What the JSON holds; ``["verdict"]["sentence"]`` is the judgement in one sentence.
    """
    references = [question.references for question in questions]
    groups = metrics.picture_groups(questions)
    values = _rows(task, references, texts)
    elsewhere = _elsewhere(groups, texts)
    facts = origin_of(manifest, questions, data) | {
        "task": task,
        "questions": len(questions),
        "pictures": len(np.unique(groups)),
        "scores": _scores(task, questions, texts),
        "before": None if before is None else _scores(task, questions, before),
        "simpler": {
            "the most frequent right text, always": _scores(task, questions, _always(questions)),
            "its own texts, each given to another picture": _scores(task, questions, elsewhere),
        },
        "exact": metrics.clustered_mean(exact(references, texts), groups),
        "change": None,
        "looking": _paired(values - _rows(task, references, elsewhere), groups),
        "notes": _notes(questions, texts),
    }
    if before is not None:
        facts["change"] = _paired(values - _rows(task, references, before), groups)
    order = np.argsort(values, kind="stable")[:SHOWN]
    worst = [(questions[i], texts[i], before[i] if before is not None else None) for i in order]
    return write_page(out, "texts", facts, judge_texts(facts), worst=worst, main=MAIN[task])


def score_texts(task: str, questions: Sequence[Question], texts: Sequence[str]) -> dict[str, float]:
    """Return the scores of a task's texts: of ``score_captions``, or ``score_answers``."""
    references = [question.references for question in questions]
    return (score_captions if task == "caption" else score_answers)(references, texts)


def _rows(task: str, references: Sequence[Sequence[str]], texts: Sequence[str]) -> np.ndarray:
    """The task's main measure, row by row."""
    if task == "answer":
        return exact(references, texts).astype(float)
    return np.array(cider(*tokenized(references, texts)))


def _scores(task: str, questions: Sequence[Question], texts: Sequence[str]) -> dict[str, float]:
    """The scores, and METEOR where it can be had: it takes too long to be asked in every epoch."""
    harmonic = meteor([q.references for q in questions], texts) if task == "caption" else None
    more = {} if harmonic is None else {"METEOR": harmonic}
    return score_texts(task, questions, texts) | more


def _paired(gains: np.ndarray, groups: np.ndarray) -> metrics.Estimate:
    """The share of rows that gain less the share that lose, by picture."""
    return metrics.clustered_difference(np.sign(gains.round(9)), groups)


def _always(questions: Sequence[Question]) -> list[str]:
    """For each question the most frequent right text of all that ask the same."""
    asked = {}
    for question in questions:
        asked.setdefault(question.question, Counter()).update(question.references)
    return [asked[question.question].most_common(1)[0][0] for question in questions]


def _elsewhere(groups: np.ndarray, texts: Sequence[str]) -> list[str]:
    """The texts moved on by as many rows as the picture with most rows has."""
    step = int(np.bincount(groups).max())
    order = np.argsort(groups, kind="stable")
    moved = np.empty(len(texts), dtype=object)
    moved[order] = np.array(texts, dtype=object)[np.roll(order, step)]
    return moved.tolist()


def _notes(questions: Sequence[Question], texts: Sequence[str]) -> dict[str, int]:
    """Count what a reader should know, by what it is."""
    most, times = Counter(map(str.strip, texts)).most_common(1)[0]
    counts = [len(question.references) for question in questions]
    return {
        "empty texts": sum(not text.strip() for text in texts),
        "different texts": len(set(texts)),
        f"times the most frequent text, '{most[:60]}'": times,
        "right texts a question, fewest": min(counts),
        "right texts a question, most": max(counts),
        "questions without a usable picture": sum(q.image is None for q in questions),
    }


def judge_texts(facts: dict[str, Any]) -> tuple[str, str]:
    """Return of what kind scores are, good, doubt or bad, and in one sentence whether to believe
    them."""
    pictures, rows, notes = facts["pictures"], facts["questions"], facts["notes"]
    looking, change, learned = facts["looking"], facts["change"], facts["learned"]
    main, scores = MAIN[facts["task"]], facts["scores"]
    if pictures < 2:
        return "doubt", "Nothing can be concluded from one picture: CIDEr of it is always 0."
    spoiled = {
        f"all {rows:,} texts are empty": notes["empty texts"] == rows,
        f"all {rows:,} texts are the same one": notes["different texts"] == 1,
        f"the model has learned from {learned} of the {pictures} pictures": learned,
    }
    for reason, found in spoiled.items():
        if found:
            return "bad", f"Don't believe this score: {reason}."
    doubts, score = [], f"{main} {scores[main]:.3f}"
    if notes["empty texts"]:
        doubts.append(f"{notes['empty texts']} texts are empty")
    if looking.low is None:
        doubts.append(f"{pictures} pictures are few")
    for name, simpler in facts["simpler"].items():
        if simpler[main] >= scores[main]:
            doubts.append(f"no better than '{name}' ({simpler[main]:.3f})")
    if looking.low is not None and looking.low <= 0:
        doubts.append("its texts fit other pictures as well")
    if change is not None:
        gain = f"{scores[main] - facts['before'][main]:+.3f} against before"
        if change.low is None or change.low <= 0 <= change.high:
            doubts.append(f"{gain} may be noise")
        elif change.high < 0:
            return "bad", f"{score}, {gain}: worse, and that is more than noise."
        score += f", {gain}"
    if doubts:
        return "doubt", f"{score}; believe it with care: {'; '.join(doubts)}."
    return "good", f"Believe it, for pictures like these: {score}; looking at them matters."
