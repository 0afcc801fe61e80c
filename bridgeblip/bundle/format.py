"""``torchscript.pt``: what is in it, and loading it."""

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from bridgeblip import InputError
from bridgeblip.bridge.processing import PROCESSOR_FILES, PROMPT_TEMPLATE, QuestionProcessor
from bridgeblip.files import file_digest
from bridgeblip.machine import _is_out_of_memory

BUNDLE_FORMAT = 1


@dataclass(frozen=True)
class Bundle:
    """A model and the processor it was trained with: they can't disagree."""

    model: torch.jit.ScriptModule
    """Methods ``encode_image(pixel_values)`` and ``score(image_embeds, <four text inputs>) ->
    logits (B, 4)``."""
    processor: QuestionProcessor
    manifest: dict
    device: torch.device
    fingerprint: str = ""
    """Tells the content of one file from another's."""


def find_bundle(path: str | Path) -> Path:
    """Return the path; raise InputError, naming the notebook that comes first, if no file is
    there."""
    path = Path(path)
    if not path.is_file():
        hint = (
            "run torchscript.ipynb first"
            if list(path.parent.glob("weights-*.pt"))
            else "run train.ipynb first"
        )
        raise InputError(f"{path} not found: {hint}, or put a ready torchscript.pt there")
    return path


def load_bundle(path: str | Path, device: str | torch.device = "cpu") -> Bundle:
    """Load ``torchscript.pt`` and check that it is whole, and of a format that this version reads.

    The file is held against ``torchscript.pt.sha256`` where that lies beside it, else against the
    checksums inside. Trust a bundle like a program: TorchScript can hold arbitrary operations.

    Raises:
        InputError: if the file is missing, damaged, foreign, of a newer format, or made for another
            prompt.
    """
    path = find_bundle(path)
    fingerprint = _check_whole(path)
    files = dict.fromkeys([*PROCESSOR_FILES, "manifest.json"], "")
    try:
        model = torch.jit.load(str(path), map_location=device, _extra_files=files)
    except (RuntimeError, ValueError) as error:  # torch.OutOfMemoryError is one
        if _is_out_of_memory(error):
            size = path.stat().st_size / 1e9
            raise InputError(
                f"no memory on {device} for {path}, {size:.1f} GB: restart this and other "
                f"notebooks, or take a larger "
                "machine"
            ) from error
        raise InputError(
            f"{path} is no TorchScript file ({str(error)[:200]}): export or copy it again"
        ) from error
    lacking = [name for name, text in files.items() if not text]
    if lacking:
        raise InputError(
            f"{path} is TorchScript but no bridgeblip bundle, it lacks {', '.join(lacking)}: "
            f"export it"
        )
    try:
        files = {
            name: text if isinstance(text, str) else text.decode("utf-8")
            for name, text in files.items()
        }
        manifest = json.loads(files.pop("manifest.json"))
        made_for = {
            key: manifest[key] for key in ("format", "processor", "letters", "letter_ids", "prompt")
        }
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} has no readable manifest ({error!r}): export or copy it again"
        ) from error
    if made_for["format"] > BUNDLE_FORMAT:
        raise InputError(
            f"{path} has format {made_for['format']}, this version reads {BUNDLE_FORMAT}: update "
            f"bridgeblip"
        )
    processor = QuestionProcessor(files)
    here = {
        "processor": processor.fingerprint,
        "letters": list(processor.letters),
        "letter_ids": processor.letter_ids,
    }
    if any(made_for[key] != value for key, value in here.items()):
        raise InputError(
            f"{path}: the processor inside is not the one that it was exported with: export it "
            f"again"
        )
    if made_for["prompt"] != PROMPT_TEMPLATE:
        raise InputError(
            f"{path} was trained with the prompt {made_for['prompt']!r}, this version has another"
        )
    return Bundle(model.eval(), processor, manifest, torch.device(device), fingerprint)


def _check_whole(path: Path) -> str:
    """Refuse a file that is not as it was written; return a fingerprint of its content."""
    digests = path.with_name(f"{path.name}.sha256")
    if digests.is_file() and digests.read_bytes().split()[:1] != [file_digest(path).encode()]:
        raise InputError(
            f"{path} has not the SHA-256 that {digests} names: copy both again, or export again"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            parts = [(part.filename, part.file_size, part.CRC) for part in archive.infolist()]
            torn = None if digests.is_file() else archive.testzip()
    except Exception as error:  # zip and its decompressors each raise their own
        raise InputError(
            f"{path} is no whole TorchScript file ({error}): export or copy it again"
        ) from error
    if torn:
        raise InputError(
            f"{path} is no whole TorchScript file ({torn} is damaged): export or copy it again"
        )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
