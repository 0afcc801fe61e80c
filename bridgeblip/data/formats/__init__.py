"""Published question sets, a file each: it says what to download, and reads the annotations.

A file has ``FORM``, what its annotations are called and look like, and ``entries(path, images,
seed)``, which yields every question, usable or not: with its ``split``, its choices in order, an
empty text where there is none. Each set has its own terms of use. Several have pictures of
COCO: where they are stored as other bytes, a split by picture content can't tell that a picture of
two sets is the same.
"""

import json
import pkgutil
import re
from pathlib import Path
from typing import Any

from bridgeblip import InputError
from bridgeblip.data.names import begin_of, what_is

SOURCES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


SPACE = re.compile(r"\s*")
HIGH, LOW = r"\\u[dD][89abAB]\w\w", r"\\u[dD][c-fC-F]\w\w"  # halves of one character
HALF = re.compile(rf"(?<!\\)((?:\\\\)*)(?:{HIGH}(?!{LOW})|(?<!{HIGH}){LOW})")


def holds_json(path: Path) -> bool:
    """Whether a file begins as a list or an object of JSON does, whatever its name."""
    return what_is(begin_of(path)) == "JSON"


def load_json(path: Path) -> Any:
    """Return the content of a JSON file, with or without byte order mark; of JSON lines, or of any
    values one behind the other, a list. Half a character, which no text can hold, becomes U+FFFD.

    Raises:
        InputError: if it can't be read, naming the line at fault.
    """
    decoder, rows = json.JSONDecoder(), []
    try:
        text = HALF.sub(r"\1\\ufffd", path.read_text(encoding="utf-8-sig"))
        place = SPACE.match(text).end()
        while place < len(text) or not rows:
            row, place = decoder.raw_decode(text, place)
            rows.append(row)
            place = SPACE.match(text, place).end()
    except (OSError, ValueError, RecursionError) as error:
        reason = error
        if isinstance(error, json.JSONDecodeError):
            reason = f"line {error.lineno} is no JSON: {error.msg}"
        raise InputError(f"{path} can't be read ({reason}): get a whole copy") from error
    return rows if len(rows) > 1 or path.suffix.lower() in (".jsonl", ".ndjson") else rows[0]
