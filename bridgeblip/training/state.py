"""The state that a killed run goes on from: ``state/step-N/``, whole or not there."""

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bridgeblip import InputError
from bridgeblip.files import copy_verified, file_digest, write_text

STATE_FOLDER = "state"

STATE_FILE = "state.json"

FOREIGN = "it belongs to another run"

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
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    digests = {path.name: file_digest(path) for path in files}
    write_text(
        staged / STATE_FILE, json.dumps({"run": run, "files": digests, "done": done}, indent=2)
    )
    folder = Path(checkpoint_dir) / STATE_FOLDER / f"step-{step}"
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
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for path in sorted(folder.iterdir()):
        copy_verified(path, partial / path.name)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    _drop_old_states(target.parent, int(folder.name.split("-")[1]))


def _drop_old_states(folder: Path, newest: int) -> None:
    """Keep the newest generations; states of later steps come from an earlier run and are
    foreign."""
    steps = sorted(_states(folder), reverse=True)
    kept = [step for step in steps if step <= newest][:GENERATIONS]
    for step in set(steps) - set(kept):
        shutil.rmtree(folder / f"step-{step}")


def _states(folder: Path) -> dict[int, Path]:
    """The states in a folder by their step; not what a synchronised Drive calls ``step-100
    (1)``."""
    names = {path: re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*")}
    return {int(name[1]): path for path, name in names.items() if name}


def newest_state(checkpoint_dirs: Sequence[str | Path], run: dict[str, Any]) -> Path | None:
    """Return the newest whole state of this ``run``, or None; each one passed over is named.

    Args:
        checkpoint_dirs: where states may lie; the first place wins between equals.
        run: what must agree: base, settings, questions.

    Raises:
        InputError: if the newest whole state of a place is of another run that has not ended: it
            would be lost.
    """
    found = {}
    for place in reversed(checkpoint_dirs):
        for step, folder in sorted(_states(Path(place) / STATE_FOLDER).items(), reverse=True):
            fault = _fault_of_state(folder, run)
            if fault is None:
                found[step] = folder
                break
            if fault.startswith(FOREIGN) and not state_is_done(folder):
                raise InputError(
                    f"{folder}: {fault} that has not ended. Set that back to go on with it; to "
                    f"start anew, delete the "
                    f"folder {STATE_FOLDER}, or take another checkpoint folder"
                )
            print(f"passing over {folder}: {fault}")
            if fault.startswith(FOREIGN):
                break  # it has ended; those before it are its own
    return found[max(found)] if found else None


def state_is_done(folder: Path) -> bool:
    """Whether a state is the last of its run."""
    return json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["done"]


def _fault_of_state(folder: Path, run: dict[str, Any]) -> str | None:
    """Return what is wrong with a state, if anything."""
    try:
        record = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        files, made_by = record["files"], record["run"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it is torn ({type(error).__name__}: {error})"
    for name, digest in files.items():
        if not (folder / name).is_file() or file_digest(folder / name) != digest:
            return f"it is torn ({name} is not as it was written)"
    different = sorted(
        key for key in run.keys() | made_by.keys() if run.get(key) != made_by.get(key)
    )
    return f"{FOREIGN} (other {', '.join(different)})" if different else None
