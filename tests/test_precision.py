import pytest
import torch
from conftest import LAYERS

from bridgeblip import InputError
from bridgeblip.bridge.lora import attach_bridge
from bridgeblip.bridge.model import load_sliced
from bridgeblip.bridge.settings import BridgeSettings
from bridgeblip.machine import LARGE, NonFiniteError, best_device, choose_precision, slow_format


@pytest.mark.parametrize(
    "capability, expected",
    [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_compute_capability_decides(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)  # it says so of a T4 as well
    precision = choose_precision("cuda", 10)
    assert precision.dtype == expected and "compute capability" in str(precision)


@pytest.mark.parametrize("native, parameters, expected", [
    (True, LARGE, torch.bfloat16), (True, LARGE - 1, torch.float32), (False, LARGE, torch.float32),
])  # fmt: skip
def test_cpu(monkeypatch, native, parameters, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert choose_precision("cpu", parameters).dtype == expected


def test_fp16_keeps_what_overflows_in_fp32(base, processor, batch):
    model = load_sliced(base, processor.letter_ids, LAYERS, dtype=torch.float16)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    wide = {name for name, dtype in kinds.items() if dtype == torch.float32}
    assert wide == {
        n for n in kinds if n.endswith("DenseReluDense.wo.weight") or n.startswith("head.")
    }
    with torch.no_grad():
        half = model(**batch).logits
        full = load_sliced(base, processor.letter_ids, LAYERS)(**batch).logits
    torch.testing.assert_close(half, full, atol=0.05 * (full.max() - full.min()).item(), rtol=0)


@pytest.mark.parametrize(
    "place",
    ["language_model.encoder.block.1.layer.1.DenseReluDense.wo", "vision_model.post_layernorm"],
)
def test_the_module_that_overflows_is_named(base, processor, batch, place):
    model = load_sliced(base, processor.letter_ids, LAYERS)
    with torch.no_grad():
        model.get_submodule(place).weight.fill_(3e38)
    with pytest.raises(NonFiniteError, match=place.replace(".", r"\.")):
        model(**batch)
    bridged = attach_bridge(
        load_sliced(base, processor.letter_ids, LAYERS), BridgeSettings(rank=192)
    )
    with torch.no_grad():
        bridged.base_model.model.get_submodule(place).weight.fill_(3e38)
    with pytest.raises(NonFiniteError, match="first module"):
        bridged(**batch)


def test_half_precision_keeps_the_head_as_it_was_trained(base, processor):
    model = load_sliced(base, processor.letter_ids, LAYERS, dtype=torch.bfloat16)
    assert {name for name, p in model.named_parameters() if p.dtype == torch.float32} == {
        "head.weight",
        "head.bias",
    }


def test_formats_that_a_machine_is_slow_in(monkeypatch):
    assert slow_format("cpu", torch.float32) == ""
    for capability, emulated in (((7, 5), True), ((8, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, has=capability: has)
        assert bool(slow_format("cuda", torch.bfloat16)) == emulated and not slow_format(
            "cuda", torch.float16
        )
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "no quick way to multiply in float16" in slow_format("cpu", torch.float16)
    assert slow_format("cpu", torch.float32) == ""


def test_a_process_without_a_gpu_of_its_own_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert best_device() == "cuda:1"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="LOCAL_RANK is 2 on a machine with 2 GPUs: start as many"):
        best_device()
