"""Files that can be trusted: written to a temporary name, flushed, verified, then renamed."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bridgeblip import InputError

# What a write fails with where no space is left.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_SPACE = "free some space"
NO_MEMORY = "close other programs, or take a larger machine"
TORCH_WRITES = ("PytorchStreamWriter", "inline_container", "iostream")  # it gives no number
OUT_OF_MEMORY = (
    "out of memory",  # CUDA's own, "CUDA error: out of memory" too
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    os.strerror(errno.ENOMEM),
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDNN_STATUS_NOT_SUPPORTED",  # what cuDNN says where no algorithm's workspace fits
    "unable to find an engine to execute this computation",
)
# What helps where the machine lacks something: the numbers and words of errors that say so.
LACKING = {
    NO_SPACE: (FULL, (*TORCH_WRITES, "disk full", *map(os.strerror, FULL))),
    NO_MEMORY: ((errno.ENOMEM,), OUT_OF_MEMORY),
    "allow more open files (ulimit -n)": ((errno.EMFILE,), (os.strerror(errno.EMFILE),)),
    "allow more processes (ulimit -u)": ((errno.EAGAIN,), ("can't start new thread",)),
    "set workers to 0, or give the machine more memory": ((), ("DataLoader worker (pid",)),
}

CHUNK = 1 << 20  # bytes that are copied at a time


def remedy_for(error: BaseException) -> str:
    """What helps against an error of the machine, whichever library raises it; empty if it is of
    another kind."""
    for remedy, (numbers, words) in LACKING.items():
        if getattr(error, "errno", None) in numbers or any(word in str(error) for word in words):
            return remedy
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return NO_MEMORY
    system = isinstance(error, OSError) or "(os error" in str(error)  # as Rust says it
    return "see that it can be reached" if system else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says, in the words of any library, that memory did not suffice.

    TorchScript turns ``torch.OutOfMemoryError`` into a plain ``RuntimeError``: only words are left.
    """
    return remedy_for(error) == NO_MEMORY


@contextmanager
def _alone(partial: Path, make: Callable[[], None]) -> Iterator[None]:
    """Have one process after another work on a temporary file or folder, which ``make`` makes if
    it is not there; a dead one's is taken over."""
    while True:
        make()
        with suppress(FileNotFoundError):  # renamed by the one before
            held = os.open(partial, os.O_RDONLY)
            with suppress(OSError):  # some file systems have no locks
                fcntl.flock(held, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(held), partial.stat()):
                break
            os.close(held)
    try:
        yield
    finally:
        os.close(held)


@contextmanager
def atomically(path: str | Path) -> Iterator[Path]:
    """Give a temporary file's path beside ``path`` to a block that writes it and verifies it by
    reading; then flush it and rename it.

    An interrupted or failed block leaves whatever was at ``path`` before; a link stays one.

    Raises:
        InputError: if ``path`` is a folder or a device, which must not be replaced.
    """
    path = Path(os.path.realpath(path))
    _refuse_no_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with _alone(partial, partial.touch):
        try:
            yield partial
            flush(partial)
            os.replace(partial, path)
        except OSError as error:
            if error.errno:
                error.filename = error.filename or str(path)  # a full disk's write names none
            raise
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """Give a temporary folder to a block that fills it; then flush its files, and let it take
    ``folder``'s place. An interrupted or failed block leaves what was there before.

    Raises:
        OSError: of a full disk, whatever the library that the block writes with calls it.
    """
    folder = Path(os.path.realpath(folder))
    partial = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")
    with _alone(partial, lambda: partial.mkdir(parents=True, exist_ok=True)):
        try:
            for left in partial.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield partial
            for path in filter(Path.is_file, partial.rglob("*")):
                flush(path)
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                os.replace(folder, old)
            os.replace(partial, folder)
            shutil.rmtree(old, ignore_errors=True)
        except Exception as error:
            if remedy_for(error) == NO_SPACE:
                raise OSError(errno.ENOSPC, f"{folder} can't be written ({error})") from error
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def flush(path: Path) -> None:
    """Have a file on the disk before going on."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def cache_folder() -> Path:
    """A folder of our own in ``$BRIDGEBLIP_CACHE``, or in the user's cache: a local disk, where
    Drive would be slow."""
    try:
        return Path(os.environ.get("BRIDGEBLIP_CACHE") or "~/.cache").expanduser() / "bridgeblip"
    except RuntimeError as error:
        raise InputError(f"there is no home folder ({error}): set $BRIDGEBLIP_CACHE") from error


def _refuse_no_file(path: Path) -> None:
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path} is there and no file: give another name, as that of a new file")


def require_place(path: str | Path) -> None:
    """Raise an InputError now if no file can be written to ``path``, rather than after hours of
    work: it is a folder or a device, its name is too long, or as ``require_writable``."""
    path = Path(path)
    _refuse_no_file(path)
    require_writable(path.parent, name=path.name)


def require_writable(
    folder: str | Path, remedy: str = "choose another folder, or free some space", name: str = ""
) -> None:
    """Raise an InputError now if files, such as one called ``name``, can't be written into
    ``folder``, rather than after hours of work."""
    # Processes may probe at once.
    probe = Path(os.path.realpath(folder)) / f".writable-{os.getpid()}{name}"
    try:
        write_text(probe, "yes")
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder} can't be written ({error}): {remedy}") from error


def write_text(path: str | Path, text: str) -> None:
    """Write a small UTF-8 text file atomically; what is half a character, such as a byte of a name
    that is no UTF-8, is written as its number."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_bytes(path: str | Path, content: bytes | memoryview) -> None:
    """Write what is in memory atomically."""
    with atomically(path) as partial:
        partial.write_bytes(content)
        if partial.read_bytes() != content:
            raise OSError(f"{path} was not stored as written: is the disk full?")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read back from where it lies."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(facts: Any) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def without(facts: dict[str, Any], *names: str) -> dict[str, Any]:
    """The facts but for those of these names."""
    return {name: fact for name, fact in facts.items() if name not in names}


def copy_verified(source: Path, target: Path) -> None:
    """Copy a file to another place, such as a mounted Drive; the source is read once, the copy
    read back.

    Raises:
        OSError: if the copy is not what was copied.
    """
    digest = hashlib.sha256()
    with atomically(target) as partial:
        with open(source, "rb") as original, open(partial, "wb") as copy:
            while chunk := original.read(CHUNK):
                digest.update(chunk)
                copy.write(chunk)
        if file_digest(partial) != digest.hexdigest():
            raise OSError(f"the copy of {source} at {target} is not the same: is the disk full?")


def numbered(folder: Path, name: str) -> dict[int, Path]:
    """What lies in a folder under a ``name``, by the number in place of its ``{}``; not what a
    synchronised Drive calls ``step-100 (1)``."""
    pattern = re.escape(name).replace(r"\{\}", r"(\d+)")
    found = {path: re.fullmatch(pattern, path.name) for path in folder.glob(name.format("*"))}
    return {int(match[1]): path for path, match in found.items() if match}


def copy_missing(places: Sequence[Path], names: Sequence[str]) -> None:
    """Give each place the files that it lacks and another one has."""
    for name in names:
        having = [place for place in places if (place / name).is_file()]
        for place in places:
            if having and place not in having:
                copy_verified(having[0] / name, place / name)


def read_text(path: Path) -> str:
    """Return what a text file holds.

    Raises:
        InputError: if it is missing or unreadable.
    """
    if not path.is_file():
        raise InputError(
            f"{path} is missing: copy the whole folder again, a base model's with its processor"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read ({error}): copy it again") from error


def holds(values: Any, kinds: dict[str, Any]) -> bool:
    """Whether something read from a file has each of these keys, of its kind."""
    return isinstance(values, dict) and all(
        key in values and isinstance(values[key], kind) for key, kind in kinds.items()
    )


def read_json(path: Path, kind: type = dict) -> Any:
    """Return what a JSON file holds; errors as ``read_text``, or if it is no JSON, or of another
    ``kind``."""
    text = read_text(path)
    try:
        content = json.loads(text)
        reason = f"it holds a {type(content).__name__}, not a {kind.__name__}"
    except (ValueError, RecursionError) as error:
        content, reason = None, str(error)
    if isinstance(content, kind):
        return content
    raise InputError(
        f"{path} is no JSON that can be used ({reason}): it is cut off, or a pointer to a file; "
        f"copy it again"
    )
