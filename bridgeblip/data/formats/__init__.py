"""Published question sets, a file each: it says what to download, and reads the annotations.

A file has ``FORM``, what its annotations are called and look like, and ``entries(path, images,
seed)``, which yields every question. Each set has its own terms of use. Several have pictures of
COCO: where they are stored as other bytes, a split by picture content can't tell that a picture of
two sets is the same.
"""

import json
import pkgutil
from pathlib import Path
from typing import Any, NamedTuple

SOURCES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


class Entry(NamedTuple):
    """One question as its source gives it, usable or not."""

    id: str
    split: str | None  # None: the set is in one piece
    picture: Path | None
    question: str
    choices: list[str]  # in order; an empty text is no choice
    answer: int | None  # index of the right choice
    source: str = ""  # what goes before the ID if another entry has the same
    problem: str = ""  # what else keeps it from being used


def load_json(path: Path) -> Any:
    """Return the content of a JSON file, with or without byte order mark; of JSON lines, a list."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    return json.loads(text)
