"""Files that can be trusted: written to a temporary name, flushed, verified, then renamed.

``weights-N.pt`` holds what training changed (adapters and head) and all that is needed to rebuild
the model around it; ``best.json`` names the best N; ``state/step-N/`` holds what a killed run goes
on from.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bridgeblip import InputError
from bridgeblip.files import write_atomically, write_text

WEIGHTS_FORMAT = 1
BEST_FILE = "best.json"


@dataclass(frozen=True)
class Weights:
    """What a weights file holds."""

    tensors: dict[str, torch.Tensor]
    """Adapters and head by name, fp32; or the complete state dict of a sliced model."""
    manifest: dict[str, Any] | None
    """Base, layers, bridge, prompt and so on (see ``training``); None with a complete state
    dict."""


def save_weights(
    path: str | Path, tensors: dict[str, torch.Tensor], manifest: dict[str, Any]
) -> None:
    """Write ``weights-N.pt`` and verify it by reading every tensor back."""

    def verify(partial: Path):
        read = _torch_load(partial)["tensors"]
        if read.keys() != tensors.keys() or not all(
            torch.equal(read[name], tensors[name]) for name in tensors
        ):
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
        raise InputError(
            f"{path} holds a {type(content).__name__}: expected what train.ipynb writes"
        )
    if "tensors" not in content:
        if not all(isinstance(value, torch.Tensor) for value in content.values()):
            raise InputError(f"{path} was not written by train.ipynb, nor is it a state dict")
        return Weights(content, None)
    if content["format"] > WEIGHTS_FORMAT:
        raise InputError(
            f"{path} has format {content['format']}, this version reads {WEIGHTS_FORMAT}: update "
            f"bridgeblip"
        )
    return Weights(content["tensors"], content["manifest"])


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each raise their own
        raise InputError(
            f"{path} can't be read ({type(error).__name__}: {str(error)[:200]}): copy it again"
        ) from error


def weights_path(checkpoint_dir: str | Path, epoch: int) -> Path:
    """Where the weights after ``epoch`` lie; the first epoch is 0."""
    return Path(checkpoint_dir) / f"weights-{epoch}.pt"


def best_epoch(accuracies: Sequence[float]) -> int:
    """Return which validation accuracy is best, the earliest of equals; one that is NaN never,
    unless all are."""
    return max(
        range(len(accuracies)),
        key=lambda epoch: -1 if math.isnan(accuracies[epoch]) else accuracies[epoch],
    )


def save_best(
    checkpoint_dir: str | Path, accuracies: list[float], permute_below: float | None = None
) -> None:
    """Record the validation accuracy of each epoch so far, and which weights are best.

    Args:
        permute_below: margin below which asking in other orders paid on the validation questions,
            if it did.
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
        raise InputError(
            f"{record} can't be read ({error}): remove it, and all weights but the best one"
        ) from error


def permutation_margin(weights: str | Path) -> float | None:
    """Return the margin that was measured with these weights; None where none was, or with
    others."""
    best = read_best(Path(weights).parent)
    return best.get("permute_below") if best.get("best") == Path(weights).name else None


def choose_weights(checkpoint_dir: str | Path) -> tuple[Path, str]:
    """Return the weights to use, and why: the best by validation accuracy, or the only file.

    Raises:
        InputError: if there is none, or several and no record of the best, or the best is not
            there.
    """
    folder = Path(checkpoint_dir)
    found = sorted(folder.glob("weights-*.pt"))
    best = read_best(folder)
    if best and found:
        path = folder / best["best"]
        if path not in found:
            raise InputError(
                f"{folder / BEST_FILE} names {path.name}, which is not there: copy it back, or "
                f"remove {BEST_FILE}"
            )
        accuracies = best["validation_accuracy"]
        reached = accuracies[best_epoch(accuracies)]
        return path, f"best of {len(accuracies)} epochs, validation accuracy {reached:.3f}"
    if len(found) == 1:
        return found[0], "the only weights file"
    if not found:
        raise InputError(
            f"no weights-N.pt in {folder}: run train.ipynb first, or put a weights file there"
        )
    raise InputError(
        f"{len(found)} weights files in {folder} and no {BEST_FILE} that names one of them: keep "
        f"one"
    )


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors that training changes, by name: adapters and head, in fp32, on the CPU."""
    return {
        name: parameter.detach().to("cpu", torch.float32).clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def load_trained(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy ``trained_tensors`` of an equally built model into ``model``.

    Raises:
        InputError: if a tensor is missing, left over or of another shape; nothing is changed then.
    """
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wrong = sorted(own.keys() ^ tensors.keys())
    wrong += [
        name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape
    ]
    if wrong:
        raise InputError(
            f"the weights do not fit this model: {len(wrong)} tensors missing, left over or of "
            f"another shape, "
            f"the first is {wrong[0]!r}. They were trained with another base, layer selection or "
            f"rank."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
