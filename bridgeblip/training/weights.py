"""What a bridge's training leaves: ``weights-N.pt`` holds what it changed after epoch N (adapters
and head) and all that is needed to rebuild the model around it; ``best.json`` names the best N."""

import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bridgeblip import InputError
from bridgeblip.files import file_digest, holds, write_bytes, write_text
from bridgeblip.messages import say

WEIGHTS_FORMAT = 1
BEST_FILE = "best.json"
# What a weights file needs to say.
NAMED = {"base": str, "revision": str | None, "layers": list, "bridge": dict, "dtype": str}


@dataclass(frozen=True)
class Weights:
    """What a weights file holds."""

    # Adapters and head by name, fp32.
    tensors: dict[str, torch.Tensor]
    # Base, layers, bridge, prompt, a probe with its logits and so on (see ``bridge.plan``).
    manifest: dict[str, Any]


def save_weights(
    path: str | Path, tensors: dict[str, torch.Tensor], manifest: dict[str, Any]
) -> None:
    """Write ``weights-N.pt`` and verify it by reading it back."""
    content = io.BytesIO()  # torch's own writer ends in other errors than a full disk's
    torch.save({"format": WEIGHTS_FORMAT, "tensors": tensors, "manifest": manifest}, content)
    write_bytes(path, content.getbuffer())


def load_weights(path: str | Path) -> Weights:
    """Read ``weights-N.pt``.

    Raises:
        InputError: if the file is missing, damaged, foreign, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} not found: run train.ipynb first, or put a weights file there")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each raise their own
        raise InputError(
            f"{path} can't be read ({type(error).__name__}: {str(error)[:200]}): copy it again"
        ) from error
    kinds = {"format": int, "tensors": dict, "manifest": dict}
    if not holds(content, kinds) or not holds(content["manifest"], NAMED):
        raise InputError(
            f"{path} lacks its format, its tensors or its {', '.join(sorted(NAMED))}: expected "
            f"what train.ipynb writes"
        )
    if content["format"] > WEIGHTS_FORMAT:
        raise InputError(
            f"{path} has format {content['format']}, this version reads {WEIGHTS_FORMAT}: update "
            f"bridgeblip"
        )
    return Weights(content["tensors"], content["manifest"])


def weights_path(checkpoint_dir: str | Path, epoch: int) -> Path:
    """Where the weights after ``epoch`` lie; the first epoch is 0."""
    return Path(checkpoint_dir) / f"weights-{epoch}.pt"


def best_epoch(accuracies: Sequence[float], losses: Sequence[float]) -> int:
    """Return which epoch validates best: by accuracy, of equals the one of lower loss, then the
    earliest; one that is NaN never, unless all are."""

    def merit(epoch: int) -> tuple[float, float]:
        accuracy, loss = accuracies[epoch], losses[epoch]
        return -1 if math.isnan(accuracy) else accuracy, -math.inf if math.isnan(loss) else -loss

    return max(range(len(accuracies)), key=merit)


def save_best(
    checkpoint_dir: str | Path,
    accuracies: list[float],
    losses: list[float],
    permute_below: float | None = None,
) -> None:
    """Record the validation accuracy and loss of each epoch so far, and which weights are best.

    Args:
        permute_below: margin below which asking in other orders paid on the validation questions,
            if it did.
    """
    record = {
        "best": weights_path("", best_epoch(accuracies, losses)).name,
        "validation_accuracy": accuracies,
        "validation_loss": losses,
        "permute_below": permute_below,
    }
    write_text(Path(checkpoint_dir) / BEST_FILE, json.dumps(record, indent=2) + "\n")


def read_best(checkpoint_dir: str | Path) -> dict[str, Any]:
    """Return what ``save_best`` recorded; empty where nothing is recorded.

    Raises:
        InputError: if the record is damaged.
    """
    path = Path(checkpoint_dir) / BEST_FILE
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        best = int(re.fullmatch(r"weights-(\d+)\.pt", record["best"])[1])
        float(record["validation_accuracy"][best])
        float(record.get("permute_below") or 0)
        return record
    except (OSError, ValueError, KeyError, TypeError, LookupError) as error:
        raise InputError(
            f"{path} can't be read ({type(error).__name__}: {error}): remove it, and all weights "
            f"but the best one"
        ) from error


def recorded_margin(weights: str | Path) -> float | None:
    """Return the margin that was measured with these weights; None where none was, or with
    others."""
    best = read_best(Path(weights).parent)
    return best.get("permute_below") if best.get("best") == Path(weights).name else None


def weights_in(folder: str | Path) -> list[Path]:
    """The weights files of a checkpoint folder."""
    return sorted(Path(folder).glob("weights-*.pt"))


def choose_weights(checkpoint_dir: str | Path) -> tuple[Path, str]:
    """Return the weights to use, and why: the best by validation accuracy, or the only file.

    Raises:
        InputError: if there is none, or several and no record of the best, or the best is not
            there.
    """
    folder = Path(checkpoint_dir)
    found = weights_in(folder)
    best = read_best(folder)
    if best and found:
        path = folder / best["best"]
        if path not in found:
            raise InputError(
                f"{folder / BEST_FILE} names {path.name}, which is not there: copy it back, or "
                f"remove {BEST_FILE}"
            )
        accuracies = best["validation_accuracy"]
        own = [weights_path(folder, epoch) for epoch in range(len(accuracies))]
        why = say("best", count=len(own), accuracy=accuracies[own.index(path)])
        older = [other.name for other in found if other not in own]
        return path, why + (f"; {', '.join(older)} are an earlier run's" if older else "")
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


def stale_bundle(bundle: str | Path, trained: dict[str, Any]) -> str:
    """Say that a bundle was not made from the best weights beside it; empty if it was, or if none
    are there.

    Args:
        trained: what its manifest has under this name: file and SHA-256 of its weights.
    """
    try:
        best, why = choose_weights(Path(bundle).parent)
    except InputError:
        return ""
    named = trained.get("sha256", trained.get("file"))  # files made before have the name only
    if named in (None, best.name) or named == file_digest(best):
        return ""
    return (
        f"{bundle} was not made from {best}, {why}: export again, unless you want what was trained "
        f"before"
    )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what training changes, by name: adapters and head, or all that learns."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the values of what is ``trainable``, by name, in fp32, on the CPU."""
    own = trainable(model)
    return {name: p.detach().to("cpu", torch.float32).clone() for name, p in own.items()}


def load_trained(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy ``trained_tensors`` of an equally built model into ``model``.

    Raises:
        InputError: if a tensor is missing, left over or of another shape; nothing is changed then.
    """
    own = trainable(model)
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
