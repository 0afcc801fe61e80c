"""The parameter budget: what inference loads, counted by part, against a competition's limit; and
it in bytes; and what slicing, bridging and the head have come to, in a few lines of text."""

import re
from collections import Counter

import pandas as pd
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from bridgeblip import InputError
from bridgeblip.bridge.base import stored_dtype
from bridgeblip.bridge.config import BridgeBlipConfig
from bridgeblip.bridge.lora import BRIDGED_LINEARS
from bridgeblip.bridge.model import BridgeBlipForMultipleChoice, empty_model, own_parameters
from bridgeblip.bridge.plan import Plan
from bridgeblip.bridge.settings import BridgeSettings
from bridgeblip.training.settings import BUDGET_LIMIT

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
LEFT_OUT = r"language_model\.decoder\..*\.SelfAttention\.(q|k|relative_attention_bias)\.weight"
"""What an export leaves out: over the decoder's single token it does nothing."""


def count_parts(model: nn.Module) -> dict[str, int]:
    """Return the parameters of an unbridged model by part.

    Counted logically: a shared tensor once, and by shape, whatever the storage packs into a byte.
    """
    counts = dict.fromkeys(PARTS.values(), 0)
    for name, parameter in own_parameters(model).items():
        prefix = next(filter(name.startswith, PARTS))
        counts[PARTS[prefix]] += parameter.numel()
    return counts


def count_trained(model: nn.Module, bridge: BridgeSettings) -> int:
    """Return how many numbers training changes, adapters and head, without making adapters."""
    rank = bridge.rank_for(model.config.text_config.d_model)
    count = model.head.weight.numel() + model.head.bias.numel()
    for name, module in model.named_modules():
        if re.fullmatch(BRIDGED_LINEARS[bridge.targets], name):
            count += rank * (module.in_features + module.out_features)
    return count


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
    trained = count_trained(model, bridge) * torch.float32.itemsize
    parts = {
        "frozen weights": frozen,
        "adapters and head": trained,
        "their gradients": trained,
        "AdamW's two moments": 2 * trained,
        "averaged adapters and head": trained,
    }
    return parts | {"total": sum(parts.values())}


KEPT, CUT = "■", "·"


def describe_slice(sliced: BridgeBlipForMultipleChoice) -> str:
    """Which decoder layers stay, and what that does to the count of parameters; asked before the
    bridge is there."""
    config, text = sliced.config, sliced.config.text_config
    kept, layers = config.kept_decoder_layers, range(config.base_decoder_layers)
    after = count_parts(sliced)
    block = sliced.language_model.decoder.block[-1].named_parameters()
    layer = sum(p.numel() for name, p in block if "relative_attention_bias" not in name)
    tied = text.tie_word_embeddings
    before = after | {
        "T5 decoder": after["T5 decoder"] + (len(layers) - len(kept)) * layer,
        "head": 0 if tied else text.vocab_size * text.d_model,
    }
    table = pd.DataFrame({"whole base": before, "slice": after})
    table.loc["all"] = table.sum()
    drawing = "".join(KEPT if index in kept else CUT for index in layers)
    return (
        f"decoder layers: {drawing}\n{len(kept)} of {len(layers)} stay: "
        f"{', '.join(map(str, kept))}\n\nparameters\n"
        f"{table.to_string(float_format='{:,.0f}'.format, formatters=['{:,}'.format] * 2)}"
    )


def describe_bridge(model: nn.Module) -> str:
    """Where the adapters sit, their rank, and how many weights learn."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = trained / sum(p.numel() for p in model.parameters())
    adapters = Counter()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            adapters[module.r["default"], ".".join(name.split(".")[-2:])] += 1
    lines = []
    for (rank, place), count in adapters.items():
        lines.append(f"{count} adapters of rank {rank} on {place}")
    bridge = "\n".join(lines) or "no adapters"
    return f"{bridge}\n{trained:,} weights learn, head included: {share:.1%} of all"


def describe_head(plan: Plan) -> str:
    """From which rows of the base's LM head the head starts."""
    processor = plan.processor
    if plan.bridge.head_init == "random":
        return f"the head starts from noise, a row for each of {', '.join(processor.letters)}"
    lines = []
    for letter, row in zip(processor.letters, processor.letter_ids, strict=True):
        token = processor.tokenizer.id_to_token(row)
        lines.append(f"{letter}: row {row} of the LM head, the token {token!r}")
    return "\n".join(lines)
