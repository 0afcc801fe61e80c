"""The state that a killed run goes on from, ``state/step-N/``, whole or not there; and how a run
ends before its own end: asked to, by a signal, or by what breaks around it, always in one line that
says how to go on."""

import errno
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bridgeblip import InputError
from bridgeblip.files import (
    NO_MEMORY,
    copy_verified,
    file_digest,
    flush,
    holds,
    numbered,
    read_json,
    remedy_for,
    replacing,
    write_text,
)
from bridgeblip.machine import NonFiniteError

STATE_FOLDER = "state"
STEP_FOLDER = "step-{}"  # in it

STATE_FILE = "state.json"

GENERATIONS = 2  # resumable states that are kept: should the newest be torn, there is one before it


def publish_state(
    staged: Path, checkpoint_dir: str | Path, step: int, run: dict[str, Any], done: bool = False
) -> Path:
    """Make a complete folder of resumable state the newest generation, in one rename.

    Args:
        staged: the folder, on the same disk; it is gone afterwards.
        run: what the state belongs to; stored with the digest of every file.
        done: whether it is a run's last: there is nothing to go on with.
    """
    files = sorted(path for path in staged.iterdir() if path.is_file())
    for path in files:
        flush(path)
    digests = {path.name: file_digest(path) for path in files}
    write_text(
        staged / STATE_FILE, json.dumps({"run": run, "files": digests, "done": done}, indent=2)
    )
    folder = Path(checkpoint_dir) / STATE_FOLDER / STEP_FOLDER.format(step)
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(
        folder, ignore_errors=True
    )  # a run that was started anew passes the same step again
    os.replace(staged, folder)
    _drop_old_states(folder.parent, step)
    return folder


def copy_state(folder: Path, checkpoint_dir: str | Path) -> None:
    """Copy a published state to a second checkpoint folder; every file verified, the folder renamed
    whole."""
    target = Path(checkpoint_dir) / STATE_FOLDER / folder.name
    with replacing(target) as partial:
        for path in sorted(folder.iterdir()):
            copy_verified(path, partial / path.name)
    _drop_old_states(target.parent, int(folder.name.split("-")[1]))


def _drop_old_states(folder: Path, newest: int) -> None:
    """Keep the newest generations; states of later steps come from an earlier run and are
    foreign."""
    steps = sorted(numbered(folder, STEP_FOLDER), reverse=True)
    kept = [step for step in steps if step <= newest][:GENERATIONS]
    for step in set(steps) - set(kept):
        shutil.rmtree(folder / STEP_FOLDER.format(step))


def read_state(folder: Path) -> dict[str, Any]:
    """Return the record of a state: the "run" that it belongs to, its "files" and their digests,
    and whether that run is "done".

    Raises:
        InputError: if the record is torn, or something else.
    """
    record = read_json(folder / STATE_FILE)
    if holds(record, {"run": dict, "files": dict, "done": bool}):
        return record
    raise InputError(f"{folder / STATE_FILE} has other values than expected")


def refuse_other_run(checkpoint_dirs: Sequence[str | Path], run: dict[str, Any]) -> None:
    """Refuse to lose another run's work.

    Raises:
        InputError: if the newest state of a place is of another run that has not ended.
    """
    for place in checkpoint_dirs:
        for _, folder in sorted(
            numbered(Path(place) / STATE_FOLDER, STEP_FOLDER).items(), reverse=True
        ):
            try:
                record = read_state(folder)
            except InputError:
                continue
            other = _differences(record["run"], run)
            if other and not record["done"]:
                raise InputError(
                    f"{folder} belongs to another run (other {', '.join(other)}) that has not "
                    f"ended. Set that back to go on with it, in the version of bridgeblip that "
                    f"began it if this one lacks it; to start anew, delete the folder "
                    f"{STATE_FOLDER}, or take another checkpoint folder"
                )
            break  # those before it are the same run's


def newest_state(checkpoint_dirs: Sequence[str | Path], run: dict[str, Any]) -> Path | None:
    """Return the newest whole state of this ``run``, or None; each one passed over is named.

    Args:
        checkpoint_dirs: where states may lie; the first place wins between equals.
        run: what must agree: base, settings, questions. Of "versions" a difference is only named.

    Raises:
        InputError: if a place has the state of another run that has not ended: it would be lost.
    """
    refuse_other_run(checkpoint_dirs, run)
    found = {}
    for place in reversed(checkpoint_dirs):
        for step, folder in sorted(
            numbered(Path(place) / STATE_FOLDER, STEP_FOLDER).items(), reverse=True
        ):
            fault = _fault_of_state(folder, run)
            if fault is None:
                found[step] = folder
                break
            print(f"passing over {folder}: {fault}")
    if not found:
        return None
    newest = found[max(found)]
    before, now = read_state(newest)["run"].get("versions"), run.get("versions")
    if before != now:
        print(f"going on with other versions, the last digits may differ: {before} -> {now}")
    return newest


def _fault_of_state(folder: Path, run: dict[str, Any]) -> str | None:
    """Return what is wrong with a state, if anything."""
    try:
        record = read_state(folder)
    except InputError as error:
        return f"it is torn ({error})"
    other = _differences(record["run"], run)
    if other:
        return f"it belongs to another run (other {', '.join(other)})"
    for name, digest in record["files"].items():
        if not (folder / name).is_file() or file_digest(folder / name) != digest:
            return f"it is torn ({name} is not as it was written)"
    return None


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The keys in which two runs differ, and of settings which."""
    found = []
    for key in sorted((before.keys() | now.keys()) - {"versions"}):
        one, other = before.get(key), now.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += [f"{key}: {name}" for name in _differences(one, other)]
        elif one != other:
            found.append(key)
    return found


class TrainingStopped(InputError):
    """Training ended because it was asked to; its state is saved."""

    exit_code = 130


class Stopper:
    """Hears the stop button, Ctrl-C, SIGTERM and a terminal's end, so that training can end after
    the step at hand, its state saved."""

    # How many listen in this process now.
    listeners = 0

    def __init__(self):
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals for the time of a block; the second one acts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals reach the main thread only
            return
        heard = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
        kept = {number: signal.getsignal(number) for number in heard}
        if kept[signal.SIGHUP] is signal.SIG_IGN:  # by nohup
            del kept[signal.SIGHUP]

        def restore():
            for number, handler in kept.items():
                signal.signal(number, handler)

        def ask(number, frame):
            self.asked = True
            restore()
            print("stopping after this step; once more to stop at once", file=sys.stderr)

        for number in kept:
            signal.signal(number, ask)
        Stopper.listeners += 1
        try:
            yield
        finally:
            Stopper.listeners -= 1
            restore()


def _leave_the_group() -> None:
    """Take a loader's process out of the group: a signal to the whole group would end it at once,
    and training with it, before anything is saved."""
    if Stopper.listeners:
        os.setpgrp()


os.register_at_fork(after_in_child=_leave_the_group)


@contextmanager
def in_one_line(folder: Path) -> Iterator[None]:
    """Say in one line what ends a run, and how to go on from what ``folder`` keeps of it.

    Raises:
        TrainingStopped: after a Ctrl-C that was not heard by a ``Stopper``.
        InputError: of numbers that are not finite, or of what ``remedy_for`` knows.
    """
    go_on = f"run the same again to go on from the last state in {folder / STATE_FOLDER}, if any"
    usual, threading.excepthook = threading.excepthook, _warn_of_a_thread
    try:
        yield
    except KeyboardInterrupt:
        raise TrainingStopped(f"stopped at once: {go_on}") from None
    except NonFiniteError as error:
        raise InputError(
            f"{error} Now {go_on}; if it stops there again, delete that folder and start anew"
        ) from error
    except InputError as error:
        if "Traceback" not in str(error):
            raise
        raise InputError(_words(error)) from error
    except (OSError, SafetensorError, RuntimeError, MemoryError) as error:
        remedy = remedy_for(error) or "see that it can be read" * isinstance(error, SafetensorError)
        if not remedy:
            raise
        if remedy == NO_MEMORY:
            raise InputError(
                f"no memory for a training step ({_words(error)}): halve --batch-size and double "
                f"--accumulation, the steps stay the same; delete {folder / STATE_FOLDER} first"
            ) from error
        raise InputError(f"training stopped, {_words(error)}: {remedy}, and {go_on}") from error
    finally:
        threading.excepthook = usual


def _warn_of_a_thread(failed: threading.ExceptHookArgs) -> None:
    """What else ends in a traceback: TensorBoard's writer on a full disk, say."""
    what = f"{failed.exc_type.__name__}: {failed.exc_value}"
    print(
        f"warning: {failed.thread.name if failed.thread else 'a thread'}: {what}", file=sys.stderr
    )


def _words(error: Exception) -> str:
    """An error's message in one line; of one in a loader's process without the traceback that it
    brings along."""
    text = str(error)
    if "Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())[:300]


def mirror(places: Sequence[Path], names: Sequence[str]) -> None:
    """Copy files of the first place to the others, verified; errors as ``copying_to``."""
    for place in places[1:]:
        with copying_to(place):
            for name in names:
                copy_verified(places[0] / name, place / name)


@contextmanager
def copying_to(place: Path) -> Iterator[None]:
    """Name the place, and what to do, if a block can't copy to it.

    Raises:
        InputError: if the place is gone, such as a Drive that is no longer mounted, or full.
    """
    try:
        if not place.is_dir():  # nor made anew: it would be another disk's
            raise FileNotFoundError(errno.ENOENT, "it is gone")
        yield
    except OSError as error:
        raise InputError(
            f"the copy in {place} can't be written ({error}): mount it again, free some space "
            f"there, or copy to nowhere; what lies here is whole, run the same again to go on"
        ) from error
