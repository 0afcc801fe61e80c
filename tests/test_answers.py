"""Probabilities, answers and weights as they are read from files."""

import numpy as np
import pandas as pd
import pytest

from bridgeblip import InputError
from bridgeblip.data.questions import Question
from bridgeblip.evidence.answers import (
    FLAG_NOTES,
    read_probabilities,
    with_answers,
    write_probabilities,
)

QUESTIONS = [Question(f"00{i}", None, "?", ("w", "x", "y", "")) for i in range(4)]
ROWS = ["000,0.7,0.1,0.2,0", "001,0.1,0.7,0.2,0", "002,0,0,1,0", "003,0.5,0.25,0.25,0"]


@pytest.fixture
def file(tmp_path):
    """Writes lines below a header, and returns the file."""

    def write(*lines, header="ID,A,B,C,D"):
        path = tmp_path / "given.csv"
        path.write_text("\n".join([header, *lines, ""]))
        return path

    return write


@pytest.mark.parametrize("count", [2, 4, 7])
def test_what_is_written_is_read(tmp_path, count):
    ids = pd.Index([f"{i:03}" for i in range(20)], name="name")
    values = np.random.default_rng(0).dirichlet(np.ones(count), len(ids)).round(6)
    values[:, 0] += 1 - values.sum(axis=1)
    table = pd.DataFrame(values, ids, list("ABCDEFG"[:count]))
    flags = [list(FLAG_NOTES)[: i % 6] for i in range(len(ids))]
    write_probabilities(tmp_path / "probabilities.csv", table, flags)
    for path in (tmp_path, tmp_path / "probabilities.csv"):
        found, read = read_probabilities(path)
        pd.testing.assert_frame_equal(found, table, atol=5e-7)
        assert read.tolist() == flags
    asked = [Question(name, None, "?", ("x",) * count) for name in ids[[5, 2]]]
    found, read = read_probabilities(tmp_path, asked)
    assert list(found.index) == ["005", "002"] and read.tolist() == [flags[5], flags[2]]


def test_more_questions_in_another_order_from_anybody_will_do(file):
    path = file(*[f"{row},note" for row in ROWS[::-1]], header="id, a,b,C,d,note")
    found, flags = read_probabilities(path, QUESTIONS[1:3])
    assert found.to_numpy().tolist() == [[0.1, 0.7, 0.2, 0], [0, 0, 1, 0]] and flags is None


@pytest.mark.parametrize(
    "row",
    ["5,-3,0,0", "nan,0.1,0.9,0", "inf,0,0,0", "-inf,inf,1,0", "70,10,20,0", "1,1,0,0", "?,0,0,1"],
)
def test_what_is_no_probability_is_named(file, row):
    path = file(*ROWS[:2], f"002,{row}", ROWS[3])
    expected = (
        f"{path}: 1 rows are no probabilities, the first has ID 002 with "
        f"{row.replace(',', ', ')}; expected 4 numbers from 0 that sum to 1: predict again"
    )
    for questions in (None, QUESTIONS):
        with pytest.raises(InputError) as caught:
            read_probabilities(path, questions)
        assert str(caught.value) == expected
    assert len(read_probabilities(path, QUESTIONS[:2])[0]) == 2  # other rows are not looked at


@pytest.mark.parametrize(
    "header, rows, message",
    [
        ("ID,A,B,C", ["000,1,0,0"], "must have one column D, in any case: it has ID, A, B, C"),
        ("ID,A,B,C,D,a", ["000,1,0,0,0,0"], "must have one column A"),
        ("ID,A,B,C,D", ROWS[:1] * 2, "has the ID '000' twice"),
        ("ID,A,B,C,D", ROWS[:3], "the questions differ in 1 IDs, one is '003'"),
        (
            "ID,A,B,C,D",  # as a spreadsheet leaves them
            [row[2:] for row in ROWS],
            "differ in 8 IDs, one is '000', one is '0': take both files from the same download",
        ),
        ("ID,A,B,C,D", [f"{row[:3]} {row[3:]}" for row in ROWS], "one is '000', one is '000 '"),
    ],
)
def test_other_columns_and_rows_are_one_clear_error(file, header, rows, message):
    path = file(*rows, header=header)
    with pytest.raises(InputError) as caught:
        read_probabilities(path, QUESTIONS)
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_answers_are_letters_of_choices(file):
    path = file("003,c", "002, B ", "001,A", "000,a", "other,?", header="id,Answer")
    assert [q.answer for q in with_answers(QUESTIONS, path)] == [0, 0, 1, 2]
    for odd in ("1", "(A)", "the y", "E", "D", ""):  # the fourth choice is empty
        path = file("000,A", f"001,{odd}", "002,A", "003,A", header="ID,answer")
        with pytest.raises(InputError) as caught:
            with_answers(QUESTIONS, path)
        expected = f"{path}: answer {odd!r} of ID 001 is not the letter of a choice, A to D"
        assert str(caught.value).startswith(expected)
    for header in ("ID,label", "ID,answers"):
        with pytest.raises(InputError, match="must have one column ANSWER"):
            with_answers(QUESTIONS, file("000,A", header=header))
