"""Pictures: their content keys, and decoding ahead in threads."""

import functools
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

LOADERS = 4  # threads that decode pictures: Pillow lets go of Python's lock meanwhile

Item = TypeVar("Item")

Loaded = TypeVar("Loaded")


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


def picture_keys(paths: Iterable[Path]) -> dict[Path, str]:
    """Return ``picture_key`` of each distinct path."""
    return {path: picture_key(path) for path in dict.fromkeys(paths)}


def load_ahead(
    load: Callable[[Item], Loaded], groups: Iterable[Sequence[Item]]
) -> Iterator[list[Loaded]]:
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
