"""Pictures: opening them, their content keys, and decoding ahead in threads."""

import functools
import hashlib
import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError
from tqdm.auto import tqdm

from bridgeblip import InputError
from bridgeblip.data.names import begin_of, what_is

# Photo editors put more than Pillow's 1 MB of text or colour profile into a PNG.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 * 2**20

JPEG_START = b"\xff\xd8\xff"
STARTS = (JPEG_START, b"\x89PNG\r\n\x1a\n")
JPEG_END = b"\xff\xd9"
TURNS = {  # EXIF's orientation -> what puts the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Threads that decode pictures: Pillow lets go of Python's lock meanwhile.
LOADERS = max(4, os.cpu_count() or 1)


def open_picture(path: str | Path) -> Image.Image:
    """Return the picture of a file as ``as_seen`` makes it: what the model sees, and what people
    are shown.

    A JPEG whose last bytes are missing is opened if no line of it is lost.

    Raises:
        InputError: if the file is no readable picture; its cause is Pillow's own error.
    """
    try:
        try:
            with Image.open(path) as file:
                image = as_seen(file)
        except OSError:
            image = _mended(Path(path).read_bytes())
            if image is None:
                raise
    except Exception as error:  # each of Pillow's decoders raises its own
        raise InputError(
            f"picture {path} can't be read ({fault_of(path, error)}): give a whole JPEG or PNG"
        ) from error
    image.info = {}  # the orientation in it must not be applied a second time
    return image


def fault_of(path: str | Path, error: BaseException) -> str:
    """Return in one line what keeps a file from being seen, given what Pillow said."""
    if not os.path.isfile(path):
        return "there is no such file"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, scale it down"
    if not isinstance(error, UnidentifiedImageError):
        return " ".join(str(error).split()) or type(error).__name__
    begin = begin_of(path)
    return f"it is {what_is(begin) or f'no whole picture, it begins with {begin[:8]!r}'}"


def as_seen(image: Image.Image) -> Image.Image:
    """Return a picture upright and in RGB.

    Transparency is laid on white, 16 bits and floating point from 0 to 1 are scaled to 8 bits, of
    an animation the first frame is taken.
    """
    image.load()  # a PNG may tell its orientation behind its pixels
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # tags beyond reading: other viewers show such a picture as it is stored
        turn = None
    if turn is not None:  # else the photo would be copied for nothing
        image = image.transpose(turn)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if image.mode != "RGB":
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey of 16 bits, or from 0 to 1, where ``convert`` would make all white or black."""
    grey = np.asarray(image)
    if image.mode == "F":
        if grey.max() > 1:
            return image
        grey = grey * 255
    elif image.mode.startswith("I;16") or grey.max() > 255:  # "I" holds whatever the file had
        grey = grey / 257
    return Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))


def _mended(content: bytes) -> Image.Image | None:
    """Open a JPEG or PNG behind a few other bytes, or a JPEG that lacks its end; None if it is
    neither."""
    begin = max(content.find(start, 0, 64) for start in STARTS)
    if begin > 0:
        return as_seen(Image.open(io.BytesIO(content[begin:])))
    if not content.startswith(JPEG_START):
        return None
    image = Image.open(io.BytesIO(content + JPEG_END))
    image.load()
    components = content[content.rfind(b"\xff\xda") + 4]  # of the last scan
    coarse = "progressive" in image.info or components != len(image.getbands())
    if coarse or (np.asarray(image)[-1] == 128).all():  # the decoder makes lost lines grey
        return None
    return as_seen(image)


# Hex digits of a picture's key by which weights remember what they have learned from.
SHORT_KEY = 16


def picture_key(path: Path) -> str:
    """Return the SHA-256 of a picture's file: the same picture under another name has the same key.

    A file is read once, however often it is asked for, unless its size or time of change is
    another.
    """
    stat = path.stat()
    return _content_key(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _content_key(path: Path, size: int, changed: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def picture_keys(paths: Iterable[Path], quiet: bool = True, strict: bool = True) -> dict[Path, str]:
    """Return ``picture_key`` of each distinct path; threads read the files, which may lie far.

    Args:
        quiet: show no progress.
        strict: raise for a file that can't be read; else its name stands for its content.
    """

    def key(path: Path) -> str:
        try:
            return picture_key(path)
        except OSError:
            if strict:
                raise
            return str(path)

    paths = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(LOADERS) as pool:
        found = pool.map(key, paths)
        shown = tqdm(found, "comparing pictures", len(paths), leave=False, disable=quiet)
        return dict(zip(paths, shown, strict=True))


def load_ahead(load: Callable, groups: Iterable[Sequence]) -> Iterator[list[Any]]:
    """Yield what ``load`` makes of each group's items; threads load the next group while this one
    is worked on.

    A GPU works about as quickly as a few threads decode: loaded in turn, each would wait for the
    other.
    """
    with ThreadPoolExecutor(LOADERS) as pool:
        begun = deque()
        for group in groups:
            begun.append(pool.map(load, group))
            if len(begun) > 1:
                yield list(begun.popleft())
        yield from map(list, begun)
