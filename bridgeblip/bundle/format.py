"""``torchscript.pt``: what is in it, loading it, and whether it is as it was written: found out
beside loading, and remembered."""

import json
import pkgutil
import re
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bridgeblip import InputError
from bridgeblip.bundle.processing import Processor
from bridgeblip.files import cache_folder, digest_of, is_out_of_memory, write_text
from bridgeblip.machine import FORMATS, LARGE, number_format, slow_format

# In a process of their own: loading TorchScript keeps Python's lock from all threads.
SHA256 = (
    "import hashlib, sys; print(hashlib.file_digest(open(sys.argv[1], 'rb'), 'sha256').hexdigest())"
)
CHECKSUMS = "import sys, zipfile; print(zipfile.ZipFile(sys.argv[1]).testzip() or '')"
BUNDLE_FORMAT = 1
MANIFEST_FILE = "manifest.json"
# Who turns questions into a model's inputs, by the manifest's ``kind``. Paths and not classes:
# a reader of one kind imports nothing of the others.
PROCESSORS = {
    "instructblip": "bridgeblip.bridge.processing:QuestionProcessor",
    "chat": "bridgeblip.vlm.processing:ChatProcessor",
}


def _is(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kind)


# What a manifest holds, and which values can be right.
MANIFEST = {
    "format": _is(int),
    "kind": _is(str),
    "processor": _is(str),
    "letters": _is(list),
    "letter_ids": _is(list),
    "prompt": _is(str),
    "dtype": lambda name: name in FORMATS,
    "config": _is(dict),
    "trained": lambda it: isinstance(it, dict) and _is(float | int)(it.get("permute_below") or 0),
}


@dataclass(frozen=True)
class Bundle:
    """A model and the processor it was trained with: they can't disagree."""

    # Methods ``encode_image(pixel_values)`` and ``score(image_embeds, <the text inputs>) -> logits
    # (B, letters)``; None where only the rest was read.
    model: torch.jit.ScriptModule | None
    # Turns pictures and questions into the model's inputs, of the class that the kind names.
    processor: Processor
    manifest: dict
    device: torch.device | None
    # Tells the content of one file from another's.
    fingerprint: str = ""


@contextmanager
def as_traced():
    """How a bundle is run by whoever runs it: no gradients, and the graph as it was traced.

    The optimising executor would give the first calls, after an interruption too, another graph,
    and on a GPU compile a kernel for each shape that comes.
    """
    with torch.inference_mode(), torch.jit.optimized_execution(False):
        yield


def find_bundle(path: str | Path) -> Path:
    """Return the path; raise InputError, naming the notebook that comes first, if no file is
    there."""
    path = Path(path)
    if path.is_file():
        return path
    trained = list(path.parent.glob("weights-*.pt"))
    first = "torchscript.ipynb" if trained else "train.ipynb"
    raise InputError(f"{path} not found: run {first} first, or put a ready torchscript.pt there")


def load_bundle(path: str | Path, device: str | torch.device = "cpu") -> Bundle:
    """Load ``torchscript.pt`` and check that it is whole, and of a format that this version reads.

    The file is held against ``torchscript.pt.sha256`` where that lies beside it, else against the
    checksums inside, while it is loaded. Trust a bundle like a program: TorchScript can hold
    arbitrary operations.

    Raises:
        InputError: if the file is missing, damaged, foreign, of a newer format, or made for another
            prompt.
    """
    path = find_bundle(path)
    with checked(path):
        header = read_header(path)
        try:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # deprecated
                model = torch.jit.load(str(path), map_location=device).eval()
        except (RuntimeError, ValueError) as error:  # torch.OutOfMemoryError is one
            if not is_out_of_memory(error):
                raise InputError(
                    f"{path} is no TorchScript file ({str(error)[:200]}): export or copy it again"
                ) from error
            size = path.stat().st_size / 1e9
            raise InputError(
                f"no memory on {device} for {path}, {size:.1f} GB: restart this and other "
                f"notebooks, or take a larger machine"
            ) from error
    slow = slow_format(device, number_format(header.manifest["dtype"]))
    if slow and path.stat().st_size > LARGE:
        remedy = "answering may take hours: take another machine, or export it as float32"
        warnings.warn(f"{path}: {slow}, {remedy}", stacklevel=2)
    return replace(header, model=model, device=torch.device(device))


def read_header(path: str | Path) -> Bundle:
    """Read what a bundle says of itself, and its processor: all but the model.

    Raises:
        InputError: if the file is missing, torn, foreign, of a newer format or kind, or was
            exported with another processor or prompt.
    """
    path = find_bundle(path)
    files = {}
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            for part in parts:
                if "/extra/" in part.filename:
                    name = part.filename.partition("/extra/")[2]
                    files[name] = archive.read(part).decode("utf-8")
    except Exception as error:  # zip, its decompressors and the file system each raise their own
        raise InputError(
            f"{path} is no whole TorchScript file ({error}): export or copy it again"
        ) from error
    if MANIFEST_FILE not in files:
        raise InputError(
            f"{path} is no bridgeblip bundle, it lacks {MANIFEST_FILE}: give what export writes"
        )
    manifest = _read_manifest(path, files.pop(MANIFEST_FILE))
    processor = _make_processor(path, manifest, files)
    checksums = [(part.filename, part.file_size, part.CRC) for part in parts]
    return Bundle(None, processor, manifest, None, digest_of(checksums))


def _read_manifest(path: Path, text: str) -> dict:
    """Return the manifest, of whose values at least the types are right."""
    remedy = "export or copy it again"
    try:
        manifest = {"kind": "instructblip"} | json.loads(text)  # before there were kinds
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} has no readable manifest ({error!r}): {remedy}") from error
    number = manifest.get("format")
    if isinstance(number, int) and number > BUNDLE_FORMAT:
        raise InputError(
            f"{path} has format {number}, this version reads {BUNDLE_FORMAT}: update bridgeblip"
        )
    for key, fits in MANIFEST.items():
        value = manifest.get(key)
        if not fits(value):
            raise InputError(f"{path} has no readable manifest ({key} is {value!r:.80}): {remedy}")
    return manifest


def _make_processor(path: Path, manifest: dict, files: dict[str, str]) -> Processor:
    """Return the processor that the manifest names, if it is the one of the export."""
    if manifest["kind"] not in PROCESSORS:
        raise InputError(
            f"{path} is of the kind {manifest['kind']!r}, this version reads "
            f"{', '.join(PROCESSORS)}: update bridgeblip"
        )
    try:
        processor = pkgutil.resolve_name(PROCESSORS[manifest["kind"]])(files)
    except Exception as error:  # a file that is missing or malformed fails in its own parser
        raise InputError(
            f"{path}: the processor inside can't be read ({error!r}): export it again"
        ) from error
    inside = (processor.fingerprint, list(processor.letters), processor.letter_ids)
    if inside != tuple(manifest[key] for key in ("processor", "letters", "letter_ids")):
        raise InputError(
            f"{path}: the processor inside is not the one that it was exported with: export it "
            f"again"
        )
    if manifest["prompt"] != processor.template:
        raise InputError(
            f"{path} was trained with the prompt {manifest['prompt']!r}, this version has another: "
            f"take the version of bridgeblip that wrote it"
        )
    return processor


@contextmanager
def checked(path: Path):
    """Find out, beside what is done within, whether a file is as it was written.

    It is held against the SHA-256 beside it, which is remembered of an unchanged file, or without
    one against the checksums inside.

    Raises:
        InputError: on leaving, if the file is damaged; also in place of an InputError within.
    """
    named = read_digests(path)
    if recall(path) in named:
        yield
        return
    command = [sys.executable, "-I", "-c", SHA256 if named else CHECKSUMS, str(path)]
    pipe, failure = subprocess.PIPE, None
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    try:
        yield
    except InputError as error:
        failure = error
    except BaseException:
        process.kill()
        raise
    found = process.communicate()[0].strip()  # empty if the file can't be read to its end
    if named and found not in named:
        raise InputError(
            f"{path} has not the SHA-256 that {digest_path(path)} names: copy both again, or "
            f"export again"
        ) from failure
    if failure:
        raise failure
    if named:
        remember(path, found)
    elif found or process.returncode:
        raise InputError(
            f"{path} is no whole TorchScript file ({found or 'unreadable'} is damaged): export or "
            f"copy it again"
        )


def digest_path(path: Path) -> Path:
    """Where the SHA-256 of a file lies."""
    return path.with_name(f"{path.name}.sha256")


def read_digests(path: Path) -> list[str]:
    """Return the SHA-256 that lie beside a file; empty where there is no such file.

    More than one while the file is being replaced. Tools write them in small letters or capitals,
    with names before or behind, some of them in UTF-16.

    Raises:
        InputError: if none can be found in it.
    """
    beside = digest_path(path)
    if not beside.is_file():
        return []
    content = beside.read_bytes().replace(b"\0", b"")  # UTF-16 of plain letters, in any order
    found = re.findall(rb"(?<![0-9a-zA-Z])[0-9a-fA-F]{64}(?![0-9a-zA-Z])", content)
    if not found:
        raise InputError(
            f"{beside} holds no SHA-256: copy it again, or remove it to check {path.name} by its "
            f"own checksums"
        )
    return [digest.decode().lower() for digest in found]


def recall(path: Path) -> str | None:
    """Return the SHA-256 that a file had when it was last read; None if it has changed since."""
    with suppress(OSError, ValueError, InputError):  # not there, damaged, or no home
        return _memory_of(path).read_text(encoding="utf-8")


def remember(path: Path, digest: str) -> None:
    """Keep the SHA-256 of a file as it is now."""
    with suppress(OSError, InputError):  # a read-only home: next time the file is read again
        write_text(_memory_of(path), digest)


def _memory_of(path: Path) -> Path:
    """Where the SHA-256 of a file is kept, by all that changes when it does."""
    stat = path.stat()
    state = [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    return cache_folder() / "digests" / digest_of([str(path.resolve()), state])
