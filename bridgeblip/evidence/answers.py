"""What a model makes of questions: probabilities, flags, problems; writing and reading them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from bridgeblip import InputError
from bridgeblip.data.questions import Question, letter, letters
from bridgeblip.data.tables import read_table
from bridgeblip.files import write_text

PROBABILITIES_FILE = "probabilities.csv"
FLAG_NOTES = {
    "blank": "answered without a picture",
    "unread": "question or choices with characters that the model can't read",
    "shortened": "prompt longer than the model reads, and shortened",
    "permuted": "averaged over the orders of their choices",
    "order": "which choice wins depends on the order of the choices",
}
FLAGS = tuple(FLAG_NOTES)


@dataclass(frozen=True)
class Answers:
    """What a model makes of questions, row by row in their order."""

    # (rows, choices), fp32; a missing choice has 0.
    probabilities: np.ndarray
    # Words of ``FLAG_NOTES`` about a row.
    flags: list[list[str]]
    # Why a row could not be answered as it stands; empty where it could.
    problems: list[str]


def margins(probabilities: np.ndarray) -> np.ndarray:
    """How far the two best of each row are apart, 0 to 1."""
    best = np.sort(probabilities.astype(np.float64), axis=-1)
    return best[:, -1] - best[:, -2]


def choose_permutation_margin(
    single: np.ndarray, averaged: np.ndarray, answers: Sequence[int]
) -> float | None:
    """Return the margin below which averaging over the orders of the choices pays, or None where it
    does not.

    Args:
        single: probabilities (rows, choices) of validation questions, asked once:
            ``permute_below=0``.
        averaged: the same, all averaged over the orders: ``permute_below=2``.
        answers: indices of the right choices.

    A gain counts if it is at least twice its standard error, were each changed row a coin's toss.
    """
    distance = margins(single)
    order = distance.argsort(kind="stable")
    before = (single.argmax(-1) == answers)[order].astype(int)
    after = (averaged.argmax(-1) == answers)[order].astype(int)
    gains = after - before
    best = int(gains.cumsum().argmax())  # the first of equals: as few rows as possible again
    gain = gains[: best + 1].sum()
    changed = np.abs(gains[: best + 1]).sum()
    if gain <= 0 or gain < 2 * changed**0.5:
        return None
    return float(np.nextafter(distance[order][best], 2))


def letters_of(probabilities: np.ndarray) -> list[str]:
    """The letter of the largest probability of each row."""
    return list(map(letter, probabilities.argmax(-1)))


def kept_folder(out: str | Path) -> Path:
    """Where the finished windows of a submission that is not written yet lie."""
    return Path(out).with_name(f".{Path(out).name}.windows")


def id_column(table: pd.DataFrame) -> str:
    """The column named ID in any letter case, else the first."""
    return next((name for name in table.columns if name.strip().lower() == "id"), table.columns[0])


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table of texts as CSV, atomically.

    What a reader may take for the end of a cell or row is quoted; pandas leaves a lone carriage
    return bare, and the row ends there when it is read again.
    """
    rows = [table.columns, *table.to_numpy()]
    write_text(path, "".join(",".join(map(_quoted, row)) + "\n" for row in rows))


def _quoted(cell: str) -> str:
    if set(cell).isdisjoint(',"\r\n'):
        return cell
    return '"' + cell.replace('"', '""') + '"'


def write_probabilities(path: Path, table: pd.DataFrame, flags: Sequence[Sequence[str]]) -> None:
    """Write ``probabilities.csv``: ID, a column a letter, margin, flags.

    Args:
        table: probabilities (rows, letters) by ID; its index is named as the column is to be.
        flags: of each row.
    """
    texts = table.assign(margin=margins(table.to_numpy())).map("{:.6f}".format)
    texts["flags"] = list(map(" ".join, flags))
    write_table(path, texts.reset_index())


def read_probabilities(
    path: str | Path, questions: Sequence[Question] | None = None
) -> tuple[pd.DataFrame, pd.Series | None]:
    """Read a ``probabilities.csv``, which need not be written here: column names are matched in any
    letter case, further columns passed over.

    Args:
        path: of the file, or of the folder that holds it.
        questions: the rows wanted, in their order, others are passed over; None: all.

    Returns:
        The probabilities, (rows, letters) by ID; and the flags of each row, None in a file without.

    Raises:
        InputError: naming the file, and the row where it is one: it is missing, lacks a column or
            a row, or holds something else than probabilities.
    """
    path = Path(path)
    path = path / PROBABILITIES_FILE if path.is_dir() else path
    choices = 2
    if questions:
        choices = max(len(question.choices) for question in questions)
    table = _by_id(path, letters(choices), questions)
    while questions is None and letter(choices) in table:
        choices += 1
    names = letters(choices)
    values = table[names].apply(pd.to_numeric, errors="coerce")
    sums = values.clip(0, 2).sum(axis=1)  # inf and -inf would give a warning
    wrong = ~(np.isclose(sums, 1, atol=1e-3) & (values >= 0).all(axis=1))
    if wrong.any():
        first = wrong.idxmax()
        raise InputError(
            f"{path}: {wrong.sum()} rows are no probabilities, the first has ID {first} with "
            f"{', '.join(table.loc[first, names])}; expected {choices} numbers from 0 that sum to "
            f"1: predict again"
        )
    return values, table["FLAGS"].str.split() if "FLAGS" in table else None


def with_answers(questions: Sequence[Question], path: str | Path) -> list[Question]:
    """Return the questions with the answers of a file of their own: columns ID and answer.

    Raises:
        InputError: if the file is missing, lacks a column or a question, or an answer is no letter
            of a choice.
    """
    given = _by_id(Path(path), ["ANSWER"], questions)["ANSWER"]
    answered = []
    for question, written in zip(questions, given, strict=True):
        known = letters(len(question.choices))
        answer = written.strip().upper()
        if answer not in known or not question.choice_mask[known.index(answer)]:
            raise InputError(
                f"{path}: answer {written!r} of ID {question.id} is not the letter of a choice, "
                f"{known[0]} to {known[-1]}: correct it"
            )
        answered.append(replace(question, answer=known.index(answer)))
    return answered


def _by_id(path: Path, wanted: Sequence[str], questions: Sequence[Question] | None) -> pd.DataFrame:
    """Read the rows of the questions, or all, from a CSV; column names are in capitals."""
    table = read_table(path)
    header = ", ".join(table.columns)
    table = table.set_index(id_column(table))
    table.columns = table.columns.str.strip().str.upper()
    for name in wanted:
        if list(table.columns).count(name) != 1:
            raise InputError(f"{path} must have one column {name}, in any case: it has {header}")
    ids = table.index if questions is None else [question.id for question in questions]
    require_ids(path, table.index, ids, "the questions", further=True)
    return table.loc[list(ids)]


def require_ids(
    path: str | Path, found: pd.Index, ids: Sequence[str], what: str, further: bool = False
) -> None:
    """Raise an InputError if the IDs in a file are not those of ``what``, or one comes twice.

    Args:
        further: IDs beyond those are welcome.
    """
    if found.has_duplicates:
        twice = found[found.duplicated()][0]
        raise InputError(f"{path} has the ID {twice!r} twice: make them unique")
    lacking = sorted(set(ids) - set(found))
    others = sorted(set(found) - set(ids))
    if lacking or (others and not further):
        some = "".join(f", one is {name!r}" for name in lacking[:1] + others[:1])
        raise InputError(
            f"{path} and {what} differ in {len(lacking) + len(others)} IDs{some}: take both files "
            f"from the same download"
        )
