"""CSV tables of texts: read as written, or refused with the line at fault."""

import csv
import io
import re
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from bridgeblip import InputError
from bridgeblip.data.names import what_is

csv.field_size_limit(2**31 - 1)  # a text may be longer than Python's 131,072 characters
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas within quotes"}
KNOWN = {"id", "image", "img_path", "question", "caption", "answer"}  # one is in any header
SPACE_AND_QUOTE = re.compile(r', +"[^",\r\n]')  # in a quoted text, a quote would be doubled
EXCELS_FIRST_LINE = re.compile(r"sep=.\s*", re.IGNORECASE)  # tells Excel the separator
QUOTED = re.compile(r'(?:(?<=,)|^)"(?:[^"]|"")*"(?=[,\r\n]|$)')  # a whole cell


@dataclass(frozen=True)
class Row:
    """A row of a file."""

    line: int  # where it begins; the file's first line is 1
    raw: str  # as it stands in the file
    cells: list[str]  # its texts, one a column; empty where the row ends early
    problem: str  # why it can't be a whole row; empty if it can


def read_table(path: str | Path) -> pd.DataFrame:
    """Return a CSV as a table of texts, as ``read_csv`` reads it."""
    header, rows = read_csv(path)
    return pd.DataFrame([row.cells for row in rows], columns=header)


def read_csv(path: str | Path) -> tuple[list[str], list[Row]]:
    """Return the header and the rows of a CSV, every cell as written; UTF-8 with or without BOM,
    else cp949 (Korean Windows).

    Blank lines and rows of commas only are passed over, and empty cells beyond the header.

    Raises:
        InputError: naming the file, and the line where it is one: it is missing, empty, in another
            encoding or with another separator, holds a NUL, its quotes don't pair up or swallow
            rows, or a row has more cells than the header.
    """
    path = Path(path)
    header, rows, empty = None, [], 0
    for line, raw, cells in _split(path, _text(path)):
        if header is None and EXCELS_FIRST_LINE.fullmatch(raw):
            continue
        if header is None:
            header = cells
            _check_separator(path, raw, cells)
            continue
        filled = raw.strip(",\r\n")
        if not filled or (len(cells) == 1 < len(header) and filled.isspace()):
            empty += "," in raw
            continue
        if any(cells[len(header) :]):
            raise InputError(
                f"{path} is no CSV table: line {line} has {len(cells)} cells, the header "
                f"{len(header)}, from {header[0][:40]!r} on; put a text that holds a comma in "
                f"quotes"
            )
        if _swallows(raw, len(header)):
            raise InputError(
                f"{path} is no CSV table: the quotes in line {line} make one row of several; take "
                f"the stray quote out, or double it within a quoted text"
            )
        missing, problem = len(header) - len(cells), ""
        if missing > 0 and not raw.endswith(("\n", "\r")):
            problem = "the file ends within this row: get a whole copy"
        elif len(cells) == 1 < missing:
            problem = f"the row is one cell, the header {len(header)}: put commas between its cells"
        rows.append(Row(line, raw, cells[: len(header)] + [""] * missing, problem))
    if header is None:
        raise InputError(f"{path} is no CSV table (it is empty): expected a header line and rows")
    if not rows:
        raise InputError(
            f"{path} has no rows: expected one a line below the header, {','.join(header)[:60]!r}"
        )
    if empty:
        warnings.warn(f"{path}: passed over {empty} rows of commas only", stacklevel=3)
    return header, rows


def _text(path: Path) -> str:
    """The decoded content of a file, without byte order mark."""
    if not path.is_file():
        raise InputError(
            f"{path} not found: put the organiser's file there, or set the path to yours"
        )
    content = path.read_bytes()
    if what := what_is(content):
        raise InputError(f"{path} is {what}, no CSV in UTF-8: get the table itself, saved as that")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as fault:
        if fault.reason == "unexpected end of data" and fault.end == len(content):
            raise InputError(
                f"{path} ends in the middle of a character: get a whole copy of it"
            ) from fault
        try:
            text = content.decode("cp949")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path} is neither UTF-8 nor cp949 text, it begins with {content[:8]!r}: save the "
                f"table as CSV in UTF-8"
            ) from error
        warnings.warn(
            f"{path} is not UTF-8: read as cp949, Korean Windows; is it that?", stacklevel=4
        )
    before, nul, _ = text.partition("\0")
    if nul:
        line = len(io.StringIO(before + "|", newline="").readlines())
        raise InputError(f"{path}, line {line} holds a NUL character, U+0000: take it out")
    return text.replace("\ufeff", "").rstrip("\x1a")  # marks of old systems, not of the text


def _split(path: Path, text: str) -> Iterator[tuple[int, str, list[str]]]:
    """Yield each row's first line, its text as it stands and its cells; no blank lines."""
    lines = io.StringIO(text, newline="").readlines()
    spaced = SPACE_AND_QUOTE.search(text) is not None
    reader = csv.reader(lines, strict=True, skipinitialspace=spaced)
    line = 1
    try:
        for cells in reader:
            if cells:
                yield line, "".join(lines[line - 1 : reader.line_num]), cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{path} is no CSV table: the quotes of the row that begins in line {line} don't pair "
            f"up ({error}); take a stray quote out, or double it within a quoted text"
        ) from error


def _check_separator(path: Path, raw: str, header: list[str]) -> None:
    """Refuse a header without any known name that another separator would part into some."""
    names = {name.strip().lower() for name in header}
    no_sign = '"\r\n' + " " * (len(header) > 1)
    for sign in dict.fromkeys(raw):
        parts = {part.strip(' "\r\n').lower() for part in raw.split(sign)}
        if not sign.isalnum() and sign not in no_sign and KNOWN & parts and not KNOWN & names:
            name = SEPARATORS.get(sign) or f"{sign!r}, {unicodedata.name(sign, 'a control sign')}"
            raise InputError(
                f"{path}: its cells are separated by {name}; save it with commas as separators"
            )


def _swallows(raw: str, width: int) -> bool:
    """Whether the first and the last line of a row of several lines have a whole row's commas each:
    then a quote that begins a text has met one that ends another."""
    lines = io.StringIO(raw, newline="").readlines()
    if len(lines) == 1 or width < 4:
        return False
    commas = {QUOTED.sub("", line).count(",") for line in (lines[0], lines[-1])}
    return commas == {width - 1}
