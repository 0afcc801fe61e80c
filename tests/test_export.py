import hashlib
import random
import shutil

import pytest
import torch
from conftest import LAYERS, row, store_weights
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.t5.modeling_t5 import T5Attention

from bridgeblip import InputError
from bridgeblip.bridge import export
from bridgeblip.bridge.base import TINY_BASE
from bridgeblip.bridge.export import (
    INPUTS,
    TraceableModel,
    export_bundle,
    restore,
)
from bridgeblip.bridge.lora import merge_bridge
from bridgeblip.bridge.model import load_sliced
from bridgeblip.bridge.settings import BridgeSettings
from bridgeblip.bridge.train import train
from bridgeblip.bundle.export import ParityError, ParityGate
from bridgeblip.bundle.format import load_bundle
from bridgeblip.bundle.trace import graphs, trace
from bridgeblip.training.settings import TrainSettings
from bridgeblip.training.tensors import SINGLE_FILE, TensorReader
from bridgeblip.training.weights import load_weights, save_best, save_weights


@pytest.fixture(scope="module")
def weights(base, processor, tmp_path_factory):
    """Weights whose bridge and head do a lot."""
    path = tmp_path_factory.mktemp("weights") / "weights-0.pt"
    return store_weights(path, base, processor, rank=192, std=0.3)


@pytest.fixture(scope="module")
def halves(base, processor, tmp_path_factory):
    """The like, trained in half precision: rounded to it, weights so large answer otherwise."""
    folder, paths = tmp_path_factory.mktemp("halves"), {}
    for dtype in ("bfloat16", "float16"):
        path = folder / f"{dtype}.pt"
        paths[dtype] = store_weights(path, base, processor, rank=192, std=0.3, dtype=dtype)
    return paths


@pytest.fixture(scope="module")
def exported(weights):
    return export_bundle(weights, weights.parent / "torchscript.pt")


@pytest.fixture(scope="module")
def result_of_training(base, competition, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    settings = TrainSettings(validation_fraction=0.25, learning_rate=1e-2)
    return train(
        competition / "train.csv", base, folder, settings, BridgeSettings(rank=192, layers=LAYERS)
    ).weights[0]


def inputs_of(processor, questions):
    batch = processor.collate(questions)
    return {name: batch[name] for name in INPUTS}


def call(model, inputs):
    return model(**{name: inputs[name] for name in INPUTS})


@torch.no_grad()
def test_trace_equals_the_trained_model_whatever_the_shape(weights, processor, questions):
    model = restore(weights).model
    shuffled = random.Random(0).sample(questions, len(questions))
    batches = [processor.collate(shuffled[:n]) for n in (2, 7, 16)]
    batches += [row(batches[0], 0), row(batches[0], 1)]
    expected = [model(**batch).logits.masked_fill(~batch["choice_mask"], 0) for batch in batches]
    traced = trace(TraceableModel(merge_bridge(model)), inputs_of(processor, shuffled[20:23]))
    for batch, logits in zip(batches, expected, strict=True):
        torch.testing.assert_close(call(traced, batch), logits, atol=1e-4, rtol=0)
        embeds = traced.encode_image(batch["pixel_values"])
        alone = traced.score(embeds, *(batch[name] for name in INPUTS[1:]))
        torch.testing.assert_close(alone, logits, atol=1e-4, rtol=0)


def test_single_token_self_attention_is_exact(base, processor):
    attention = (
        load_sliced(base, processor.letter_ids, LAYERS)
        .language_model.decoder.block[0]
        .layer[0]
        .SelfAttention
    )
    hidden = torch.randn(5, 1, 32)
    whole = T5Attention.forward(attention, hidden)[0]
    torch.testing.assert_close(attention(hidden)[0], whole)


def test_no_device_constant_survives_saving_and_loading(exported):
    loaded = torch.jit.load(str(exported[0]))
    kinds = [
        n.output().type().kind() for g in graphs(loaded) for n in g.findAllNodes("prim::Constant")
    ]
    assert kinds and "DeviceObjType" not in kinds


def test_dead_work_is_gone(exported):
    names = [name for name, _ in torch.jit.load(str(exported[0])).named_parameters()]
    assert not [n for n in names if "lora" in n or "lm_head" in n]
    assert not [
        n
        for n in names
        if "decoder" in n and "SelfAttention" in n and n.split(".")[-2] in ("q", "k")
    ]


def test_parity_table_covers_each_form(exported):
    _, parity = exported
    assert set(parity["form"]) == {"as trained", "merged", "reloaded"} and parity["ok"].all()
    assert (parity["difference"] <= 1e-4).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", ["head", "lora_B"])
def test_a_fault_planted_in_merging_stops_the_export(
    weights, halves, tmp_path, monkeypatch, fault, dtype
):
    merge = export.merge_bridge

    def damage(model):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if fault in name and parameter.requires_grad:
                    parameter.mul_(1.05)
        return merge(model)

    monkeypatch.setattr(export, "merge_bridge", damage)
    remedy = "please report it" if dtype == "float32" else "export in float32"
    with pytest.raises(ParityError, match=f"(?s){remedy}.*merged"):
        export_bundle(halves.get(dtype, weights), tmp_path / "torchscript.pt")
    assert not list(tmp_path.iterdir())


def swap_layers(wrapper, *inputs):
    blocks = wrapper.model.language_model.decoder.block
    wrapper.model.language_model.decoder.block = nn.ModuleList([blocks[1], blocks[0], *blocks[2:]])
    logits = wrapper.model.score(*inputs).float()
    wrapper.model.language_model.decoder.block = blocks
    return logits


FAULTS = {
    "head dropped": lambda wrapper, *inputs: wrapper.model.score(*inputs).float() * 0,
    "mask ignored": lambda wrapper, *inputs: wrapper.model.score(
        *inputs[:4], torch.ones_like(inputs[4])
    ).float(),
    "one layer swapped": swap_layers,
    "prompt not given to the Q-Former": lambda wrapper, embeds, ids, mask, *text: (
        wrapper.model.score(embeds, ids, torch.zeros_like(mask), *text).float()
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_planted_in_tracing_stops_the_export(
    weights, halves, tmp_path, monkeypatch, fault, dtype
):
    monkeypatch.setattr(export.TraceableModel, "score", FAULTS[fault])
    with pytest.raises(ParityError, match="reloaded"):
        export_bundle(halves.get(dtype, weights), tmp_path / "torchscript.pt")
    assert not list(tmp_path.iterdir())


def test_the_margin_that_training_recorded_travels_with_the_file(weights, tmp_path):
    assert (
        load_bundle(export_bundle(weights, tmp_path / "plain.pt")[0]).manifest["trained"][
            "permute_below"
        ]
        is None
    )
    shutil.copy(weights, tmp_path)
    save_best(tmp_path, [0.5], [1.0], 0.125)
    path, _ = export_bundle(tmp_path / weights.name, tmp_path / "torchscript.pt")
    assert load_bundle(path).manifest["trained"]["permute_below"] == 0.125


def test_the_digest_beside_the_file_is_as_sha256sum_writes_it(exported):
    path = exported[0]
    digest, name = path.with_name("torchscript.pt.sha256").read_text().split()
    assert name == path.name and digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_weights_on_another_base_of_the_same_shape_are_caught(result_of_training, base, tmp_path):
    """The probe that travels with the weights knows what they answered when they were trained."""
    shutil.copytree(base, tmp_path / "base")
    shard = tmp_path / "base" / TensorReader(base).shard_of["query_tokens"]
    tensors = load_file(shard)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, shard)
    _, parity = export_bundle(result_of_training, tmp_path / "torchscript.pt")
    assert parity["form"].tolist()[0] == "as trained" and parity["ok"].all()
    with pytest.raises(ParityError, match=r"(?s)trained on \(--base\).*as trained"):
        export_bundle(result_of_training, tmp_path / "other.pt", tmp_path / "base")
    assert not (tmp_path / "other.pt").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_base_is_caught_in_half_precision_too(competition, tmp_path, dtype):
    """On a pretrained base: what rounding does to random weights of that size is anybody's
    guess."""
    weights = train(
        competition / "train.csv", "tiny", tmp_path / "run", TrainSettings(validation_fraction=0.25)
    ).weights

    def compared(base) -> dict:
        restored = restore(weights[0], base, dtype=dtype)
        probe = restored.manifest["probe"]
        gate = ParityGate(
            {name: probe["inputs"][name] for name in INPUTS}, restored.model, restored.dtype
        )
        gate.compare_trained(probe["logits"], restored.manifest["dtype"])
        return gate.rows[0]

    found = compared("tiny")
    assert found["ok"] and found["difference"] < found["bound"] / 4
    shutil.copytree(TINY_BASE, tmp_path / "base")
    shard = tmp_path / "base" / SINGLE_FILE
    save_file({name: tensor.flip(-1) for name, tensor in load_file(shard).items()}, shard)
    found = compared(tmp_path / "base")
    assert not found["ok"] and found["difference"] > 2 * found["bound"]


def test_a_probe_may_lack_choices(result_of_training, tmp_path):
    loaded = load_weights(result_of_training)
    loaded.manifest["probe"]["logits"][0, 3] = float("-inf")
    save_weights(tmp_path / "weights-0.pt", loaded.tensors, loaded.manifest)
    assert export_bundle(tmp_path / "weights-0.pt", tmp_path / "torchscript.pt")[1]["ok"].all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_export(halves, tmp_path, dtype):
    path, parity = export_bundle(halves[dtype], tmp_path / "torchscript.pt")
    bundle = load_bundle(path)
    assert bundle.manifest["dtype"] == dtype
    kinds = {name: p.dtype for name, p in bundle.model.named_parameters()}
    wide = {name for name, kind in kinds.items() if kind == torch.float32}
    assert {name for name in wide if ".head." in name} == {"model.head.weight", "model.head.bias"}
    assert all(".head." in name or (dtype == "float16" and ".wo." in name) for name in wide)
    assert set(kinds.values()) - {torch.float32} == {getattr(torch, dtype)}
    assert (parity["difference"] <= parity["bound"]).all() and parity["bound"].iloc[0] > 1e-4


def test_weights_of_another_base_are_refused(weights, tmp_path):
    loaded = load_weights(weights)
    save_weights(
        tmp_path / "weights-0.pt", loaded.tensors, loaded.manifest | {"processor": "another"}
    )
    with pytest.raises(InputError, match="another tokenizer"):
        restore(tmp_path / "weights-0.pt")
    save_weights(
        tmp_path / "weights-1.pt",
        loaded.tensors,
        loaded.manifest | {"base": "tiny", "layers": [0, 3]},
    )
    with pytest.raises(InputError, match="do not fit"):
        restore(tmp_path / "weights-1.pt")
