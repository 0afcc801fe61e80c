import json

import pytest
import torch
from conftest import LAYERS, ROOT
from transformers import InstructBlipConfig

from bridgeblip import InputError
from bridgeblip.bridge.base import BridgeBlipConfig, slice_config
from bridgeblip.bridge.budget import certify_budget, count_parts, held_memory
from bridgeblip.bridge.export import TraceableModel
from bridgeblip.bridge.lora import attach_bridge, merge_bridge
from bridgeblip.bridge.model import load_sliced
from bridgeblip.bridge.settings import DEFAULT_DECODER_LAYERS, BridgeSettings
from bridgeblip.training.callbacks import Averages
from bridgeblip.training.settings import TrainSettings
from bridgeblip.training.trainer import optimizer
from tools.make_full_size_base import FULL_SIZE_CONFIG


@pytest.fixture(scope="module")
def real() -> BridgeBlipConfig:
    return slice_config(
        InstructBlipConfig.from_dict(json.loads(json.dumps(FULL_SIZE_CONFIG))),
        DEFAULT_DECODER_LAYERS,
    )


def test_the_real_model_stays_under_three_billion(real):
    parts = certify_budget(real)
    assert parts["total"] == 2_916_893_444 == sum(parts.values()) - parts["total"]
    assert (parts["vision tower"], parts["head"]) == (985_952_256, 4 * 2048 + 4)
    assert (
        parts["T5 decoder"] == 8 * 65_017_856 + 32 * 32 + 2048
    )  # layers, position bias, last norm
    with pytest.raises(
        InputError, match=r"above the limit of 2,900,000,000.*keep fewer decoder layers"
    ):
        certify_budget(real, 2_900_000_000)


def test_the_bridge_of_the_real_model(real):
    trained = held_memory(real, torch.bfloat16, BridgeSettings())["adapters and head"] // 4
    head = 4 * 2048 + 4
    idle = 8 * 96 * (2048 + 2048)  # an adapter on self-attention's q, as published, or on its k
    assert trained - head == 41_680_896 - 2 * idle


def test_counts_are_those_of_the_loaded_model(base, processor):
    model = load_sliced(base, processor.letter_ids, LAYERS)
    assert sum(count_parts(model).values()) == sum(p.numel() for p in model.parameters())
    assert certify_budget(model.config)["total"] == sum(p.numel() for p in model.parameters())


def test_the_shipped_config_is_what_slicing_the_real_one_gives(real):
    shipped = BridgeBlipConfig.from_json_file(ROOT / "instructblip.config.json").to_dict()
    expected = real.to_dict()
    assert (
        shipped.pop("architectures") == ["BridgeBlipForMultipleChoice"]
        and expected.pop("architectures") is None
    )
    assert shipped == expected
    assert (
        shipped["text_config"]["dense_act_fn"] == "gelu"
        and not shipped["text_config"]["scale_decoder_outputs"]
    )


def size(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [96, 0])
def test_held_memory_is_what_training_and_answering_hold(base, processor, batch, dtype, rank):
    bridge = BridgeSettings(rank=rank)
    sliced = load_sliced(base, processor.letter_ids, LAYERS, dtype=dtype)
    config = sliced.config
    model = attach_bridge(sliced, bridge)
    averages, steps = Averages(model, 0.05), optimizer(model, TrainSettings())
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [
        p
        for name, p in model.named_parameters()
        if not p.requires_grad and ".head.original_module." not in name
    ]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    steps.step()
    moments = [state[name] for state in steps.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert held_memory(config, dtype, bridge) == {
        "frozen weights": size(frozen),
        "adapters and head": size(trained),
        "their gradients": size(p.grad for p in trained),
        "AdamW's two moments": size(moments),
        "averaged adapters and head": size(averages.mean.values()),
        "total": size(frozen) + 3 * size(trained) + size(moments),
    }
    if rank:  # a head that was trained alone stays in float32
        exported = size(TraceableModel(merge_bridge(model)).parameters())
        assert held_memory(config, dtype) == {"weights": exported, "total": exported}


def test_float16_keeps_the_products_that_overflow_in_float32(real):
    wider = held_memory(real, torch.float16)["total"] - held_memory(real, torch.bfloat16)["total"]
    assert (
        wider == 2 * 32 * 2048 * 5120
    )  # wo of 24 encoder and 8 decoder layers; the head is in float32 in both
