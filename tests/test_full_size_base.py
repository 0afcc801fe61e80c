import copy
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
)

from bridgeblip import InputError
from bridgeblip.bridge.base import LM_HEAD, open_base, slice_config
from bridgeblip.bridge.model import BridgeBlipForMultipleChoice, load_sliced
from bridgeblip.bridge.processing import QuestionProcessor
from bridgeblip.bridge.settings import DEFAULT_DECODER_LAYERS
from bridgeblip.training.tensors import INDEX_FILE
from tools.make_full_size_base import FULL_SIZE_CONFIG, main, stored_tensors, write_base

SHARED = "language_model.shared.weight"
SHARD_BYTES = 3_000_000


def scaled_down() -> dict:
    """The real config, but narrow and shallow: vocabularies, picture and query tokens stay."""
    config = copy.deepcopy(FULL_SIZE_CONFIG)
    narrow = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config["vision_config"] |= narrow
    config["qformer_config"] |= narrow | dict(encoder_hidden_size=16)
    config["text_config"] |= dict(
        d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=4, num_heads=2
    )
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full_size") / "base"
    write_base(scaled_down(), folder, torch.float32, max_shard_size=SHARD_BYTES)
    return folder


@pytest.fixture(scope="module")
def tensors(folder):
    return read_tensors(folder)


def read_tensors(folder) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def test_full_size_counts():
    stored = stored_tensors(FULL_SIZE_CONFIG, torch.bfloat16)
    assert sum(tensor.numel() for tensor in stored.values()) == 4_022_969_088
    assert stored[LM_HEAD].numel() == 65_798_144
    assert sum(tensor.nbytes for tensor in stored.values()) == 2 * 4_022_969_088
    config = InstructBlipConfig.from_dict(copy.deepcopy(FULL_SIZE_CONFIG))
    with torch.device("meta"):
        sliced = BridgeBlipForMultipleChoice(slice_config(config, DEFAULT_DECODER_LAYERS))
    assert DEFAULT_DECODER_LAYERS == (0, 3, 6, 9, 12, 15, 18, 21)
    assert sum(parameter.numel() for parameter in sliced.parameters()) == 2_916_893_444


def test_hugging_face_loads_every_tensor_and_keeps_the_lm_head_untied(folder, tensors):
    model, info = InstructBlipForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True
    )
    assert {
        name: list(found) for name, found in info.items() if found
    } == {}  # missing, unexpected, mismatched
    state = {
        name: tensor for name, tensor in model.state_dict().items() if "embed_tokens" not in name
    }
    assert {name: t.shape for name, t in tensors.items()} == {
        name: t.shape for name, t in state.items()
    }
    assert all(torch.equal(tensors[name], state[name]) for name in tensors)
    assert state[LM_HEAD].data_ptr() != state[SHARED].data_ptr() and not torch.equal(
        state[LM_HEAD], state[SHARED]
    )
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in tensors.values())
    text = model.config.text_config
    assert (
        not text.scale_decoder_outputs
        and text.dense_act_fn == "gelu"
        and text.decoder_start_token_id == 0
    )
    assert (
        model.generation_config.decoder_start_token_id == 0
        and model.generation_config.eos_token_id == 1
    )


def test_shards_and_index_agree(folder, tensors):
    index = json.loads((folder / INDEX_FILE).read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2
    assert files == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_parameters"] == sum(
        tensor.numel() for tensor in tensors.values()
    )
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for file in files:
        with safe_open(folder / file, framework="pt") as shard:
            names = list(shard.keys())
            assert shard.metadata() == {"format": "pt"}
        assert {name for name, held_by in index["weight_map"].items() if held_by == file} == set(
            names
        )
        assert sum(tensors[name].nbytes for name in names) <= SHARD_BYTES


def test_values_are_distinct_and_depend_on_nothing_but_the_seed(tensors, tmp_path):
    matrices = [tensor for tensor in tensors.values() if tensor.dim() > 1]
    assert len({tensor.numpy().tobytes() for tensor in matrices}) == len(matrices)
    write_base(scaled_down(), tmp_path / "half")  # in bfloat16, in one shard
    half = read_tensors(tmp_path / "half")
    assert half.keys() == tensors.keys()
    assert all(torch.equal(half[name], tensors[name].bfloat16()) for name in tensors)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    write_base(scaled_down(), tmp_path / "other", seed=1)
    other = read_tensors(tmp_path / "other")
    assert not any(
        torch.equal(other[name], half[name]) for name in tensors if tensors[name].dim() > 1
    )


def test_processor_has_the_real_ids(folder):
    theirs = InstructBlipProcessor.from_pretrained(folder)
    t5, bert = theirs.tokenizer, theirs.qformer_tokenizer
    assert t5.convert_tokens_to_ids(["<pad>", "</s>", "<unk>", "<extra_id_99>", "<extra_id_0>", "<image>"]) == [
        0, 1, 2, 32000, 32099, 32100,
    ]  # fmt: skip
    assert bert.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]) == [
        0, 100, 101, 102, 103, 30522,
    ]  # fmt: skip
    assert (len(t5), len(bert), bert.bos_token, theirs.num_query_tokens) == (
        32101,
        30523,
        "[DEC]",
        32,
    )
    ours = QuestionProcessor.from_base(folder)
    assert ours.letter_ids == [71, 272, 205, 309]
    assert (ours.image_size, ours.image_token_id, ours.prompt_limit) == ([224, 224], 32100, 512)
    prompts = [
        'Which colour is the naïve BUS at 7:45? A. dark-red B. "blue" C. 3/4 D. {x}~z',
        "jazz",
    ]
    expected = theirs(text=prompts, padding=True, return_tensors="pt")
    got = ours.encode_prompts(prompts)
    assert not (got["input_ids"] == t5.unk_token_id).any()
    assert not (got["qformer_input_ids"] == bert.unk_token_id).any()
    for name in ("qformer_input_ids", "qformer_attention_mask"):
        assert torch.equal(got[name], expected[name])
    assert torch.equal(got["input_ids"][:, 32:], expected["input_ids"])
    assert ours.tokenizer.decode(ours.tokenizer.encode(prompts[0]).ids) == prompts[0]


@torch.no_grad()
def test_logits_depend_on_picture_and_prompt(folder):
    processor = QuestionProcessor.from_base(folder)
    model = load_sliced(folder, processor.letter_ids, [0, 3])
    prompts = processor.encode_prompts(
        ["Which digit is shown?"] * 2 + ["What is it? A. a cat B. a dog"]
    )
    noise = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    pictures = [processor.pixels(Image.fromarray(noise[i])) for i in (0, 1, 0)]
    first, other_picture, other_prompt = model(**prompts, pixel_values=torch.stack(pictures)).logits
    assert torch.isfinite(first).all() and first.std() > 0.1
    assert (first - other_picture).abs().max() > 1e-3 and (first - other_prompt).abs().max() > 1e-3


def test_no_more_is_asked_of_the_files_than_is_kept(folder, monkeypatch):
    readers = []

    def watched(*args):
        readers.append(open_base(*args))
        return readers[-1]

    monkeypatch.setattr("bridgeblip.bridge.model.open_base", watched)
    model = load_sliced(folder, QuestionProcessor.from_base(folder).letter_ids, [0, 3])
    kept = sum(p.nbytes for p in model.parameters())
    assert 0.999 * kept <= sum(reader.bytes_read for reader in readers) <= 1.01 * kept


def test_refusals_are_one_line(folder, tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError, match=r"exists already.*another --out"):
        write_base(scaled_down(), folder)
    usage = type("Usage", (), {"free": 7_000_000_000})
    monkeypatch.setattr("tools.make_full_size_base.shutil.disk_usage", lambda path: usage)
    assert main(["--out", str(tmp_path / "no" / "room")]) == 2
    message = capsys.readouterr().err
    assert re.fullmatch(r"error: 7\.0 GB are free for .*, the base takes 8\.0 GB: .*\n", message)
    assert not (tmp_path / "no").exists()
