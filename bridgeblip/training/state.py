"""The state that a killed run goes on from: ``state/step-N/``, whole or not there."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bridgeblip import InputError
from bridgeblip.files import (
    copy_verified,
    file_digest,
    holds,
    numbered,
    replace_folder,
    write_text,
)

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
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
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

    def fill(partial: Path) -> None:
        for path in sorted(folder.iterdir()):
            copy_verified(path, partial / path.name)

    replace_folder(target, fill)
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
        ValueError: if the record is torn, or something else.
    """
    try:
        record = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        kinds = {"run": dict, "files": dict, "done": bool}
        if holds(record, kinds):
            return record
        reason = "other values than expected"
    except (OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise ValueError(f"it is torn ({STATE_FILE}, {reason})")


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
            except ValueError:
                continue
            other = _differences(record["run"], run)
            if other and not record["done"]:
                raise InputError(
                    f"{folder} belongs to another run (other {', '.join(other)}) that has not "
                    f"ended. Set that back to go on with it, with the version of bridgeblip that "
                    f"began it if this one has no such setting; to start anew, delete the folder "
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
    except ValueError as error:
        return str(error)
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
