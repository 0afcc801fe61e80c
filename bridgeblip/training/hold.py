"""A folder belongs to one live run: the file that says so, and how a dead run's is told apart."""

import json
import platform
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from bridgeblip import InputError
from bridgeblip.files import numbered, require_writable, write_text

HOLD_FILE = ".held-{}"
BEAT_SECONDS = 20  # between two signs of life
STALE_SECONDS = 120  # without a sign of life, a run on another machine is dead
OWN: set[Path] = set()  # folders that this process holds


@contextmanager
def holding(folders: Sequence[Path], main: bool = True) -> Iterator[None]:
    """Hold folders for the time of a block; what a dead run has left there is no obstacle. Of
    several processes the ``main`` one does it for all.

    A run on this machine is alive if its process is. One on another machine, where the folder may
    be a mounted Drive, is alive if it gives a sign of life while this waits for one.

    Raises:
        InputError: if a live run holds one of them, it is named; or if one can't be written.
    """
    with ExitStack() as stack:
        for folder in folders if main else ():
            require_writable(folder)
            folder = Path(folder).resolve()
            if folder not in OWN:  # held already, around this block
                stack.enter_context(_holding(folder))
        yield


@contextmanager
def _holding(folder: Path) -> Iterator[None]:
    path = _take(folder)
    OWN.add(folder)
    ended = threading.Event()
    beats = threading.Thread(target=_beat, args=(path, ended), daemon=True)
    beats.start()
    try:
        yield
    finally:
        ended.set()
        beats.join()
        OWN.remove(folder)
        with suppress(OSError):  # a Drive that is away
            path.unlink()


def require_free(folder: Path) -> dict[int, Path]:
    """Refuse a folder that a live run holds, without holding it; return the files of runs that held
    it when they died."""
    others = numbered(folder, HOLD_FILE)
    for path in others.values():
        _refuse_if_alive(folder, path)
    return others


def _take(folder: Path) -> Path:
    """Create this run's file; of several that try at once the file system lets one do it."""
    while True:
        others = require_free(folder)
        path = folder / HOLD_FILE.format(max(others, default=0) + 1)
        try:
            with open(path, "x", encoding="utf-8") as file:
                json.dump(_sign(), file)
        except FileExistsError:
            continue  # another run was quicker
        for other in others.values():
            other.unlink(missing_ok=True)
        return path


def _sign() -> dict[str, Any]:
    """What a run says of itself."""
    me = psutil.Process()
    return {
        "host": _host(),
        "pid": me.pid,
        "started": me.create_time(),
        "alive": time.time(),
    }


def _host() -> str:
    """This machine since it was switched on: a container's name alone may come again."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{platform.node()} {boot.read_text()[:8] if boot.is_file() else ''}".strip()


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        try:
            write_text(path, json.dumps(_sign()))  # whole, or the sign before stays
        except OSError:
            continue  # a full disk or a Drive that is away: training has its own word on that


def _refuse_if_alive(folder: Path, path: Path) -> None:
    """Return if the run whose file this is has ended; that takes a while only where its process is
    another machine's."""
    first, until, told = _read(path), time.monotonic() + STALE_SECONDS, False
    while path.exists():
        sign = _read(path)
        first = first or sign
        if sign and sign["host"] == _host():
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(sign["pid"])
                same = abs(process.create_time() - sign["started"]) < 2  # its number may come again
                if same and process.status() != "zombie":
                    break
            return
        if sign and sign["alive"] != first["alive"]:
            break
        try:
            said = sign["alive"] if sign else path.stat().st_mtime
        except FileNotFoundError:  # let go of just now
            return
        if time.time() - said > STALE_SECONDS or time.monotonic() > until:
            return
        if not told:
            print(f"{path} is of a run on another machine: waiting whether it gives a sign of life")
            told = True
        time.sleep(0.2)
    else:
        return
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(sign["started"]))
    raise InputError(
        f"{folder} is held by a live run, process {sign['pid']} on {sign['host']}, since {since}: "
        f"wait for its end, stop it, or take another folder"
    )


def _read(path: Path) -> dict[str, Any] | None:
    """The sign in a file; None if it is gone, or just being written."""
    try:
        sign = json.loads(path.read_text(encoding="utf-8"))
        numbers = {key: float(sign[key]) for key in ("started", "alive")}
        return {"pid": int(sign["pid"]), "host": str(sign["host"])} | numbers
    except (OSError, ValueError, KeyError, TypeError):
        return None
