"""Files that can be trusted: written to a temporary name, flushed, verified, then renamed.

``weights-N.pt`` holds what training changed (adapters and head) and all that is needed to rebuild the
model around it; ``best.json`` names the best N.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bridgeblip import InputError

WEIGHTS_FORMAT = 1
BEST_FILE = "best.json"


def write_atomically(path: str | Path, write: Callable[[Path], None], verify: Callable[[Path], None]) -> None:
    """Have ``write`` fill a temporary file beside ``path``, flush it, ``verify`` it by reading, and rename it.

    An interrupted or failed write leaves whatever was at ``path`` before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        verify(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a small UTF-8 text file atomically."""

    def verify(partial: Path):
        if partial.read_text(encoding="utf-8") != text:
            raise OSError(f"{path} was not stored as written: is the disk full?")

    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"), verify)


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


def save_best(checkpoint_dir: str | Path, accuracies: list[float]) -> None:
    """Record the validation accuracy of each epoch so far, and which is best (the earliest of equals)."""
    best = max(range(len(accuracies)), key=lambda epoch: accuracies[epoch])
    record = {"best": weights_path("", best).name, "validation_accuracy": accuracies}
    write_text(Path(checkpoint_dir) / BEST_FILE, json.dumps(record, indent=2) + "\n")


def choose_weights(checkpoint_dir: str | Path) -> tuple[Path, str]:
    """Return the weights to use, and why: the best by validation accuracy, or the only file.

    Raises:
        InputError: if there is none, or several and no record of the best.
    """
    folder = Path(checkpoint_dir)
    found = sorted(folder.glob("weights-*.pt"))
    record = folder / BEST_FILE
    if record.is_file():
        best = json.loads(record.read_text(encoding="utf-8"))
        path = folder / best["best"]
        if path in found:
            epoch = int(path.stem.split("-")[1])
            accuracies = best["validation_accuracy"]
            return path, f"best of {len(accuracies)} epochs, validation accuracy {accuracies[epoch]:.3f}"
    if len(found) == 1:
        return found[0], "the only weights file"
    if not found:
        raise InputError(f"no weights-N.pt in {folder}: run train.ipynb first, or put a weights file there")
    raise InputError(f"{len(found)} weights files in {folder} and no {BEST_FILE} that names one of them: keep one")
