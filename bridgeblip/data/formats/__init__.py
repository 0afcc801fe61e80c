"""Published question sets, a file each: it says what to download, and reads the annotations.

A file has ``FORM``, what its annotations are called and look like, and ``entries(path, images,
seed)``, which yields every question, usable or not: with its ``split``, its choices in order, an
empty text where there is none. Each set has its own terms of use. Several have pictures of
COCO: where they are stored as other bytes, a split by picture content can't tell that a picture of
two sets is the same.
"""

import json
import pkgutil
from pathlib import Path
from typing import Any

SOURCES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load_json(path: Path) -> Any:
    """Return the content of a JSON file, with or without byte order mark; of JSON lines, a list.

    Raises:
        ValueError: naming the line at fault.
    """
    text = path.read_text(encoding="utf-8-sig")
    lines = path.suffix.lower() == ".jsonl"
    rows = []
    for number, part in enumerate(text.split("\n") if lines else [text]):
        try:
            if part.strip() or not lines:
                rows.append(json.loads(part))
        except RecursionError as error:
            raise ValueError("its lists are nested too deeply") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number + error.lineno} is no JSON: {error.msg}") from error
    return rows if lines else rows[0]
