"""Question files: reading, checking, the prompt, and splits by picture content."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from bridgeblip import InputError

LETTERS = ("A", "B", "C", "D")
COLUMNS = ("id", "img_path", "question", "a", "b", "c", "d")
PROMPT_TEMPLATE = "Question: {question} Options: {options} Short answer:"


@dataclass(frozen=True)
class Question:
    """One row of a question file."""

    id: str
    image: Path
    """The picture's file; the CSV's path, seen from the CSV's folder."""
    question: str
    choices: tuple[str, str, str, str]
    """The four texts, as written; an empty one is no choice."""
    answer: int | None = None
    """Index of the right choice, or None in a file without answers."""

    @property
    def choice_mask(self) -> list[bool]:
        return [bool(choice) for choice in self.choices]

    @property
    def prompt(self) -> str:
        return render_prompt(self.question, self.choices)


def render_prompt(question: str, choices: Sequence[str]) -> str:
    """Return the text that the model reads for one question; empty choices are left out.

    InstructBLIP was tuned on ``Question: ... Options: ... Short answer:``. Each choice follows its
    letter as ``A. text`` because the T5 vocabulary then holds the letter as one token of its own,
    the very token (``▁A``) that the model gives as its answer: answering is pointing back.
    """
    options = " ".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True) if choice)
    return PROMPT_TEMPLATE.format(question=question, options=options)


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a CSV as text, every cell as written; UTF-8 with or without BOM, else cp949 (Korean Windows).

    Raises:
        InputError: if the file is missing, empty, or in neither encoding.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} not found: put the organiser's file there, or set the path to yours")
    for encoding in ("utf-8-sig", "cp949"):
        try:
            table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding=encoding)
        except UnicodeDecodeError:
            continue
        except (pd.errors.EmptyDataError, pd.errors.ParserError) as error:
            raise InputError(f"{path} is no CSV table ({error}): expected a header line and rows") from error
        if table.empty:
            raise InputError(f"{path} has no rows: expected one question a line below the header")
        return table
    raise InputError(f"{path} is neither UTF-8 nor cp949 text: save it as UTF-8")


def read_questions(path: str | Path, need_answers: bool = False) -> list[Question]:
    """Read a question file: columns ID, img_path, Question, A, B, C, D and perhaps answer.

    Column names are matched in any letter case and order; ``path`` serves for ``img_path``; other
    columns are ignored.

    Raises:
        InputError: naming the file, and the row where it is one: a missing column, a repeated ID, fewer than
            two choices, an answer that is no letter of a choice, a picture that is not there.
    """
    path = Path(path)
    table = read_table(path)
    table.columns = [name.strip().lower() for name in table.columns]
    table = table.rename(columns={} if "img_path" in table.columns else {"path": "img_path"})
    wanted = [*COLUMNS, "answer"] if need_answers else COLUMNS
    missing = [name for name in wanted if name not in table.columns]
    if missing:
        raise InputError(
            f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}: it has "
            f"{', '.join(table.columns)}; expected ID, img_path, Question, A, B, C, D"
            + (", answer" if need_answers else "")
        )
    repeated = table["id"][table["id"].duplicated()]
    if len(repeated):
        raise InputError(
            f"{path} has {len(repeated)} repeated IDs, the first is {repeated.iloc[0]!r}: make them unique"
        )
    rows = table.to_dict("records")
    questions = [_read_row(path, number, row, "answer" in table.columns) for number, row in enumerate(rows, start=2)]
    check_pictures(questions, path)
    return questions


def _read_row(path: Path, number: int, row: dict[str, str], has_answer: bool) -> Question:
    choices = tuple(row[letter.lower()].strip() for letter in LETTERS)
    where = f"{path}, line {number} (ID {row['id']})"
    if sum(map(bool, choices)) < 2:
        raise InputError(f"{where}: fewer than two choices are filled in; expected texts in A, B, C, D")
    answer = None
    if has_answer:
        letter = row["answer"].strip().upper()
        if letter not in LETTERS or not choices[LETTERS.index(letter)]:
            raise InputError(f"{where}: answer {row['answer']!r} is not the letter of a choice; expected A, B, C or D")
        answer = LETTERS.index(letter)
    return Question(row["id"], path.parent / row["img_path"], row["question"].strip(), choices, answer)


def check_pictures(questions: Sequence[Question], path: Path) -> None:
    """Refuse a file whose pictures are not there, before any long work starts."""
    missing = [q for q in questions if not q.image.is_file()]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(questions)} pictures not found, the first is {missing[0].image} "
            f"(ID {missing[0].id}): unpack the organiser's pictures beside the CSV"
        )


def picture_key(path: Path) -> str:
    """Return the SHA-256 of a picture's file: the same picture under another name has the same key."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def split_by_picture(
    questions: Sequence[Question], fraction: float, seed: int
) -> tuple[list[Question], list[Question]]:
    """Return (training, validation) questions; no picture content is in both, letters are balanced.

    Raises:
        InputError: if there are too few distinct pictures to set ``fraction`` of them apart.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    folds = round(1 / fraction)
    keys = picture_keys(q.image for q in questions)
    groups = [keys[q.image] for q in questions]
    if len(set(groups)) < folds:
        raise InputError(f"{len(set(groups))} distinct pictures can't be split {folds} ways: give more pictures")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    kept, held_out = next(splitter.split(questions, [q.answer for q in questions], groups))
    return [questions[i] for i in kept], [questions[i] for i in held_out]


def picture_keys(paths: Iterable[Path]) -> dict[Path, str]:
    """Return ``picture_key`` of each distinct path."""
    return {path: picture_key(path) for path in dict.fromkeys(paths)}
