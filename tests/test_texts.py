import json

import pytest
from PIL import Image

from bridgeblip import InputError
from bridgeblip.data.texts import read_task

COCO_NAME = "COCO_val2014_{:012d}.jpg"
FACTS = "image,cars,Colour\n1.png,2,red\n2.png,0,blue\n"
DIALOGUES = [
    {"question": "Is it day?", "answer": "yes"},
    [
        {"question": "How many cars?", "answer": "{cars}"},
        {"question": "You said {cars}: of which colour?", "answer": "{colour}"},
    ],
]


@pytest.fixture
def folder(tmp_path):
    for name in ("1.png", "2.png", COCO_NAME.format(7), COCO_NAME.format(8)):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".jsonl"):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def talk(*texts, image="1.png", **more):
    speakers = ("human", "gpt")
    turns = [{"from": speakers[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"image": image, "conversations": turns, **more}


def coco(**marks):
    captions = [(7, "a cat"), (7, "one cat"), (8, "a dog")]
    rows = [
        {"image_id": image, "caption": text, "id": i} for i, (image, text) in enumerate(captions)
    ]
    rows[1] |= marks
    return {
        "images": [{"id": i, "file_name": COCO_NAME.format(i)} for i in (7, 8)],
        "annotations": rows,
    }


def found(questions):
    return [(q.id, q.image.name, q.references) for q in questions]


CATS = [("7", COCO_NAME.format(7), ("a cat", "one cat")), ("8", COCO_NAME.format(8), ("a dog",))]


def test_coco(folder):
    task, questions = read_task(put(folder, "captions.json", coco()))
    assert task == "caption" and found(questions) == CATS
    assert not any(q.choices or q.question for q in questions)


@pytest.mark.parametrize("mark, word", [("is_rejected", "rejected"), ("is_precanned", "canned")])
def test_vizwiz_leaves_out_what_it_marks_and_counts_it(folder, mark, word):
    path = put(folder, "train.json", coco(**{mark: True}))
    with pytest.warns(UserWarning, match=f"left out 1 {word} captions"):
        _, questions = read_task(path)
    assert questions[0].references == ("a cat",)


def test_a_picture_without_a_caption_is_left_out_and_counted(folder):
    content = coco()
    content["annotations"].pop()
    with pytest.warns(UserWarning, match="left out 1 pictures without a caption"):
        _, questions = read_task(put(folder, "train.json", content))
    assert [q.id for q in questions] == ["7"]
    asked = read_task(put(folder, "test.json", content | {"annotations": []}), need_answers=False)
    assert [q.id for q in asked[1]] == ["7", "8"]


def test_karpathy_asks_for_its_splits(folder):
    images = [
        {"filename": "1.png", "filepath": "", "cocoid": 1, "split": "train", "sentences": [{"raw": "a"}]},
        {"filename": "2.png", "filepath": "", "cocoid": 2, "split": "restval", "sentences": [{"raw": "b "}]},
        {"filename": COCO_NAME.format(7), "imgid": 3, "split": "test", "sentences": [{"raw": "c"}, {"raw": "d"}]},
    ]  # fmt: skip
    path = put(folder, "dataset_coco.json", {"images": images, "dataset": "coco"})
    with pytest.raises(InputError, match="splits train, restval, test: name some"):
        read_task(path)
    with pytest.raises(InputError, match="--split"):
        read_task(path, split="train,valid")
    _, questions = read_task(path, split="train,restval")
    assert found(questions) == [("1", "1.png", ("a",)), ("2", "2.png", ("b",))]
    assert read_task(path, split="test")[1][0].references == ("c", "d")


def test_internvl_lines_as_captions_are_one_question_a_picture(folder):
    ask = "<image>\nProvide a one-sentence caption for the provided image."
    rows = [talk(ask, "a cat", id=0), talk(ask, "one cat", id=1), talk(ask, "a dog", image="2.png", id=2)]  # fmt: skip
    path = put(folder, "coco_karpathy_train_567k.jsonl", rows)
    task, questions = read_task(path, task="caption")
    assert task == "caption" and len(questions) == 2
    assert questions[0].references == ("a cat", "one cat")
    assert questions[0].question == "Provide a one-sentence caption for the provided image."
    task, questions = read_task(path)
    assert task == "answer" and [(q.id, q.line) for q in questions] == [
        ("0", 1),
        ("1", 2),
        ("2", 3),
    ]


@pytest.mark.parametrize("beside", [False, True])
def test_internvl_test_file_takes_the_captions_beside_it(folder, beside):
    rows = [{"image": COCO_NAME.format(i), "caption": ["a", "b"]} for i in (7, 8)]
    path = put(folder, "coco_karpathy_test.json", rows)
    if beside:
        right = put(
            folder, "coco_karpathy_test_gt.json", coco() | {"images": [{"id": 7}, {"id": 8}]}
        )
        with pytest.raises(InputError, match=r"give the file that names them.*karpathy_test.json"):
            read_task(right)
    _, questions = read_task(path)
    assert [q.id for q in questions] == ["7", "8"]
    assert questions[0].references == (("a cat", "one cat") if beside else ("a", "b"))


def test_every_answer_of_a_conversation_is_a_question_with_its_history(folder):
    rows = [
        talk("<image>\nWhat is it?", "A cat.", "Where?", "On a\nmat.", id="x"),
        talk("Why?\n<image>", "Because.", id="x"),
        {"id": "words", "conversations": talk("Hi", "Hello")["conversations"]},
    ]
    with pytest.warns(UserWarning, match="left out 1 conversations with several pictures or none"):
        task, questions = read_task(put(folder, "llava.json", rows))
    assert task == "answer" and [q.id for q in questions] == ["x", "x-2", "x-3"]
    assert [q.question for q in questions] == ["What is it?", "Where?", "Why?"]
    assert questions[1].references == ("On a\nmat.",)
    assert questions[1].history == (("What is it?", "A cat."),) and not questions[2].history


@pytest.mark.parametrize("where", ["frames/messages.txt", "messages.txt"])
def test_dialogues_about_a_table_of_facts(folder, where):
    for name in ("1.png", "2.png"):
        (folder / "frames").mkdir(exist_ok=True)
        (folder / name).rename(folder / "frames" / name)
    path = put(folder, where, DIALOGUES)
    put(folder, f"{path.relative_to(folder).parent}/labels.csv", FACTS)
    task, questions = read_task(path)
    assert task == "answer" and len(questions) == 6
    assert found(questions)[1:3] == [("1.png-2", "1.png", ("2",)), ("1.png-3", "1.png", ("red",))]
    assert questions[5].history == (("How many cars?", "0"),) and questions[5].line == 3
    assert questions[5].question == "You said 0: of which colour?"


def test_a_placeholder_that_no_column_has_is_named(folder):
    put(folder, "labels.csv", FACTS)
    path = put(folder, "messages.txt", [{"question": "{size}?", "answer": "{cars}"}])
    with pytest.raises(
        InputError, match=r"\{size\} is no column of labels.csv, which has image, cars"
    ):
        read_task(path)


def test_plain_tables(folder):
    path = put(folder, "a.csv", "Image,Question,Answer\n1.png,How many?,3\n2.png,How many?,\n")
    with pytest.raises(InputError, match="1 of 2 rows have no answer, the first is ID 2, line 3"):
        read_task(path)
    task, questions = read_task(path, need_answers=False)
    assert task == "answer" and found(questions) == [("1", "1.png", ("3",)), ("2", "2.png", ())]
    path = put(folder, "c.csv", 'image,caption\n1.png,a cat\n1.png,"one, cat"\n2.png,a dog\n')
    task, questions = read_task(path)
    assert task == "caption"
    assert found(questions) == [("1.png", "1.png", ("a cat", "one, cat")), ("2.png", "2.png", ("a dog",))]  # fmt: skip


def test_choices_are_read_as_question_files_are(folder):
    path = put(folder, "q.csv", "id,path,question,a,b,c,d,answer\nq1,1.png,무엇?,개,소,말,새,b\n")
    task, (question,) = read_task(path)
    assert task == "choice" and question.answer == 1 and question.small_letters
    with pytest.raises(InputError, match=r"holds choices, not captions: .* --task choice"):
        read_task(path, task="caption")
    with pytest.raises(InputError, match="pictures beside it"):
        read_task(path, images=folder / "elsewhere")


TASKS = {"answers": "answer", "choices": "choice"}


@pytest.mark.parametrize("name, content, message", [
    ("x.json", {"questions": [], "task_type": 1}, "holds objects with questions, task_type"),
    ("x.json", [{"image_id": 1, "text": ""}], "a list of objects with image_id, text"),
    ("x.json", [], "a list of"),
    ("x.json", "", "is empty, no CSV"),
    ("x.json", "[1,", "line 1 is no JSON"),
    ("x.xlsx", "PK\3\4", "an Excel workbook, or a zip, no CSV"),
    ("x.parquet", "PAR1", "a Parquet table, no CSV"),
    ("x.tsv", "id\timage\tcaption\n", "separated by tabs"),
    ("x.json", [{"image": "1.png", "caption": "a"}], "not choices: give another file"),
    ("x.json", [{"image": "1.png", "caption": "a"}, {"image": "1.png", "caption": {"b": "c"}}], "after 1 questions .*is no text"),
    ("x.csv", "image,image,caption\n1.png,2.png,a\n", "column image twice"),
    ("x.csv", "image,\u200bcaption\n1.png,a\n", "odd or hidden character, ZERO WIDTH SPACE"),
    ("x.json", "[" * 100_000, "recursion"),
    ("x.json", {"images": [{"id": 1, "file_name": "1.png"}], "annotations": [{"id": 3}]}, "KeyError: 'image_id'"),
    ("x.jsonl", [talk("a", "b"), talk("a", "b", "c")], "entry 2: its turns are from human, gpt, human"),
    ("x.csv", "picture,text\n1.png,a\n", "has the columns picture, text"),
    ("x.csv", "image,caption\n1.png,\n", "has no captions"),
    ("x.csv", "image,caption\n1.png,a\n", "not answers in free text: .* --task caption"),
    ("x.csv", "id,image,question,answer\n1,1.png,a,b\n1,1.png,a,b\n", "1 repeated IDs"),
    ("messages.txt", [{"question": "a"}], "labels.csv not found"),
])  # fmt: skip
def test_anything_else_is_refused_naming_what_was_seen(folder, name, content, message):
    path = put(folder, name, content)
    task = next((task for word, task in TASKS.items() if f"not {word}" in message), None)
    with pytest.raises(InputError, match=message) as caught:
        read_task(path, task=task)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.csv", "x.txt", "x", "x.CSV ", "x.json"])
def test_a_table_is_told_by_its_content(folder, name):
    rows = "image,caption\n ./1.PNG ,None\n2.png,NA\n"
    (folder / name).write_text(rows)
    task, questions = read_task(folder / name)
    assert task == "caption" and [q.references for q in questions] == [("None",), ("NA",)]
    assert [q.image.name for q in questions] == ["1.png", "2.png"] and questions[
        1
    ].place.startswith(f"{folder / name}, line 3")


def test_null_is_no_text_and_half_a_character_none(folder):
    path = put(folder, "x.json", "")
    path.write_text(
        '[{"image": "1.png", "caption": [null, NaN, 7, "x \\ud83d", "\\ud83d\\ude00 \\\\ud83d"]},'
        ' {"image": "2.png", "caption": null}]\n'
    )
    with pytest.warns(UserWarning, match="left out 1 pictures without a caption"):
        (only,) = read_task(path)[1]
    assert only.references == ("7", "x \ufffd", "😀 \\ud83d")


def test_json_lines_are_read_under_any_name(folder):
    lines = "\n\n".join(json.dumps(talk("a", "b")) for _ in range(2))
    (folder / "x.json").write_text(lines)
    assert len(read_task(folder / "x.json")[1]) == 2


def test_a_broken_line_is_named(folder):
    path = put(folder, "x.jsonl", [talk("a", "b"), talk("a", "b")])
    path.write_text(path.read_text()[:-9])
    with pytest.raises(InputError, match=r"x.jsonl can.t be read .line 2 is no JSON"):
        read_task(path)


def test_pictures_elsewhere_are_asked_for(folder):
    path = put(folder, "annotations/captions.json", coco())
    with pytest.raises(
        InputError, match=r"2 of 2 pictures not found, the first is .* \(ID 7\): .*--images"
    ):
        read_task(path)
    assert found(read_task(path, images=folder)[1]) == CATS
    _, questions = read_task(path, strict=False)
    assert questions[0].image is None and "not found" in questions[0].problem
