import json
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path

import families
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    IdeficsConfig,
    InternVLConfig,
    LlavaConfig,
    MllamaConfig,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)

from bridgeblip import InputError
from bridgeblip.__main__ import main
from bridgeblip.embedded.digits import write_competition
from bridgeblip.files import cache_folder
from bridgeblip.hosting.doctor_tune import held_memory
from bridgeblip.machine import Precision
from bridgeblip.training.settings import TrainSettings, block, evenly
from bridgeblip.training.tensors import TensorReader
from bridgeblip.vlm import slicing
from bridgeblip.vlm.batches import Batches
from bridgeblip.vlm.families import TINY_CHAT, empty_model, load_config
from bridgeblip.vlm.merge import logits_of, probe
from bridgeblip.vlm.settings import TuneSettings, read_run
from bridgeblip.vlm.slicing import (
    HELD_ELSE,
    HELD_IN_BLOCK,
    describe_budget,
    layers_of,
    slice_empty,
    slice_model,
    warn_of_cut,
)
from bridgeblip.vlm.tune import tune

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [0, 2, 5]
OF = 6


@pytest.fixture(autouse=True)
def small_shards(monkeypatch, tmp_path):
    monkeypatch.setattr(slicing, "SHARD_SIZE", "40KB")
    monkeypatch.setenv("BRIDGEBLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    """A base of several shards, some of which hold nothing but one decoder layer."""
    folder = tmp_path_factory.mktemp("llava") / "base"
    model, processor = families.build("llava", layers=OF)
    model.save_pretrained(folder, max_shard_size="30KB")
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def csv(competition, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("questions") / "few"
    shutil.copytree(competition, folder, ignore=shutil.ignore_patterns("sample*"))
    pd.read_csv(folder / "train.csv").iloc[::4].to_csv(folder / "few.csv", index=False)
    return folder / "few.csv"


def cut_in_memory(model: nn.Module, kept: list[int]) -> nn.Module:
    """The whole slicing, in place: layers chosen, numbered anew."""
    name, layers = layers_of(model)
    chosen = nn.ModuleList(layers[place] for place in kept)
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, chosen)
    for place, layer in enumerate(chosen):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    text = model.config.get_text_config(decoder=True)
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[place] for place in kept]
    text.num_hidden_layers = len(kept)
    return model


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_sliced_folder_equals_slicing_in_memory(family, tmp_path):
    base = families.save(family, tmp_path / "base", layers=OF)
    folder, facts = slice_model(base, None, LAYERS)
    assert len([*folder.glob("*.safetensors")]) > 2 and facts["layers"] == LAYERS
    sliced, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    batch = Batches(AutoProcessor.from_pretrained(folder), sliced.config).ask(*probe())
    whole, _ = families.build(family, layers=OF)
    before = logits_of(whole, batch)
    expected = logits_of(cut_in_memory(whole, LAYERS), batch)
    assert (expected - before).abs().max() > 0
    assert (logits_of(sliced.eval(), batch) - expected).abs().max() == 0.0


@pytest.mark.parametrize("tied", [True, False])
def test_tied_or_not_as_the_base_is(tied, tmp_path):
    base = families.save("llava", tmp_path / "base", layers=3, tie_word_embeddings=tied)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
    folder, _ = slice_model(base, None, "even-2")
    whole, sliced = (AutoModelForImageTextToText.from_pretrained(f) for f in (base, folder))
    for model in (whole, sliced):
        inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
        assert (inner.weight is outer.weight) == tied
    assert torch.equal(whole.get_output_embeddings().weight, sliced.get_output_embeddings().weight)


def test_a_wrong_layer_is_caught_and_nothing_is_kept(llava, monkeypatch):
    usual = slicing.save_torch_state_dict

    def planted(tensors, *args, **how):
        name = next(name for name in tensors if "layers.1.mlp.up_proj" in name)
        tensors[name] = tensors[name.replace("layers.1", "layers.0")].clone()
        usual(tensors, *args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(slicing, "save_torch_state_dict", planted)
        with pytest.raises(InputError, match=r"1 tensors of the slice .*layers\.1\.mlp\.up_proj"):
            slice_model(llava, None, LAYERS)
    assert not [*cache_folder().rglob("*.safetensors")]
    folder, _ = slice_model(llava, None, LAYERS)
    whole, sliced = TensorReader(llava), TensorReader(folder)
    sources = {name: name for name in sliced.shard_of if "layers" not in name}
    with pytest.raises(InputError, match=r"59 tensors of the slice are not those of"):
        slicing.compare(whole, sources, folder)  # layers are left over


def test_a_killed_slicing_leaves_nothing_that_is_taken_for_whole(llava, monkeypatch):
    written = []

    def save_and_die(*args, **how):
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(save_file(*args, **how))

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", save_and_die)
        context = multiprocessing.get_context("fork")
        process = context.Process(target=slice_model, args=(llava, None, LAYERS))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len([*cache_folder().rglob("*.safetensors")]) == 2  # of a partial folder
    assert not [*cache_folder().rglob("slice.json")]
    folder, _ = slice_model(llava, None, LAYERS)
    _, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert [path for path in folder.parent.iterdir() if path.suffix != ".lock"] == [folder]
    monkeypatch.setattr(slicing, "_write", lambda *args: pytest.fail("written again"))
    assert slice_model(llava, None, LAYERS)[0] == folder


def test_what_was_changed_in_the_cache_is_sliced_anew(llava):
    folder, facts = slice_model(llava, None, LAYERS)
    shard = next(folder.glob("*.safetensors"))
    tensors = load_file(shard)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, shard, {"format": "pt"})
    again, anew = slice_model(llava, None, LAYERS)
    assert again == folder and anew["tensors"] == facts["tensors"]
    assert all(torch.equal(tensors[name], found) for name, found in load_file(shard).items())
    other, _ = slice_model(llava, None, "0,2")
    assert other != folder and folder.is_dir()


def test_shards_that_hold_only_cut_layers_are_never_downloaded(llava, tmp_path, monkeypatch):
    """A hub that is a folder: what is asked for is copied from it."""
    hub, asked = tmp_path / "snapshots" / "c0ffee", []

    def download(name, revision, allow_patterns):
        hub.mkdir(parents=True, exist_ok=True)
        asked.extend(allow_patterns)
        for pattern in allow_patterns:
            for path in llava.glob(pattern):
                shutil.copy(path, hub)
        return str(hub)

    monkeypatch.setattr("bridgeblip.training.tensors.snapshot_download", download)
    config = AutoConfig.from_pretrained(llava)
    monkeypatch.setattr(slicing, "load_config", lambda base, revision: config)
    folder, facts = slice_model("some/model", None, LAYERS)
    assert facts["revision"] == "c0ffee"
    index = json.loads((llava / "model.safetensors.index.json").read_text())["weight_map"]
    cut = re.compile(r"language_model\.(model\.)?layers\.[134]\.")
    wanted = {file for name, file in index.items() if not cut.search(name)}
    assert {name for name in asked if "*" not in name} == wanted < set(index.values())
    local, known = slice_model(llava, None, LAYERS)
    assert known["tensors"] == facts["tensors"] and local != folder


BAD = {
    "3,1": r"decoder layers \[3, 1\]: expected at least one index, in rising order, none repeated",
    "1,1": r"decoder layers \[1, 1\]: expected at least one index, in rising order",
    "0,6": r"decoder layers \[6\] do not exist: the base has 6, numbered 0 to 5",
    "block-7": r"layer selection 'block-7': the decoder has 6 layers",
    "every-fourth": r"layer selection 'every-fourth' is unknown: expected every-third",
}


@pytest.mark.parametrize("layers", BAD)
def test_bad_layers_are_one_line(layers, llava, csv, tmp_path, capsys):
    command = f"tune --base {llava} --data {csv} --few no --out {tmp_path / 'run'} --layers "
    assert main([*command.split(), layers]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(BAD[layers], error)


def test_bases_that_can_not_be_sliced_are_one_line(base, llava, csv, tmp_path, capsys, monkeypatch):
    command = f"tune --data {csv} --few no --out {tmp_path / 'run'} --layers 0,2 --base "
    for known in (base, "tiny"):  # InstructBLIP-FlanT5's kind
        assert main(f"{command}{known}".split()) == 2
        assert re.search(r"encoder-decoder .*there is train", capsys.readouterr().err)
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "config.json").write_text('{"model_type": "vit"}')
    assert main(f"{command}{tmp_path / 'tower'}".split()) == 2
    assert re.search(r"is a 'vit' model, no image-text-to-text model", capsys.readouterr().err)
    odd = tmp_path / "odd"
    shutil.copytree(llava, odd)
    for path in odd.glob("*.safetensors"):
        tensors = {f"{name}.quantised": tensor for name, tensor in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    (odd / "model.safetensors.index.json").unlink()
    shutil.copy(path, odd / "model.safetensors")
    assert main(f"{command}{odd}".split()) == 2
    assert re.search(r"0 places in the stored weights hold .* 6 layers", capsys.readouterr().err)
    usage = type("Usage", (), {"free": 100_000})
    monkeypatch.setattr("bridgeblip.vlm.slicing.shutil.disk_usage", lambda path: usage)
    assert main(f"{command}{llava}".split()) == 2
    assert re.search(r"takes 0\.0 GB, 0\.0 GB are free .*free some space", capsys.readouterr().err)
    assert not [*cache_folder().rglob("*.safetensors")]


SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 64}
REFUSED = {
    "fed by place": (
        Qwen3VLConfig(
            text_config=SMALL | {"num_hidden_layers": 6, "num_key_value_heads": 2, "head_dim": 16},
            vision_config={"depth": 3, "hidden_size": 32, "deepstack_visual_indexes": [0, 1]},
        ),
        "0,2,5",
        r"feeds layers by their place \(deepstack_visual_embeds\); keep 0 to 1",
    ),
    "a list of places": (
        MllamaConfig(
            text_config=SMALL
            | {"num_hidden_layers": 6, "num_key_value_heads": 2, "cross_attention_layers": [1, 4]}
            | {"pad_token_id": 0},
            vision_config={"hidden_size": 32, "attention_heads": 2, "num_hidden_layers": 1}
            | {"num_global_layers": 1, "intermediate_size": 32},
        ),
        "0,2,5",
        r"layer 2 of a 'mllama' model's decoder would become another kind of layer",
    ),
    "three lists": (
        IdeficsConfig(**SMALL, num_hidden_layers=4),
        "0,2",
        r"2 lists of 4 layers are in the decoder of a 'idefics' model, expected one",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_cut_would_change_is_refused(name):
    config, layers, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        slice_empty(empty_model(config), layers)


def test_layers_that_are_fed_by_place_may_be_kept():
    config, _, _ = REFUSED["fed by place"]
    sliced, kept = slice_empty(empty_model(config), "0,1,5")
    assert sliced.config.text_config.num_hidden_layers == 3 == len(kept)
    assert config.text_config.num_hidden_layers == 6


def test_a_cut_chat_model_learns_and_answers_alike_by_run_folder_and_file(tmp_path, capsys):
    """The embedded one, from a folder of its own, since its weights are to change at the end."""
    base, data, run = tmp_path / "base", tmp_path / "data", tmp_path / "run"
    shutil.copytree(TINY_CHAT, base)
    write_competition(data, tmp_path / "answers.csv", {"train": 24, "test": 5})
    train = TrainSettings(
        batch_size=8, learning_rate=3e-3, validation_fraction=0.25, label_smoothing=0.0
    )
    result = tune(base, data / "train.csv", run, TuneSettings(layers="block-14"), train)
    said = capsys.readouterr().out
    assert "parameters, each counted once, of at most 3,000,000,000" in said
    assert "warning: 14 of 24 decoder layers stay" in said
    right = [question.answer for question in result.validation]
    before = np.array(json.loads((run / "before.json").read_text()))
    unbridged, bridged = (-np.log(p[range(len(p)), right]) for p in (before, result.probabilities))
    assert bridged.mean() < 0.9 * unbridged.mean()
    facts = read_run(run)
    assert (facts["base"], facts["layers"]) == (str(base), [*range(13), 23])
    adapter = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (3, 6)  # of a width of 64
    learned = load_file(run / "adapter" / "adapter_model.safetensors")
    linears = {re.sub(r".*(layers\.\d+\.\w+\.\w+)\..*", r"\1", name) for name in learned}
    assert len(linears) == 14 * 7
    shutil.rmtree(cache_folder())  # as on another machine
    merged, file = run / "merged", run / "torchscript.pt"
    assert main(["merge", str(run)]) == 0
    assert AutoConfig.from_pretrained(merged).text_config.num_hidden_layers == 14
    assert main(f"export --weights {run} --out {file}".split()) == 0
    tables, out = [], tmp_path / "submission.csv"
    ask = f"predict --csv {data / 'test.csv'} --out {out} --model"
    for model in (run, merged, file):
        assert main([*ask.split(), str(model)]) == 0
        probabilities = pd.read_csv(tmp_path / "probabilities.csv")[list("ABCD")]
        tables.append((pd.read_csv(out)["answer"], probabilities))
    for letters, probabilities in tables[1:]:
        assert letters.equals(tables[0][0]) and letters.nunique() == 4
        assert (probabilities - tables[0][1]).abs().max(axis=None) < 1e-4
    capsys.readouterr()
    again = f"tune --base {base} --data {data / 'train.csv'} --few no --out {tmp_path / 'next'}"
    assert main(f"{again} --layers 0,5 --continue {run}".split()) == 2
    assert re.search(r"on decoder layers \[0, 1, .*\], not on \[0, 5\]", capsys.readouterr().err)
    (weights,) = base.glob("*.safetensors")
    tensors = {name: tensor + 0.1 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    assert main([*ask.split(), str(run)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {base} has changed since it was sliced for this run")
    assert main([*ask.split(), str(merged)]) == 0


def test_a_cut_deeper_than_a_bridge_was_seen_to_heal_is_warned_of(csv, capsys):
    whole = empty_model(load_config("tiny-chat"))
    for fine in ([], block(24, 16), evenly(24, 20)):
        assert warn_of_cut(whole, fine) == ""
    assert warn_of_cut(whole, block(24, 15)) and warn_of_cut(whole, evenly(24, 18))
    main(f"doctor --stage tune --base tiny-chat --csv {csv} --layers even-2".split())
    assert "warning  2 of 24 decoder layers stay" in capsys.readouterr().out


def test_the_warning_says_what_was_measured():
    cuts = (ROOT / "results" / "cut" / "cut.md").read_text(encoding="utf-8")
    verdict = cuts.split("tiny-chat (", 1)[1].splitlines()[0]
    assert re.findall(r"(\d+) of 24 layers \(", verdict) == [f"{HELD_ELSE}", f"{HELD_IN_BLOCK}"]
    for page in ("other-models.md", "other-models.ko.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert re.search(rf"`tiny-chat`\D+24\D+{HELD_ELSE}\D+{HELD_IN_BLOCK}\D", text), page


def test_rank_and_alpha_are_a_share_of_the_width_unless_given():
    assert (TuneSettings().rank, TuneSettings().alpha) == (16, 32)
    bridge = TuneSettings(layers="every-third").on(2048)
    assert (bridge.rank, bridge.alpha) == (96, 192)
    narrow = TuneSettings(layers="every-third", rank=8).on(64)
    assert (narrow.rank, narrow.alpha) == (8, 16)
    assert TuneSettings(layers="0,1", alpha=5).on(64).alpha == 5


def test_doctor_counts_the_sliced_model(llava, csv, capsys):
    command = f"doctor --stage tune --base {llava} --csv {csv} --layers even-3"
    main(command.split())
    said = capsys.readouterr().out
    whole = empty_model(AutoConfig.from_pretrained(llava))
    count = slice_empty(whole, "even-3")[0].num_parameters()
    assert f"{count:,} parameters, each counted once, of at most 3,000,000,000" in said
    # both sides of seven linears in three layers, 32 wide, rank 2
    learning = 2 * 3 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    assert f"{learning:,} numbers learn" in said
    main([*command.split()[:-1], "0,9"])
    assert "problem  decoder layers [9] do not exist" in capsys.readouterr().out


QWEN2_5_VL_3B = Qwen2_5_VLConfig(
    text_config={
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008,
        "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
    },
    vision_config={
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "out_hidden_size": 2048,
    },
    tie_word_embeddings=True,
)  # fmt: skip
INTERNVL3_2B = InternVLConfig(
    text_config={
        "model_type": "qwen2", "vocab_size": 151674, "hidden_size": 1536,
        "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    vision_config={
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": [448, 448], "patch_size": [14, 14],
        "attention_bias": True,
    },
    tie_word_embeddings=False,
)  # fmt: skip
LLAVA_1_5_7B = LlavaConfig(
    text_config={
        "model_type": "llama", "vocab_size": 32064, "hidden_size": 4096,
        "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    vision_config={
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
        "projection_dim": 768,
    },
)  # fmt: skip


PUBLISHED = {
    "Qwen2.5-VL-3B": (QWEN2_5_VL_3B, 3_754_622_976, "block-26 would have 2,983,853,056"),
    "InternVL3-2B": (INTERNVL3_2B, 2_088_957_440, "at most 3,000,000,000"),
    "LLaVA-1.5-7B": (LLAVA_1_5_7B, 7_063_427_072, "block-11 would have 2,813,376,512"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_before_and_after_the_shallowest_cut_that_fits(name):
    config, count, said = PUBLISHED[name]
    whole = empty_model(config)
    assert whole.num_parameters() == count
    fits, line = describe_budget(whole, whole)
    assert fits == (count <= 3e9) and line.endswith(said)
    if not fits:
        shallowest = int(re.search(r"block-(\d+)", said)[1])
        less, _ = slice_empty(whole, f"block-{shallowest + 1}")
        assert less.num_parameters() > 3e9
        assert "no cut" in describe_budget(whole, whole, 10**8)[1]


def test_the_recipes_are_what_doctor_computes(monkeypatch):
    usual = Precision(torch.bfloat16, "as on a GPU")
    monkeypatch.setattr("bridgeblip.hosting.doctor_tune.choose_precision", lambda *args: usual)
    rows = []
    for page in ("other-models.md", "other-models.ko.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        rows.append(re.findall(r"^\| (\S+) \| ([\d,]+) \| `(\S+)` \| (.*) \|$", text, flags=re.M))
    assert rows[0] == rows[1] and {row[0] for row in rows[0]} == set(PUBLISHED)
    for name, whole, layers, rest in rows[0]:
        config, count, _ = PUBLISHED[name]
        sliced, kept = slice_empty(empty_model(config), layers)
        learning, held = held_memory(sliced, TuneSettings(layers=layers))
        depth = config.get_text_config().num_hidden_layers
        facts = [f"{len(kept)} / {depth}", f"{sliced.num_parameters():,}", f"{learning:,}"]
        assert whole == f"{count:,}"
        assert rest.split(" | ") == [*facts, f"{held / 1e9:.1f}"]
