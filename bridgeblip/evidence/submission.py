"""What is handed in: a submission in the sample's form, with probabilities and problems beside
it."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from bridgeblip import InputError
from bridgeblip.data.questions import Question, letters, read_table
from bridgeblip.evidence.answers import FLAGS, Answers, kept_folder, letters_of, margins
from bridgeblip.files import write_atomically

SAMPLE_FILE = "sample_submission.csv"
PROBABILITIES_FILE = "probabilities.csv"
PROBLEMS_FILE = "problems.csv"
SHOWN = 20  # problems that are printed; the file has all


def find_sample(csv: str | Path) -> Path | None:
    """Return the sample submission beside a question file; None, and a line that says so, if there
    is none."""
    sample = Path(csv).with_name(SAMPLE_FILE)
    if sample.is_file():
        return sample
    print(f"no {sample}: the submission gets the columns ID and answer, in the order of {csv}")
    return None


def read_sample(
    ids: Sequence[str], sample: str | Path | None, id_column: str = "ID"
) -> pd.DataFrame:
    """Return the sample submission: two columns, ID and answer; made up in the order of ``ids`` if
    it is None.

    Raises:
        InputError: if the sample has other columns, or its IDs are not exactly ``ids``.
    """
    if sample is None:
        return pd.DataFrame({id_column: list(ids), "answer": ""})
    table = read_table(sample)
    if len(table.columns) != 2:
        raise InputError(
            f"{sample} has columns {', '.join(table.columns)}; expected two: ID and answer"
        )
    column = table[_id_column(table)]
    if column.duplicated().any():
        raise InputError(
            f"{sample} has the ID {column[column.duplicated()].iloc[0]!r} twice: make them unique"
        )
    strangers = set(column) ^ set(ids)
    if strangers:
        raise InputError(
            f"{sample} and the questions differ in {len(strangers)} IDs, one is "
            f"{sorted(strangers)[0]!r}: "
            "take both files from the same download"
        )
    return table


def write_submission(
    questions: Sequence[Question], answers: Answers, sample: str | Path | None, out: str | Path
) -> pd.DataFrame:
    """Write the answers with exactly the sample's columns, IDs and order, and what belongs to them
    beside it.

    ``probabilities.csv`` has the four probabilities, the margin between the two best and the flags
    of every row, ``problems.csv`` the rows that could not be answered as they stand, if any. The
    letters are small if those in the sample's answers are; where it has none, if those in the
    question file's header are.

    Raises:
        InputError: if the sample's IDs are not those of the questions.
    """
    ids = [question.id for question in questions]
    form = read_sample(ids, sample)
    problems = problem_table(questions, answers)
    if problems.empty:
        Path(out).with_name(PROBLEMS_FILE).unlink(missing_ok=True)  # of an earlier run
    else:
        _write_table(Path(out).with_name(PROBLEMS_FILE), problems)
    submission = _write_answers(
        form, ids, answers.probabilities, answers.flags, questions[0].small_letters, Path(out)
    )
    shutil.rmtree(kept_folder(out), ignore_errors=True)
    return submission


def problem_table(questions: Sequence[Question], answers: Answers) -> pd.DataFrame:
    """ID, line and reason of every row that could not be answered as it stands."""
    rows = [
        (q.id, str(q.line), reason)
        for q, reason in zip(questions, answers.problems, strict=True)
        if reason
    ]
    return pd.DataFrame(rows, columns=["ID", "line", "reason"])


def describe(questions: Sequence[Question], answers: Answers, out: str | Path) -> str:
    """What was written and what should be known about it, in a few lines."""
    problems = problem_table(questions, answers)
    permuted, changed = (
        sum(flag in flags for flags in answers.flags) for flag in ("permuted", "order")
    )
    lines = [f"wrote {out} and {Path(out).with_name(PROBABILITIES_FILE)}: {len(questions)} answers"]
    if permuted:
        lines.append(
            f"{permuted} were averaged over the orders of their choices, {changed} depend on the "
            f"order"
        )
    if len(problems):
        lines.append(
            f"{len(problems)} rows could not be answered as they stand, see {PROBLEMS_FILE} beside "
            f"it:"
        )
    lines += [
        f"line {row.line} (ID {row.ID}): {row.reason}" for row in problems.head(SHOWN).itertuples()
    ]
    if len(problems) > SHOWN:
        lines.append(f"and {len(problems) - SHOWN} more")
    return "\n".join(lines)


def blend(files: Sequence[str | Path], sample: str | Path | None, out: str | Path) -> pd.DataFrame:
    """Average several ``probabilities.csv`` into a submission, with its own ``probabilities.csv``
    beside it.

    Args:
        sample: its columns, order and letter case are kept; an earlier submission will do. None:
            the first file's order, and capital letters.

    Raises:
        InputError: if a file has other IDs than the first, or would be overwritten.
    """
    out, files = Path(out), [Path(file) for file in files]
    if out.with_name(PROBABILITIES_FILE).resolve() in [file.resolve() for file in files]:
        raise InputError(
            f"{out} would get its {PROBABILITIES_FILE} where one of the inputs is: choose another "
            f"folder"
        )
    tables = [_read_probabilities(file) for file in files]
    ids = tables[0].index
    for file, table in zip(files, tables, strict=True):
        strangers = set(ids) ^ set(table.index)
        if strangers:
            raise InputError(
                f"{file} and {files[0]} differ in {len(strangers)} IDs, one is "
                f"{sorted(strangers)[0]!r}: "
                "blend results of the same questions"
            )
    tables = [table.loc[ids] for table in tables]
    probabilities = np.mean(
        [table.drop(columns=["margin", "flags"]).to_numpy() for table in tables], axis=0
    )
    words = [
        set(" ".join(row).split())
        for row in zip(*(table["flags"] for table in tables), strict=True)
    ]
    flags = [[flag for flag in FLAGS if flag in row] for row in words]
    form = read_sample(ids, sample, ids.name)
    return _write_answers(form, list(ids), probabilities, flags, False, out)


def _read_probabilities(path: Path) -> pd.DataFrame:
    """Read a ``probabilities.csv`` with its IDs as the index."""
    table = read_table(path)
    given = letters(len(table.columns) - 3)
    expected = [*given, "margin", "flags"]
    try:
        if list(table.columns[1:]) != expected:
            raise ValueError(f"its columns are {', '.join(table.columns)}")
        table = table.astype(dict.fromkeys(given, float)).set_index(
            table.columns[0], verify_integrity=True
        )
    except ValueError as error:
        raise InputError(
            f"{path} is no {PROBABILITIES_FILE} ({error}): expected ID, {', '.join(expected)}"
        ) from error
    return table


def _write_answers(
    form: pd.DataFrame,
    ids: Sequence[str],
    probabilities: np.ndarray,
    flags: Sequence[Sequence[str]],
    small: bool,
    out: Path,
) -> pd.DataFrame:
    """Write probabilities in the order of ``ids``, then the submission in the form of a sample."""
    id_column = _id_column(form)
    (answer_column,) = set(form.columns) - {id_column}
    table = pd.DataFrame(probabilities, columns=letters(probabilities.shape[1])).assign(
        margin=margins(probabilities)
    )
    table = table.map("{:.6f}".format).assign(flags=[" ".join(words) for words in flags])
    table.insert(0, id_column, list(ids))
    _write_table(out.with_name(PROBABILITIES_FILE), table)
    written = set(form[answer_column].str.strip())
    capitals = letters(probabilities.shape[1])
    if written <= set(capitals) or written <= {capital.lower() for capital in capitals}:
        small = not written <= set(capitals)
    given = letters_of(probabilities)
    answers = dict(zip(ids, (name.lower() if small else name for name in given), strict=True))
    submission = form.assign(**{answer_column: form[id_column].map(answers)})
    _write_table(out, submission)
    return submission


def _id_column(table: pd.DataFrame) -> str:
    """The column named ID in any letter case, else the first."""
    return next((name for name in table.columns if name.strip().lower() == "id"), table.columns[0])


def _write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table of texts as CSV, atomically, and only if it reads back as the same table."""

    def verify(partial: Path) -> None:
        if read_table(partial).to_dict("split") != table.to_dict("split"):
            raise OSError(f"{path} was not stored as written: is the disk full?")

    text = table.to_csv(index=False, lineterminator="\n")
    write_atomically(path, lambda partial: partial.write_bytes(text.encode("utf-8")), verify)
