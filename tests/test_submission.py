import csv
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridgeblip import InputError
from bridgeblip.data.questions import Question
from bridgeblip.evidence.answers import Answers, kept_folder
from bridgeblip.evidence.submission import (
    answer_names,
    blend,
    check_out,
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
    questions = [replace(q, small_letters=header.islower()) for q in QUESTIONS]
    sample = write_sample(tmp_path, answer=sample_answer)
    submission = write_submission(questions, ANSWERS, sample, tmp_path / "submission.csv")
    assert "".join(submission["Answer"]) == written


def test_a_samples_columns_without_a_name_are_passed_over(tmp_path):
    sample = tmp_path / "sample_submission.csv"
    sample.write_text("ID,answer,,\n1,-,,\n2,-,,\n")
    assert list(read_sample(["1", "2"], sample).columns) == ["ID", "answer"]
    with pytest.raises(
        InputError, match=r"differ in 2 IDs.*some differ only in spaces, or in what"
    ):
        read_sample(["1", "2\u200b"], sample)
    sample.write_text("answer,index\nA,1\nA,2\n")
    with pytest.raises(InputError, match="the ID 'A' twice in its column answer"):
        read_sample(["1", "2"], sample)


def test_answer_may_stand_before_the_id(tmp_path):
    sample = write_sample(tmp_path)
    table = pd.read_csv(sample, dtype=str)
    table[table.columns[::-1]].to_csv(sample, index=False)
    write_submission(QUESTIONS, ANSWERS, sample, tmp_path / "submission.csv")
    assert (tmp_path / "submission.csv").read_text().startswith('Answer,id\nB,"003, 3"\n')


def test_of_several_processes_only_the_first_says_that_there_is_no_sample(
    tmp_path, monkeypatch, capsys
):
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert find_sample(tmp_path / "test.csv") is None and not capsys.readouterr().out


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
    """Each flag once, in a line of its own; then the rows that have problems."""
    flags = [["shortened"], ["blank", "permuted"], ["permuted", "order"], ["unread", "shortened"]]
    answers = Answers(PROBABILITIES, flags, ANSWERS.problems)
    assert describe(QUESTIONS, answers, "out/submission.csv").splitlines() == [
        "wrote out/submission.csv and out/probabilities.csv: 4 answers",
        "1 of 4 rows: answered without a picture",
        "1 of 4 rows: question or choices with characters that the model can't read",
        "2 of 4 rows: prompt longer than the model reads, and shortened",
        "2 of 4 rows: averaged over the orders of their choices",
        "1 of 4 rows: which choice wins depends on the order of the choices",
        "1 rows could not be answered as they stand, see problems.csv beside it:",
        'line 3 (ID 001, 1): no "picture"',
    ]
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
    with pytest.raises(InputError, match="would be overwritten, but is an input"):
        blend(files, None, tmp_path / "one" / "blend.csv")
    with pytest.raises(InputError, match="must have one column A, in any case: it has id, Answer"):
        blend([files[0], tmp_path / "sample_submission.csv"], None, out)
    pd.read_csv(files[1], dtype=str, keep_default_na=False).head(3).to_csv(files[1], index=False)
    with pytest.raises(InputError, match="differ in 1 IDs"):
        blend(files, None, out)


def write_rows(path, rows, columns="ID,A,B,C,D,margin,flags"):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([columns, *rows, ""]))
    return path


GOOD = ["000,0.7,0.1,0.1,0.1,0.6,", "001,0.1,0.7,0.1,0.1,0.6,order"]


@pytest.mark.parametrize(
    "row", ["5,-3,0,0", "nan,0.1,0.9,0", "inf,0,0,0", "70,10,10,10", ",,,", "x,0,0,1", "0,0,0,0"]
)
def test_blend_refuses_what_is_no_probability(tmp_path, row):
    good = write_rows(tmp_path / "a.csv", GOOD)
    bad = write_rows(tmp_path / "b.csv", [GOOD[0], f"001,{row},0.6,"])
    with pytest.raises(InputError) as caught:
        blend([good, bad], None, tmp_path / "out" / "submission.csv")
    message = str(caught.value)
    assert message.startswith(f"{bad}: 1 rows are no probabilities, the first has ID 001 with ")
    assert "\n" not in message and list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("count", [2, 3, 5])
def test_any_number_of_choices_is_blended(tmp_path, count):
    table = pd.DataFrame(np.eye(3, count), ["x", "y", "z"], list("ABCDE"[:count]))
    table = table.where(table.sum(axis=1) > 0, 1 / count).rename_axis("name")
    table.to_csv(tmp_path / "a.csv")  # as somebody may write it: no margin, no flags
    table[::-1].to_csv(tmp_path / "b.csv")
    submission = blend([tmp_path / "a.csv", tmp_path / "b.csv"], None, tmp_path / "out" / "s.csv")
    assert list(submission["name"]) == ["x", "y", "z"]
    assert list(submission["answer"]) == ["A", "B", "C" if count > 2 else "A"]


def test_a_letter_that_one_file_lacks_has_no_probability_there(tmp_path):
    four = write_rows(tmp_path / "a.csv", GOOD)
    five = write_rows(tmp_path / "b.csv", ["001,0,0,0,0,1", "000,0,0,0,0,1"], "ID,A,B,C,D,E")
    blend([four, five], None, tmp_path / "out" / "submission.csv")
    assert (tmp_path / "out" / "probabilities.csv").read_text().splitlines()[1:] == [
        "000,0.350000,0.050000,0.050000,0.050000,0.500000,0.150000,",
        "001,0.050000,0.350000,0.050000,0.050000,0.500000,0.150000,order",
    ]


# ---------------------------------------------------------------- the sample's form


@pytest.mark.parametrize(
    "written, names",
    [
        ("0 1 2 3", "0 1 2 3"),
        ("0 0 2", "0 1 2 3"),
        ("1 2 3 4", "1 2 3 4"),
        ("4 - 3", "1 2 3 4"),
        ("(A) (B) (A)", "(A) (B) (C) (D)"),
        ("(A) -", "(A) (B) (C) (D)"),
        ("[c]", "[a] [b] [c] [d]"),
        ("B.", "A. B. C. D."),
        ("a a", "a b c d"),
        ("D", "A B C D"),
        ("- ?", "A B C D"),
    ],
)
def test_a_plain_form_is_kept_without_a_word(written, names, recwarn):
    assert answer_names(written.split(), 4) == names.split() and not recwarn.list


@pytest.mark.parametrize(
    "written",
    ["0 0", "1 1", "1 2 3", "0 4", "a B", "(A) B", "(A) [B]", "E", "cup", "10", "A1", "①", "yes -"],
)
def test_letters_and_a_warning_where_the_form_is_not_plain(written):
    with pytest.warns(UserWarning, match="are not plainly letters or numbers of 4 choices: A to D"):
        assert answer_names(written.split(), 4, small=True) == list("ABCD")


def test_the_submission_is_in_the_samples_form(tmp_path):
    sample = write_sample(tmp_path)
    table = pd.read_csv(sample, dtype=str).assign(Answer=["0", "1", "2", "3"])
    table.to_csv(sample, index=False)
    write_submission(QUESTIONS, ANSWERS, sample, tmp_path / "submission.csv")
    assert (tmp_path / "submission.csv").read_text() == (
        'id,Answer\n"003, 3",1\n"000, 0",0\n"002, 2",3\n"001, 1",2\n'
    )


# ---------------------------------------------------------------- nothing else is lost


def test_an_input_is_never_written_over(tmp_path):
    asked = write_rows(
        tmp_path / "test.csv", ["000,x.png,?,a,b,c,d"], "ID,img_path,Question,A,B,C,D"
    )
    before = asked.read_bytes()
    for out in (asked, tmp_path / "sub" / ".." / "test.csv"):
        with pytest.raises(InputError, match=r"test\.csv would be overwritten, but is an input"):
            check_out(out, asked, None)
    beside = write_rows(tmp_path / "problems.csv", ["000,2,lost"], "ID,line,reason")
    with pytest.raises(InputError, match=r"problems\.csv would be overwritten"):
        check_out(tmp_path / "submission.csv", beside)
    assert asked.read_bytes() == before


@pytest.mark.parametrize(
    "name, header",
    [
        ("submission.csv", "ID,img_path,Question,A,B,C,D"),
        ("submission.csv", "%PDF-1.4"),
        ("probabilities.csv", "ID,A,B,C,D"),
        ("problems.csv", "homework,page"),
    ],
)
def test_a_file_that_is_not_of_an_earlier_run_stays(tmp_path, name, header):
    foreign = write_rows(tmp_path / name, ["1,2"], header)
    before = foreign.read_bytes()
    for run in (
        lambda out: check_out(out),
        lambda out: write_submission(QUESTIONS, ANSWERS, None, out),
        lambda out: write_submission(
            QUESTIONS, Answers(PROBABILITIES, [[]] * 4, [""] * 4), None, out
        ),
    ):
        with pytest.raises(InputError, match=f"{name} would be overwritten"):
            run(tmp_path / "submission.csv")
    assert foreign.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_an_earlier_runs_files_are_replaced(tmp_path):
    columns = ('the "ID", of all', "an answer")
    sample = write_sample(tmp_path, columns)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "submission.csv").touch()  # as mktemp leaves it
    for _ in range(2):
        write_submission(QUESTIONS, ANSWERS, sample, tmp_path / "out" / "submission.csv")


@pytest.mark.parametrize("out", ["", "out", "probabilities.csv", "Problems.csv", "file/s.csv"])
def test_a_place_that_can_not_be_written_is_refused(tmp_path, out):
    (tmp_path / "out").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="can't be"):
        check_out(tmp_path / out)


TEXTS = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1)


@settings(deadline=None)  # a busy machine is slow once
@given(ids=st.lists(TEXTS, min_size=1, unique=True), reason=TEXTS)
def test_what_was_written_reads_back_whatever_the_ids(tmp_path_factory, ids, reason):
    """A lone carriage return in an ID, too: after all answering a write must not fail."""
    out = tmp_path_factory.mktemp("out") / "submission.csv"
    questions = [Question(name, None, "?", ("a", "b")) for name in ids]
    probabilities = np.tile(np.float32([0.25, 0.75]), (len(ids), 1))
    answers = Answers(probabilities, [["blank"]] * len(ids), [reason] * len(ids))
    write_submission(questions, answers, None, out)
    for name, column, value in (
        ("submission.csv", "answer", "B"),
        ("probabilities.csv", "B", "0.750000"),
        ("problems.csv", "reason", reason),
    ):
        with open(out.with_name(name), encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["ID"] for row in rows] == ids
        assert {row[column] for row in rows} == {value}
