"""A base model folder or hub repository: where it lies, and reading only the tensors that stay.

The base is an ``InstructBlipForConditionalGeneration`` in Hugging Face's own layout:
``config.json``, one or more ``*.safetensors`` shards, and the processor's files.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from bridgeblip import InputError
from bridgeblip.bridge.settings import REAL_BASE
from bridgeblip.files import read_json

TINY_BASE = Path(__file__).parent.parent / "embedded" / "tiny"
"""The embedded base model; the name "tiny" stands for it."""

REAL_REVISION = "bf9bd58cb3bb06e88c03b80f9cc346b90094bc6d"

SMALL_FILES = ["*.json", "*.txt", "*.model", "qformer_tokenizer/*"]
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
LM_HEAD = "language_model.lm_head.weight"
EMBEDDINGS = "language_model.shared.weight"


def resolve_base(base: str | Path, revision: str | None = None) -> Path:
    """Return the folder of ``base``: "tiny", a local folder, or a hub id (its small files are
    downloaded).

    A local folder wins over the hub. Weights are downloaded by ``TensorReader``, not here.

    Raises:
        InputError: if nothing of that name can be had.
    """
    if str(base) == "tiny":
        return TINY_BASE
    folder = Path(base)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(
                f"base model folder {folder} has no config.json: expected a Hugging Face model"
            )
        return folder
    if str(base).count("/") != 1 or str(base).startswith((".", "/", "~")):
        raise InputError(
            f"base model {str(base)!r} not found: expected 'tiny', an existing folder, or a hub id "
            f"like {REAL_BASE}"
        )
    return _download(base, revision, SMALL_FILES)


def _download(base: str | Path, revision: str | None, patterns: list[str]) -> Path:
    """Return the folder of a hub id's files, downloading those that are not there yet."""
    try:
        return Path(
            snapshot_download(
                str(base), revision=pinned_revision(base, revision), allow_patterns=patterns
            )
        )
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise InputError(
            f"base model {base} is neither a local folder nor to be had from the hub "
            f"({type(error).__name__}: "
            f"{error}). Check the name, the connection and the disk's space, or give the folder of "
            f"a copy."
        ) from error


def pinned_revision(base: str | Path, revision: str | None) -> str | None:
    """Return the revision that is taken where none is asked for: of the real base, the one that is
    known."""
    return revision or (REAL_REVISION if str(base) == REAL_BASE else None)


class TensorReader:
    """Reads single tensors of a base from its safetensors shards, nothing else.

    Args:
        base: what ``resolve_base`` takes; missing shards of a hub id are downloaded when first
            needed.
        device: where the tensors go, straight from the file.

    Attributes:
        bytes_read: how much of the shards was asked for so far.
    """

    def __init__(
        self, base: str | Path, revision: str | None = None, device: str | torch.device = "cpu"
    ):
        self.base, self.revision, self.device = base, revision, device
        self.bytes_read = 0
        self.folder = resolve_base(base, revision)
        index = self.folder / INDEX_FILE
        if index.is_file():
            self.shard_of = read_json(index).get("weight_map")
            if not isinstance(self.shard_of, dict):
                raise InputError(f"{index} has no weight_map: copy it again")
        else:
            with self._open(SINGLE_FILE) as shard:
                self.shard_of = dict.fromkeys(shard.keys(), SINGLE_FILE)

    def _open(self, file: str):
        path = self.folder / file
        if not path.is_file():
            if Path(self.base).is_dir() or str(self.base) == "tiny":
                raise InputError(
                    f"weights file {path} of the base is missing: copy the whole model folder"
                )
            _download(self.base, self.revision, [file])
        if not path.is_file():
            raise InputError(
                f"base {self.base} has no {file}: expected weights in safetensors files"
            )
        try:
            return safe_open(path, framework="pt", device=str(self.device))
        except SafetensorError as error:
            raise InputError(
                f"weights file {path} can't be read ({error}): it is truncated; copy it again"
            ) from error

    def read(
        self, names: Sequence[str], dtype_of: Callable[[str], torch.dtype]
    ) -> dict[str, torch.Tensor]:
        """Return the named tensors, each in the format that ``dtype_of`` gives for its name.

        On a CPU those that keep their format are mapped from the file, privately: they are read
        when first used.

        Raises:
            InputError: if the base lacks a tensor, naming it.
        """
        self._require(names)
        tensors = {}
        with tqdm(total=len(names), desc="reading", unit="tensor") as bar:
            for file in sorted({self.shard_of[name] for name in names}):
                with self._open(file) as shard:
                    for name in [n for n in names if self.shard_of[n] == file]:
                        tensor = shard.get_tensor(name)
                        self.bytes_read += tensor.nbytes
                        tensors[name] = tensor.to(dtype_of(name))
                        bar.update()
        return tensors

    def _require(self, names: Sequence[str]) -> None:
        missing = [name for name in names if name not in self.shard_of]
        if missing:
            raise InputError(
                f"base {self.folder} lacks {len(missing)} expected tensors, the first is "
                f"{missing[0]!r}"
            )

    def read_rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Return ``rows`` of a matrix, shape (len(rows), width), fp32, without reading the
        others; errors as ``read``."""
        self._require([name])
        with self._open(self.shard_of[name]) as shard:
            matrix = shard.get_slice(name)
            chosen = torch.cat([matrix[row : row + 1] for row in rows])
        self.bytes_read += chosen.nbytes
        return chosen.float()


def source_name(name: str, kept_layers: Sequence[int]) -> str:
    """Return the base's name of a tensor that the sliced model calls ``name``.

    Decoder blocks are numbered anew in the slice. The relative position bias exists in block 0 of a
    T5 stack only, so the slice's block 0 takes it from there whichever layer comes first.
    """
    match = re.fullmatch(r"language_model\.decoder\.block\.(\d+)\.(.+)", name)
    if match is None or match[2].endswith("relative_attention_bias.weight"):
        return name
    return f"language_model.decoder.block.{kept_layers[int(match[1])]}.{match[2]}"


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The format of a tensor in a model of ``dtype``.

    In half precision the head stays in fp32, as it was trained: rounded logits would make ties of
    close answers. In fp16 T5's ``wo`` does, too: its products overflow.
    """
    is_head = name.endswith(("head.weight", "head.bias"))
    overflows = name.endswith("DenseReluDense.wo.weight") and dtype == torch.float16
    return torch.float32 if is_head or overflows else dtype
