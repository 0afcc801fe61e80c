"""One prediction on what people really bring: every row gets an answer, every fault its name, no
good row blame."""

import re
import struct
import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LAYERS
from PIL import Image

from bridgeblip.bridge.model import load_sliced
from bridgeblip.bundle.format import Bundle
from bridgeblip.bundle.predict import predict
from bridgeblip.data.questions import read_questions
from bridgeblip.evidence.submission import find_sample, read_sample, write_submission

CHOICES = ("one", "two", "three", "four")


def photo(seed, size=(40, 30), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


def several(seed):
    return {"save_all": True, "append_images": [photo(seed + 1), photo(seed + 2)]}


GOOD = {  # file: picture and how it is saved
    "plain.jpg": (photo(0), {}),
    "progressive.jpg": (photo(1), {"progressive": True}),
    "SHOUTED.JPG": (photo(2), {"format": "JPEG"}),
    "plain.png": (photo(3), {}),
    "plain.webp": (photo(4), {}),
    "plain.gif": (photo(5), {}),
    "plain.bmp": (photo(6), {}),
    "plain.tiff": (photo(7), {}),
    "packed.tif": (photo(8), {"compression": "tiff_lzw"}),
    "grey.jpg": (photo(9, mode="L"), {}),
    "grey.png": (photo(10, mode="L"), {}),
    "grey and clear.png": (photo(11, mode="LA"), {}),
    "black and white.png": (photo(12, mode="1"), {}),
    "palette.png": (photo(13, mode="P"), {}),
    "clear palette.png": (photo(14, mode="P"), {"transparency": 3}),
    "clear.png": (photo(15, mode="RGBA"), {}),
    "clear.webp": (photo(16, mode="RGBA"), {}),
    "print.jpg": (photo(17, mode="CMYK"), {}),
    "print.tiff": (photo(18, mode="CMYK"), {}),
    "video.jpg": (photo(19, mode="YCbCr"), {}),
    "deep.png": (Image.fromarray(np.asarray(photo(20, mode="L")).astype(np.uint16) * 257), {}),
    "deep.tiff": (Image.fromarray(np.asarray(photo(21, mode="L")).astype(np.uint16) * 257), {}),
    "floating.tiff": (photo(22, mode="F"), {}),
    "on its side.jpg": (photo(23), turned(6)),
    "upside down.jpg": (photo(24), turned(3)),
    "mirrored.png": (photo(25), turned(5)),
    "moving.gif": (photo(26), several(26)),
    "moving.webp": (photo(27), several(27)),
    "moving.png": (photo(28), several(28)),
    "one pixel.png": (photo(29, (1, 1)), {}),
    "wide.png": (photo(30, (20000, 3)), {}),
    "tall.jpg": (photo(31, (2, 9000)), {}),
    "a png.jpg": (photo(32), {"format": "PNG"}),
    "a jpeg.png": (photo(33), {"format": "JPEG"}),
    "a webp.gif": (photo(34), {"format": "WEBP"}),
    "no suffix": (photo(35), {"format": "PNG"}),
    "사진 한 장.jpg": (photo(36), {}),
    "폴더 하나/고양이.png": (photo(37), {}),
    'comma, "quotes".png': (photo(38), {}),
    "naïve é & #1 %20.png": (photo(39), {}),
}


def bomb() -> bytes:
    """A PNG that says it has 3.6 billion pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def bad_files(folder):
    """Write what is no picture; return the path of each as a CSV has it, and what must be said
    about it."""
    jpeg, png = (folder / "plain.jpg").read_bytes(), (folder / "plain.png").read_bytes()
    contents = {
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "cut.png": (png[: len(png) // 2], "truncated"),
        "cut early.jpg": (jpeg[:20], "truncated|Truncated|no whole picture"),
        "damaged.png": (
            png[:60] + bytes(20) + png[80:],
            r"cut|broken|CRC|SyntaxError|OSError|zlib|no whole picture",
        ),
        "empty.jpg": (b"", "it is empty"),
        "text.jpg": (b"this is no picture", "no whole picture"),
        "page.png": ("<html>로그인</html>".encode(), "a web page"),
        "bytes.webp": (bytes(range(256)) * 4, "no whole picture"),
        "bomb.png": (bomb(), "more than 178,956,970 pixels, scale it down"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    (folder / "folder.jpg").mkdir()
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    photo(99).save(folder.parent / "secret.png")
    return {
        name: f"{name}.* can't be read .*({reason})" for name, (_, reason) in contents.items()
    } | {
        "folder.jpg": "folder.jpg not found",
        "dangling.jpg": "dangling.jpg not found",
        "missing.jpg": "missing.jpg not found",
        f"{'long' * 90}.jpg": "long.jpg not found",
        "": "img_path is empty",
        "../secret.png": "outside the folder",
        "./폴더 하나/../../secret.png": "outside the folder",
        str(folder.parent / "secret.png"): "outside the folder",
    }


ODD_ROWS = [  # question, choices, what must be said about the row
    ("Is it this,\nor that, or \"the other\"?\r\nSay!", CHOICES, None),
    ("Numbers?", ("007", "1.50", "1e5", "-0"), None),
    ("Words that look like nothing?", ("NaN", "None", "NULL", "n/a"), None),
    ("Only two?", ("yes", "", "no", ""), None),
    ("이것은 무엇입니까?", ("하나", "둘", "셋", "넷"), None),
    ("", CHOICES, None),
    ("One choice?", ("", "", "only", ""), "fewer than two choices"),
    ("No choice?", ("", "", "", ""), "fewer than two choices"),
    ("Is it so? " * 200 + "Which?", CHOICES, None),
    ("Which?", ("many words " * 150 + "!", *CHOICES[1:]), None),
]  # fmt: skip


@pytest.fixture(scope="module")
def rough(tmp_path_factory):
    """The folder, and by ID what must be said about each row; None for a good one."""
    folder = tmp_path_factory.mktemp("data") / "대회 자료"
    for name, (picture, how) in GOOD.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, **how)
    rows = [(name, "What is it?", CHOICES, None) for name in GOOD]
    rows += [(name, "What is it?", CHOICES, reason) for name, reason in bad_files(folder).items()]
    rows += [("plain.png", question, choices, reason) for question, choices, reason in ODD_ROWS]
    order = np.random.default_rng(0).permutation(len(rows))
    table = pd.DataFrame(
        [(*rows[i][2], rows[i][1], rows[i][0]) for i in order],
        columns=["D", "c", "B", "a", "question", "Path"],
    )
    table.insert(2, "note", "더 있는 열")
    table["iD"] = [f"행 {i:03d}" for i in range(len(table))]
    table.to_csv(folder / "test.csv", index=False, encoding="utf-8-sig", lineterminator="\r\n")
    sample = table[["iD"]].sample(frac=1, random_state=0).assign(ANSWER="-")
    sample.to_csv(folder / "sample_submission.csv", index=False)
    return folder, {name: rows[i][3] for name, i in zip(table["iD"], order, strict=True)}


def test_every_row_is_answered_and_every_fault_named(rough, base, processor, tmp_path):
    folder, reasons = rough
    model = load_sliced(base, processor.letter_ids, LAYERS)
    bundle = Bundle(model, processor, {}, torch.device("cpu"))
    questions = read_questions(folder / "test.csv", strict=False)
    assert len({q.image for q in questions}) >= 40 and len(questions) == len(GOOD) + 17 + len(
        ODD_ROWS
    )
    sample = find_sample(folder / "test.csv")
    read_sample([q.id for q in questions], sample)
    answers = predict(bundle, questions)
    write_submission(questions, answers, sample, tmp_path / "submission.csv")

    submission = pd.read_csv(tmp_path / "submission.csv", dtype=str, keep_default_na=False)
    assert list(submission.columns) == ["iD", "ANSWER"] and set(submission["ANSWER"]) <= set("ABCD")
    assert list(submission["iD"]) == list(pd.read_csv(sample)["iD"])
    problems = pd.read_csv(tmp_path / "problems.csv", dtype=str, keep_default_na=False).set_index(
        "ID"
    )["reason"]
    assert set(problems.index) == {name for name, reason in reasons.items() if reason}
    for name, reason in problems.items():
        assert re.search(reasons[name], reason), (reason, reasons[name])
    flags = {q.id: words for q, words in zip(questions, answers.flags, strict=True)}
    asked = {q.id: q for q in questions}
    for name, reason in reasons.items():
        expected = ["blank"] * ("choices" not in (reason or "choices"))
        if len(processor.prompt(asked[name])) > 1000:
            expected += ["shortened"]  # the model's own limit, and no problem of the row
        if "이것은" in asked[name].question:
            expected += ["unread"]
        assert flags[name] == expected, (name, reason)

    blank = predict(bundle, questions, blank_images=True).probabilities
    for row, (question, flag) in enumerate(zip(questions, answers.flags, strict=True)):
        assert np.allclose(answers.probabilities[row], blank[row], atol=1e-5) == (
            flag == ["blank"] or sum(question.choice_mask) == 1
        )
    one = next(row for row, q in enumerate(questions) if q.choices.count("") == 3)
    assert answers.probabilities[one].tolist() == [
        float(choice != "") for choice in questions[one].choices
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp949"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_cells_are_kept_as_written_in_any_encoding(rough, tmp_path, encoding, ending):
    folder, _ = rough
    table = pd.read_csv(folder / "test.csv", dtype=str, keep_default_na=False)
    table = table[~table["Path"].str.contains("naïve")]  # cp949 has no such letters
    table.to_csv(tmp_path / "test.csv", index=False, encoding=encoding, lineterminator=ending)
    read = read_questions(tmp_path / "test.csv", strict=False)
    assert [q.choices for q in read] == list(
        zip(table["a"], table["B"], table["c"], table["D"], strict=True)
    )
    assert [(q.id, q.question) for q in read] == list(
        zip(table["iD"], table["question"].str.strip(), strict=True)
    )
