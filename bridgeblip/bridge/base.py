"""A base model folder or hub repository: where it lies, what slicing changes in its config, and
reading only the tensors that stay.

The base is an ``InstructBlipForConditionalGeneration`` in Hugging Face's own layout:
``config.json``, one or more ``*.safetensors`` shards, and the processor's files.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import InstructBlipConfig

from bridgeblip import InputError
from bridgeblip.bridge.settings import REAL_BASE
from bridgeblip.data.questions import NUM_CHOICES
from bridgeblip.training.settings import check_decoder_layers
from bridgeblip.training.tensors import SMALL_FILES, TensorReader, download

# The embedded base model; the name "tiny" stands for it.
TINY_BASE = Path(__file__).parent.parent / "embedded" / "tiny"

REAL_REVISION = "bf9bd58cb3bb06e88c03b80f9cc346b90094bc6d"

LM_HEAD = "language_model.lm_head.weight"
EMBEDDINGS = "language_model.shared.weight"


def resolve_base(base: str | Path, revision: str | None = None) -> Path:
    """Return the folder of ``base``: "tiny", a local folder, or a hub id (its small files are
    downloaded).

    A local folder wins over the hub. Weights are downloaded by what ``open_base`` returns.

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
    return download(base, pinned_revision(base, revision), SMALL_FILES)


def hub_id(base: str | Path) -> str | None:
    """Return ``base`` if it is a hub id, None if it is "tiny" or a folder."""
    return None if str(base) == "tiny" or Path(base).is_dir() else str(base)


def pinned_revision(base: str | Path, revision: str | None) -> str | None:
    """Return the revision that is taken where none is asked for: of the real base, the one that is
    known."""
    return revision or (REAL_REVISION if str(base) == REAL_BASE else None)


def open_base(
    base: str | Path, revision: str | None = None, device: str | torch.device = "cpu"
) -> TensorReader:
    """Return what reads single tensors of a base; missing shards of a hub id are downloaded when
    first needed. Errors as ``resolve_base``."""
    folder, pinned = resolve_base(base, revision), pinned_revision(base, revision)
    return TensorReader(folder, hub_id(base), pinned, device)


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


class BridgeBlipConfig(InstructBlipConfig):
    """An InstructBLIP config and what was cut from it.

    ``text_config.num_decoder_layers`` is the number of *kept* decoder layers, so that the T5 code
    builds the sliced decoder by itself.
    """

    model_type = "bridgeblip"

    # Indices, in the base's decoder, of the layers that stay; in order.
    kept_decoder_layers: list[int] | None = None
    # How many decoder layers the base has.
    base_decoder_layers: int | None = None
    # Width of the classification head.
    num_choices: int = NUM_CHOICES


def slice_config(base: InstructBlipConfig, layers: Sequence[int]) -> BridgeBlipConfig:
    """Return the config of ``base`` with only ``layers`` left of its decoder.

    Raises:
        InputError: if the base's language model is not a T5, or the layers can't be kept.
    """
    if base.text_config.model_type != "t5":
        raise InputError(
            f"the base's language model is {base.text_config.model_type!r}; expected 't5' "
            f"(InstructBLIP-FlanT5): "
            "the slice and the head are made for an encoder-decoder"
        )
    values = base.to_dict()
    values.pop("model_type")
    values.pop("architectures", None)
    available = values["text_config"]["num_decoder_layers"]
    kept = check_decoder_layers(layers, available)
    values["text_config"]["num_decoder_layers"] = len(kept)
    return BridgeBlipConfig(**values, kept_decoder_layers=kept, base_decoder_layers=available)
