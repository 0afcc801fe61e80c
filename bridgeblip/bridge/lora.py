"""The LoRA bridge over the cut layers: attaching and merging it."""

import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from bridgeblip.bridge.base import stored_dtype
from bridgeblip.bridge.model import BridgeBlipForMultipleChoice
from bridgeblip.bridge.settings import BridgeSettings
from bridgeblip.training.settings import rank_for

# Which linears get adapters: all that do work. With a single decoder token, self-attention is
# o(v(x)): its q and k get no gradient and do none.
BRIDGED_LINEARS = (
    r"language_model\.decoder\.block\.\d+\.layer\."
    r"(0\.SelfAttention\.(v|o)|1\.EncDecAttention\.(q|k|v|o)"
    r"|2\.DenseReluDense\.(wi|wi_0|wi_1|wo))"
)


def attach_bridge(
    model: BridgeBlipForMultipleChoice, settings: BridgeSettings
) -> PeftModel | nn.Module:
    """Put LoRA adapters on the kept decoder layers and make them and the head trainable, in fp32.

    Rank and alpha are the settings' share of this decoder's width. With rank 0 only the head is
    trainable, and the model itself is returned. LoRA: Hu et al. 2021.
    """
    width = model.config.text_config.d_model
    rank = rank_for(settings.rank, width)
    if rank == 0:
        model.requires_grad_(False)
        model.head.float().requires_grad_(True)
        return model
    config = LoraConfig(
        r=rank,
        lora_alpha=settings.alpha / settings.rank * rank,
        lora_dropout=settings.dropout,
        target_modules=BRIDGED_LINEARS,
        modules_to_save=["head"],
    )
    with warnings.catch_warnings():  # peft asks transformers a question by its old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        bridged = get_peft_model(model, config)
    for parameter in bridged.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return bridged.train().eval()  # once through all: the dropouts are new


def round_fairly(
    values: torch.Tensor, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Cast fp32 ``values`` to ``dtype``; to bfloat16 by stochastic rounding, up or down by the
    distance to each.

    A LoRA update is often smaller than half a step of bfloat16. Rounding to the nearest would then
    give the old weight back nearly everywhere, and the low-rank update, small in each weight but
    alike in all, would shrink. Rounded stochastically it is there in the mean (Gupta et al. 2015).
    """
    if dtype != torch.bfloat16:
        return values.to(dtype)
    noise = torch.randint(1 << 16, values.shape, dtype=torch.int32, generator=generator).to(
        values.device
    )
    bits = values.contiguous().view(torch.int32) + noise  # bfloat16 is the upper half of fp32
    return (bits & -(1 << 16)).view(torch.float32).to(dtype)


@torch.no_grad()
def merge_bridge(model: nn.Module) -> BridgeBlipForMultipleChoice:
    """Return the plain model with the adapters merged into its linears and the trained head in
    place.

    Each product is added in fp32 and only then cast to the model's own format: adding in half
    precision would round the update away.
    """
    if not isinstance(model, PeftModel):
        return model
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            weight = layer.get_base_layer().weight
            update = layer.get_delta_weight("default")  # fp32, as the adapters are
            weight.copy_(round_fairly(weight.float() + update, weight.dtype, generator))
    dtype = model.get_input_embeddings().weight.dtype
    merged = model.unload()
    merged.head.to(stored_dtype("head.weight", dtype))
    return merged
