"""The parameter budget: what inference loads, counted by part, against a competition's limit; and
the bytes that it, or its training, holds."""

import re

import torch
from torch import nn

from bridgeblip import InputError
from bridgeblip.bridge.base import BridgeBlipConfig, stored_dtype
from bridgeblip.bridge.lora import attach_bridge
from bridgeblip.bridge.model import empty_model, own_parameters
from bridgeblip.bridge.settings import BridgeSettings
from bridgeblip.training.settings import BUDGET_LIMIT
from bridgeblip.training.weights import trainable

PARTS = {
    "vision_model": "vision tower",
    "query_tokens": "Q-Former",
    "qformer": "Q-Former",
    "language_projection": "projection",
    "language_model.shared": "embeddings",
    "language_model.encoder": "T5 encoder",
    "language_model.decoder": "T5 decoder",
    "head": "head",
}
# What an export leaves out: over the decoder's single token it does nothing.
LEFT_OUT = r"language_model\.decoder\..*\.SelfAttention\.(q|k|relative_attention_bias)\.weight"


def count_parts(model: nn.Module) -> dict[str, int]:
    """Return the parameters of an unbridged model by part.

    Counted logically: a shared tensor once, and by shape, whatever the storage packs into a byte.
    """
    counts = dict.fromkeys(PARTS.values(), 0)
    for name, parameter in own_parameters(model).items():
        prefix = next(filter(name.startswith, PARTS))
        counts[PARTS[prefix]] += parameter.numel()
    return counts


def certify_budget(config: BridgeBlipConfig, limit: int = BUDGET_LIMIT) -> dict[str, int]:
    """Return the parameters of the merged model by part, and their "total".

    Raises:
        InputError: if the total is above ``limit``.
    """
    parts = count_parts(empty_model(config))
    total = sum(parts.values())
    if total > limit:
        listed = ", ".join(f"{name} {count:,}" for name, count in parts.items())
        raise InputError(
            f"{total:,} parameters are above the limit of {limit:,} ({listed}): keep fewer decoder "
            f"layers"
        )
    return parts | {"total": total}


def held_memory(
    config: BridgeBlipConfig, dtype: torch.dtype, bridge: BridgeSettings | None = None
) -> dict[str, int]:
    """Return the bytes that are held all the time, by part, and their "total": by an exported model
    in ``dtype``, or, with a bridge, by its training.

    This is what shapes and number formats tell. What comes and goes is not in it: activations,
    pictures, buffers.
    """
    model = empty_model(config)
    exported = frozen = 0
    for name, parameter in own_parameters(model).items():
        size = parameter.numel() * stored_dtype(name, dtype).itemsize
        exported += 0 if re.fullmatch(LEFT_OUT, name) else size
        frozen += 0 if name.startswith("head.") else size
    if bridge is None:
        return {"weights": exported, "total": exported}
    learning = trainable(attach_bridge(model, bridge)).values()
    trained = sum(parameter.nbytes for parameter in learning)
    parts = {
        "frozen weights": frozen,
        "adapters and head": trained,
        "their gradients": trained,
        "AdamW's two moments": 2 * trained,
        "averaged adapters and head": trained,
    }
    return parts | {"total": sum(parts.values())}
