"""Miniature annotation files in the published layouts, each with real pictures, to question
CSVs."""

import copy
import importlib
import json
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from bridgeblip import InputError
from bridgeblip.__main__ import main
from bridgeblip.bridge.base import TINY_BASE
from bridgeblip.bridge.processing import QuestionProcessor, render_prompt
from bridgeblip.data.formats import SOURCES
from bridgeblip.data.prepare import join, prepare, read_annotations, write_questions
from bridgeblip.data.questions import read_questions
from bridgeblip.embedded.digits import digit_pictures

AOKVQA = [
    {
        "split": "train",
        "image_id": 299207,
        "question_id": "22MexNkBPpdZGX6sxbxVBH",
        "question": "What is the man by the bags awaiting?",
        "choices": ["skateboarder", "train", "delivery", "cab"],
        "correct_choice_idx": 3,
        "direct_answers": [
            "ride",
            "ride",
            "bus",
            "taxi",
            "travelling",
            "traffic",
            "taxi",
            "cab",
            "cab",
            "his ride",
        ],
        "difficult_direct_answer": False,
        "rationales": [
            "A train would not be on the street.",
            "He is by the road.",
            "He has luggage.",
        ],
    },
    {
        "split": "train",
        "image_id": 17,
        "question_id": "2aMexNkBPpdZGX6sxbxVBX",
        "question": 'The sign says "정지", or\r\n"stop"; what\'s next, then?',
        "choices": ['a "full", complete stop', "빨리, 더 빨리", "a turn, left", "None"],
        "correct_choice_idx": 1,
        "direct_answers": ["stop"] * 10,
        "difficult_direct_answer": True,
        "rationales": ["It says so.", "It says so.", "It says so."],
    },
]
AOKVQA_VAL = [
    {
        "split": "val",
        "image_id": 461751,
        "question_id": "22jbM6gDxdaMaunuzgrsBB",
        "question": "What is in the motorcyclist's mouth?",
        "choices": ["toothpick", "food", "popsicle stick", "cigarette"],
        "correct_choice_idx": 3,
        "direct_answers": ["cigarette"] * 10,
        "difficult_direct_answer": False,
        "rationales": ["He's smoking while riding.", "It is lit.", "The man is smoking."],
    }
]
AOKVQA_TEST = [
    {
        "split": "test",
        "image_id": 5,
        "question_id": "23CMexNkBPpdZGX6sxbxVB",
        "question": "What is it?",
        "choices": ["a", "b", "c", "d"],
        "difficult_direct_answer": False,
    }
]


def pair(qa_id, image_id, question, answer, wrong):
    return {
        "image_id": image_id,
        "question": question,
        "multiple_choices": wrong,
        "qa_id": qa_id,
        "answer": answer,
        "type": question.split()[0].lower(),
    }


VISUAL7W = {
    "dataset": "visual7w-telling",
    "images": [
        {
            "qa_pairs": [
                pair(
                    871917,
                    2323054,
                    "What type of flooring?",
                    "Wood.",
                    ["Tile.", "Carpet.", "Cement."],
                ),
                pair(871918, 2323054, "Who is there?", "No one.", ["A man.", "A boy.", "A girl."]),
            ],
            "image_id": 2323054,
            "split": "train",
            "filename": "v7w_2323054.jpg",
        },
        {
            "qa_pairs": [
                pair(986943, 2359297, "When is it?", "Noon.", ["Night.", "Dusk.", "Dawn."])
            ],
            "image_id": 2359297,
            "split": "val",
            "filename": "v7w_2359297.jpg",
        },
    ],
}
VISUAL7W_POINTING = {
    "dataset": "visual7w-pointing",
    "images": [
        {
            "qa_pairs": [pair(172024, 4, "Which item is round?", 1002, [1003, 1004, 1005])],
            "image_id": 4,
            "split": "train",
            "filename": "v7w_4.jpg",
        }
    ],
    "boxes": [{"box_id": 1002, "name": "ball", "height": 2, "width": 3, "y": 4, "x": 5}],
}


def problem(question, choices, answer, hint="", image="image.png", split="train"):
    return {
        "question": question,
        "choices": choices,
        "answer": answer,
        "hint": hint,
        "image": image,
        "task": "closed choice",
        "grade": "grade2",
        "subject": "natural science",
        "topic": "geography",
        "category": "Geography",
        "skill": "Read a map: cardinal directions",
        "lecture": "Maps have four cardinal directions.",
        "solution": "",
        "split": split,
    }


SCIENCEQA = {
    "1": problem(
        "Which of these states is farthest north?",
        ["West Virginia", "Louisiana", "Arizona", "Oklahoma"],
        0,
    ),
    "2": problem(
        "Which angle is it?",
        ["a 30\u00b0 angle", "a 45\u00b0 angle"],
        1,
        "Tom had a catapult.\nFigure: it.",
    ),
    "4": problem(
        "Which figure of speech is used?\nSing, O goddess.",
        ["chiasmus", "apostrophe"],
        1,
        image=None,
    ),
    "5": problem("Which could the test show?", ["steadiness", "size", "damage"], 2, split="val"),
    "9": problem("Which one is it?", ["one", "two", "three", "four", "five"], 4),
}


@pytest.fixture(scope="module")
def pictures():
    return [picture for picture, _ in digit_pictures()["test"][:10]]


@pytest.fixture
def downloads(tmp_path, pictures) -> Path:
    """A folder as it is after downloading and unpacking all three sets."""
    names = [
        "coco/train2017/000000299207.jpg",
        "coco/train2017/000000000017.jpg",
        "coco/val2017/000000461751.jpg",
        "coco/test2017/000000000005.jpg",
        "v7w/images/v7w_2323054.jpg",
        "v7w/images/v7w_2359297.jpg",
        *(
            f"scienceqa/images/{p['split']}/{number}/image.png"
            for number, p in SCIENCEQA.items()
            if p["image"]
        ),
    ]
    folder = tmp_path / "downloads"
    for name, picture in zip(names, pictures, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / name)
    write_json(folder / "aokvqa" / "aokvqa_v1p0_train.json", AOKVQA)
    write_json(folder / "aokvqa" / "aokvqa_v1p0_val.json", AOKVQA_VAL)
    write_json(folder / "aokvqa" / "aokvqa_v1p0_test.json", AOKVQA_TEST)
    write_json(folder / "v7w" / "dataset_v7w_telling.json", VISUAL7W)
    write_json(folder / "v7w" / "dataset_v7w_pointing.json", VISUAL7W_POINTING)
    write_json(folder / "scienceqa" / "problems.json", SCIENCEQA)
    return folder


def write_json(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def changed(content, change):
    """A deep copy of ``content`` after ``change`` was called with it."""
    content = copy.deepcopy(content)
    change(content)
    return content


def prepare_aokvqa(downloads, content, out="questions.csv"):
    path = write_json(downloads / "changed.json", content)
    return prepare("aokvqa", [path], downloads / "coco", downloads / out)


def test_aokvqa(downloads, tmp_path, capsys):
    out = tmp_path / "competition" / "aokvqa.csv"
    folder = downloads / "aokvqa"
    files = [str(folder / f"aokvqa_v1p0_{split}.json") for split in ("train", "val")]
    assert main(["prepare", "aokvqa", *files, "--images", str(downloads / "coco"), "--split", "train", "val",
                 "--out", str(out)]) == 0  # fmt: skip
    assert capsys.readouterr().out == f"wrote {out}: 3 questions about 3 picture files\n"
    assert out.read_text(encoding="utf-8").startswith("ID,img_path,Question,A,B,C,D,answer\n")
    first, awkward, third = read_questions(out, need_answers=True)
    assert (
        first.id == "aokvqa-22MexNkBPpdZGX6sxbxVBH" and third.id == "aokvqa-22jbM6gDxdaMaunuzgrsBB"
    )
    assert first.choices == ("skateboarder", "train", "delivery", "cab") and first.answer == 3
    assert awkward.question == 'The sign says "정지", or "stop"; what\'s next, then?'
    assert awkward.choices == ('a "full", complete stop', "빨리, 더 빨리", "a turn, left", "None")
    assert awkward.answer == 1
    assert pd.read_csv(out)["img_path"][0] == "../downloads/coco/train2017/000000299207.jpg"


def test_splits_that_are_not_asked_for_are_counted(downloads):
    files = [downloads / "aokvqa" / f"aokvqa_v1p0_{split}.json" for split in ("train", "val")]
    summary = prepare("aokvqa", files, downloads / "coco", downloads / "q.csv")
    assert summary.questions == 2 and list(summary.left_out) == ["split val not asked for"]
    with pytest.raises(
        InputError, match=r"no question of split dev in .*: the splits there are train, val"
    ):
        prepare("aokvqa", files, downloads / "coco", downloads / "q.csv", ["train", "dev"])


def test_visual7w(downloads, capsys):
    out = downloads / "v7w" / "v7w.csv"
    arguments = ["prepare", "visual7w", str(downloads / "v7w" / "dataset_v7w_telling.json"),
                 "--images", str(downloads / "v7w" / "images"), "--out", str(out)]  # fmt: skip
    assert main([*arguments, "--split", "train", "val"]) == 0
    assert "3 questions about 2 picture files" in capsys.readouterr().out
    questions = read_questions(out, need_answers=True)
    assert [q.choices[q.answer] for q in questions] == ["Wood.", "No one.", "Noon."]
    assert [choice for choice in questions[0].choices if choice != "Wood."] == [
        "Tile.",
        "Carpet.",
        "Cement.",
    ]
    assert pd.read_csv(out)["img_path"].tolist() == ["images/v7w_2323054.jpg"] * 2 + [
        "images/v7w_2359297.jpg"
    ]
    whole = out.read_bytes()
    assert main([*arguments, "--split", "train", "val"]) == 0 and out.read_bytes() == whole
    assert (
        main([*arguments, "--split", "train", "val", "--seed", "1"]) == 0
        and out.read_bytes() != whole
    )
    assert main(arguments) == 0
    assert [q.answer for q in read_questions(out)] == [
        q.answer for q in questions[:2]
    ]  # val or not, the same place


def test_right_answers_of_visual7w_are_spread_evenly(tmp_path):
    image = changed(VISUAL7W["images"][0], lambda i: i.update(qa_pairs=[
        pair(500_000 + n, 1, "What is it?", "right", ["a", "b", "c"]) for n in range(4000)]))  # fmt: skip
    path = write_json(tmp_path / "dataset_v7w_telling.json", {"images": [image]})
    places = {
        seed: [e.answer for e in read_annotations("visual7w", path, tmp_path, seed)]
        for seed in (0, 1)
    }
    for answers in places.values():
        assert all(
            920 < count < 1080 for count in Counter(answers).values()
        )  # 1000 expected, deviation 27
    assert 0.2 < sum(a == b for a, b in zip(*places.values(), strict=True)) / 4000 < 0.3
    assert read_annotations("visual7w", path, tmp_path, 0)[17].choices[places[0][17]] == "right"
    assert places[0][:8] == [0, 1, 1, 0, 3, 1, 2, 2]  # the same on every machine and Python


def test_scienceqa(downloads, tmp_path, capsys):
    out = tmp_path / "scienceqa.csv"
    folder = downloads / "scienceqa"
    assert main(["prepare", "scienceqa", str(folder / "problems.json"), "--images", str(folder / "images"),
                 "--split", "train", "val", "--out", str(out)]) == 0  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"wrote {out}: 3 questions about 3 picture files",
        "left out 1: no picture; the first is scienceqa-4",
        "left out 1: more than four choices; the first is scienceqa-9",
    ]
    four, two, three = read_questions(out, need_answers=True)
    assert (
        four.question == "Which of these states is farthest north?"
        and four.choice_mask == [True] * 4
    )
    assert two.question == "Tom had a catapult. Figure: it. Which angle is it?"
    assert two.choices == ("a 30° angle", "a 45° angle", "", "") and two.answer == 1
    assert "C." not in render_prompt(two.question, two.choices) and two.choice_mask == [
        True,
        True,
        False,
        False,
    ]
    assert three.answer == 2 and three.image.samefile(folder / "images/val/5/image.png")


SEEDBENCH = {
    "questions": [
        {
            "answer": "D",
            "choice_a": "One",
            "choice_b": "Two",
            "choice_c": "Three",
            "choice_d": "Four",
            "data_id": "1454426_2591111986",
            "data_type": "image",
            "question": "How many towels are in the image?",
            "question_id": "101669",
            "question_type_id": 5,
        },
    ],
    "question_type": {"Instances Counting": 5},
}
VIDEO = SEEDBENCH["questions"][0] | {"data_type": "video", "question_id": "v1"}
AI2D = {
    "imageName": "0.png",
    "questions": {
        "Which stage comes first?": {
            "abcLabel": False,
            "answerTexts": ["egg", "pupa", "larva", "moth"],
            "correctAnswer": 0,
            "questionId": "0.png-0",
        },
        "What is A?": {
            "abcLabel": True,
            "answerTexts": ["ears", "nose", "mouth", "face"],
            "correctAnswer": 3,
            "questionId": "0.png-1",
        },
    },
}


@pytest.mark.parametrize(
    "source, content, picture, question",
    [
        (
            "seedbench",
            {"questions": [*SEEDBENCH["questions"], VIDEO]},
            "1454426_2591111986",
            ("seedbench-101669", "How many towels are in the image?", "Four"),
        ),
        ("ai2d", AI2D, "0.png", ("ai2d-0.png-0", "Which stage comes first?", "egg")),
    ],
)
def test_sets_in_one_piece(tmp_path, pictures, source, content, picture, question):
    pictures[0].save(tmp_path / picture, format="PNG")
    summary = prepare(
        source, [write_json(tmp_path / "q.json", content)], tmp_path, tmp_path / "q.csv"
    )
    assert {reason: len(out) for reason, out in summary.left_out.items()} == {"no picture": 1}
    (only,) = read_questions(summary.out, need_answers=True)
    assert (only.id, only.question, only.choices[only.answer]) == question


def test_every_set_says_what_to_download_and_what_its_files_are():
    assert SOURCES == ("ai2d", "aokvqa", "scienceqa", "seedbench", "visual7w")
    for source in SOURCES:
        published = importlib.import_module(f"bridgeblip.data.formats.{source}")
        assert "https://" in published.__doc__ and " pictures " in published.__doc__.replace(
            "\n", " "
        )


def test_forms_of_aokvqa_that_are_met(downloads):
    hub = changed(AOKVQA[:1], lambda rows: rows[0].update(image={"bytes": None, "path": "x.jpg"}))
    del hub[0]["split"], hub[0]["image_id"]
    images = downloads / "coco"
    (images / "train2017" / "000000299207.jpg").rename(images / "x.jpg")
    assert prepare_aokvqa(downloads, hub).questions == 1
    texts = changed(AOKVQA[1:], lambda rows: rows[0].update(image_id="17", correct_choice_idx="1"))
    path = downloads / "texts.json"
    path.write_text(json.dumps(texts), encoding="utf-8-sig")
    lines = downloads / "lines.jsonl"
    lines.write_text(json.dumps(texts[0]) + "\n" + json.dumps(texts[0]) + "\n")
    assert prepare("aokvqa", [path], images, downloads / "q.csv").questions == 1
    summary = prepare("aokvqa", [lines], images, downloads / "q.csv")
    assert (summary.questions, summary.renamed) == (2, 1)


@pytest.mark.parametrize("source, content, said", [
    ("aokvqa", [AOKVQA[0], AOKVQA[0] | {"choices": "['a', 'b']"}], "after 1 questions .*choices in one text"),
    ("visual7w", {"images": [VISUAL7W["images"][0] | {"qa_pairs": [
        {"qa_id": 1, "question": "?", "answer": "a", "multiple_choices": "bcd"}]}]}, "no attribute 'copy'"),
    ("seedbench", {"questions": [SEEDBENCH["questions"][0] | {"answer": ""}]}, "not in list"),
])  # fmt: skip
def test_no_set_is_read_askew(tmp_path, source, content, said):
    with pytest.raises(InputError, match=rf"another form .*{said}") as caught:
        read_annotations(source, write_json(tmp_path / "x.json", content), tmp_path)
    assert "seems to be" not in str(caught.value)  # what was asked for is no remedy


def test_texts_are_tidied(downloads):
    odd = SCIENCEQA["1"] | {
        "hint": None,
        "question": "What\0is \ud83d?",
        "choices": ["a\u200b", "b"],
    }
    path = write_json(downloads / "p.json", {"1": odd | {"answer": 0}})
    summary = prepare("scienceqa", [path], downloads / "scienceqa/images", downloads / "q.csv")
    (only,) = read_questions(summary.out)
    assert (only.question, only.choices[:2]) == ("What is \ufffd?", ("a", "b"))


@pytest.mark.parametrize(
    "content, name",
    [
        ('{"1": {"semantic": [], "fullAnswer": "Yes."}}', "GQA's questions"),
        ("PK\3\4", "an Excel workbook, or a zip"),
        ('{"annotations": [{"multiple_choice_answer": "food"}]}', "VQA v2's annotations"),
        ('{"task_type": "Open-Ended", "questions": []}', "VQA's questions"),
        (json.dumps(SEEDBENCH), "SEED-Bench's: prepare seedbench"),
        (json.dumps(AI2D), "AI2D's: prepare ai2d"),
        ("index\tquestion\tA\tB\tanswer\tcategory\timage\tsplit\n", "MMBench's table"),
    ],
)
def test_a_set_of_another_kind_is_named(tmp_path, content, name):
    (tmp_path / "x.json").write_text(content)
    for source in ("aokvqa", "visual7w", "scienceqa"):
        with pytest.raises(
            InputError, match=rf"another form after 0.*expected .*; it seems to be {name}"
        ):
            read_annotations(source, tmp_path / "x.json", tmp_path)


def test_a_long_hint_is_shortened_and_counted(downloads):
    hint = "word " * 400
    path = write_json(downloads / "p.json", {"1": SCIENCEQA["1"] | {"hint": hint}})
    summary = prepare("scienceqa", [path], downloads / "scienceqa/images", downloads / "q.csv")
    assert "shortened 1 questions to their last 1000 characters" in str(summary)
    (only,) = read_questions(summary.out)
    assert only.question.startswith("...") and len(only.question) == 1003
    assert only.question.endswith("word Which of these states is farthest north?")


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda rows: rows[0].update(image_id=1), "picture not found"),
        (lambda rows: rows[0].update(question=" "), "no question"),
        (lambda rows: rows[0]["choices"].append("bus"), "more than four choices"),
        (lambda rows: rows[0].update(choices=["cab", " "]), "fewer than two choices"),
        (lambda rows: rows[0].pop("correct_choice_idx"), "no answer"),
        (lambda rows: rows[0].update(correct_choice_idx=4), "no answer"),
        (lambda rows: rows[0].update(choices=["train", "cab", "bus", ""]), "no answer"),
        (
            lambda rows: rows[0].update(choices=["cab", "train", "bus", "cab "]),
            "right choice given twice",
        ),
    ],
)
def test_rows_that_cannot_be_used_are_left_out_and_named(downloads, change, reason):
    summary = prepare_aokvqa(downloads, changed(AOKVQA, change))
    assert {reason: [e.id for e in entries] for reason, entries in summary.left_out.items()} == {
        reason: ["aokvqa-22MexNkBPpdZGX6sxbxVBH"]
    }
    assert f"left out 1: {reason}; the first is aokvqa-22MexNkBPpdZGX6sxbxVBH" in str(summary)
    assert [q.id for q in read_questions(summary.out, need_answers=True)] == [
        "aokvqa-2aMexNkBPpdZGX6sxbxVBX"
    ]


def test_nothing_usable_keeps_what_was_there(downloads, tmp_path, capsys):
    (tmp_path / "q.csv").write_text("mine")
    path = downloads / "aokvqa" / "aokvqa_v1p0_test.json"
    with pytest.raises(
        InputError, match=r"no usable question .*left out 1: no answer; the first is aokvqa-23C"
    ):
        prepare("aokvqa", [path], downloads / "coco", tmp_path / "q.csv", ["test"])
    with pytest.raises(
        InputError, match=r"left out 2: picture not found; .*nowhere/train2017/000000299207\.jpg"
    ):
        prepare(
            "aokvqa",
            [downloads / "aokvqa" / "aokvqa_v1p0_train.json"],
            "nowhere",
            tmp_path / "q.csv",
        )
    assert (tmp_path / "q.csv").read_text() == "mine"


@pytest.mark.parametrize(
    "source, file",
    [
        ("aokvqa", "v7w/dataset_v7w_telling.json"),
        ("aokvqa", "scienceqa/problems.json"),
        ("aokvqa", "coco/train2017/000000299207.jpg"),
        ("visual7w", "aokvqa/aokvqa_v1p0_train.json"),
        ("visual7w", "scienceqa/problems.json"),
        ("visual7w", "v7w/dataset_v7w_pointing.json"),
        ("visual7w", "cut.json"),
        ("scienceqa", "aokvqa/aokvqa_v1p0_train.json"),
        ("scienceqa", "v7w/dataset_v7w_telling.json"),
        ("scienceqa", "nowhere.json"),
    ],
)
def test_another_file_is_one_line_and_exit_code_2(downloads, source, file, capsys):
    whole = (downloads / "v7w" / "dataset_v7w_telling.json").read_text()
    (downloads / "cut.json").write_text(whole[: len(whole) // 2])
    arguments = [
        str(downloads / file),
        "--images",
        str(downloads),
        "--out",
        str(downloads / "q.csv"),
    ]
    assert main(["prepare", source, *arguments]) == 2
    error = capsys.readouterr().err
    expected = {
        "aokvqa": "aokvqa_v1p0_train.json",
        "visual7w": "dataset_v7w_telling.json",
        "scienceqa": "problems.json",
    }
    assert error.startswith(f"error: {downloads / file} ") and error.count("\n") == 1
    assert (
        f"expected {'A-OKVQA' if source == 'aokvqa' else ''}" in error and expected[source] in error
    )
    assert not (downloads / "q.csv").exists()


@pytest.fixture
def csvs(downloads) -> list[Path]:
    """Three question files that share IDs: one as prepared, one in Korean Windows' form, one with
    faults."""
    first = prepare("aokvqa", [downloads / "aokvqa" / "aokvqa_v1p0_train.json"], downloads / "coco",
                    downloads / "first.csv").out  # fmt: skip
    shared = "aokvqa-22MexNkBPpdZGX6sxbxVBH"
    korean, faulty = downloads / "ko" / "train.csv", downloads / "v7w" / "train.csv"
    korean.parent.mkdir()
    korean.write_text(f'id,path,question,a,b,c,d,answer\n{shared},../coco/val2017/000000461751.jpg,"무엇, 이것은?",'
                      "담배,,막대,,c\n", encoding="cp949")  # fmt: skip
    rows = [
        f"{shared},images/v7w_2323054.jpg,What?,x,y,,,B",
        f"2,{downloads}/v7w/images/v7w_2323054.jpg,What?,x,y,z,w,A",
        "3,images/gone.jpg,What?,x,y,z,w,A",
        "4,images/v7w_2323054.jpg,What?,x,y,z,w,-",
        "5,images/v7w_2323054.jpg,What?,x,,,,A",
        "6,,What?,x,y,z,w,A",
    ]
    faulty.write_text(
        "\n".join(["ID,img_path,Question,A,B,C,D,answer", *rows]), encoding="utf-8-sig"
    )
    return [first, korean, faulty]


def test_csvs_are_joined(downloads, csvs, tmp_path, capsys):
    out = tmp_path / "all" / "all.csv"
    assert main(["prepare", "csv", *map(str, csvs), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"wrote {out}: 5 questions about 4 picture files",
        f"left out 1: picture not found; the first is 3, {downloads}/v7w/images/gone.jpg",
        "left out 1: no answer; the first is 4",
        "left out 1: fewer than two choices; the first is 5",
        "left out 1: no picture; the first is 6",
        "put a prefix before 2 IDs that an earlier question has",
    ]
    questions = read_questions(out, need_answers=True)
    shared = "aokvqa-22MexNkBPpdZGX6sxbxVBH"
    assert [q.id for q in questions] == [shared, "aokvqa-2aMexNkBPpdZGX6sxbxVBX", f"train-{shared}",
                                         f"train-train-{shared}", "2"]  # fmt: skip
    assert [(q.question, q.choices, q.answer) for q in questions[:2]] == [
        (q.question, q.choices, q.answer) for q in read_questions(csvs[0])
    ]
    korean = questions[2]
    assert (
        korean.question == "무엇, 이것은?"
        and korean.choices == ("담배", "", "막대", "")
        and korean.answer == 2
    )
    assert korean.image.samefile(downloads / "coco" / "val2017" / "000000461751.jpg")
    assert pd.read_csv(out)["img_path"].str.startswith("../downloads/").all()


def test_csvs_that_cannot_be_joined(csvs, tmp_path, capsys):
    with pytest.raises(InputError, match=r"first\.csv is one of the files to join"):
        join(csvs, csvs[0].parent / "ko" / ".." / "first.csv")
    (tmp_path / "test.csv").write_text("ID,img_path,Question,A,B,C,D\n1,x.jpg,?,a,b,c,d\n")
    assert (
        main(
            [
                "prepare",
                "csv",
                str(csvs[0]),
                str(tmp_path / "test.csv"),
                "--out",
                str(tmp_path / "q.csv"),
            ]
        )
        == 2
    )
    assert "test.csv lacks the column answer: it has id," in capsys.readouterr().err
    assert not (tmp_path / "q.csv").exists()


def test_paths_resolve_from_a_linked_folder(downloads, tmp_path):
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    summary = prepare_aokvqa(downloads, AOKVQA, tmp_path / "link" / "q.csv")
    assert read_questions(tmp_path / "far" / "away" / "q.csv") and read_questions(summary.out)


def test_paths_do_not_depend_on_the_working_folder(downloads, tmp_path, monkeypatch):
    monkeypatch.chdir(downloads)
    prepare("aokvqa", ["aokvqa/aokvqa_v1p0_train.json"], "coco", "q/here.csv")
    monkeypatch.chdir(tmp_path)
    assert [q.image.is_file() for q in read_questions(downloads / "q" / "here.csv")] == [True, True]


def test_prepared_questions_can_be_collated(downloads):
    """What is prepared goes through the processor; missing choices are masked."""
    files = [downloads / "scienceqa" / "problems.json"]
    out = prepare("scienceqa", files, downloads / "scienceqa" / "images", downloads / "q.csv").out
    batch = QuestionProcessor.from_base(TINY_BASE).collate(read_questions(out, need_answers=True))
    assert batch["choice_mask"].tolist() == [[True] * 4, [True, True, False, False]]
    assert batch["labels"].tolist() == [0, 1]


def test_nothing_at_all_is_refused(tmp_path):
    with pytest.raises(InputError, match="no usable question"):
        write_questions([], tmp_path / "q.csv")
    with pytest.raises(
        InputError, match=r"no question of split train in .*: the splits there are none"
    ):
        prepare("aokvqa", [write_json(tmp_path / "empty.json", [])], tmp_path, tmp_path / "q.csv")
