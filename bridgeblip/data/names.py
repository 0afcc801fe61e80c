"""Names that look the same are the same: whatever way their letters are composed, whatever stands
in them that can't be seen."""

import codecs
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

# Spaces of all kinds, and what shows nothing at all -> what is shown.
UNSEEN = {}
for code in (*range(0xFF), 0x180E, *range(0x2000, 0x3001), 0xFEFF):
    if chr(code).isspace():
        UNSEEN[code] = " "
    elif unicodedata.category(chr(code)) == "Cf":
        UNSEEN[code] = ""
BLANK = "".join(map(chr, UNSEEN))

OTHERS = {  # how files begin that are given for something else
    rb"\Z": "empty",
    rb"\xff\xfe\x00\x00|\x00\x00\xfe\xff": "UTF-32 text",
    rb"\xff\xfe|\xfe\xff|([^\x00]\x00){4}|(\x00[^\x00]){4}": "UTF-16 text",
    rb"PK\x03\x04": "an Excel workbook, or a zip",
    rb"\xd0\xcf\x11\xe0": "an Excel workbook",
    rb"\x1f\x8b|BZh\d|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!": "a packed file",
    rb"%PDF": "a PDF",
    rb"(<\?xml.*)?<svg": "a drawing, SVG",
    rb"<": "a web page",
    rb"version https://git-lfs": "a pointer to the file",
    rb"PAR1": "a Parquet table",
    rb"ARROW1": "an Arrow table",
    rb"SQLite format": "a database",
    rb".{4}ftyp(hei|hev|mif1|msf1)": "a HEIC photo",
    rb".{4}ftyp(iso|mp4|M4V|qt)": "a video",
    rb"[\[{]\s*[\[\]{}\"\d-]": "JSON",
}


def begin_of(path: str | Path, size: int = 1000) -> bytes:
    """Return a file's first bytes; it may be larger than memory."""
    with open(path, "rb") as file:
        return file.read(size)


def what_is(content: bytes) -> str:
    """Return what a file's content is, if it begins as something of ``OTHERS`` does; else empty."""
    begin = content[:1000].removeprefix(codecs.BOM_UTF8).lstrip()
    found = (what for start, what in OTHERS.items() if re.match(start, begin, re.DOTALL))
    return next(found, "")


def looks(name: str) -> str:
    """Return one form of all the names that look like this one."""
    return unicodedata.normalize("NFC", name).translate(UNSEEN).strip()


def by_look(names: Iterable[str]) -> dict[str, list[str]]:
    """Return file names by what they look like, letter case aside."""
    alike = {}
    for name in names:
        alike.setdefault(looks(name).casefold(), []).append(name)
    return alike


def pick(name: str, alike: dict[str, list[str]]) -> str:
    """Return the name in ``by_look`` that a written one means: itself, else the only one that looks
    like it; as written if there is none."""
    found = alike.get(looks(name).casefold(), [])
    return found[0] if len(found) == 1 else name
