"""The embedded question set: real scanned digits and multiple-choice questions about them.

The pictures are scikit-learn's copy of the UCI "Optical Recognition of Handwritten Digits" test
set: 1,797 scans of 8 x 8 grey levels. Three disjoint groups of pictures are made, once and for all:
``pretrain`` (the tiny base model saw these, and nothing else), ``train`` and ``test``.
"""

import random
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from bridgeblip.data.questions import NUM_CHOICES, Question, letter, letters

SPLIT_SEED = 20250701
SPLIT_SIZES = {"test": 300, "train": 400}  # pictures; the rest is "pretrain"
PICTURE_SIDE = 64  # pixels of the PNG files
QUESTIONS_A_PICTURE = {"train": 6, "test": 4}

NUMBERS = tuple(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen "
    "seventeen eighteen".split()
)
WORDS = {
    "z": ("zebra", "zoo", "zipper"),
    "o": ("owl", "orange", "onion"),
    "t": ("tiger", "table", "train"),
    "f": ("fox", "fish", "flag"),
    "s": ("sun", "snake", "spoon"),
    "e": ("eagle", "egg", "elbow"),
    "n": ("nest", "nut", "needle"),
}
DIGITS = range(10)


# kind -> (wordings, values that may stand for {k}, answer as a function of digit, k and a
# generator)
KINDS = {
    "name": (
        ("Which digit is shown in the picture?", "What number did somebody write here?"),
        (0,),
        lambda d, k, rng: NUMBERS[d],
    ),
    "sum": (
        ("What do you get if you add {k} to the digit?", "What is the digit plus {k}?"),
        tuple(range(1, 10)),
        lambda d, k, rng: NUMBERS[d + k],
    ),
    "rest": (
        ("What remains when the digit is taken away from {k}?", "What is {k} minus the digit?"),
        (9, 10, 11, 12),
        lambda d, k, rng: NUMBERS[k - d],
    ),
    "double": (
        ("What is twice the digit?", "What do you get if you double the digit?"),
        (0,),
        lambda d, k, rng: NUMBERS[2 * d],
    ),
    "dial": (
        (
            "On a dial nine is followed by zero. Where does it point {k} steps after the digit?",
            "Go {k} steps on from the digit where zero follows nine. Which digit is it?",
        ),
        (1, 2, 3),
        lambda d, k, rng: NUMBERS[(d + k) % 10],
    ),
    "initial": (
        (
            "Which word starts with the same letter as the name of the digit?",
            "Whose first letter is also the first letter of the digit?",
        ),
        (0,),
        lambda d, k, rng: rng.choice(WORDS[NUMBERS[d][0]]),
    ),
    "sum_initial": (
        ("Add {k} to the digit. Which word starts with the same letter as the result?",),
        (1, 2, 3),
        lambda d, k, rng: rng.choice(WORDS[NUMBERS[d + k][0]]),
    ),
    "letters": (
        ("How many letters has the name of the digit?",),
        (0,),
        lambda d, k, rng: NUMBERS[len(NUMBERS[d])],
    ),
    "parity": (
        ("Which of these is true of the digit?", "What can be said about the digit?"),
        (0,),
        lambda d, k, rng: (
            f"{'odd' if d % 2 else 'even'} and {'above four' if d > 4 else 'below five'}"
        ),
    ),
    "above": (
        (
            "Which of these is the nearest number above the digit?",
            "Which of these comes first above the digit?",
        ),
        (0,),
        None,  # depends on the choices: see _above
    ),
}


def _above(digit: int, rng: random.Random) -> tuple[str, list[str]]:
    """The smallest of four numbers that is larger than the digit; never simply the largest."""
    larger = rng.sample(range(digit + 1, 13), rng.randint(1, 3))
    others = [n for n in range(13) if n <= digit]
    larger += rng.sample(
        [n for n in range(digit + 1, 13) if n not in larger], max(0, 4 - len(larger) - len(others))
    )
    smaller = rng.sample(others, 4 - len(larger))
    answer = min(larger)
    return NUMBERS[answer], [NUMBERS[n] for n in larger + smaller if n != answer]


def make_question(kind: str, digit: int, answer: int, rng: random.Random) -> Question:
    """Ask ``kind``, which is its ID, about ``digit`` with the right choice at position ``answer``.

    Wrong choices are the right ones of other digits, so that the choices alone give nothing away.
    """
    wordings, ks, solve = KINDS[kind]
    k = rng.choice(ks)
    if solve is None:
        right, wrong = _above(digit, rng)
    else:
        right = solve(digit, k, rng)
        banned = {right} if kind not in ("initial", "sum_initial") else set(WORDS[right[0]])
        wrong = []
        for other in rng.sample(DIGITS, len(DIGITS)):
            text = solve(other, k, rng)
            if text not in banned and len(wrong) < 3:
                wrong.append(text)
                banned.add(text)
        spare = [
            n for n in NUMBERS[2:8] if n not in banned
        ]  # only "letters" has fewer than four values
        wrong += rng.sample(spare, 3 - len(wrong))
    rng.shuffle(wrong)
    choices = (*wrong[:answer], right, *wrong[answer:])
    return Question(kind, None, rng.choice(wordings).format(k=NUMBERS[k]), choices, answer)


def digit_pictures() -> dict[str, list[tuple[Image.Image, int]]]:
    """Return the pictures and their digits by split; no picture content occurs in two splits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.RandomState(SPLIT_SEED).permutation(len(data.images))
    pictures = {}  # by content: of equal ones the first
    for i in order:
        ink = data.images[i] * (255 / 16)
        grey = (255 - ink).round().astype(np.uint8)  # dark ink on white paper
        side = (PICTURE_SIDE, PICTURE_SIDE)
        picture = Image.fromarray(grey).resize(side, Image.Resampling.BICUBIC)
        pictures.setdefault(grey.tobytes(), (picture, int(data.target[i])))
    distinct = list(pictures.values())
    test, train = SPLIT_SIZES["test"], SPLIT_SIZES["train"]
    return {
        "test": distinct[:test],
        "train": distinct[test : test + train],
        "pretrain": distinct[test + train :],
    }


def split_questions(split: str, digits: list[int], draw: int = 0) -> list[list[Question]]:
    """Return the questions of each picture of a split: different kinds each, letters balanced over
    all.

    Args:
        draw: 0: the competition's; any other number: others of the same kinds.
    """
    rng = random.Random(f"{SPLIT_SEED} {split}{draw or ''}")
    each = QUESTIONS_A_PICTURE[split]
    places = [i % NUM_CHOICES for i in range(each * len(digits))]
    rng.shuffle(places)
    return [
        [make_question(kind, digit, places.pop(), rng) for kind in rng.sample(list(KINDS), each)]
        for digit in digits
    ]


def write_competition(
    folder: str | Path, answers_csv: str | Path, limits: dict[str, int] | None = None
) -> None:
    """Write the question set in exactly the competition's form, and the test answers apart from it.

    As in the official files, a picture is stored once a question, each time under another name, the
    question files start with a byte order mark and the sample's answers are ``-``.

    Args:
        limits: at most so many pictures of a split, for a quick look.
    """
    folder = Path(folder)
    pictures = digit_pictures()
    for split in QUESTIONS_A_PICTURE:
        shown = pictures[split][: (limits or {}).get(split)]
        images = folder / f"{split}_input_images"
        images.mkdir(parents=True, exist_ok=True)
        rows = []
        for (picture, _), questions in zip(
            shown, split_questions(split, [d for _, d in shown]), strict=True
        ):
            for question in questions:
                name = f"{split.upper()}_{len(rows):04d}"
                picture.save(images / f"{name}.png")
                path = f"./{images.name}/{name}.png"
                rows.append(
                    [name, path, question.question, *question.choices, letter(question.answer)]
                )
        table = pd.DataFrame(
            rows, columns=["ID", "img_path", "Question", *letters(NUM_CHOICES), "answer"]
        )
        if split == "test":
            table[["ID", "answer"]].to_csv(answers_csv, index=False)
            table[["ID"]].assign(answer="-").to_csv(folder / "sample_submission.csv", index=False)
            table = table.drop(columns="answer")
        table.to_csv(folder / f"{split}.csv", index=False, encoding="utf-8-sig")
