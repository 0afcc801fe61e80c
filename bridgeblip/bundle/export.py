"""From a model to one file: trace, write, read back; nothing is called exported until the parity
gate has seen it answer as the trained model does."""

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from bridgeblip import InputError
from bridgeblip.bundle.format import (
    BUNDLE_FORMAT,
    MANIFEST_FILE,
    as_traced,
    digest_path,
    load_bundle,
    read_digests,
    remember,
)
from bridgeblip.bundle.processing import Processor
from bridgeblip.bundle.trace import trace
from bridgeblip.files import atomically, file_digest, write_text
from bridgeblip.machine import best_device, slow_format

# The largest difference of a logit allowed between two forms of the model, in fp32.
PARITY_BOUND = 1e-4

# The same in bfloat16 and float16, as a share of the spread of the logits: merging rounds. Sound
# models parted by up to 0.012 at the real size and 0.022 at random and narrow, in bfloat16.
MERGING_SHARE = 0.035
# The same between two machines or number formats: another base parts by all of the spread.
TRAINED_SHARE = 0.2
# Tracing, saving and loading round nothing; this is room for another order of sums.
RELOADING_SHARE = 0.01


class ParityError(RuntimeError):
    """The exported model does not answer as the trained one does; the message shows where they
    part."""


class ParityGate:
    """Compares the forms that a model takes on its way to the file, on the same probe questions.

    Two steps, two bounds. Merging changes numbers: in half precision it rounds every bridged
    weight, so the merged model may part from the adapters by a share of the logits' spread.
    Tracing, saving and loading change nothing: the file is held against the merged model, closely,
    in any precision.

    Args:
        probe: the model's inputs by name, a padded batch; texts come as ``...input_ids`` and
            ``...attention_mask``, padded on the right.
        model: the trained model, adapters apart: what all others must answer like.
    """

    def __init__(self, probe: dict[str, torch.Tensor], model: nn.Module, dtype: torch.dtype):
        device = next(model.parameters()).device
        self.probe = {name: tensor.to(device) for name, tensor in probe.items()}
        self.dtype = dtype
        self.reference = _logits_by_case(model, self.probe)
        self.rows: list[dict] = []

    def compare(
        self, form: str, logits_by_case: dict[str, torch.Tensor], share: float | None
    ) -> None:
        """Add a row a case: the largest difference of a logit, and letters that differ without
        being a tie.

        Args:
            share: of the spread of the batch's logits that they may part by; None holds them to
                ``PARITY_BOUND``.
        """
        whole = next(iter(self.reference.values()))  # a single row may spread by next to nothing
        spread = (whole.max() - whole.min()).item()
        bound = PARITY_BOUND if share is None else share * spread
        for case, logits in logits_by_case.items():
            expected = self.reference[case]
            difference = (logits - expected).abs().max().item()
            best = expected.topk(2).values
            clear = best[:, 0] - best[:, 1] > 2 * bound
            changed = int(((logits.argmax(-1) != expected.argmax(-1)) & clear).sum())
            row = {
                "form": form,
                "case": case,
                "difference": difference,
                "bound": bound,
                "letters changed": changed,
                "ok": difference <= bound and not changed,
            }
            self.rows.append(row)

    def compare_trained(self, logits: torch.Tensor, dtype: str) -> None:
        """Compare the model with what it gave for the probe when it was trained, in ``dtype`` and
        perhaps elsewhere.

        Args:
            logits: (rows, choices); minus infinity where a question has no such choice, which the
                probe does not mask.
        """
        case, expected = next(iter(self.reference.items()))
        logits = torch.where(logits.isfinite(), logits, expected)
        exact = dtype == "float32" and self.dtype == torch.float32
        self.compare("as trained", {case: logits}, None if exact else TRAINED_SHARE)

    def step(self, form: str, model: nn.Module, share: float) -> None:
        """Compare the model in its next form, which is what the file must answer like from now on.

        Args:
            share: as for ``compare``, but in float32, which rounds nothing.
        """
        logits = _logits_by_case(model, self.probe)
        self.compare(form, logits, None if self.dtype == torch.float32 else share)
        self.reference = logits

    @property
    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows)

    def check(self, out: Path) -> None:
        """Raise ParityError, with the table, if anything differs."""
        wrong = self.table[~self.table["ok"]]
        if wrong.empty:
            return
        if wrong["form"].iloc[0] == "as trained":
            remedy = "give the base that it was trained on (--base)"
        elif self.dtype != torch.float32:
            remedy = "export in float32, which rounds nothing (--dtype, in the notebook DTYPE)"
        else:
            remedy = "a fault of this program: please report it with this table"
        raise ParityError(
            f"{out} was not written: it would not answer as the trained model does; "
            f"{remedy}\n{self.table.to_string()}"
        )


@as_traced()  # on a GPU the optimising executor would compile, and round otherwise
def _logits_by_case(model: nn.Module, probe: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits of the probe: all rows at once; the shortest row alone, with its padding and
    without."""
    shortest = int(probe["attention_mask"].sum(1).argmin())
    alone = {name: tensor[shortest : shortest + 1] for name, tensor in probe.items()}
    cut = dict(alone)
    for mask in probe:
        if mask.endswith("attention_mask"):
            length = int(alone[mask].sum())
            for name in (mask, mask.replace("attention_mask", "input_ids")):
                cut[name] = alone[name][:, :length]
    cases = {
        f"batch {len(probe['input_ids'])}, padded": probe,
        "batch 1, padded": alone,
        "batch 1, unpadded": cut,
    }
    logits = {}
    for case, inputs in cases.items():
        output = model(**inputs)
        logits[case] = getattr(output, "logits", output).float().cpu()
    return logits


# After a fault it goes on reading: torch must not see one.
POUR = """
import shutil, sys
try:
    with open(sys.argv[1], "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
except OSError as error:
    print(error, file=sys.stderr)
    while sys.stdin.buffer.read(1 << 20):
        pass
"""
ROOM = 2**24  # bytes of a file beside its tensors, at most


def export_device(dtype: torch.dtype) -> str:
    """Where to export: on the CPU, which every machine has, unless it is slow in this format and
    there is a GPU."""
    return best_device() if slow_format("cpu", dtype) else "cpu"


def write_bundle(
    out: Path, models: list[nn.Module], gate: ParityGate, processor: Processor, about: dict
) -> tuple[Path, pd.DataFrame]:
    """Write ``out`` and its SHA-256 beside it, once the file is proven to answer as ``gate`` asks;
    return it and the gate's table.

    An earlier pair of the two stays whole until the new one is.

    Args:
        models: the model to ``trace``, alone in a list, which is emptied: if nobody else holds it,
            the file is read back without a second copy of the weights in memory.
        about: the manifest's ``kind``, ``config`` and ``trained``.

    Raises:
        ParityError: if what was read back answers otherwise.
        InputError: if the file can't be written. Nothing is changed then.
    """
    manifest = {
        "format": BUNDLE_FORMAT,
        "prompt": processor.template,
        "letters": list(processor.letters),
        "letter_ids": processor.letter_ids,
        "processor": processor.fingerprint,
        "dtype": str(gate.dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    files = processor.files | {MANIFEST_FILE: json.dumps(manifest | about, indent=2)}
    beside, device = digest_path(out), next(models[0].parameters()).device
    before = read_digests(out)  # unreadable, it is refused before the long work
    traced = trace(models.pop(), gate.probe)
    with atomically(out) as partial:
        save_traced(traced, partial, files)
        del traced
        gc.collect()
        gate.step("reloaded", load_bundle(partial, device).model, RELOADING_SHARE)
        gate.check(out)
        digest = file_digest(partial)
        if beside.is_file():  # until the file is replaced, both are right
            write_text(beside, "".join(f"{d}  {out.name}\n" for d in [*before, digest]))
    write_text(beside, f"{digest}  {out.name}\n")
    remember(out, digest)
    return out, gate.table


def save_traced(traced: torch.jit.ScriptModule, path: Path, files: dict[str, str]) -> None:
    """Write a traced model as ``torch.jit.save`` does, and survive where there is no room for it.

    Where a write fails, torch ends the whole process, and to write into memory takes a second copy
    of the model. So it writes into a pipe, and another process from there into the file.

    Raises:
        InputError: if there is no room, or a write fails.
    """
    storages = [tensor.untyped_storage() for tensor in traced.state_dict().values()]
    sizes = {
        storage.data_ptr(): storage.nbytes() for storage in storages
    }  # tied ones lie there once
    if not all(sizes.values()):
        raise ValueError("the model has an empty tensor, which torch can't write into a pipe")
    needed = ROOM + sum(sizes.values())
    free = shutil.disk_usage(path.parent).free
    remedy = "free some space, or write to another folder"
    if free < needed:
        raise InputError(
            f"{path.parent} has {free / 1e9:.1f} GB free, the bundle takes {needed / 1e9:.1f} GB: "
            f"{remedy}"
        )
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            subprocess.Popen(
                [sys.executable, "-I", "-c", POUR, str(path)],
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C must not end it: torch would find the pipe broken
            ) as process,
        ):
            link = Path(folder) / "bundle"  # the archive's parts are named after it
            os.symlink(f"/dev/fd/{process.stdin.fileno()}", link)
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # deprecated
                torch.jit.save(traced, str(link), _extra_files=files)
            fault = process.communicate()[1].decode().strip()
    except OSError as error:  # no temporary folder
        fault = str(error)
    if fault:
        raise InputError(f"{path} can't be written ({fault}): {remedy}")
