"""Questions to be answered with a text, captions and free answers, from the files that they come
as.

COCO's and VizWiz's captions, Karpathy's split file, InternVL's ``coco_karpathy_test.json`` with its
``_gt.json``, conversations as LLaVA and InternVL write them, dialogues about a table of facts, and
plain CSV; a function each.
"""

import functools
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bridgeblip import InputError
from bridgeblip.data.formats import holds_json, load_json
from bridgeblip.data.questions import (
    Question,
    check_ids,
    check_once,
    check_pictures,
    known_names,
    locate,
    names_in,
    odd_names,
    read_questions,
)
from bridgeblip.data.tables import read_csv

EXPECTED = (
    "a question CSV, a CSV with image and caption or image, question and answer, captions of COCO, "
    "VizWiz or Karpathy, conversations of LLaVA or InternVL, or messages.txt beside labels.csv"
)
PICTURE_COLUMNS = ("image", "img_path", "frame", "file", "filename", "file_name")
LABELS_FILE = "labels.csv"
FRAMES = "frames"  # the folder of the pictures of labels.csv
PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
LEFT_OUT = {"is_rejected": "rejected captions", "is_precanned": "canned captions"}  # of VizWiz
HOLDS = {"choice": "choices", "caption": "captions", "answer": "answers in free text"}  # by task


def read_task(
    path: str | Path,
    images: str | Path | None = None,
    task: str | None = None,
    split: str | None = None,
    need_answers: bool = True,
    strict: bool = True,
) -> tuple[str, list[Question]]:
    """Return what a file asks for, one of ``HOLDS``, and its questions.

    A caption's question may be empty: then the model's own prompt asks. All captions of a picture
    are the ``references`` of one question, whose ID is COCO's ``image_id`` where there is one.
    What is left out is counted in a warning.

    Args:
        images: the folder that the pictures' names start from; by default the file's own, and
            ``frames`` in it for ``labels.csv``. A question CSV has its pictures beside it.
        task: what is wanted; None: what the file is for.
        split: of Karpathy's file, names with commas between them, such as ``train,restval``.
        need_answers: refuse rows without a text that counts as right.
        strict: refuse the file for a missing picture; otherwise its row has no ``image``, and says
            so in ``problem``.

    Raises:
        InputError: naming the file, and the row where it is one: it is missing or of another form,
            is for another task, lacks answers or pictures, or an ID comes twice.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} not found: expected {EXPECTED}")
    names, is_json = [], holds_json(path)
    if not is_json:
        with warnings.catch_warnings(action="ignore"):  # they come when its rows are read
            names = known_names(read_csv(path)[0])
    if names and (task == "choice" or {"a", "b"} <= set(names)):
        _check_task(path, "choice", task)
        if images is not None and Path(images).resolve() != path.parent.resolve():
            raise InputError(f"{path} has its pictures beside it: leave --images out")
        return "choice", read_questions(path, need_answers, strict)
    folder = Path(images or path.parent)
    if names:
        kind, rows = _table(path, folder)
    elif path.suffix.lower() == ".txt":
        frames = path.parent / FRAMES
        kind, rows = "answer", _dialogues(path, folder if images or not frames.is_dir() else frames)
    else:
        kind, rows = _published(path, folder, split)
    _check_task(path, kind, task)
    questions = _found(path, rows)
    task = task or kind
    if task == "caption":
        questions = _one_a_picture(questions)
    if need_answers:
        questions = _labelled(path, questions, task)
    check_ids(questions, path)
    if strict:
        check_pictures(
            questions, path, f"name the folder of the pictures by --images, not {folder}"
        )
    return task, list(map(_placed, questions))


def _found(path: Path, rows: Iterator[Question]) -> list[Question]:
    """The questions of a file as they are read, each picture where a name means it."""
    questions, listing = [], functools.cache(names_in)
    try:
        for question in rows:
            image = locate(Path(), str(question.image), listing)
            questions.append(replace(question, image=image, file=path))
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{path} has another form after {len(questions)} questions ({reason}); expected "
            f"{EXPECTED}"
        ) from error
    return questions


def _check_task(path: Path, kind: str, task: str | None) -> None:
    """Refuse choices in a caption task and the like; questions with answers may be captions."""
    if task not in (None, kind) and (kind, task) != ("answer", "caption"):
        raise InputError(
            f"{path} holds {HOLDS[kind]}, not {HOLDS[task]}: give another file, or a model for "
            f"this one; to tune on it, --task {kind}"
        )


def _table(path: Path, folder: Path) -> tuple[str, Iterator[Question]]:
    """A CSV with a picture's column, and caption, or question and perhaps answer; perhaps id."""
    header, rows = read_csv(path)
    names = known_names(header)
    picture = next((name for name in PICTURE_COLUMNS if name in names), None)
    kind = "caption" if "caption" in names else "answer"
    if picture is None or (kind == "answer" and "question" not in names):
        odd = odd_names(names, [*PICTURE_COLUMNS, "caption", "question"])
        raise InputError(f"{path} has the columns {', '.join(names)}{odd}; expected {EXPECTED}")
    check_once(path, names, ["id", picture, "question", kind])

    def questions() -> Iterator[Question]:
        for number, row in enumerate(rows, 1):
            cells = dict(zip(names, map(str.strip, row.cells), strict=True))
            image = cells[picture]
            of_picture = kind == "caption" and _picture_id(image)
            name = cells.get("id") or of_picture or str(number)
            answer = cells.get(kind, "")
            yield _question(name, folder / image, cells.get("question", ""), [answer], row.line)

    return kind, questions()


def _dialogues(path: Path, folder: Path) -> Iterator[Question]:
    """Dialogues of a JSON text, each asked of every row of the ``labels.csv`` beside it.

    The text is a list of dialogues; a dialogue is a turn ``{"question": ..., "answer": ...}`` or a
    list of turns. ``{name}`` in a text stands for the row's cell in the column of that name. The
    first column, or the one called image, names the picture.
    """
    labels = path.with_name(LABELS_FILE)
    header, rows = read_csv(labels)
    names = known_names(header)
    picture = next((name for name in PICTURE_COLUMNS if name in names), names[0])
    dialogues = load_json(path)
    for row in rows:
        cells = dict(zip(names, map(str.strip, row.cells), strict=True))
        image = folder / cells[picture].removeprefix(f"{FRAMES}/")
        number = 0
        for dialogue in dialogues:
            history = ()
            for turn in dialogue if isinstance(dialogue, list) else [dialogue]:
                asked, answer = (
                    _filled(turn[part], cells, path) for part in ("question", "answer")
                )
                number += 1
                name = f"{cells[picture]}-{number}"
                yield _question(name, image, asked, [answer], row.line, history)
                history += ((asked, answer),)


def _filled(text: str, cells: dict[str, str], path: Path) -> str:
    """The text with each placeholder's cell in its place."""
    unknown = {name for name in PLACEHOLDER.findall(text) if name.strip().lower() not in cells}
    if unknown:
        raise InputError(
            f"{path}: {{{min(unknown)}}} is no column of {LABELS_FILE}, which has "
            f"{', '.join(cells)}: correct the name"
        )
    return PLACEHOLDER.sub(lambda match: cells[match[1].strip().lower()], text).strip()


def _published(path: Path, folder: Path, split: str | None) -> tuple[str, Iterator[Question]]:
    """The task and the questions of a JSON file, told by what it holds."""
    content = load_json(path)
    first = content[0] if isinstance(content, list) and content else content
    keys = set(first) if isinstance(first, dict) else set()
    if isinstance(content, list) and "conversations" in keys:
        return "answer", _conversations(path, content, folder)
    if isinstance(content, list) and {"image", "caption"} <= keys:
        return "caption", _captions(path, content, folder)
    images = content.get("images") if isinstance(content, dict) else None
    if isinstance(images, list) and images and isinstance(images[0], dict):
        if "sentences" in images[0]:
            return "caption", _karpathy(path, images, folder, split)
        if "annotations" in keys or {"file_name", "id"} <= set(images[0]):
            return "caption", _coco(path, content, folder)
    what = f"objects with {', '.join(sorted(keys)[:8])}" if keys else f"{str(first)[:40]!r}"
    seen = f"a list of {what}" if isinstance(content, list) else what
    raise InputError(f"{path} holds {seen}; expected {EXPECTED}")


def _coco(path: Path, content: dict[str, Any], folder: Path) -> Iterator[Question]:
    """COCO's and VizWiz's ``images`` with ``annotations``; of these, rejected and canned ones are
    left out."""
    captions, left_out = {}, Counter()
    for row in content.get("annotations", []):
        marks = [word for mark, word in LEFT_OUT.items() if row.get(mark)]
        left_out.update(marks[:1])
        if not marks:
            captions.setdefault(row["image_id"], []).append(row["caption"])
    _say_left_out(path, left_out)
    for image in content["images"]:
        name = image.get("file_name") or image.get("image")
        if name is None:
            raise InputError(
                f"{path} has captions without the pictures' names: give the file that names them, "
                f"such as {path.name.replace('_gt', '')}"
            )
        yield _question(image["id"], folder / name, "", captions.get(image["id"], []))


def _karpathy(
    path: Path, images: Sequence[dict[str, Any]], folder: Path, split: str | None
) -> Iterator[Question]:
    """Karpathy's split file, ``dataset_coco.json`` and the like."""
    known = list(dict.fromkeys(image["split"] for image in images))
    wanted = split.split(",") if split else known
    if len(set(wanted) & set(known)) < len(wanted) or (split is None and len(known) > 1):
        raise InputError(f"{path} has the splits {', '.join(known)}: name some of them by --split")
    for image in images:
        if image["split"] in wanted:
            name = Path(image.get("filepath", "")) / image["filename"]
            texts = [sentence["raw"] for sentence in image["sentences"]]
            number = image.get("cocoid", image.get("imgid"))
            yield _question(number, folder / name, "", texts)


def _captions(path: Path, rows: Sequence[dict[str, Any]], folder: Path) -> Iterator[Question]:
    """Rows of image and caption, one or several, as in ``coco_karpathy_test.json``; if a file of
    the same name with ``_gt`` lies beside it, the captions are that file's."""
    right = path.with_name(f"{path.stem}_gt.json")
    given = None
    if right.is_file():
        given = {}
        for row in load_json(right)["annotations"]:
            given.setdefault(str(row["image_id"]), []).append(row["caption"])
    for row in rows:
        name = _picture_id(row["image"])
        texts = row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
        if given is not None and name not in given:
            raise InputError(f"{right} has no caption of image_id {name}, which {path} has")
        yield _question(name, folder / row["image"], "", texts if given is None else given[name])


def _conversations(path: Path, rows: Sequence[dict[str, Any]], folder: Path) -> Iterator[Question]:
    """LLaVA's conversations, InternVL's likewise: every answer is a question with its history."""
    left_out, seen = Counter(), Counter()
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("image"), str):
            left_out["conversations with several pictures or none"] += 1
            continue
        turns = row["conversations"]
        speakers = [turn["from"] for turn in turns]
        if speakers != ["human", "gpt"] * (len(turns) // 2) or not turns:
            raise InputError(
                f"{path}, entry {number}: its turns are from {', '.join(speakers) or 'nobody'}; "
                f"expected human and gpt in turn"
            )
        name = str(row.get("id", number))
        texts = [turn["value"].replace("<image>", "").strip() for turn in turns]
        pairs = tuple(zip(texts[::2], texts[1::2], strict=True))
        line = number if path.suffix.lower() == ".jsonl" else 0
        for place, (asked, answer) in enumerate(pairs):
            seen[name] += 1
            unique = name if seen[name] == 1 else f"{name}-{seen[name]}"
            yield _question(unique, folder / row["image"], asked, [answer], line, pairs[:place])
    _say_left_out(path, left_out)


def _question(
    name: Any, image: Path, asked: str, right: Sequence[Any], line: int = 0, history: tuple = ()
) -> Question:
    """A question without choices; empty texts are no references, nor are null and NaN."""
    texts = [str(text).strip() for text in right if text is not None and text == text]
    if wrong := [text for text in right if isinstance(text, (dict, list))]:
        raise TypeError(f"{str(wrong[0])[:60]} is no text")
    texts = tuple(filter(None, texts))
    return Question(str(name), image, asked, (), line=line, references=texts, history=history)


def _picture_id(name: str) -> str:
    """COCO's image_id, where the name is COCO's; else the name."""
    digits = re.fullmatch(r"(?:COCO_\w+_)?(\d{12})", Path(name).stem)
    return str(int(digits[1])) if digits else name


def _one_a_picture(questions: Sequence[Question]) -> list[Question]:
    """Put the captions of a picture together where a row has one of them."""
    merged = {}
    for question in questions:
        key = question.image, question.question, question.history
        first = merged.setdefault(key, question)
        if first is not question:
            merged[key] = replace(first, references=first.references + question.references)
    return list(merged.values())


def _labelled(path: Path, questions: Sequence[Question], task: str) -> list[Question]:
    """Refuse rows without an answer; pictures without a caption are left out."""
    bare = [question for question in questions if not question.references]
    if len(bare) == len(questions):
        raise InputError(f"{path} has no {task}s: give a file that has")
    if bare and task == "answer":
        raise InputError(
            f"{path}: {len(bare)} of {len(questions)} rows have no answer, the first is "
            f"ID {bare[0].id}{f', line {bare[0].line}' * bool(bare[0].line)}: fill them in or take "
            f"them out"
        )
    _say_left_out(path, Counter({"pictures without a caption": len(bare)}))
    return [question for question in questions if question.references]


def _placed(question: Question) -> Question:
    """Take away a picture that is not there."""
    if os.path.isfile(question.image):
        return question
    return replace(question, image=None, problem=f"picture {question.image} not found")


def _say_left_out(path: Path, left_out: Counter) -> None:
    if left_out.total():
        counted = ", ".join(f"{count:,} {what}" for what, count in left_out.items())
        warnings.warn(f"{path}: left out {counted}", stacklevel=4)
