import itertools
import random
import re
from collections import Counter

import pandas as pd

from bridgeblip.data.pictures import picture_keys
from bridgeblip.data.questions import Question, read_questions
from bridgeblip.embedded.digits import (
    KINDS,
    NUMBERS,
    digit_pictures,
    make_question,
    split_questions,
)


def test_no_picture_is_in_two_splits():
    splits = digit_pictures()
    assert {name: len(pictures) for name, pictures in splits.items()} == {
        "test": 300,
        "train": 400,
        "pretrain": 1097,
    }
    contents = [{picture.tobytes() for picture, _ in pictures} for pictures in splits.values()]
    assert len(set.union(*contents)) == sum(map(len, contents)) == 1797


def right_texts(q: Question, digit: int) -> list[str]:
    """The choices that are right, worked out again from the wording alone."""
    wording = re.sub("nine is followed by zero|zero follows nine", "", q.question)
    k = next((NUMBERS.index(word) for word in re.findall(r"\w+", wording) if word in NUMBERS), 0)
    if q.id in ("initial", "sum_initial"):
        return [choice for choice in q.choices if choice[0] == NUMBERS[digit + k][0]]
    if q.id == "parity":
        return [
            f"{'odd' if digit % 2 else 'even'} and {'above four' if digit > 4 else 'below five'}"
        ]
    if q.id == "above":
        return [min((c for c in q.choices if NUMBERS.index(c) > digit), key=NUMBERS.index)]
    numbers = {
        "name": digit,
        "sum": digit + k,
        "rest": k - digit,
        "double": 2 * digit,
        "dial": (digit + k) % 10,
        "letters": len(NUMBERS[digit]),
    }
    return [NUMBERS[numbers[q.id]]]


def test_exactly_one_choice_is_right():
    rng = random.Random(0)
    for kind, digit, answer, _ in itertools.product(KINDS, range(10), range(4), range(5)):
        q = make_question(kind, digit, answer, rng)
        assert len(set(q.choices)) == 4 and q.answer == answer
        assert right_texts(q, digit) == [q.choices[answer]], q


def test_letters_are_balanced_and_say_nothing():
    digits = [digit for _, digit in digit_pictures()["test"]]
    questions = [q for group in split_questions("test", digits) for q in group]
    assert len(questions) == 1200
    assert set(Counter(q.answer for q in questions).values()) == {300}
    per_kind = Counter(q.id for q in questions)
    assert min(per_kind.values()) > 80


def test_official_form(competition):
    heads = {
        name: (competition / name).read_bytes()[:3]
        for name in ("train.csv", "test.csv", "sample_submission.csv")
    }
    assert (
        heads["train.csv"] == heads["test.csv"] == b"\xef\xbb\xbf"
        and heads["sample_submission.csv"] == b"ID,"
    )
    sample = pd.read_csv(competition / "sample_submission.csv")
    assert list(sample.columns) == ["ID", "answer"] and set(sample["answer"]) == {"-"}
    assert "answer" not in pd.read_csv(competition / "test.csv").columns
    truth = pd.read_csv(competition.parent / "answers.csv")
    assert list(truth["ID"]) == list(sample["ID"]) and set(truth["answer"]) <= set("ABCD")
    asked = read_questions(competition / "test.csv")
    keys = picture_keys(q.image for q in asked)
    assert len(keys) == 20 and len(set(keys.values())) == 5  # four questions a picture, four names
