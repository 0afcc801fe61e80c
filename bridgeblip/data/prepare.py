"""Published annotation files, and several question CSVs, to one question CSV; the pictures stay
where they are.

What the user downloads and unpacks, for each source:

``aokvqa``
    ``aokvqa_v1p0_train.json`` and ``aokvqa_v1p0_val.json``, from ``aokvqa_v1p0.tar.gz``
    (https://github.com/allenai/aokvqa), and the pictures of COCO 2017, ``train2017.zip`` and
    ``val2017.zip`` (https://cocodataset.org/#download). The folder of pictures is the one that
    holds ``train2017/``.
``visual7w``
    ``dataset_v7w_telling.json``, from ``dataset_v7w_telling.zip``, and ``visual7w_images.zip``
    (https://ai.stanford.edu/~yukez/visual7w/). The folder of pictures holds ``v7w_1.jpg`` and so
    on.
``scienceqa``
    ``problems.json``, in ``data/scienceqa/`` of https://github.com/lupantech/ScienceQA, and the
    three picture archives that ``tools/download.sh`` there fetches, ``train.zip``, ``val.zip`` and
    ``test.zip``. The folder of pictures holds ``train/``, ``val/`` and ``test/``.
    ``pid_splits.json`` is not needed: each problem names its split.

Each set has its own terms of use. Visual7W's pictures come from COCO too: where they are stored as
other bytes, a split by picture content can't tell that a picture of both sets is the same.
"""

import functools
import json
import operator
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from bridgeblip import InputError
from bridgeblip.data.questions import letter, letters, read_rows
from bridgeblip.files import write_text

PICTURE_NOT_FOUND = "picture not found"


@dataclass(frozen=True)
class Entry:
    """One question as its source gives it, usable or not."""

    source: str
    """What goes before the ID if another entry has the same."""
    id: str
    split: str | None
    picture: Path | None
    question: str
    choices: list[str]
    """In order; an empty text is no choice."""
    answer: int | None
    """Index of the right choice."""


@dataclass(frozen=True)
class Summary:
    """What became of the entries; as text, the lines to print."""

    out: Path
    questions: int
    pictures: int
    """Distinct picture files."""
    left_out: dict[str, list[Entry]]
    """The entries that are not in the file, by reason."""
    renamed: int
    """IDs that were taken already and got a prefix."""

    def __str__(self) -> str:
        lines = [
            f"wrote {self.out}: {self.questions} questions about {self.pictures} picture files"
        ]
        lines += _reasons(self.left_out)
        if self.renamed:
            lines.append(f"put a prefix before {self.renamed} IDs that an earlier question has")
        return "\n".join(lines)


def prepare(
    source: str,
    files: Sequence[str | Path],
    images: str | Path,
    out: str | Path,
    splits: Sequence[str] = ("train",),
    seed: int = 0,
) -> Summary:
    """Turn annotation files of one published set into the question CSV ``out``.

    Args:
        source: ``aokvqa``, ``visual7w`` or ``scienceqa``.
        images: the folder of pictures, as the module's docstring says for each source.
        splits: the set's own names of the parts to take.
        seed: of the place of the right answer in Visual7W, which gives it apart from the wrong
            ones.

    Raises:
        InputError: if a file is missing or of another form, lacks a split, or has no usable
            question.
    """
    entries = [entry for file in files for entry in read_annotations(source, file, images, seed)]
    known = list(dict.fromkeys(entry.split for entry in entries))
    unknown = [split for split in splits if split not in known]
    if unknown:
        raise InputError(
            f"no question of split {', '.join(unknown)} in {', '.join(map(str, files))}: "
            f"the splits there are {', '.join(known) or 'none'}"
        )
    return write_questions(entries, out, splits)


def join(files: Sequence[str | Path], out: str | Path) -> Summary:
    """Join question CSVs with answers, in any form that ``questions`` reads, into the question CSV
    ``out``.

    A row keeps its ID; if an earlier row has it, the name of the row's file goes before it.

    Raises:
        InputError: if a file is missing, no table, lacks a column or is ``out`` itself, or no row
            is usable.
    """
    if Path(out).resolve() in [Path(file).resolve() for file in files]:
        raise InputError(f"{out} is one of the files to join: give the new file another name")
    return write_questions([entry for file in files for entry in read_question_csv(file)], out)


def read_annotations(
    source: str, path: str | Path, images: str | Path, seed: int = 0
) -> list[Entry]:
    """Return every question of a published annotation file, in the file's order.

    Raises:
        InputError: if the file is missing or not in the published form.
    """
    parse, form = SOURCES[source]
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"{path} not found: expected {form}; bridgeblip/data/prepare.py says where to download "
            f"it"
        )
    try:
        return list(
            parse(json.loads(path.read_text(encoding="utf-8")), path.stem, Path(images), seed)
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} has another form ({type(error).__name__}: {error}); expected {form}"
        ) from error


def _aokvqa(records: list[dict], source: str, images: Path, seed: int) -> Iterator[Entry]:
    for record in records:
        split = record["split"]
        picture = images / f"{split}2017" / f"{record['image_id']:012d}.jpg"
        answer = record.get("correct_choice_idx")  # the test file has none
        yield _entry(
            source,
            f"aokvqa-{record['question_id']}",
            split,
            picture,
            record["question"],
            record["choices"],
            answer,
        )


def _visual7w(content: dict, source: str, images: Path, seed: int) -> Iterator[Entry]:
    for image in content["images"]:
        picture = images / image["filename"]
        for pair in image["qa_pairs"]:
            choices = list(pair.get("multiple_choices", []))
            # Keyed on the question alone: its place stays, whatever else is in the file or is left
            # out.
            place = random.Random(f"{seed} {pair['qa_id']}").randrange(len(choices) + 1)
            choices.insert(place, pair["answer"])
            yield _entry(
                source,
                f"visual7w-{pair['qa_id']}",
                image["split"],
                picture,
                pair["question"],
                choices,
                place,
            )


def _scienceqa(problems: dict[str, dict], source: str, images: Path, seed: int) -> Iterator[Entry]:
    for number, problem in problems.items():
        split = problem["split"]
        picture = images / split / number / problem["image"] if problem["image"] else None
        question = (
            f"{problem['hint']}\n{problem['question']}"  # many can't be answered without the hint
        )
        yield _entry(
            source,
            f"scienceqa-{number}",
            split,
            picture,
            question,
            problem["choices"],
            problem["answer"],
        )


# source -> (parser, what its file is called and looks like)
SOURCES: dict[str, tuple[Callable[..., Iterator[Entry]], str]] = {
    "aokvqa": (
        _aokvqa,
        "A-OKVQA's aokvqa_v1p0_train.json or aokvqa_v1p0_val.json, a list of questions with split, "
        "image_id, "
        "question_id, question, choices and correct_choice_idx",
    ),
    "visual7w": (
        _visual7w,
        "Visual7W's dataset_v7w_telling.json, an object whose images have filename, split and "
        "qa_pairs with qa_id, "
        "question, answer and multiple_choices as text",
    ),
    "scienceqa": (
        _scienceqa,
        "ScienceQA's problems.json, an object that maps numbers to problems with question, "
        "choices, answer, hint, "
        "image and split",
    ),
}


def read_question_csv(path: str | Path) -> list[Entry]:
    """Return every row of a question CSV that has answers, unusable ones too.

    Raises:
        InputError: if the file is missing, no table, or lacks a column.
    """
    path = Path(path)
    entries = []
    for row in read_rows(path, need_answers=True):
        picture = None if row.image == path.parent else row.image
        entries.append(
            _entry(path.stem, row.id, None, picture, row.question, row.choices, row.answer)
        )
    return entries


def _entry(source, id_, split, picture, question: str, choices: Iterable[str], answer) -> Entry:
    """An entry with its texts tidied: no space around them, line ends as ``\\n``."""
    answer = None if answer is None else operator.index(answer)
    return Entry(
        source,
        _tidy(id_),
        split,
        picture,
        _tidy(question),
        [_tidy(choice) for choice in choices],
        answer,
    )


def _tidy(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def write_questions(
    entries: Sequence[Entry], out: str | Path, splits: Sequence[str | None] = (None,)
) -> Summary:
    """Write the usable entries of ``splits`` as a question CSV, atomically, and say what became of
    the others.

    Pictures are referenced by their path from the CSV's folder. Choices that are missing leave
    empty cells.

    Raises:
        InputError: if no entry is usable; nothing is written then.
    """
    out = Path(out)
    folder = out.parent.resolve()
    is_file, resolve = functools.cache(Path.is_file), functools.cache(Path.resolve)
    rows, left_out, taken, renamed = [], {}, set(), 0
    for entry in tqdm(entries, desc=f"preparing {out.name}", unit="question"):
        reason = _fault(entry, splits, is_file)
        if reason:
            left_out.setdefault(reason, []).append(entry)
            continue
        name = entry.id
        while name in taken:
            name = f"{entry.source}-{name}"
        taken.add(name)
        renamed += name != entry.id
        picture = _path_from(folder, resolve(entry.picture.parent) / entry.picture.name)
        choices = entry.choices + [""] * (4 - len(entry.choices))
        rows.append([name, picture, entry.question, *choices, letter(entry.answer)])
    if not rows:
        raise InputError("; ".join([f"no usable question for {out}", *_reasons(left_out)]))
    table = pd.DataFrame(rows, columns=["ID", "img_path", "Question", *letters(4), "answer"])
    write_text(out, table.to_csv(index=False, lineterminator="\n"))
    return Summary(out, len(table), table["img_path"].nunique(), left_out, renamed)


def _fault(
    entry: Entry, splits: Sequence[str | None], is_file: Callable[[Path], bool]
) -> str | None:
    """Why an entry can't be used, or None."""
    if entry.split not in splits:
        return f"split {entry.split} not asked for"
    if entry.picture is None:
        return "no picture"
    if not entry.question:
        return "no question"
    if len(entry.choices) > 4:
        return "more than four choices"
    if sum(map(bool, entry.choices)) < 2:
        return "fewer than two choices"
    if entry.answer not in range(len(entry.choices)) or not entry.choices[entry.answer]:
        return "no answer"
    if entry.choices.count(entry.choices[entry.answer]) > 1:
        return "right choice given twice"
    return None if is_file(entry.picture) else PICTURE_NOT_FOUND


def _reasons(left_out: dict[str, list[Entry]]) -> list[str]:
    firsts = {
        reason: f"{entries[0].id}, {entries[0].picture}"
        if reason == PICTURE_NOT_FOUND
        else entries[0].id
        for reason, entries in left_out.items()
    }
    return [
        f"left out {len(left_out[reason])}: {reason}; the first is {first}"
        for reason, first in firsts.items()
    ]


def _path_from(folder: Path, picture: Path) -> str:
    """Path of a picture from a folder, with ``/``; whole if they share no root (two drives of
    Windows)."""
    try:
        return Path(os.path.relpath(picture, folder)).as_posix()
    except ValueError:
        return picture.as_posix()
