"""How a run ends before its own end: asked to, by a signal, or by what breaks around it; always in
one line that says how to go on."""

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from bridgeblip import InputError
from bridgeblip.files import FULL, copy_verified
from bridgeblip.machine import NonFiniteError, is_out_of_memory
from bridgeblip.training.state import STATE_FOLDER

WRITERS = ("PytorchStreamWriter", "inline_container", "iostream", os.strerror(errno.ENOSPC))
"""Words of torch.save and of safetensors, which give no number, on a full disk."""


class TrainingStopped(InputError):
    """Training ended because it was asked to; its state is saved."""

    exit_code = 130


class Stopper:
    """Hears the stop button, Ctrl-C and SIGTERM, so that training can end after the step at hand,
    its state saved."""

    listeners = 0
    """How many listen in this process now."""

    def __init__(self):
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals for the time of a block; the second one acts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals reach the main thread only
            return
        kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

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
        InputError: of numbers that are not finite, a full disk, a file that can't be reached.
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
        if isinstance(error, MemoryError) or is_out_of_memory(error):
            raise InputError(
                f"no memory for a training step ({_words(error)}): halve --batch-size and double "
                f"--accumulation, the steps stay the same; delete {folder / STATE_FOLDER} first"
            ) from error
        remedy = _remedy(error)
        if remedy is None:
            raise
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
    if any(word in text for word in WRITERS[:3]):
        text = f"{os.strerror(errno.ENOSPC)} ({text})"  # torch's own words name no cause
    return " ".join(text.split())[:300]


def _remedy(error: Exception) -> str | None:
    """What helps; None if it is no matter of files."""
    written = any(word in str(error) for word in WRITERS)
    if written or getattr(error, "errno", None) in FULL or "disk full" in str(error):
        return "free some space"
    if isinstance(error, RuntimeError):
        return None
    return "see that the file can be reached again"


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
