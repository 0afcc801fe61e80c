"""Whether a bundle is as it was written: found out beside loading, and remembered."""

import json
import re
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from bridgeblip import InputError
from bridgeblip.files import cache_folder, write_text

# In a process of their own: loading TorchScript keeps Python's lock from all threads.
SHA256 = (
    "import hashlib, sys; print(hashlib.file_digest(open(sys.argv[1], 'rb'), 'sha256').hexdigest())"
)
CHECKSUMS = "import sys, zipfile; print(zipfile.ZipFile(sys.argv[1]).testzip() or '')"


@contextmanager
def checked(path: Path):
    """Find out, beside what is done within, whether a file is as it was written.

    It is held against the SHA-256 beside it, which is remembered of an unchanged file, or without
    one against the checksums inside.

    Raises:
        InputError: on leaving, if the file is damaged; also in place of an InputError within.
    """
    named = read_digests(path)
    found = recall(path) if named else None
    process = None
    if found is None:
        command = [sys.executable, "-I", "-c", SHA256 if named else CHECKSUMS, str(path)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    failure = None
    try:
        yield
    except InputError as error:
        failure = error
    except BaseException:
        if process:
            process.kill()
        raise
    if process:
        found = process.communicate()[0].strip()  # empty if the file can't be read to its end
    if named and found not in named:
        raise InputError(
            f"{path} has not the SHA-256 that {digest_path(path)} names: copy both again, or "
            f"export again"
        ) from failure
    if not named and (found or process.returncode) and not failure:
        raise InputError(
            f"{path} is no whole TorchScript file ({found or 'unreadable'} is damaged): export or "
            f"copy it again"
        )
    if failure:
        raise failure
    if named and process:
        remember(path, found)


def digest_path(path: Path) -> Path:
    """Where the SHA-256 of a file lies."""
    return path.with_name(f"{path.name}.sha256")


def read_digests(path: Path) -> list[str]:
    """Return the SHA-256 that lie beside a file; empty where there is no such file.

    More than one while the file is being replaced. Tools write them in small letters or capitals,
    with names before or behind, some of them in UTF-16.

    Raises:
        InputError: if none can be found in it.
    """
    beside = digest_path(path)
    if not beside.is_file():
        return []
    content = beside.read_bytes().replace(b"\0", b"")  # UTF-16 of plain letters, in any order
    found = re.findall(rb"(?<![0-9a-zA-Z])[0-9a-fA-F]{64}(?![0-9a-zA-Z])", content)
    if not found:
        raise InputError(
            f"{beside} holds no SHA-256: copy it again, or remove it to check {path.name} by its "
            f"own checksums"
        )
    return [digest.decode().lower() for digest in found]


def recall(path: Path) -> str | None:
    """Return the SHA-256 that a file had when it was last read; None if it has changed since."""
    match _memory().get(str(path.resolve())):
        case [state, str(digest)] if state == _state(path):
            return digest
    return None


def remember(path: Path, digest: str) -> None:
    """Keep the SHA-256 of a file as it is now."""
    kept = _memory() | {str(path.resolve()): (_state(path), digest)}
    with suppress(OSError):  # a read-only home: next time the file is read again
        write_text(_memory_path(), json.dumps(kept))


def _memory() -> dict[str, list]:
    try:
        return dict(json.loads(_memory_path().read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # not there, or damaged
        return {}


def _memory_path() -> Path:
    return cache_folder() / "digests.json"


def _state(path: Path) -> list[int]:
    """What changes when a file does."""
    stat = path.stat()
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
