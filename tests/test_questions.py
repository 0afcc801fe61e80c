import re
import shutil

import pandas as pd
import pytest

from bridgeblip import InputError
from bridgeblip.bridge.processing import render_prompt
from bridgeblip.data.orders import cyclic_orders
from bridgeblip.data.pictures import picture_key, picture_keys
from bridgeblip.data.questions import Question, read_questions, split_by_picture


def rewrite(competition, tmp_path, change=lambda table: table, **to_csv):
    """Copy the training set with its table changed."""
    shutil.copytree(competition, tmp_path / "c")
    table = pd.read_csv(competition / "train.csv", dtype=str)
    path = tmp_path / "c" / "train.csv"
    change(table).to_csv(path, **({"index": False} | to_csv))
    return path


def test_prompt_is_pinned():
    """Weights and bundles are tied to this very text."""
    assert render_prompt("What is it?", ("a cat", "a dog", "a cow", "an owl")) == (
        "Question: What is it? Options: A. a cat B. a dog C. a cow D. an owl Short answer:"
    )
    assert (
        render_prompt("Which?", ("x", "", "y", ""))
        == "Question: Which? Options: A. x C. y Short answer:"
    )


def test_reads_the_official_form(competition):
    train = read_questions(competition / "train.csv", need_answers=True)
    test = read_questions(competition / "test.csv")
    assert (competition / "train.csv").read_bytes().startswith(b"\xef\xbb\xbf")
    assert len(train) == 72 and train[0].id == "TRAIN_0000" and train[0].image.is_file()
    assert all(q.answer in range(4) for q in train) and all(q.answer is None for q in test)


@pytest.mark.parametrize(
    "change, to_csv",
    [
        (lambda t: t.rename(columns=str.lower).rename(columns={"img_path": "path"}), {}),
        (lambda t: t[t.columns[::-1]].assign(note="x"), {"encoding": "utf-8-sig"}),
        (lambda t: t.assign(answer=t["answer"].str.lower()), {"lineterminator": "\r\n"}),
        (lambda t: t.assign(extra="가나다"), {"encoding": "cp949"}),
    ],
    ids=["lower case, path", "order, extra column", "lower-case answers, CRLF", "cp949"],
)
def test_reads_other_forms_alike(competition, tmp_path, change, to_csv):
    expected = read_questions(competition / "train.csv", need_answers=True)
    read = read_questions(rewrite(competition, tmp_path, change, **to_csv), need_answers=True)
    assert [(q.id, q.question, q.choices, q.answer) for q in read] == [
        (q.id, q.question, q.choices, q.answer) for q in expected
    ]


def test_cells_are_kept_as_written(competition, tmp_path):
    def change(table):
        table.loc[0, ["A", "B", "C", "D"]] = ["007", "1.50", "None", "nan"]
        table.loc[0, "Question"] = 'a "quoted", comma\nand newline?'
        return table

    first = read_questions(rewrite(competition, tmp_path, change))[0]
    assert first.choices == ("007", "1.50", "None", "nan")
    assert first.question == 'a "quoted", comma\nand newline?'


def put(column, value, row=3):
    def change(table):
        table.loc[row, column] = value
        return table

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.drop(columns="img_path"), "lacks the column img_path.*expected ID"),
        (lambda t: t.drop(columns="answer"), "lacks the column answer"),
        (lambda t: t.head(0), "no rows"),
        (put("ID", "TRAIN_0000"), "1 repeated IDs.*TRAIN_0000"),
        (put("answer", "E"), r"line 5 \(ID TRAIN_0003\): answer 'E'"),
        (put(["A", "B", "C"], ""), "line 5.*fewer than two choices"),
        (put("img_path", "./nowhere.png"), "1 of 72 pictures not found.*nowhere.png.*TRAIN_0003"),
    ],
)
def test_unusable_files_are_refused_in_one_line(competition, tmp_path, change, message):
    with pytest.raises(InputError, match=message) as caught:
        read_questions(rewrite(competition, tmp_path, change), need_answers=True)
    assert "\n" not in str(caught.value) and "train.csv" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00\x01\xff", b'ID,"x\n1,2'])
def test_files_that_are_no_table(tmp_path, content):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.csv"):
        read_questions(tmp_path / "x.csv")
    with pytest.raises(InputError, match="not found"):
        read_questions(tmp_path / "y.csv")


def test_lines_are_those_of_the_file(competition, tmp_path):
    change = put(["Question", "B"], ["two\nlines", "one\nmore"], row=1)
    questions = read_questions(rewrite(competition, tmp_path, change))
    assert [q.line for q in questions[:4]] == [2, 3, 6, 7]


def test_letters_are_those_of_the_header(competition, tmp_path):
    assert not read_questions(competition / "train.csv")[0].small_letters
    lower = read_questions(
        rewrite(competition, tmp_path, lambda table: table.rename(columns=str.lower))
    )
    assert lower[0].small_letters


def test_a_comma_without_quotes_is_no_shifted_column(tmp_path):
    (tmp_path / "x.csv").write_text(
        "ID,img_path,Question,A,B,C,D\n1,a.png,Well, what is it?,a,b,c,d\n"
    )
    with pytest.raises(InputError, match=r"x\.csv is no CSV table .*length of data"):
        read_questions(tmp_path / "x.csv", strict=False)
    (tmp_path / "x.csv").write_text("ID,img_path,Question,A,B,C,D\n1,a.png,What?,a,b\n")
    (short,) = read_questions(tmp_path / "x.csv", strict=False)
    assert short.choices == ("a", "b", "", "")


def test_a_prediction_survives_bad_rows(competition, tmp_path):
    (tmp_path / "secret.png").write_bytes(b"")

    def change(table):
        table.loc[[0, 1], ["A", "B", "C"]] = ""
        table.loc[[1, 2, 3, 4, 5, 6], "img_path"] = [
            "no.png", "../secret.png", "a/../../secret.png", str(tmp_path / "secret.png"), "", f"{'x' * 300}.png"
        ]  # fmt: skip
        table.loc[7, ["answer", "img_path"]] = [
            "-",
            f"train_input_images/../{table['img_path'][7]}",
        ]
        return table

    path = rewrite(competition, tmp_path, change)
    questions = read_questions(path, strict=False)
    assert len(questions) == 72 and not any(q.problem for q in questions[7:])
    assert [q.image is None for q in questions[:8]] == [False, *[True] * 6, False]
    reasons = ["fewer than two", "fewer than two.*; picture "
                                 "no.png not found", *["outside the folder"] * 3,
               "not found", "xxx.png not found"]  # fmt: skip
    for question, reason in zip(questions, reasons, strict=False):
        assert re.search(reason, question.problem), question.problem
    assert questions[0].choice_mask == [False, False, False, True] and questions[7].answer is None


@pytest.mark.parametrize(
    "change", [lambda t: t.drop(columns="A"), put("ID", "TRAIN_0000"), lambda t: t.head(0)]
)
def test_a_prediction_refuses_whole_files_too(competition, tmp_path, change):
    with pytest.raises(InputError, match=r"train\.csv .*(column a|repeated|no rows)"):
        read_questions(rewrite(competition, tmp_path, change), strict=False)


def test_two_columns_of_one_name_are_refused(competition, tmp_path):
    with pytest.raises(InputError, match=r"train\.csv has the column a twice"):
        read_questions(rewrite(competition, tmp_path, lambda table: table.assign(a="x")))


def test_cyclic_orders_turn_the_filled_choices_only():
    question = Question("1", None, "?", ("w", "", "y", "z"), answer=2)
    turned = [question.reordered(order) for order in cyclic_orders(question.choices)]
    assert [q.choices for q in turned] == [
        ("w", "", "y", "z"),
        ("y", "", "z", "w"),
        ("z", "", "w", "y"),
    ]
    assert [q.choices[q.answer] for q in turned] == ["y"] * 3
    assert cyclic_orders(("", "x", "", "")) == [{1: 1}] and cyclic_orders(("",) * 4) == [{}]


def test_split_keeps_every_picture_on_one_side(questions):
    training, validation = split_by_picture(questions, 0.25, seed=0)
    assert len(training) + len(validation) == len(questions)
    seen = [{picture_key(q.image) for q in part} for part in (training, validation)]
    assert len(seen[1]) == 3 and not seen[0] & seen[1]
    assert (
        len(set(picture_keys(q.image for q in questions).values())) == 12
    )  # 72 names, 12 pictures
    assert split_by_picture(questions, 0.25, seed=0) == (training, validation)
    with pytest.raises(InputError, match="12 distinct pictures"):
        split_by_picture(questions, 0.05, seed=0)


def test_split_of_fewer_questions_than_letters_can_be_balanced_over(questions):
    one_each = list(
        {picture_key(q.image): q for q in questions}.values()
    )  # 12, about three of each letter
    training, validation = split_by_picture(one_each, 0.1, seed=0)
    assert len(validation) in (1, 2) and len(training) + len(validation) == 12
