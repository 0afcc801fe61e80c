"""Question files: reading, checking, the prompt, and splits by picture content."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from bridgeblip import InputError
from bridgeblip.data.pictures import picture_keys

COLUMNS = ("id", "img_path", "question", "a", "b", "c", "d")


def letter(index: int) -> str:
    """Return the letter of a choice: A of the first, B of the second and so on."""
    return chr(ord("A") + index)


def letters(count: int) -> list[str]:
    """Return the letters of ``count`` choices."""
    return [letter(index) for index in range(count)]


@dataclass(frozen=True)
class Question:
    """One row of a question file."""

    id: str
    image: Path | None
    """The picture's file; the CSV's path, seen from the CSV's folder. None: to be answered without
    a picture."""
    question: str
    choices: tuple[str, ...]
    """The texts, as written, one a letter; an empty one is no choice. None at all: to be answered
    freely."""
    answer: int | None = None
    """Index of the right choice, or None in a file without answers."""
    small_letters: bool = False
    """Whether the file's header writes its letters small."""
    line: int = 0
    """Where the row begins in its file; the header is line 1."""
    problem: str = ""
    """What keeps the row from being used as it stands; empty if nothing does."""

    @property
    def choice_mask(self) -> list[bool]:
        """Which letters can be the answer; all of them where no choice is filled in."""
        filled = [bool(choice) for choice in self.choices]
        return filled if any(filled) else [True] * len(filled)

    def reordered(self, source: dict[int, int]) -> "Question":
        """Return the question with the choice of ``source[i]`` at place ``i``; the answer follows
        its choice."""
        places = [source.get(i, i) for i in range(len(self.choices))]
        choices = tuple(self.choices[i] for i in places)
        return replace(
            self, choices=choices, answer=None if self.answer is None else places.index(self.answer)
        )


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a CSV as text, every cell as written; UTF-8 with or without BOM, else cp949 (Korean
    Windows).

    Raises:
        InputError: if the file is missing, empty, in neither encoding, or a row has more cells than
            the header.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"{path} not found: put the organiser's file there, or set the path to yours"
        )
    for encoding in ("utf-8-sig", "cp949"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "error", pd.errors.ParserWarning
                )  # cells left over: a comma without quotes
                table = pd.read_csv(
                    path, dtype=str, keep_default_na=False, encoding=encoding, index_col=False
                )
        except UnicodeDecodeError:
            continue
        except (pd.errors.EmptyDataError, pd.errors.ParserError, pd.errors.ParserWarning) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"{path} is no CSV table ({reason}): expected a header line and rows"
            ) from error
        if table.empty:
            raise InputError(f"{path} has no rows: expected one question a line below the header")
        if encoding == "cp949":
            warnings.warn(
                f"{path} is not UTF-8: read as cp949, Korean Windows; is it that?", stacklevel=2
            )
        return table.fillna("")  # a row that ends early
    raise InputError(f"{path} is neither UTF-8 nor cp949 text: save it as UTF-8")


def with_known_names(table: pd.DataFrame) -> pd.DataFrame:
    """Return a question table with its column names in lower case; ``path`` serves for
    ``img_path``."""
    table = table.rename(columns=lambda name: name.strip().lower())
    return table if "img_path" in table.columns else table.rename(columns={"path": "img_path"})


def read_questions(
    path: str | Path, need_answers: bool = False, strict: bool = True
) -> list[Question]:
    """Read a question file: columns ID, img_path, Question, A, B, C, D and perhaps answer.

    Column names are matched in any letter case and order; ``path`` serves for ``img_path``; other
    columns are ignored.

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
        return [_check_place(question, path.parent) for question in questions]
    for question in questions:
        if question.problem:
            raise InputError(describe_problem(question, path))
    check_pictures(questions, path)
    return questions


def read_rows(path: Path, need_answers: bool) -> list[Question]:
    """Return every row of a question file, its ``problem`` filled in; IDs and pictures are not
    looked at.

    Raises:
        InputError: if the file is no table, or lacks a column.
    """
    table = read_table(path)
    written = [name.strip() for name in table.columns]
    table = with_known_names(table)
    wanted = [*COLUMNS, "answer"] if need_answers else COLUMNS
    missing = [name for name in wanted if name not in table.columns]
    if missing:
        raise InputError(
            f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}: it has "
            f"{', '.join(table.columns)}; expected ID, img_path, Question, A, B, C, D"
            + (", answer" if need_answers else "")
        )
    twice = [name for name in wanted if list(table.columns).count(name) > 1]
    if twice:
        raise InputError(
            f"{path} has the column {twice[0]} twice, letter case aside: take one of them out"
        )
    small = {"a", "b", "c", "d"} <= set(written)
    questions, line = [], 2
    for row in table.to_dict("records"):
        questions.append(_read_row(path.parent, line, row, small, need_answers))
        line += 1 + sum(cell.count("\n") for cell in row.values())
    return questions


def _read_row(
    folder: Path, line: int, row: dict[str, str], small: bool, need_answer: bool
) -> Question:
    choices = tuple(row[name].strip() for name in "abcd")
    problem = ""
    if sum(map(bool, choices)) < 2:
        problem = "fewer than two choices are filled in; expected texts in A, B, C, D"
    given, answer = row.get("answer", "").strip().upper(), None
    known = letters(len(choices))
    if given in known and choices[known.index(given)]:
        answer = known.index(given)
    elif need_answer and not problem:
        problem = f"answer {row['answer']!r} is not the letter of a choice; expected A, B, C or D"
    question = row["question"].strip()
    return Question(
        row["id"], folder / row["img_path"], question, choices, answer, small, line, problem
    )


def describe_problem(question: Question, path: Path) -> str:
    """The problem of a row in one line, with where to find it."""
    return f"{path}, line {question.line} (ID {question.id}): {question.problem}"


def check_ids(questions: Sequence[Question], path: Path) -> None:
    """Refuse a file in which an ID comes twice."""
    ids = pd.Series([question.id for question in questions])
    repeated = ids[ids.duplicated()]
    if len(repeated):
        raise InputError(
            f"{path} has {len(repeated)} repeated IDs, the first is {repeated.iloc[0]!r}: make "
            f"them unique"
        )


def _check_place(question: Question, folder: Path) -> Question:
    """Take away a picture that is not there, or not below ``folder``; links are followed."""
    written = os.path.relpath(question.image, folder)
    if written.split(os.sep)[0] == os.pardir:
        problem = f"picture {written} lies outside the folder of the CSV"
    elif not os.path.isfile(question.image):
        problem = f"picture {written} not found"
    else:
        return question
    return replace(
        question, image=None, problem="; ".join(filter(None, [question.problem, problem]))
    )


def check_pictures(questions: Sequence[Question], path: Path) -> None:
    """Refuse a file whose pictures are not there, before any long work starts."""
    missing = [
        q for q in questions if not os.path.isfile(q.image)
    ]  # False, too, for names that no disk can hold
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(questions)} pictures not found, the first is "
            f"{missing[0].image} "
            f"(ID {missing[0].id}): unpack the organiser's pictures beside the CSV"
        )


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
    keys = picture_keys(q.image for q in questions)
    groups = [keys[q.image] for q in questions]
    if len(set(groups)) < folds:
        raise InputError(
            f"{len(set(groups))} distinct pictures can't be split {folds} ways: give more pictures"
        )
    answers = [q.answer for q in questions]
    if max(map(answers.count, set(answers))) < folds:
        answers = [0] * len(questions)  # a fold could not have one of each
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    kept, held_out = next(splitter.split(questions, answers, groups))
    return [questions[i] for i in kept], [questions[i] for i in held_out]
