"""From a model to one file: trace, write, read back, prove that it answers alike."""

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from bridgeblip import InputError
from bridgeblip.bundle.format import BUNDLE_FORMAT, MANIFEST_FILE, load_bundle
from bridgeblip.bundle.gate import RELOADING_SHARE, ParityGate
from bridgeblip.bundle.processing import Processor
from bridgeblip.bundle.trace import trace
from bridgeblip.bundle.whole import digest_path, read_digests, remember
from bridgeblip.files import file_digest, write_atomically, write_text
from bridgeblip.machine import best_device, slow_format

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
) -> None:
    """Write ``out`` and its SHA-256 beside it, once the file is proven to answer as ``gate`` asks.

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
    models.append(trace(models.pop(), gate.probe))

    def write(partial: Path) -> None:
        save_traced(models.pop(), partial, files)
        gc.collect()

    def verify(partial: Path) -> str:
        gate.step("reloaded", load_bundle(partial, device).model, RELOADING_SHARE)
        gate.check(out)
        digest = file_digest(partial)
        if beside.is_file():  # until the file is replaced, both are right
            write_text(beside, "".join(f"{d}  {out.name}\n" for d in [*before, digest]))
        return digest

    digest = write_atomically(out, write, verify)
    write_text(beside, f"{digest}  {out.name}\n")
    remember(out, digest)


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
            torch.jit.save(traced, str(link), _extra_files=files)
            fault = process.communicate()[1].decode().strip()
    except OSError as error:  # no temporary folder
        fault = str(error)
    if fault:
        raise InputError(f"{path} can't be written ({fault}): {remedy}")
