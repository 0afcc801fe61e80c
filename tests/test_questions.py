import re
import shutil
import unicodedata
import warnings

import pandas as pd
import pytest

from bridgeblip import InputError
from bridgeblip.bridge.processing import render_prompt
from bridgeblip.data.pictures import picture_key, picture_keys
from bridgeblip.data.questions import (
    Question,
    cyclic_orders,
    read_questions,
    repeated_answers,
    split_by_picture,
)


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


HEADER = "ID,img_path,Question,A,B,C,D\n"


def read(tmp_path, text: str | bytes, **how):
    """Read what stands in a file; its pictures need not be there."""
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "x.csv").write_bytes(content)
    return read_questions(tmp_path / "x.csv", strict=False, **how)


ROW = "1,a.png,What is it?,a,b,c,d\n"


def test_excels_own_first_line_is_passed_over(tmp_path):
    assert [question.line for question in read(tmp_path, f"sep=,\n{HEADER}{ROW}")] == [3]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (HEADER + ROW + HEADER + ROW.replace("1", "2"), "line 3 is the header once more"),
        (HEADER + ROW + ROW.replace("1", ""), "line 3 has no ID"),
        ((HEADER + ROW).encode("utf-32"), "UTF-32 text"),
        (("sep=;\n" + HEADER + ROW).replace(",", ";"), "separated by semicolons"),
    ],
)
def test_odd_files_are_refused_by_their_line(tmp_path, content, said):
    with pytest.raises(InputError, match=said):
        read(tmp_path, content)


@pytest.mark.parametrize(
    "text, message",
    [
        ("2,a.png,Well, what is it?,a,b,c,d\n", "line 3 has 8 cells, the header 7"),
        ('2,a.png,"Two inches,a,b,c,d\n', "begins in line 3 don't pair up"),
        ('2,a.png,"Two" inches,a,b,c,d\n', "begins in line 3 don't pair up"),
        ('2,a.png,"An inch,a,b,c,d\n3,a.png,One",a,b,c,d\n', "line 3 make one row of several"),
        (
            '2,a.png,"An inch,a,b,c,d\n\n3,a.png,"A, B",a,b,c,d\n4,a.png,One",a,b,c,d\n',
            "begins in line 3 don't pair up",
        ),
        ('2,a.png,"Short,a,b\n3,a.png,One",a,b,c,d\n', "line 3: a text in quotes holds a row"),
        ("2,a.png,What\0 is it?,a,b,c,d\n", "line 3 holds a NUL character"),
    ],
)
def test_no_row_is_swallowed_or_shifted_without_a_word(tmp_path, text, message):
    with pytest.raises(InputError, match=rf"x\.csv.*{message}") as caught:
        read(tmp_path, HEADER + ROW + text)
    assert "\n" not in str(caught.value)


def test_texts_of_several_lines_in_quotes_are_welcome(tmp_path):
    text = 'Look, see, and tell.\nIs it red, green, or blue? "So, or so", then?\n'
    quoted = text.replace('"', '""')
    rows = read(tmp_path, f'{HEADER}1,a.png,"{quoted}","a\nb","c, d",e,"""f"""\n{ROW}'.replace(
        f"\n{ROW}", "\n2,a.png,What?,a,b,c,d\n"))  # fmt: skip
    assert [q.id for q in rows] == ["1", "2"] and rows[0].question == text.strip()
    assert rows[0].choices == ("a\nb", "c, d", "e", '"f"')


def test_a_comma_hidden_by_a_missing_choice_is_named(tmp_path):
    with pytest.warns(UserWarning, match=r"in 1 rows a choice begins .* line 3 \(ID 2\)"):
        read(tmp_path, HEADER + ROW + "2,a.png,Well, what is it?,a,b,c\n")
    with warnings.catch_warnings(record=True) as caught:  # a style, or meant so
        read(tmp_path, HEADER + "1,a.png,What?, a, b, c, d\n2,a.png,What?, a, b, c, d\n")
        read(tmp_path, HEADER + ROW + '2,a.png,What?," a",b,c,d\n')
    assert not [w for w in caught if "begins with a space" in str(w.message)]


def test_short_rows_lack_their_last_choices(tmp_path):
    (short,) = read(tmp_path, HEADER + "1,a.png,What?,a,b\n")
    assert short.choices == ("a", "b", "", "") and "ends within" not in short.problem
    _, cut = read(tmp_path, HEADER + ROW + "2,a.png,What?,apple,ban")
    assert cut.problem.startswith("the file ends within this row")
    with pytest.raises(InputError, match="ends in the middle of a character"):
        read(tmp_path, (HEADER + "1,a.png,What?,a,가").encode()[:-1])


def test_what_spreadsheets_add_is_passed_over(tmp_path):
    with pytest.warns(UserWarning, match="passed over 2 rows of commas only"):
        rows = read(tmp_path, f"\n{HEADER}\n{ROW},,,,,,\n   \n2,a.png,Q,a,b,c,d,,\n,,,,,,,\n")
    assert [(q.id, q.line) for q in rows] == [("1", 4), ("2", 7)]
    (spaced,) = read(
        tmp_path, 'ID, img_path, Question, A, B, C, D\n1, a.png, "Q, or R?", "a", b, c, d\n'
    )
    assert (spaced.question, spaced.choices) == ("Q, or R?", ("a", "b", "c", "d"))


@pytest.mark.parametrize(
    "content, message",
    [
        ((HEADER + ROW).replace(",", ";"), "separated by semicolons"),
        ((HEADER + ROW).replace(",", "\t"), "separated by tabs"),
        ((HEADER + ROW).encode("utf-16-le"), "UTF-16 text, no CSV in UTF-8"),
        ((HEADER + ROW).encode("utf-16"), "UTF-16 text"),
        (HEADER.replace("Question", "Question\u200b") + ROW, "ZERO WIDTH SPACE"),
        (HEADER.replace("B,", "\u202aB\u202c,") + ROW, "LEFT-TO-RIGHT EMBEDDING, POP DIR"),
        (HEADER.replace("C,", "") + ROW.replace("c,", ""), "lacks the column c"),
        (HEADER.replace("B,", "\u0412,") + ROW, "CYRILLIC CAPITAL LETTER VE|LETTER VE"),
        (HEADER.replace("A,", "\uff21,") + ROW, "FULLWIDTH LATIN SMALL LETTER A"),
        ((HEADER + ROW).replace(",", "^"), r"separated by '\^', CIRCUMFLEX"),
        ((HEADER + ROW).replace(",", "\uff0c"), "FULLWIDTH COMMA"),
        (HEADER.replace(",", "\t").replace("Question", "So, question") + ROW, "separated by tabs"),
        (f'"{HEADER.strip()}"\n"{ROW.strip()}"\n', "commas within quotes"),
        ("# made by a tool\n" + HEADER + ROW, "header 1, from '# made by a tool' on"),
        ("404: Not Found", "no rows: .* header, '404: Not Found'"),
        (b"PAR1" + bytes(range(256)), "a Parquet table"),
        (b"SQLite format 3\0" + bytes(90), "a database"),
        (b'[{"ID": 1}]', "JSON, no CSV in"),
        ((HEADER + ROW).encode() + bytes(900), "line 3 holds a NUL"),
        ((HEADER + ROW.replace("What", "caf\xe9")).encode("cp1252"), "it begins with b'ID,img_p'"),
        ("\ufeff" + HEADER + ROW + "\ufeff" + HEADER + ROW, "line 3 is the header once more"),
        (HEADER + ROW + ROW.replace("1,", "1\u200b,"), "look the same; the first is '1'"),
    ],
)
def test_other_forms_are_refused_by_name(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, content)


def test_what_can_not_be_seen_is_no_text(tmp_path):
    """A text may be as long as it likes; a row of one cell says so."""
    long = "word " * 40_000
    rows = read(
        tmp_path,
        f"{HEADER}1,a.png,{long},a,b,\u200b,\u2060\u00a0\n2;a.png;What?;a;b\n"
        "3,.,What?,a,b,c,d\n4,a.png,What?,a\u200b,b,,\n\x1a",
    )
    assert [len(row.question) for row in rows] == [199_999, 0, 5, 5]
    assert rows[0].choices == rows[3].choices == ("a", "b", "", "")
    assert rows[1].problem.startswith("the row is one cell, the header 7: put commas")
    assert "picture . not found" in rows[2].problem and rows[2].image is None
    assert rows[3].place == f"{tmp_path / 'x.csv'}, line 5 (ID 4)"


def test_any_number_of_choices_is_read(tmp_path):
    (five,) = read(
        tmp_path, "ID,img_path,Question,A,B,C,D,E,F1,x,answer\n1,a.png,?,a,b,c,d,e,,9,e\n"
    )
    assert five.choices == tuple("abcde") and five.answer == 4
    (two,) = read(tmp_path, "ID,img_path,Question,A,B\n1,a.png,?,yes,no\n")
    assert two.choices == ("yes", "no")


def test_a_right_choice_under_several_letters_is_found(tmp_path):
    header = HEADER.replace("D", "D,answer", 2).replace("ID,answer", "ID")
    rows = read(tmp_path, f"{header}1,a.png,?,a,b,c,c,A\n2,a.png,?,a,b,a,d,C\n3,a.png,?,x,y,,,\n")
    assert re.search(r"in 1 rows .* line 3 \(ID 2\)", repeated_answers(rows, tmp_path / "x.csv"))
    assert repeated_answers(rows[:1], tmp_path / "x.csv") == ""
    (tmp_path / "a.png").touch()
    (tmp_path / "x.csv").write_text(f"{header}2,a.png,?,a,b,a,d,C\n")
    with pytest.warns(UserWarning, match="in 1 rows the right choice is given under several"):
        read_questions(tmp_path / "x.csv", need_answers=True)  # as training reads it


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_pictures_are_found_under_names_that_look_the_same(tmp_path, stored):
    folder = tmp_path / unicodedata.normalize(stored, "사진 é")
    folder.mkdir()
    (folder / unicodedata.normalize("NFC", "고양이.png")).touch()
    (folder / "plain.png").touch()
    other = unicodedata.normalize("NFC" if stored == "NFD" else "NFD", "사진 é")
    written = [f"{folder.name}/plain.png", f"{other}/plain.png", f" {other}/plain.png ",
               f".\\{other}\\plain.png", f"{other}/{unicodedata.normalize('NFD', '고양이')}.png"]  # fmt: skip
    rows = "".join(f"{i},{name},?,a,b,c,d\n" for i, name in enumerate(written))
    assert all(q.image and not q.problem for q in read(tmp_path, HEADER + rows))
    (tmp_path / "a\\b.png").touch()
    (asis,) = read(tmp_path, HEADER + "1,a\\b.png,?,a,b,c,d\n")
    assert asis.image.name == "a\\b.png"  # there, as written


def test_a_picture_is_found_under_the_one_name_that_looks_alike(tmp_path):
    stored = ["at 3.04\u202fPM.png", "zero\u200bwidth.png", "UP/Q.PNG", "a.png", "A.png"]
    for name in stored:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    written = ["at 3.04 PM.png", "zerowidth.png\u200b", "up\\q.png", "a.png", "A.png"]
    rows = [f"{number},{name},What?,a,b,c,d\n" for number, name in enumerate(written)]
    questions = read(tmp_path, HEADER + "".join(rows) + "9,A.PNG,What?,a,b,c,d\n")
    assert [q.image and str(q.image.relative_to(tmp_path)) for q in questions] == [*stored, None]


def test_it_is_said_at_the_start_that_no_picture_is_there(tmp_path):
    with pytest.warns(UserWarning, match=r"x\.csv: none of its pictures .*a\.png not found"):
        read(tmp_path, HEADER + ROW)


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
               "img_path is empty", "xxx.png not found"]  # fmt: skip
    for question, reason in zip(questions, reasons, strict=False):
        assert re.search(reason, question.problem), question.problem
    assert questions[0].choice_mask == [False, False, False, True] and questions[7].answer is None


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.drop(columns="A"),
        put("ID", "TRAIN_0000"),
        lambda t: t.assign(ID=["é", "e\u0301 ", *t["ID"][2:]]),  # they look the same
        lambda t: t.head(0),
    ],
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
