"""Question files: reading, checking, splits by picture content; asking in every order of the
choices."""

import functools
import os
import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from bridgeblip import InputError
from bridgeblip.data.names import BLANK, by_look, looks, pick
from bridgeblip.data.pictures import picture_keys
from bridgeblip.data.tables import Row, read_csv

NUM_CHOICES = 4  # that InstructBLIP's head answers with, and published sets are brought to


def letter(index: int) -> str:
    """Return the letter of a choice: A of the first, B of the second and so on."""
    return chr(ord("A") + index)


def letters(count: int) -> list[str]:
    """Return the letters of ``count`` choices."""
    return list(map(letter, range(count)))


@dataclass(frozen=True)
class Question:
    """One row of a question file."""

    id: str
    # The picture's file; the CSV's path, seen from the CSV's folder. None: to be answered without.
    image: Path | None
    question: str
    # The texts, one a letter; an empty one is no choice. None at all: to be answered freely.
    choices: tuple[str, ...]
    # Index of the right choice, or None in a file without answers.
    answer: int | None = None
    # Whether the file's header writes its letters small.
    small_letters: bool = False
    # Its file, and where the row begins in it; the header is line 1.
    file: Path | None = field(default=None, compare=False)
    line: int = 0
    # What keeps the row from being used as it stands; empty if nothing does.
    problem: str = ""
    # Where there are no choices, the texts that count as right: captions, or the answer.
    references: tuple[str, ...] = ()
    # Earlier turns of the same dialogue, (asked, answered) each.
    history: tuple[tuple[str, str], ...] = ()
    # Which part of a published set it belongs to; None if the set is in one piece.
    split: str | None = None

    @property
    def place(self) -> str:
        """Where to find the row, for messages."""
        known = [str(self.file)] * bool(self.file) + [f"line {self.line}"] * bool(self.line)
        return f"{', '.join(known)} (ID {self.id})".strip()

    @property
    def choice_mask(self) -> list[bool]:
        """Which letters can be the answer; all of them where no choice is filled in."""
        filled = list(map(bool, self.choices))
        return filled if any(filled) else [True] * len(filled)

    def mask(self, width: int) -> list[bool]:
        """Which of so many letters can be the answer; all of them where there are no choices."""
        return ((self.choice_mask or [True] * width) + [False] * width)[:width]

    def reordered(self, source: dict[int, int]) -> "Question":
        """Return the question with the choice of ``source[i]`` at place ``i``; the answer follows
        its choice."""
        places = [source.get(i, i) for i in range(len(self.choices))]
        choices = tuple(self.choices[i] for i in places)
        return replace(
            self, choices=choices, answer=None if self.answer is None else places.index(self.answer)
        )


def known_names(header: Sequence[str]) -> list[str]:
    """Return column names in lower case, without spaces; ``path`` serves for ``img_path``."""
    names = [name.strip().lower() for name in header]
    if "img_path" not in names:
        names = ["img_path" if name == "path" else name for name in names]
    return names


def read_questions(
    path: str | Path, need_answers: bool = False, strict: bool = True
) -> list[Question]:
    """Read a question file: columns ID, img_path, Question, A, B and so on, perhaps answer.

    Column names are matched in any letter case and order; ``path`` serves for ``img_path``; other
    columns are ignored. A picture is found, too, under a name that looks the same.

    Args:
        strict: refuse the file for a single bad row. Otherwise such a row says so in ``problem``,
            and has no ``image`` where its picture is missing or lies outside the CSV's folder.

    Raises:
        InputError: naming the file, and the row where it is one: a missing column, a repeated ID;
            and if ``strict`` fewer than two choices, an answer that is no letter of a choice, a
            picture that is not there.
    """
    path = Path(path)
    questions = read_rows(path, need_answers)
    check_ids(questions, path)
    if not strict:
        placed = [_check_place(question, path.parent) for question in questions]
        if not any(question.image for question in placed):
            warnings.warn(
                f"{path}: none of its pictures can be used ({placed[0].problem}): unpack the "
                f"organiser's pictures beside the CSV, else every row is answered without one",
                stacklevel=2,
            )
        return placed
    for question in questions:
        if question.problem:
            raise InputError(f"{question.place}: {question.problem}")
    check_pictures(questions, path)
    if same := repeated_answers(questions, path):
        warnings.warn(same, stacklevel=2)
    return questions


def read_rows(path: str | Path, need_answers: bool) -> list[Question]:
    """Return every row of a question file, its ``problem`` filled in; IDs are not looked at, nor
    whether the pictures are there.

    Raises:
        InputError: if the file is no table, lacks a column, or a quote has swallowed a row.
    """
    path = Path(path)
    header, rows = read_csv(path)
    names = known_names(header)
    _check_columns(path, names, need_answers)
    _check_swallowed(path, rows, names.index("img_path"))
    small = {"a", "b"} <= set(map(str.strip, header))
    listing = functools.cache(names_in)
    used = _choice_names(names)
    questions, spaced = [], []
    for row in rows:
        cells = dict(zip(names, row.cells, strict=True))
        texts = [cells[name] for name in used]
        choices = tuple(text.strip(BLANK) for text in texts)
        given = cells.get("answer", "").strip(BLANK).upper()
        known = letters(len(choices))
        answer = known.index(given) if given in known and choices[known.index(given)] else None
        problem = ""
        if row.problem:
            problem = row.problem
        elif not cells["img_path"].strip(BLANK):
            problem = "img_path is empty; expected the name of a picture's file"
        elif sum(map(bool, choices)) < 2:
            problem = f"fewer than two choices are filled in; expected texts in {', '.join(known)}"
        elif need_answers and answer is None:
            problem = (
                f"answer {cells['answer']!r} is not the letter of a choice; expected one of "
                f"{', '.join(known)}"
            )
        image = locate(path.parent, cells["img_path"], listing)
        question = cells["question"].strip(BLANK)
        questions.append(
            Question(cells["id"], image, question, choices, answer, small, path, row.line, problem)
        )
        if any(text[:1] == " " and f",{text}" in row.raw for text in texts):
            spaced.append(questions[-1])
    if 0 < len(spaced) <= len(questions) / 2:  # else all commas have a space behind them
        warnings.warn(
            f"{path}: in {len(spaced)} rows a choice begins with a space, the first in line "
            f"{spaced[0].line} (ID {spaced[0].id}): if it is the rest of a text with a comma, put "
            f"that text in quotes",
            stacklevel=2,
        )
    return questions


def _choice_names(names: Sequence[str]) -> list[str]:
    """The columns of the choices: a, b and on to the last; one left out between two is among
    them."""
    count = 2
    while letter(count).lower() in names or letter(count + 1).lower() in names:
        count += 1
    return list(map(str.lower, letters(count)))


def _check_columns(path: Path, names: Sequence[str], need_answers: bool) -> None:
    wanted = ["id", "img_path", "question", *_choice_names(names), *["answer"] * need_answers]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise InputError(
            f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}: it has "
            f"{', '.join(names)}; expected ID, img_path, Question, A, B, C, D"
            + ", answer" * need_answers
            + odd_names(names, missing)
        )
    check_once(path, names, wanted)


def odd_names(names: Sequence[str], missing: Sequence[str]) -> str:
    """Say which column names would be missing ones, had they no characters that can't be seen or
    seem others; empty if none."""
    said = ""
    for name in names:
        # A letter of a script without capitals, such as Hangul, is not odd.
        odd = [c for c in name if not " " <= c <= "~" and unicodedata.category(c) != "Lo"]
        pattern = "".join(".?" if char in odd else re.escape(char) for char in name)
        if odd and any(re.fullmatch(pattern, other) for other in missing):
            shown = ", ".join(unicodedata.name(char, f"U+{ord(char):04X}") for char in odd)
            said += f"; {name!r} has an odd or hidden character, {shown}: write the name anew"
    return said


def check_once(path: Path, names: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuse a table in which a column that is read comes twice."""
    twice = [name for name in wanted if names.count(name) > 1]
    if twice:
        raise InputError(
            f"{path} has the column {twice[0]} twice, letter case aside: take one of them out"
        )


def _check_swallowed(path: Path, rows: Sequence[Row], column: int) -> None:
    """Refuse a text in which a line has a picture's name where a row has it."""
    for row in rows:
        suffix = Path(row.cells[column].strip()).suffix
        later_lines = [line for cell in row.cells for line in cell.splitlines()[1:]]
        for line in later_lines:
            parts = line.split(",")
            if suffix and len(parts) > column and parts[column].strip().endswith(suffix):
                raise InputError(
                    f"{path}, line {row.line}: a text in quotes holds a row, {line[:60]!r}; take "
                    f"the stray quote out, or double it within a quoted text"
                )


def locate(folder: Path, written: str, listing: Callable[[Path], dict[str, list[str]]]) -> Path:
    """Return the file of a path as written, or the only one that looks like it, letter case aside
    and with ``\\`` for ``/``.

    Args:
        listing: ``names_in``, perhaps remembered.
    """
    if os.path.isfile(folder / written):
        return folder / written
    for part in Path(written.strip(BLANK).replace("\\", "/")).parts:
        folder /= pick(part, listing(folder))
    return folder


def names_in(folder: Path) -> dict[str, list[str]]:
    """Return the names in a folder as ``by_look`` does; none where it can't be read."""
    with suppress(OSError):
        return by_look(os.listdir(folder))
    return {}


def repeated_answers(questions: Sequence[Question], path: Path) -> str:
    """Say in one line in how many rows the right choice is given under several letters, and where;
    empty if in none."""
    answered = [question for question in questions if question.answer is not None]
    rows = [row for row in answered if row.choices.count(row.choices[row.answer]) > 1]
    if not rows:
        return ""
    return (
        f"{path}: in {len(rows)} rows the right choice is given under several letters, the first "
        f"in line {rows[0].line} (ID {rows[0].id}): correct them or leave them out"
    )


def check_ids(questions: Sequence[Question], path: Path) -> None:
    """Refuse a file in which the header comes once more, a row has no ID, or an ID comes twice."""
    for question in questions:
        if (question.id.lower(), question.question.lower()) == ("id", "question"):
            raise InputError(f"{path}, line {question.line} is the header once more: take it out")
        if not question.id.strip():
            raise InputError(f"{path}, line {question.line} has no ID: give it one of its own")
    ids = pd.Series([looks(question.id) for question in questions])
    repeated = ids[ids.duplicated()]
    if len(repeated):
        raise InputError(
            f"{path} has {len(repeated)} repeated IDs, or such that look the same; the first is "
            f"{repeated.iloc[0]!r}: make them unique"
        )


def _check_place(question: Question, folder: Path) -> Question:
    """Take away a picture that is not there, or not below ``folder``; links are followed."""
    written = os.path.relpath(question.image, folder)
    if written == os.curdir and question.problem:
        return replace(question, image=None)  # none is named, as its problem says
    if written.split(os.sep)[0] == os.pardir:
        problem = f"picture {written} lies outside the folder of the CSV"
    elif not os.path.isfile(question.image):
        problem = f"picture {written} not found"
    else:
        return question
    return replace(
        question, image=None, problem="; ".join(filter(None, [question.problem, problem]))
    )


def check_pictures(
    questions: Sequence[Question],
    path: Path,
    remedy: str = "unpack the organiser's pictures beside the CSV",
) -> None:
    """Refuse a file whose pictures are not there, before any long work starts."""
    # False, too, for names that no disk can hold.
    missing = [question for question in questions if not os.path.isfile(question.image)]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(questions)} pictures not found, the first is "
            f"{missing[0].image} (ID {missing[0].id}): {remedy}"
        )


def content_keys(
    questions: Sequence[Question], quiet: bool = True, strict: bool = True
) -> list[str | None]:
    """Return the content key of each question's picture, None where it has none; see
    ``picture_keys``."""
    images = [question.image for question in questions]
    keys = picture_keys(filter(None, images), quiet, strict)
    return list(map(keys.get, images))


def split_by_picture(
    questions: Sequence[Question], fraction: float, seed: int
) -> tuple[list[Question], list[Question]]:
    """Return (training, validation) questions; no picture content is in both, letters are balanced
    if enough are there.

    Raises:
        InputError: if there are too few distinct pictures to set ``fraction`` of them apart.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    folds = round(1 / fraction)
    groups = content_keys(questions)
    if len(set(groups)) < folds:
        raise InputError(
            f"{len(set(groups))} distinct pictures can't be split {folds} ways: give more pictures"
        )
    answers = [0 if q.answer is None else q.answer for q in questions]
    if max(map(answers.count, set(answers))) < folds:
        answers = [0] * len(questions)  # a fold could not have one of each
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    # It warns of letters too rare for each fold to have one.
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        kept, held_out = next(splitter.split(questions, answers, groups))
    return [questions[i] for i in kept], [questions[i] for i in held_out]


def ask_in_orders(
    questions: Sequence[Question],
    single: np.ndarray,
    rows: Sequence[int],
    ask: Callable[[Sequence[int], Sequence[Question]], np.ndarray],
) -> list[list[np.ndarray]]:
    """Return the probabilities (choices,) that each question was given: as written, and ``rows`` in
    every cyclic order of their choices, too, put back to the choices as written.

    Args:
        single: probabilities (questions, choices), asked as written.
        ask: gives the probabilities of rows whose choices stand in another order, shown beside
            them.
    """
    turns = [(row, turn) for row in rows for turn in cyclic_orders(questions[row].choices)[1:]]
    views = [[probabilities] for probabilities in single]
    if not turns:
        return views
    scores = ask([row for row, _ in turns], [questions[row].reordered(turn) for row, turn in turns])
    for (row, turn), seen in zip(turns, scores, strict=True):
        view = seen.copy()
        view[list(turn.values())] = seen[list(turn.keys())]
        views[row].append(view)
    return views


def cyclic_orders(choices: Sequence[str]) -> list[dict[int, int]]:
    """Return every cyclic order of the filled choices, the one as written first, as ``reordered``
    takes it."""
    filled = [i for i, choice in enumerate(choices) if choice]
    return [
        dict(zip(filled, filled[shift:] + filled[:shift], strict=True))
        for shift in range(max(1, len(filled)))
    ]
