"""The frozen vision tower, paid for once: image features on disk, by content of the picture.

One small safetensors file a picture: it appears whole or not at all, is mapped and not read, and
may be written by several processes at once, for all write the same. Files of another encoder lie in
another folder.
"""

import hashlib
import os
import shutil
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from bridgeblip.bridge.processing import QuestionProcessor
from bridgeblip.data.pictures import LOADERS, load_ahead
from bridgeblip.data.questions import Question
from bridgeblip.files import atomically

DEFAULT_LIMIT = 40 * 10**9  # bytes of features on disk: some 55,000 pictures of the real model
PICTURES_AT_ONCE = 32  # that the vision tower is given
SPARE_DISK = 10**9  # bytes that the cache leaves free


def encoder_key(
    model: nn.Module, processor: QuestionProcessor, parts: tuple[str, ...] = ("vision_model.",)
) -> str:
    """SHA-256 over the processor and the weights whose names begin with ``parts``: equal keys give
    equal features."""
    digest = hashlib.sha256(processor.fingerprint.encode())
    for name, tensor in model.state_dict().items():
        if not name.startswith(parts):
            continue
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


class FeatureCache:
    """Features of pictures under one encoder, (patches + 1, vision width) each."""

    def __init__(self, folder: str | Path, encoder: str):
        self.root = Path(folder)
        self.folder = self.root / encoder[:32]

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def write(self, key: str, features: torch.Tensor) -> None:
        """Store the features of the picture with content ``key``, with their checksum."""
        features = features.detach().cpu().contiguous()
        checksum = {"crc32": str(_crc32(features))}
        with atomically(self.path(key)) as partial:
            save_file({"features": features}, partial, checksum)
            if not _is_whole(partial):
                raise OSError(f"{partial} was not stored as written: is the disk full?")

    def has(self, key: str) -> bool:
        """Whether whole features of this picture are there; torn ones count as none."""
        return _is_whole(self.path(key))

    def read(self, key: str) -> torch.Tensor:
        """Return a picture's features, mapped from the disk."""
        with safe_open(self.path(key), framework="pt") as file:
            return file.get_tensor("features")


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata()["crc32"] == str(_crc32(file.get_tensor("features")))
    except (FileNotFoundError, SafetensorError):
        return False


def _crc32(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.view(torch.uint8).numpy())


@torch.no_grad()
def fill(
    cache: FeatureCache,
    model: nn.Module,
    processor: QuestionProcessor,
    pictures: dict[str, Path],
    batch_size: int = PICTURES_AT_ONCE,
    limit: int = DEFAULT_LIMIT,
    share: tuple[int, int] = (0, 1),
) -> bool:
    """Encode the pictures whose features are not there yet; return False if they would not fit.

    Batches are the same whatever is there already, so that an interrupted run goes on with the same
    numbers.

    Args:
        pictures: content key -> a file with that content.
        batch_size: pictures that the tower is given at once.
        limit: most bytes of all features together; those used longest ago make room.
        share: (rank, processes): each process encodes its part of the batches.
    """
    keys, (rank, processes) = list(pictures), share
    with ThreadPoolExecutor(LOADERS) as pool:
        checked = tqdm(
            pool.map(cache.has, keys),
            "checking cached pictures",
            len(keys),
            disable=rank > 0,
            leave=False,
        )
        missing = {key for key, is_there in zip(keys, checked, strict=True) if not is_there}
        starts = range(0, len(keys), batch_size)[rank::processes]
        chunks = [keys[i : i + batch_size] for i in starts]
        chunks = [chunk for chunk in chunks if missing.intersection(chunk)]
        weight, count = next(model.parameters()), sum(map(len, chunks))
        positions = model.vision_model.embeddings.num_positions
        size = positions * model.config.vision_config.hidden_size * weight.itemsize
        if chunks and not _make_room(cache, keys, size, len(missing), limit):
            return False
        loaded = load_ahead(lambda key: processor.load_pixels(pictures[key]), chunks)
        writing = ()
        with tqdm(
            total=count, desc="encoding pictures", unit="picture", disable=rank > 0 or not count
        ) as bar:
            for chunk, pixels in zip(chunks, loaded, strict=True):
                features = model.encode_image(torch.stack(pixels).to(weight.device)).cpu()
                list(
                    writing
                )  # of the pictures before, while these were encoded; raises what it did
                fresh = [(key, f) for key, f in zip(chunk, features, strict=True) if key in missing]
                writing = pool.map(lambda one: cache.write(*one), fresh)
                bar.update(len(chunk))
            list(writing)
    for key in keys[rank::processes]:
        if key not in missing:
            with suppress(PermissionError):  # another user's
                os.utime(cache.path(key))  # used now: the last to make room
    return True


def _make_room(
    cache: FeatureCache, keys: Sequence[str], size: int, missing: int, limit: int
) -> bool:
    """Delete features used longest ago until those ``missing`` fit, ``size`` bytes each; False if
    they can't."""
    if size * len(keys) > limit:
        return False
    cache.folder.mkdir(parents=True, exist_ok=True)
    wanted = {cache.path(key) for key in keys}
    found = [
        (path.stat().st_mtime, path.stat().st_size, path)
        for path in cache.root.glob(f"{'[0-9a-f]' * 32}/*.safetensors")
    ]
    free = shutil.disk_usage(cache.folder).free - SPARE_DISK
    excess = max(
        sum(stored for _, stored, _ in found) + size * missing - limit, size * missing - free
    )
    for _, stored, path in sorted(found):
        if excess > 0 and path not in wanted:
            path.unlink(missing_ok=True)
            excess -= stored
    return excess <= 0


class CachedPictures:
    """Reads features of questions' pictures from the cache, for ``QuestionProcessor.collate``.

    Where ``device`` is a GPU with room for all of them, they lie there as ``table``, and a batch
    tells ``picture_rows`` (B,) in it; else it has ``image_embeds`` (B, patches + 1, vision width).
    """

    def __init__(
        self, cache: FeatureCache, key_of: dict[Path, str], device: str | torch.device = "cpu"
    ):
        self.cache, self.key_of = cache, key_of
        self.row_of = {key: row for row, key in enumerate(dict.fromkeys(key_of.values()))}
        size = len(self.row_of) * cache.read(next(iter(self.row_of))).nbytes
        on_gpu = torch.device(device).type == "cuda"
        self.resident = on_gpu and size < torch.cuda.mem_get_info(device)[0] / 2

    def table(self, device: str | torch.device) -> torch.Tensor:
        """Return all features (pictures, patches + 1, vision width) on ``device``."""
        one = self.cache.read(next(iter(self.row_of)))
        table = torch.empty(len(self.row_of), *one.shape, dtype=one.dtype, device=device)
        for key, row in self.row_of.items():
            table[row] = self.cache.read(key)
        return table

    def __call__(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        keys = [self.key_of[question.image] for question in questions]
        if self.resident:
            return {"picture_rows": torch.tensor(list(map(self.row_of.get, keys)))}
        return {"image_embeds": torch.stack(list(map(self.cache.read, keys)))}
