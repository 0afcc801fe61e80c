import json

import pytest
from conftest import LAYERS, ROOT
from transformers import InstructBlipConfig

from bridgeblip import InputError
from bridgeblip.budget import certify_budget, count_parts, count_trained
from bridgeblip.config import DEFAULT_DECODER_LAYERS, BridgeBlipConfig, BridgeSettings, slice_config
from bridgeblip.model import attach_bridge, empty_model, load_sliced, trained_tensors
from tools.make_full_size_base import FULL_SIZE_CONFIG


@pytest.fixture(scope="module")
def real() -> BridgeBlipConfig:
    return slice_config(InstructBlipConfig.from_dict(json.loads(json.dumps(FULL_SIZE_CONFIG))), DEFAULT_DECODER_LAYERS)


def test_the_real_model_stays_under_three_billion(real):
    parts = certify_budget(real)
    assert parts["total"] == 2_916_893_444 == sum(parts.values()) - parts["total"]
    assert (parts["vision tower"], parts["head"]) == (985_952_256, 4 * 2048 + 4)
    assert parts["T5 decoder"] == 8 * 65_017_856 + 32 * 32 + 2048  # layers, position bias, last norm
    with pytest.raises(InputError, match=r"above the limit of 2,900,000,000.*keep fewer decoder layers"):
        certify_budget(real, 2_900_000_000)


def test_the_bridge_of_the_real_model(real):
    model = empty_model(real)
    head = 4 * 2048 + 4
    assert count_trained(model, BridgeSettings(), idle=True) - head == 41_680_896
    assert count_trained(model, BridgeSettings()) - head == 41_680_896 - 8 * 2 * 96 * (2048 + 2048)
    assert count_trained(model, BridgeSettings(targets="q,v"), idle=True) - head == 12_582_912


def test_counts_are_those_of_the_loaded_model(base, processor):
    model = load_sliced(base, processor.letter_ids, LAYERS)
    assert sum(count_parts(model).values()) == sum(p.numel() for p in model.parameters())
    assert certify_budget(model.config)["total"] == sum(p.numel() for p in model.parameters())
    settings = BridgeSettings(rank=192)
    expected = count_trained(model, settings)
    assert sum(t.numel() for t in trained_tensors(attach_bridge(model, settings)).values()) == expected


def test_the_shipped_config_is_what_slicing_the_real_one_gives(real):
    shipped = BridgeBlipConfig.from_json_file(ROOT / "instructblip.config.json").to_dict()
    expected = real.to_dict()
    assert shipped.pop("architectures") == ["BridgeBlipForMultipleChoice"] and expected.pop("architectures") is None
    assert shipped == expected
    assert shipped["text_config"]["dense_act_fn"] == "gelu" and not shipped["text_config"]["scale_decoder_outputs"]
