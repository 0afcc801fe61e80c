"""Files that can be trusted: written to a temporary name, flushed, verified, then renamed.

``weights-N.pt`` holds what training changed (adapters and head) and all that is needed to rebuild the
model around it; ``best.json`` names the best N; ``state/step-N/`` holds what a killed run goes on from.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bridgeblip import InputError

WEIGHTS_FORMAT = 1
BEST_FILE = "best.json"
STATE_FOLDER = "state"
STATE_FILE = "state.json"
FOREIGN = "it belongs to another run"
GENERATIONS = 2  # resumable states that are kept: should the newest be torn, there is one before it


def write_atomically(
    path: str | Path, write: Callable[[Path], None], verify: Callable[[Path], Any], tag: str = ""
) -> Any:
    """Have ``write`` fill a temporary file beside ``path``, flush it, ``verify`` it by reading, and rename it.

    An interrupted or failed write leaves whatever was at ``path`` before. Returns what ``verify`` does.

    Args:
        tag: sets the temporary files of several writers of one path apart.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}{tag}.partial")
    try:
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        verified = verify(partial)
        os.replace(partial, path)
        return verified
    finally:
        partial.unlink(missing_ok=True)


def require_writable(folder: str | Path) -> None:
    """Raise an InputError now if files can't be written into ``folder``, rather than after hours of work."""
    probe = Path(folder) / ".writable"
    try:
        write_text(probe, "yes")
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder} can't be written ({error}): choose another folder, or free some space") from error


def write_text(path: str | Path, text: str) -> None:
    """Write a small UTF-8 text file atomically."""

    def verify(partial: Path):
        if partial.read_bytes() != text.encode():
            raise OSError(f"{path} was not stored as written: is the disk full?")

    write_atomically(path, lambda partial: partial.write_bytes(text.encode()), verify)


@dataclass(frozen=True)
class Weights:
    """What a weights file holds."""

    tensors: dict[str, torch.Tensor]
    """Adapters and head by name, fp32; or the complete state dict of a sliced model."""
    manifest: dict[str, Any] | None
    """Base, layers, bridge, prompt and so on (see ``training``); None with a complete state dict."""


def save_weights(path: str | Path, tensors: dict[str, torch.Tensor], manifest: dict[str, Any]) -> None:
    """Write ``weights-N.pt`` and verify it by reading every tensor back."""

    def verify(partial: Path):
        read = _torch_load(partial)["tensors"]
        if read.keys() != tensors.keys() or not all(torch.equal(read[name], tensors[name]) for name in tensors):
            raise OSError(f"{path} was not stored as written: is the disk full?")

    content = {"format": WEIGHTS_FORMAT, "tensors": tensors, "manifest": manifest}
    write_atomically(path, lambda partial: torch.save(content, partial), verify)


def load_weights(path: str | Path) -> Weights:
    """Read ``weights-N.pt``, or a complete state dict of the sliced model.

    Raises:
        InputError: if the file is missing, damaged, foreign, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} not found: run train.ipynb first, or put a weights file there")
    content = _torch_load(path)
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path} holds a {type(content).__name__}: expected what train.ipynb writes")
    if "tensors" not in content:
        if not all(isinstance(value, torch.Tensor) for value in content.values()):
            raise InputError(f"{path} was not written by train.ipynb, nor is it a state dict")
        return Weights(content, None)
    if content["format"] > WEIGHTS_FORMAT:
        raise InputError(
            f"{path} has format {content['format']}, this version reads {WEIGHTS_FORMAT}: update bridgeblip"
        )
    return Weights(content["tensors"], content["manifest"])


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each raise their own
        raise InputError(f"{path} can't be read ({type(error).__name__}: {str(error)[:200]}): copy it again") from error


def weights_path(checkpoint_dir: str | Path, epoch: int) -> Path:
    """Where the weights after ``epoch`` lie; the first epoch is 0."""
    return Path(checkpoint_dir) / f"weights-{epoch}.pt"


def best_epoch(accuracies: Sequence[float]) -> int:
    """Return which validation accuracy is best, the earliest of equals; one that is NaN never, unless all are."""
    return max(range(len(accuracies)), key=lambda epoch: -1 if math.isnan(accuracies[epoch]) else accuracies[epoch])


def save_best(checkpoint_dir: str | Path, accuracies: list[float], permute_below: float | None = None) -> None:
    """Record the validation accuracy of each epoch so far, and which weights are best.

    Args:
        permute_below: margin below which asking in other orders paid on the validation questions, if it did.
    """
    best = weights_path("", best_epoch(accuracies)).name
    record = {"best": best, "validation_accuracy": accuracies, "permute_below": permute_below}
    write_text(Path(checkpoint_dir) / BEST_FILE, json.dumps(record, indent=2) + "\n")


def read_best(checkpoint_dir: str | Path) -> dict[str, Any]:
    """Return what ``save_best`` recorded; empty where nothing is recorded.

    Raises:
        InputError: if the record is damaged.
    """
    record = Path(checkpoint_dir) / BEST_FILE
    if not record.is_file():
        return {}
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{record} can't be read ({error}): remove it, and all weights but the best one") from error


def permutation_margin(weights: str | Path) -> float | None:
    """Return the margin that was measured with these weights; None where none was, or with others."""
    best = read_best(Path(weights).parent)
    return best.get("permute_below") if best.get("best") == Path(weights).name else None


def choose_weights(checkpoint_dir: str | Path) -> tuple[Path, str]:
    """Return the weights to use, and why: the best by validation accuracy, or the only file.

    Raises:
        InputError: if there is none, or several and no record of the best, or the best is not there.
    """
    folder = Path(checkpoint_dir)
    found = sorted(folder.glob("weights-*.pt"))
    best = read_best(folder)
    if best and found:
        path = folder / best["best"]
        if path not in found:
            raise InputError(
                f"{folder / BEST_FILE} names {path.name}, which is not there: copy it back, or remove {BEST_FILE}"
            )
        accuracies = best["validation_accuracy"]
        reached = accuracies[best_epoch(accuracies)]
        return path, f"best of {len(accuracies)} epochs, validation accuracy {reached:.3f}"
    if len(found) == 1:
        return found[0], "the only weights file"
    if not found:
        raise InputError(f"no weights-N.pt in {folder}: run train.ipynb first, or put a weights file there")
    raise InputError(f"{len(found)} weights files in {folder} and no {BEST_FILE} that names one of them: keep one")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read back from where it lies."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_verified(source: Path, target: Path) -> None:
    """Copy a file to another place, such as a mounted Drive: temporary name, flush, size and SHA-256, rename.

    Raises:
        OSError: if the copy is not what was copied.
    """
    digest = file_digest(source)

    def verify(partial: Path):
        if partial.stat().st_size != source.stat().st_size or file_digest(partial) != digest:
            raise OSError(f"the copy of {source} at {target} is not the same: is the disk full?")

    write_atomically(target, lambda partial: shutil.copyfile(source, partial), verify)


def copy_missing(places: Sequence[Path], names: Sequence[str]) -> None:
    """Give each place the files that it lacks and another one has."""
    for name in names:
        having = [place for place in places if (place / name).is_file()]
        for place in places:
            if having and place not in having:
                copy_verified(having[0] / name, place / name)


def publish_state(staged: Path, checkpoint_dir: str | Path, step: int, run: dict[str, Any], done: bool = False) -> Path:
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
    write_text(staged / STATE_FILE, json.dumps({"run": run, "files": digests, "done": done}, indent=2))
    folder = Path(checkpoint_dir) / STATE_FOLDER / f"step-{step}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)  # a run that was started anew passes the same step again
    os.replace(staged, folder)
    _drop_old_states(folder.parent, step)
    return folder


def copy_state(folder: Path, checkpoint_dir: str | Path) -> None:
    """Copy a published state to a second checkpoint folder; every file verified, the folder renamed whole."""
    target = Path(checkpoint_dir) / STATE_FOLDER / folder.name
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for path in sorted(folder.iterdir()):
        copy_verified(path, partial / path.name)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    _drop_old_states(target.parent, int(folder.name.split("-")[1]))


def _drop_old_states(folder: Path, newest: int) -> None:
    """Keep the newest generations; states of later steps come from an earlier run and are foreign."""
    steps = sorted(_states(folder), reverse=True)
    kept = [step for step in steps if step <= newest][:GENERATIONS]
    for step in set(steps) - set(kept):
        shutil.rmtree(folder / f"step-{step}")


def _states(folder: Path) -> dict[int, Path]:
    """The states in a folder by their step; not what a synchronised Drive calls ``step-100 (1)``."""
    names = {path: re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*")}
    return {int(name[1]): path for path, name in names.items() if name}


def newest_state(checkpoint_dirs: Sequence[str | Path], run: dict[str, Any]) -> Path | None:
    """Return the newest whole state of this ``run``, or None; each one passed over is named.

    Args:
        checkpoint_dirs: where states may lie; the first place wins between equals.
        run: what must agree: base, settings, questions.

    Raises:
        InputError: if the newest whole state of a place is of another run that has not ended: it would be lost.
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
                    f"{folder}: {fault} that has not ended. Set that back to go on with it; to start anew, delete the "
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
    different = sorted(key for key in run.keys() | made_by.keys() if run.get(key) != made_by.get(key))
    return f"{FOREIGN} (other {', '.join(different)})" if different else None
