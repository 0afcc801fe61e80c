"""The weights of a model folder or hub repository: reading only the tensors that are asked for."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import model_info, snapshot_download
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from bridgeblip import InputError
from bridgeblip.files import read_json

SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "qformer_tokenizer/*"]
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@contextmanager
def asking_hub(base: str | Path) -> Iterator[None]:
    """Turn whatever the hub's client raises in the block into one error that says what to do."""
    try:
        yield
    except Exception as error:  # a dozen unrelated types
        raise InputError(
            f"base model {base} is neither a local folder nor to be had from the hub "
            f"({type(error).__name__}: {error}). Check the name, the connection and the disk's "
            f"space, or give the folder of a copy."
        ) from error


def download(base: str | Path, revision: str | None, patterns: list[str]) -> Path:
    """Return the folder of a hub id's files, downloading those that are not there yet, or what is
    there of them where the hub can't be reached.

    Raises:
        InputError: if they can't be had.
    """
    with asking_hub(base):
        return Path(snapshot_download(str(base), revision=revision, allow_patterns=patterns))


def require_hub(base: str) -> None:
    """Refuse a hub id that can't be asked for now, with the hub's reason."""
    with asking_hub(base):
        model_info(base, timeout=10)


class TensorReader:
    """Reads single tensors of a folder's safetensors shards, nothing else.

    Args:
        folder: in Hugging Face's layout.
        hub_id: whose ``revision`` a shard that the folder lacks is downloaded from, when first
            needed; None: the folder is all that there is.
        device: where the tensors go, straight from the file.

    Attributes:
        shard_of: file of each stored tensor.
        bytes_read: how much of the shards was asked for so far.
    """

    def __init__(
        self,
        folder: Path,
        hub_id: str | None = None,
        revision: str | None = None,
        device: str | torch.device = "cpu",
    ):
        self.folder, self.hub_id, self.revision, self.device = folder, hub_id, revision, device
        self.bytes_read = 0
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
            if self.hub_id is None:
                raise InputError(
                    f"weights file {path} of the base is missing: copy the whole model folder"
                )
            download(self.hub_id, self.revision, [file])
        if not path.is_file():
            require_hub(self.hub_id)
            raise InputError(
                f"base {self.hub_id} has no {file}: expected weights in safetensors files"
            )
        try:
            return safe_open(path, framework="pt", device=str(self.device))
        except SafetensorError as error:
            raise InputError(
                f"weights file {path} can't be read ({error}): it is truncated; copy it again"
            ) from error

    def read(
        self, names: Sequence[str], dtype_of: Callable[[str], torch.dtype] | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the named tensors, each in the format that ``dtype_of`` gives for its name, or as
        stored.

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
                        tensors[name] = tensor.to(dtype_of(name)) if dtype_of else tensor
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
