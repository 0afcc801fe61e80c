import json

import pytest
import torch
from conftest import DECODER_LAYERS, LAYERS, row, without
from peft.tuners.lora import LoraLayer
from torch.nn import functional

from bridgeblip import InputError
from bridgeblip.bridge.base import source_name
from bridgeblip.bridge.lora import attach_bridge, merge_bridge, round_fairly
from bridgeblip.bridge.model import BridgeBlipForMultipleChoice, load_sliced
from bridgeblip.bridge.settings import BridgeSettings
from bridgeblip.training.weights import load_trained, trained_tensors


@pytest.fixture
def sliced(base, processor):
    return load_sliced(base, processor.letter_ids, LAYERS)


def bridged(sliced, seed=0):
    torch.manual_seed(seed)
    model = attach_bridge(sliced, BridgeSettings(rank=192))  # 192 of 2048 is 3 of 32
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # starts at zero: without this a merge test proves nothing
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@torch.no_grad()
def test_unsliced_letters_equal_hugging_face(base, hf_model, processor, batch):
    """All layers, no LoRA, the letters' rows as head: InstructBLIP's own first-step logits."""
    model = load_sliced(base, processor.letter_ids, range(DECODER_LAYERS))
    for inputs in (batch, row(batch, 0), row(batch, 3)):
        start = torch.zeros(len(inputs["input_ids"]), 1, dtype=torch.long)
        theirs = hf_model(**without(inputs, "labels", "choice_mask"), decoder_input_ids=start)
        expected = theirs.logits[:, 0, processor.letter_ids]
        assert expected.std() > 0.1  # not trivially equal
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_no_linear_is_given_a_slice(sliced, batch):
    """torch would copy its weights for every row of the batch."""
    seen = {}
    for name, module in sliced.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: seen.update({name: inputs[0]})
            )
    sliced(**batch)
    assert len(seen) > 60 and all(inputs.is_contiguous() for inputs in seen.values())


def test_every_mask_suits_the_fused_kernels_of_a_gpu(sliced, batch, monkeypatch):
    """They take one whose keys lie side by side; torch writes out all scores for any other."""
    attend, strides = functional.scaled_dot_product_attention, []

    def watched(*inputs, attn_mask=None, **kwargs):
        strides.extend([] if attn_mask is None else [attn_mask.stride(-1)])
        return attend(*inputs, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched)
    sliced(**batch)
    assert len(strides) > len(sliced.language_model.encoder.block) and set(strides) == {1}


def test_every_kept_tensor_equals_its_source(sliced, hf_model):
    source = hf_model.state_dict()
    for name, tensor in sliced.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(tensor, source[source_name(name, LAYERS)]), name
    assert sliced.language_model.encoder.embed_tokens.weight is sliced.language_model.shared.weight


def test_head_starts_from_the_letters_rows(base, processor, hf_model, sliced):
    assert torch.equal(
        sliced.head.weight, hf_model.language_model.lm_head.weight[processor.letter_ids]
    )
    with pytest.raises(InputError, match="letter ids"):
        load_sliced(base, [1, 2, 3], LAYERS)


def test_save_pretrained_round_trip(sliced, batch, tmp_path):
    sliced.save_pretrained(tmp_path)
    again = BridgeBlipForMultipleChoice.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**batch).logits, sliced(**batch).logits, atol=1e-4, rtol=0)


def test_shape_that_contradicts_the_config_is_named(base, processor, tmp_path):
    for file in base.rglob("*"):
        if file.is_file():
            target = tmp_path / file.relative_to(base)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["d_ff"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"DenseReluDense.*shape.*config\.json"):
        load_sliced(tmp_path, processor.letter_ids, LAYERS)


def test_frozen_means_frozen_and_in_eval(sliced, batch):
    """Two steps: nothing frozen moves, every B and the head learn at once, every A one step
    later."""
    model = attach_bridge(sliced, BridgeSettings(rank=192, dropout=0.0)).train()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        expected = {n for n in grads if step or "lora_A" not in n}
        assert {n for n, g in grads.items() if g is not None and g.abs().max() > 0} == expected
        optimizer.step()
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
            assert parameter.grad is None
    assert len([n for n in grads if "lora_A" in n]) == 9 * len(
        LAYERS
    )  # all but self-attention's q and k


def test_only_the_adapters_dropout_follows_train(sliced, batch):
    model = attach_bridge(sliced, BridgeSettings(rank=192, dropout=0.5))
    model.train()
    torch.manual_seed(0)
    torch.testing.assert_close(
        model(**batch).logits, model(**batch).logits
    )  # B is 0: T5's dropout would show
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert not torch.equal(model(**batch).logits, model(**batch).logits)
    model.eval()
    torch.testing.assert_close(model(**batch).logits, model(**batch).logits, atol=0, rtol=0)


@torch.no_grad()
def test_merging_keeps_adapters_and_head(sliced, batch):
    plain = sliced(**batch).logits
    model = bridged(sliced)
    model.base_model.model.head.weight.add_(0.3)
    adapted = model(**batch).logits
    assert (adapted - plain).abs().max() > 0.1
    merged = merge_bridge(model)
    assert type(merged) is BridgeBlipForMultipleChoice
    assert not [n for n, _ in merged.named_parameters() if "lora" in n]
    torch.testing.assert_close(merged(**batch).logits, adapted, atol=1e-4, rtol=0)


@torch.no_grad()
def test_trained_tensors_carry_the_whole_difference(base, processor, batch):
    first = bridged(load_sliced(base, processor.letter_ids, LAYERS), seed=1)
    second = bridged(load_sliced(base, processor.letter_ids, LAYERS), seed=2)
    tensors = trained_tensors(first)
    assert not any("layer_norm" in n or "embed" in n for n in tensors)
    load_trained(second, tensors)
    torch.testing.assert_close(second(**batch).logits, first(**batch).logits, atol=0, rtol=0)
    with pytest.raises(InputError, match="do not fit"):
        load_trained(second, dict(list(tensors.items())[1:]))


@torch.no_grad()
def test_missing_choices_are_masked(sliced, batch):
    mask = torch.ones_like(batch["choice_mask"])
    mask[:, 3] = False
    logits = sliced(**batch | {"choice_mask": mask}).logits
    assert torch.isinf(logits[:, 3]).all() and torch.isfinite(logits[:, :3]).all()


@torch.no_grad()
def test_picture_and_prompt_both_matter(sliced, batch):
    logits = sliced(**batch).logits
    swapped = batch | {"pixel_values": batch["pixel_values"].flip(0)}
    assert (sliced(**swapped).logits - logits).abs().max() > 1e-3
    unseen = batch | {"qformer_attention_mask": torch.zeros_like(batch["qformer_attention_mask"])}
    assert (sliced(**unseen).logits - logits).abs().max() > 1e-3  # the Q-Former reads the prompt


def test_small_updates_survive_merging_in_half_precision(base, processor):
    """Updates far below a step of bfloat16 are there in the mean; rounding to the nearest would
    lose most of them."""
    torch.manual_seed(0)
    sliced = load_sliced(base, processor.letter_ids, LAYERS, dtype=torch.bfloat16)
    model = attach_bridge(sliced, BridgeSettings(rank=192))
    before, updates = {}, {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=3e-4)
            before[name] = layer.get_base_layer().weight.float().clone()
            updates[name] = layer.get_delta_weight("default").detach()
    merged = {
        name.replace(".base_layer", ""): w.float()
        for name, w in merge_bridge(model).named_parameters()
    }
    after = {name: merged[f"{name.removeprefix('base_model.model.')}.weight"] for name in before}
    wanted = torch.cat([update.flatten() for update in updates.values()])
    got = torch.cat([(after[name] - before[name]).flatten() for name in before])
    nearest = torch.cat(
        [((before[n] + u).bfloat16().float() - before[n]).flatten() for n, u in updates.items()]
    )
    share = [float((moved * wanted).sum() / wanted.square().sum()) for moved in (got, nearest)]
    assert share[0] == pytest.approx(1, abs=0.2) and share[1] < 0.6
    values = torch.randn(1000)
    steps = (
        round_fairly(values, torch.bfloat16, torch.Generator()).float() - values
    ).abs() / values.abs()
    assert steps.max() < 2**-7
    assert torch.equal(round_fairly(values, torch.float16, torch.Generator()), values.half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_stops_at_the_model(dtype, base, processor, batch):
    """It would take T5's products that overflow from float32 to float16."""
    model = attach_bridge(
        load_sliced(base, processor.letter_ids, LAYERS, dtype=dtype), BridgeSettings()
    )
    wo = model.base_model.model.language_model.encoder.block[0].layer[1].DenseReluDense.wo
    seen = []
    wo.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.no_grad():
        expected = model(**batch).logits
        with torch.autocast("cpu", torch.float16):
            assert torch.equal(model(**batch).logits, expected)
    assert seen == [torch.float32, torch.float32]
