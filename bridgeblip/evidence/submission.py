"""What is handed in: a submission in the sample's form, with probabilities and problems beside
it."""

import json
import os
import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from bridgeblip import InputError
from bridgeblip.data.questions import Question, letters
from bridgeblip.data.tables import read_table
from bridgeblip.evidence.answers import (
    FLAG_NOTES,
    FLAGS,
    PROBABILITIES_FILE,
    Answers,
    id_column,
    kept_folder,
    read_probabilities,
    require_ids,
    write_probabilities,
    write_table,
)
from bridgeblip.files import atomically, require_place, write_text
from bridgeblip.machine import process_rank
from bridgeblip.messages import say

SAMPLE_FILE = "sample_submission.csv"
PROBLEMS_FILE = "problems.csv"
CELL = r'("([^"]|"")*"|[^,"]*)'
SHOWN = 20  # problems that are printed; the file has all


def find_sample(csv: str | Path) -> Path | None:
    """Return the sample submission beside a question file; None, and a line that says so, if there
    is none."""
    sample = Path(csv).with_name(SAMPLE_FILE)
    if sample.is_file():
        return sample
    if process_rank()[0] == 0:  # once, however many processes answer
        print(f"no {sample}: the submission gets the columns ID and answer, in the order of {csv}")
    return None


def read_sample(ids: Sequence[str], sample: str | Path | None, name: str = "ID") -> pd.DataFrame:
    """Return the sample submission: two columns, ID and answer; made up in the order of ``ids``,
    their column called ``name``, if it is None.

    Raises:
        InputError: if the sample has other columns, or its IDs are not exactly ``ids``.
    """
    if sample is None:
        return pd.DataFrame({name: list(ids), "answer": ""})
    table = read_table(sample)
    table = table.loc[:, table.columns.str.strip() != ""]  # that a spreadsheet adds
    if len(table.columns) != 2:
        raise InputError(
            f"{sample} has columns {', '.join(table.columns)}; expected two: ID and answer"
        )
    require_ids(sample, pd.Index(table[id_column(table)]), ids, "the questions")
    return table


def check_out(out: str | Path, *inputs: str | Path | None) -> None:
    """Refuse a place for the submission, or for captions if it ends in .json, before any work, if
    it can't be written or if writing it would cost a file that is not an earlier run's.

    Args:
        inputs: files that are read; None is none.

    Raises:
        InputError: if ``out`` is a folder, has the name of a file that goes beside it, or lies
            where nothing can be written; if it or a file beside it is an input, or is there and
            looks like something else.
    """
    out = Path(out)
    if out.is_dir() or out.name.lower() in (PROBABILITIES_FILE, PROBLEMS_FILE):
        example = (out if out.is_dir() else out.parent) / "submission.csv"
        raise InputError(f"{out} can't be the submission's name: expected one such as {example}")
    require_place(out)
    read = [os.path.realpath(path) for path in inputs if path]  # of links in a circle, too
    headers = {out.name: f"{CELL},{CELL}", PROBABILITIES_FILE: ".*,margin,flags"}
    if out.suffix == ".json":
        headers = {out.name: r"\[\]?"}
    for name, header in (headers | {PROBLEMS_FILE: "ID,line,reason"}).items():
        path = out.with_name(name)
        lost = os.path.realpath(path) in read
        if path.exists() and path.stat().st_size:
            with open(path, encoding="utf-8-sig", errors="replace") as file:
                lost |= not re.fullmatch(header, file.readline(10_000).strip())
        if lost:
            raise InputError(
                f"{path} would be overwritten, but is an input or not of an earlier run: choose "
                f"another folder or name"
            )


def write_submission(
    questions: Sequence[Question], answers: Answers, sample: str | Path | None, out: str | Path
) -> pd.DataFrame:
    """Write the answers with exactly the sample's columns, IDs and order, and what belongs to them
    beside it.

    ``probabilities.csv`` has the probabilities, the margin between the two best and the flags of
    every row, ``problems.csv`` the rows that could not be answered as they stand, if any. Answers
    are called as in the sample, see ``answer_names``; small letters without one if the question
    file's header has them.

    Raises:
        InputError: if the sample's IDs are not those of the questions, or as ``check_out`` does.
    """
    out = Path(out)
    ids = [question.id for question in questions]
    form = read_sample(ids, sample)
    check_out(out, sample)
    write_problems(questions, answers, out)
    table = pd.DataFrame(answers.probabilities, ids, letters(answers.probabilities.shape[1]))
    submission = _write_answers(form, table, answers.flags, questions[0].small_letters, out)
    shutil.rmtree(kept_folder(out), ignore_errors=True)
    return submission


def write_problems(questions: Sequence[Question], answers: Answers, out: Path) -> None:
    """Write ``problems.csv`` beside what is handed in, if there are any."""
    problems = problem_table(questions, answers)
    if problems.empty:
        out.with_name(PROBLEMS_FILE).unlink(missing_ok=True)  # of an earlier run
    else:
        write_table(out.with_name(PROBLEMS_FILE), problems)


def problem_table(questions: Sequence[Question], answers: Answers) -> pd.DataFrame:
    """ID, line and reason of every row that could not be answered as it stands."""
    table = pd.DataFrame(map(vars, questions))[["id", "line"]].astype(str)
    table = table.rename(columns={"id": "ID"}).assign(reason=answers.problems)
    return table[table["reason"] != ""]


def describe(questions: Sequence[Question], answers: Answers, out: str | Path) -> str:
    """What was written and what should be known about it: a line a flag, and a line a problem."""
    rows = len(questions)
    beside = Path(out).with_name(PROBABILITIES_FILE)
    lines = [say("wrote", out=out, probabilities=beside, rows=rows)]
    for flag, note in FLAG_NOTES.items():
        count = sum(flag in words for words in answers.flags)
        if count:
            lines.append(f"{count} of {rows} rows: {note}")
    return "\n".join([*lines, *problem_lines(questions, answers)])


def problem_lines(questions: Sequence[Question], answers: Answers) -> list[str]:
    """What should be known about rows that could not be answered as they stand."""
    lines, problems = [], problem_table(questions, answers)
    if len(problems):
        lines.append(say("problem_rows", count=len(problems), file=PROBLEMS_FILE))
    for row in problems.head(SHOWN).itertuples():
        lines.append(f"line {row.line} (ID {row.ID}): {row.reason}")
    if len(problems) > SHOWN:
        lines.append(f"and {len(problems) - SHOWN} more")
    return lines


def write_captions(
    out: Path, questions: Sequence[Question], texts: Sequence[str], answers: Answers
) -> str:
    """Write captions as COCO's servers take them, ``[{"image_id": ..., "caption": ...}]``, and
    ``problems.csv`` beside them; say what was written."""
    rows = []
    for question, text in zip(questions, texts, strict=True):
        is_number = re.fullmatch("0|[1-9][0-9]{0,17}", question.id)  # as written, in 64 bits
        name = int(question.id) if is_number else question.id
        rows.append({"image_id": name, "caption": text})
    write_text(out, json.dumps(rows, ensure_ascii=False, indent=0) + "\n")
    write_problems(questions, answers, out)
    shutil.rmtree(kept_folder(out), ignore_errors=True)
    return "\n".join([f"wrote {out}: {len(texts)} texts", *problem_lines(questions, answers)])


def blend(files: Sequence[str | Path], sample: str | Path | None, out: str | Path) -> pd.DataFrame:
    """Average several ``probabilities.csv`` into a submission, with its own ``probabilities.csv``
    beside it.

    Args:
        sample: its columns, order and answers' form are kept; an earlier submission will do. None:
            the first file's order, and capital letters.

    Raises:
        InputError: if a file holds something else than probabilities, or has other IDs than the
            first; or as ``check_out`` does.
    """
    check_out(out, *files, sample)
    tables, flags = zip(*map(read_probabilities, files), strict=True)
    ids = tables[0].index
    for file, table in zip(files, tables, strict=True):
        require_ids(file, table.index, ids, str(files[0]))
    # a letter that a file has not has no probability there
    table = pd.concat(tables).fillna(0).groupby(level=0, sort=False).mean()
    words = pd.concat([pd.Series([[]] * len(ids), ids), *flags])
    flags = []
    for row in words.groupby(level=0, sort=False).sum():
        flags.append([flag for flag in FLAGS if flag in row])
    return _write_answers(read_sample(ids, sample, ids.name), table, flags, False, Path(out))


def _write_answers(
    form: pd.DataFrame,
    table: pd.DataFrame,
    flags: Sequence[Sequence[str]],
    small: bool,
    out: Path,
) -> pd.DataFrame:
    """Write probabilities, (rows, letters) by ID, then the submission in the form of a sample."""
    name = id_column(form)
    column = form.columns.drop(name)[0]
    names = answer_names(form[column], len(table.columns), small)
    answers = pd.Series(np.array(names)[table.to_numpy().argmax(-1)], table.index)
    submission = form.assign(**{column: answers.loc[form[name]].to_numpy()})
    with atomically(out) as partial:  # both, or none
        write_table(partial, submission)
        write_probabilities(out.with_name(PROBABILITIES_FILE), table.rename_axis(name), flags)
    return submission


def answer_names(written: Sequence[str], choices: int, small: bool = False) -> list[str]:
    """Return what the choices are called in a submission: as in a sample's answers, where these are
    letters or numbers of the choices, perhaps between signs as in "(A)"; numbers count from 0 or
    from 1, whichever only one of the two can have written. Else capital letters, with a warning
    unless all that is there are signs such as "-".

    Args:
        written: the sample's answers.
        small: write small letters where the sample has none.
    """
    capitals = letters(choices)
    small_ones = list(map(str.lower, capitals))
    words = sorted({text.strip() for text in written if re.search(r"\w", text)})
    if not words:
        return small_ones if small else capitals
    before, core, after = re.fullmatch(r"(\W*)(.*?)(\W*)", words[0], re.DOTALL).groups()
    numbers = list(map(str, range(choices + 1)))
    plain = []
    for form in (capitals, small_ones, numbers[:-1], numbers[1:]):
        names = [f"{before}{name}{after}" for name in form]
        if set(words) <= set(names):
            plain.append(names)
    if len(plain) == 1 and (len(words) > 1 or not core.isdigit()):  # a lone 0 may mean nothing
        return plain[0]
    warnings.warn(
        f"the sample's answers, such as {words[0]!r}, are not plainly letters or numbers of "
        f"{choices} choices: {capitals[0]} to {capitals[-1]} are written; ask the organiser",
        stacklevel=2,
    )
    return capitals
