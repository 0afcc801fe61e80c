import numpy as np
import pandas as pd
import pytest

from bridgeblip import InputError
from bridgeblip.evidence.answers import kept_folder
from bridgeblip.data.questions import Question
from bridgeblip.evidence.answers import Answers
from bridgeblip.evidence.submission import (
    blend,
    describe,
    find_sample,
    read_sample,
    write_submission,
)

LOWER = ("a", "b", "c", "d")
QUESTIONS = [Question(f"00{i}, {i}", None, "?", ("w", "x", "y", "z"), line=i + 2) for i in range(4)]
PROBABILITIES = np.array(
    [[0.7, 0.1, 0.1, 0.1], [0, 0.25, 0.75, 0], [0.1, 0.2, 0.3, 0.4], [0.3, 0.5, 0.1, 0.1]], "f4"
)
ANSWERS = Answers(PROBABILITIES, [[], ["blank", "permuted"], [], []], ["", 'no "picture"', "", ""])


def write_sample(folder, columns=("id", "Answer"), answer="-", ids=(3, 0, 2, 1)):
    path = folder / "sample_submission.csv"
    rows = [(QUESTIONS[i].id, answer) for i in ids]
    pd.DataFrame(rows, columns=columns).to_csv(
        path, index=False, encoding="utf-8-sig", lineterminator="\r\n"
    )
    return path


def test_submission_follows_the_sample(tmp_path):
    out = tmp_path / "out" / "submission.csv"
    kept_folder(out).mkdir(parents=True)
    write_submission(QUESTIONS, ANSWERS, write_sample(tmp_path), out)
    assert out.read_bytes() == b'id,Answer\n"003, 3",B\n"000, 0",A\n"002, 2",D\n"001, 1",C\n'
    assert out.with_name("probabilities.csv").read_text().splitlines() == [
        "id,A,B,C,D,margin,flags",
        '"000, 0",0.700000,0.100000,0.100000,0.100000,0.600000,',
        '"001, 1",0.000000,0.250000,0.750000,0.000000,0.500000,blank permuted',
        '"002, 2",0.100000,0.200000,0.300000,0.400000,0.100000,',
        '"003, 3",0.300000,0.500000,0.100000,0.100000,0.200000,',
    ]
    assert (
        out.with_name("problems.csv").read_text() == 'ID,line,reason\n"001, 1",3,"no ""picture"""\n'
    )
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "probabilities.csv",
        "problems.csv",
        "submission.csv",
    ]
    write_submission(
        QUESTIONS, Answers(PROBABILITIES, [[]] * 4, [""] * 4), write_sample(tmp_path), out
    )
    assert not out.with_name("problems.csv").exists()


@pytest.mark.parametrize(
    "sample_answer, header, written",
    [
        ("-", "ABCD", "BADC"),
        ("-", "abcd", "badc"),
        ("a", "ABCD", "badc"),
        ("B", "abcd", "BADC"),
        ("", "abcd", "badc"),
    ],
)
def test_letters_have_the_case_that_the_data_uses(tmp_path, sample_answer, header, written):
    questions = [Question(q.id, None, "?", q.choices, letters=tuple(header)) for q in QUESTIONS]
    sample = write_sample(tmp_path, answer=sample_answer)
    submission = write_submission(questions, ANSWERS, sample, tmp_path / "submission.csv")
    assert "".join(submission["Answer"]) == written


def test_answer_may_stand_before_the_id(tmp_path):
    sample = write_sample(tmp_path)
    table = pd.read_csv(sample, dtype=str)
    table[table.columns[::-1]].to_csv(sample, index=False)
    write_submission(QUESTIONS, ANSWERS, sample, tmp_path / "submission.csv")
    assert (tmp_path / "submission.csv").read_text().startswith('Answer,id\nB,"003, 3"\n')


def test_without_a_sample_the_order_is_the_questions(tmp_path, capsys):
    assert find_sample(tmp_path / "test.csv") is None
    assert (
        "sample_submission.csv: the submission gets the columns ID and answer"
        in capsys.readouterr().out
    )
    write_submission(QUESTIONS, ANSWERS, None, tmp_path / "submission.csv")
    assert (
        (tmp_path / "submission.csv").read_text().startswith('ID,answer\n"000, 0",A\n"001, 1",C\n')
    )
    assert find_sample(write_sample(tmp_path)) == tmp_path / "sample_submission.csv"


@pytest.mark.parametrize(
    "sample, message",
    [
        ({"ids": (0, 1, 2)}, "differ in 1 IDs, one is '003, 3'"),
        ({"ids": (0, 1, 2, 3, 3)}, "has the ID '003, 3' twice"),
        ({"columns": ("id", "a"), "answer": "x"}, None),
    ],
)
def test_other_ids_are_refused_and_nothing_is_written(tmp_path, sample, message):
    path = write_sample(tmp_path, **sample)
    ids = [q.id for q in QUESTIONS]
    if message is None:
        assert len(read_sample(ids, path)) == 4
        path.write_text("id\n1\n")
        message = "has columns id; expected two"
    with pytest.raises(InputError, match=message):
        read_sample(ids, path)
    with pytest.raises(InputError, match=r"sample_submission\.csv"):
        write_submission(QUESTIONS, ANSWERS, path, tmp_path / "submission.csv")
    assert [file.name for file in tmp_path.iterdir()] == ["sample_submission.csv"]


def test_what_was_written_is_described():
    lines = describe(QUESTIONS, ANSWERS, "out/submission.csv").splitlines()
    assert (
        lines[0].endswith("probabilities.csv: 4 answers")
        and "1 were averaged" in lines[1]
        and "0 depend" in lines[1]
    )
    assert (
        lines[2].startswith("1 rows could not") and lines[3] == 'line 3 (ID 001, 1): no "picture"'
    )
    many = Answers(np.repeat(PROBABILITIES, 10, 0), [[]] * 40, ["lost"] * 40)
    assert describe(QUESTIONS * 10, many, "x.csv").endswith("\nand 20 more")


def test_blend_averages_probabilities(tmp_path):
    files = []
    for name, probabilities, order in (
        ("one", PROBABILITIES, 1),
        ("two", PROBABILITIES[:, ::-1], -1),
    ):
        answers = Answers(
            probabilities[::order], [["order"] * (name == "two"), ["blank"], [], []], [""] * 4
        )
        write_submission(QUESTIONS[::order], answers, None, tmp_path / name / "submission.csv")
        files.append(tmp_path / name / "probabilities.csv")
    out = tmp_path / "blend" / "submission.csv"
    submission = blend(files, None, out)
    assert list(submission.columns) == ["ID", "answer"] and list(submission["ID"]) == [
        q.id for q in QUESTIONS
    ]
    table = pd.read_csv(out.with_name("probabilities.csv"), keep_default_na=False)
    np.testing.assert_allclose(
        table[list("ABCD")], (PROBABILITIES + PROBABILITIES[:, ::-1]) / 2, atol=1e-6
    )
    assert list(table["flags"]) == ["", "blank", "blank", "order"]
    assert set(blend(files, write_sample(tmp_path, answer="a"), out)["Answer"]) <= set(LOWER)
    with pytest.raises(InputError, match="where one of the inputs is: choose another folder"):
        blend(files, None, tmp_path / "one" / "blend.csv")
    with pytest.raises(
        InputError, match=r"is no probabilities\.csv \(its columns are id, Answer\)"
    ):
        blend([files[0], tmp_path / "sample_submission.csv"], None, out)
    pd.read_csv(files[1], dtype=str, keep_default_na=False).head(3).to_csv(files[1], index=False)
    with pytest.raises(InputError, match="differ in 1 IDs"):
        blend(files, None, out)
