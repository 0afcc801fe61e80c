"""What slicing, bridging and the head have come to, as a few lines of text for whoever looks on."""

from collections import Counter

import pandas as pd
from peft.tuners.lora import LoraLayer
from torch import nn

from bridgeblip.bridge.budget import count_parts
from bridgeblip.bridge.model import BridgeBlipForMultipleChoice
from bridgeblip.bridge.plan import Plan

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
