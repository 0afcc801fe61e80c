"""Published annotation files, and several question CSVs, to one question CSV; the pictures stay
where they are. ``bridgeblip/data/formats/`` says what to download for each published set."""

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from bridgeblip import InputError
from bridgeblip.data.names import BLANK, begin_of, what_is
from bridgeblip.data.questions import NUM_CHOICES, Question, letter, letters, read_rows
from bridgeblip.files import require_place, write_text

PICTURE_NOT_FOUND = "picture not found"
LONGEST = 1000  # characters of a question: with its choices, about what the models read

SIGNS = {  # what only the files of one set hold -> what they are
    '"multiple_choice_answer"': "VQA v2's annotations, which have no choices",
    '"task_type"': "VQA's questions, which have no answers",
    "answer\tcategory\timage\t": "MMBench's table, which holds its pictures: not read",
    "answer,category,image,": "MMBench's table, which holds its pictures: not read",
    '"entityChoices"': "GQA's choices, which are no questions",
    '"fullAnswer"': "GQA's questions, which have no choices",
    '"answer_type"': "VQA's annotations, which have no choices",
    '"answer_confidence"': "VizWiz's questions, which have no choices",
    '"image_filename"': "CLEVR's questions, which have no choices",
    '"issimple"': "TallyQA's questions, which have no choices",
    '"dataset_type"': "TextVQA's questions, which have no choices",
    '"topic_difficulty"': "MMMU's questions, whose choices are one text: not read",
    '"conversations"': "conversations: tune --data takes them as they are",
    '"caption"': "captions: tune --data takes them as they are",
    '"correct_choice_idx"': "A-OKVQA's: prepare aokvqa",
    '"qa_pairs"': "Visual7W's: prepare visual7w, if it is the telling part",
    '"answerTexts"': "AI2D's: prepare ai2d",
    '"choice_a"': "SEED-Bench's: prepare seedbench",
    '"hint"': "ScienceQA's: prepare scienceqa",
}


@dataclass(frozen=True)
class Summary:
    """What became of the questions; as text, the lines to print."""

    out: Path
    questions: int
    pictures: int  # distinct files
    left_out: dict[str, list[Question]]  # those that are not in the file, by reason
    renamed: int  # IDs that were taken already and got a prefix
    shortened: int  # questions that lost their beginning

    def __str__(self) -> str:
        lines = [
            f"wrote {self.out}: {self.questions} questions about {self.pictures} picture files"
        ]
        lines += _reasons(self.left_out)
        if self.renamed:
            lines.append(f"put a prefix before {self.renamed} IDs that an earlier question has")
        if self.shortened:
            lines.append(f"shortened {self.shortened} questions to their last {LONGEST} characters")
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
        source: one of ``formats.SOURCES``.
        images: the folder of pictures, as the source's file in ``formats`` says.
        splits: the set's own names of the parts to take; a set in one piece is taken whole.
        seed: of the place of the right answer in Visual7W, which gives it apart from the wrong
            ones.

    Raises:
        InputError: if a file is missing or of another form, lacks a split, or has no usable
            question.
    """
    entries = []
    for file in files:
        entries += zip(repeat(Path(file).stem), read_annotations(source, file, images, seed))
    known = list(dict.fromkeys(question.split for _, question in entries))
    unknown = [split for split in splits if split not in known]
    if unknown and None not in known:
        raise InputError(
            f"no question of split {', '.join(unknown)} in {', '.join(map(str, files))}: "
            f"the splits there are {', '.join(known) or 'none'}"
        )
    return write_questions(entries, out, (None, *splits))


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
    entries = []
    for path in map(Path, files):
        for row in read_rows(path, need_answers=True):
            picture = None if row.image == path.parent else row.image
            entries.append((path.stem, _tidied(replace(row, image=picture))))
    return write_questions(entries, out)


def read_annotations(
    source: str, path: str | Path, images: str | Path, seed: int = 0
) -> list[Question]:
    """Return every question of a published annotation file, in the file's order.

    Raises:
        InputError: if the file is missing or not in the published form; then it says what the file
            is, if that can be seen.
    """
    published = importlib.import_module(f"bridgeblip.data.formats.{source}")
    path, questions = Path(path), []
    if not path.is_file():
        raise InputError(
            f"{path} not found: expected {published.FORM}; bridgeblip/data/formats/{source}.py "
            f"says where to download it"
        )
    try:
        questions.extend(map(_tidied, published.entries(path, Path(images), seed)))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        content = begin_of(path, 4000)
        begin, whole = content.decode(errors="replace"), what_is(content)
        seen = [name for sign, name in SIGNS.items() if sign in begin and source not in name]
        seen += [whole] * (whole not in ("", "JSON"))
        raise InputError(
            f"{path} has another form after {len(questions)} questions ({type(error).__name__}: "
            f"{error}); expected {published.FORM}" + (f"; it seems to be {seen[0]}" if seen else "")
        ) from error
    return questions


def write_questions(
    entries: Sequence[tuple[str, Question]],
    out: str | Path,
    splits: Sequence[str | None] = (None,),
) -> Summary:
    """Write the usable questions of ``splits`` as a question CSV, atomically, and say what became
    of the others.

    Pictures are referenced by their path from the CSV's folder. Choices that are missing leave
    empty cells. Texts lose the space around them; of a very long question, the end is kept.

    Args:
        entries: questions, each behind what goes before its ID if an earlier one has the same.

    Raises:
        InputError: if no question is usable; nothing is written then.
    """
    out = Path(out)
    require_place(out)
    folder = out.parent.resolve()
    is_file, resolve = functools.cache(os.path.isfile), functools.cache(Path.resolve)
    rows, left_out, taken, renamed, shortened = [], {}, set(), 0, 0
    for source, question in tqdm(entries, desc=f"preparing {out.name}", unit="question"):
        reason = _fault(question, splits, is_file)
        if reason:
            left_out.setdefault(reason, []).append(question)
            continue
        name, text = question.id, question.question
        while name in taken:
            name = f"{source}-{name}"
        taken.add(name)
        renamed += name != question.id
        if len(text) > LONGEST:
            text = "..." + text[-LONGEST:]
            shortened += 1
        picture = resolve(question.image.parent) / question.image.name
        with suppress(ValueError):  # on another drive of Windows it keeps its whole path
            picture = Path(os.path.relpath(picture, folder))
        choices = [*question.choices, *[""] * NUM_CHOICES][:NUM_CHOICES]
        rows.append([name, picture.as_posix(), text, *choices, letter(question.answer)])
    if not rows:
        raise InputError("; ".join([f"no usable question for {out}", *_reasons(left_out)]))
    table = pd.DataFrame(
        rows, columns=["ID", "img_path", "Question", *letters(NUM_CHOICES), "answer"]
    )
    write_text(out, table.to_csv(index=False, lineterminator="\n"))
    pictures = table["img_path"].nunique()
    return Summary(out, len(table), pictures, left_out, renamed, shortened)


def _tidied(question: Question) -> Question:
    """The question with its texts in one line each, no space around them, nor a NUL in them, which
    no CSV holds."""
    if isinstance(question.choices, str):
        raise TypeError(f"choices in one text, {question.choices[:40]!r}")
    texts = (question.id, question.question, *question.choices)
    name, asked, *choices = [" ".join(t.replace("\0", " ").split()).strip(BLANK) for t in texts]
    return replace(question, id=name, question=asked, choices=tuple(choices))


def _fault(
    question: Question, splits: Sequence[str | None], is_file: Callable[[Path], bool]
) -> str | None:
    """Why a question can't be used, or None."""
    filled = sum(map(bool, question.choices))
    right = (
        question.choices[question.answer] if question.answer in range(len(question.choices)) else ""
    )
    faults = {
        f"split {question.split} not asked for": question.split not in splits,
        "no picture": question.image is None,
        "no question": not question.question,
        "more than four choices": any(question.choices[NUM_CHOICES:]),
        "fewer than two choices": filled < 2,
        "no answer": not right,
        "right choice given twice": question.choices.count(right) > 1,
    }
    for reason, found in faults.items():
        if found:
            return reason
    if not is_file(question.image):
        return PICTURE_NOT_FOUND
    return question.problem or None


def _reasons(left_out: dict[str, list[Question]]) -> list[str]:
    lines = []
    for reason, questions in left_out.items():
        first = questions[0].id
        if reason == PICTURE_NOT_FOUND:
            first += f", {questions[0].image}"
        lines.append(f"left out {len(questions)}: {reason}; the first is {first}")
    return lines
