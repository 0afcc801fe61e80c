"""Whatever Python's csv module writes comes back as it was; BRIDGEBLIP_EXAMPLES sets how many tables
are tried."""

import csv
import io
import os
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridgeblip import InputError
from bridgeblip.data import tables
from bridgeblip.data.names import BLANK
from bridgeblip.data.questions import read_questions
from bridgeblip.data.tables import read_table
from bridgeblip.evidence.answers import Answers
from bridgeblip.evidence.submission import write_submission

EXAMPLES = int(os.environ.get("BRIDGEBLIP_EXAMPLES", "100"))
TRIED = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)

# Letters of all the world, and more of what a reader stumbles over.
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff")
TEXTS = st.text(LETTERS | st.sampled_from(",\"'\r\n\t ;|\\ab1가"), max_size=12)
LINE_ENDS = st.sampled_from(["\n", "\r\n", "\r"])
QUOTING = st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])


def as_csv(rows: list[list[str]], end: str, quoting: int, mark: bool) -> bytes:
    """Rows as the csv module writes them; it leaves a carriage return bare that is no line end."""
    file = io.StringIO(newline="")
    bare = any(set("\r\n") & set(cell) for row in rows for cell in row)
    csv.writer(file, lineterminator=end, quoting=csv.QUOTE_ALL if bare else quoting).writerows(rows)
    return file.getvalue().encode("utf-8-sig" if mark else "utf-8")


@st.composite
def written_tables(draw) -> tuple[list[list[str]], bytes]:
    """A header and rows, and their file; a row without any text is no row."""
    width = draw(st.integers(1, 8))
    row = st.lists(TEXTS, min_size=width, max_size=width)
    header, *rows = draw(st.lists(row.filter(any), min_size=2, max_size=6))
    content = as_csv([header, *rows], draw(LINE_ENDS), draw(QUOTING), draw(st.booleans()))
    return [header, *rows], content


def read_back(path, content: bytes) -> list[list[str]]:
    path.write_bytes(content)
    table = read_table(path)
    return [list(table.columns), *table.to_numpy().tolist()]


def test_any_table_comes_back_as_it_was(tmp_path):
    refused = []

    @TRIED
    @given(written_tables())
    def check(written):
        try:
            assert read_back(tmp_path / "t.csv", written[1]) == written[0]
        except InputError as error:
            refused.append(str(error))

    check()
    assert len(refused) < EXAMPLES / 100, refused


def test_a_reader_that_drops_rows_is_found(tmp_path, monkeypatch):
    """The property has teeth: a reader that leaves out rows with a lone quote fails it."""
    split = tables._split

    def careless(path, text):
        for line, raw, cells in split(path, text):
            if sum(cell.count('"') for cell in cells) % 2 == 0:
                yield line, raw, cells

    monkeypatch.setattr(tables, "_split", careless)
    with pytest.raises(AssertionError):
        test_any_table_comes_back_as_it_was(tmp_path)


CELLS = TEXTS.map(lambda text: text.strip(BLANK))
LABELS = st.text(string.ascii_letters + '0123456789,"\r\n 가é', min_size=1, max_size=8)


def test_any_question_file_and_its_submission_come_back(tmp_path):
    refused = []

    @pytest.mark.filterwarnings("ignore")
    @TRIED
    @given(
        st.lists(
            st.tuples(LABELS.filter(str.strip), CELLS, *[CELLS] * 4),
            min_size=1,
            max_size=5,
            unique_by=lambda row: row[0].strip(),
        ),
        LINE_ENDS,
        QUOTING,
        st.booleans(),
    )
    def check(rows, end, quoting, mark):
        header = ["ID", "img_path", "Question", "A", "B", "C", "D"]
        table = [[row[0], "none.png", *row[1:]] for row in rows]
        path = tmp_path / "test.csv"
        path.write_bytes(as_csv([header, *table], end, quoting, mark))
        try:
            questions = read_questions(path, strict=False)
        except InputError as error:
            refused.append(str(error))
            return
        seen = [(q.id, q.question, *q.choices) for q in questions]
        assert seen == [tuple(row) for row in rows]
        probabilities = np.eye(4, dtype="f4")[[i % 4 for i in range(len(rows))]]
        answers = Answers(probabilities, [[] for _ in rows], [""] * len(rows))
        write_submission(questions, answers, None, tmp_path / "submission.csv")
        given_answers = read_table(tmp_path / "submission.csv").to_numpy().tolist()
        assert given_answers == [[row[0], "ABCD"[i % 4]] for i, row in enumerate(rows)]

    check()
    assert len(refused) < EXAMPLES / 100, refused
