import json
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import LAYERS, ROOT, without
from huggingface_hub import HfApi
from peft import PeftModel
from safetensors.torch import load_file

from bridgeblip import InputError
from bridgeblip.__main__ import main
from bridgeblip.bridge import share
from bridgeblip.bridge.base import REAL_BASE, REAL_REVISION, BridgeBlipConfig
from bridgeblip.bridge.export import restore
from bridgeblip.bridge.lora import merge_bridge
from bridgeblip.bridge.model import load_sliced
from bridgeblip.bridge.settings import BridgeSettings
from bridgeblip.bridge.share import FILES, _public_name, write_adapter
from bridgeblip.bridge.train import train
from bridgeblip.training.settings import TrainSettings
from bridgeblip.training.weights import load_weights, save_weights

FRESH = """
import sys, torch
code, batch, logits = sys.argv[1:]
exec(open(code).read())
with torch.no_grad():
    torch.save(model(**torch.load(batch)).logits, logits)
"""


@pytest.fixture(scope="module")
def weights(competition, tmp_path_factory):
    """What two epochs on the tiny base write; the first is the better."""
    folder = tmp_path_factory.mktemp("trained")
    settings = TrainSettings(epochs=2, learning_rate=3e-3, validation_fraction=0.25)
    return train(
        competition / "train.csv", "tiny", folder, settings, features=folder / "features"
    ).weights


@pytest.fixture(scope="module")
def adapter(weights):
    return write_adapter(weights[0], weights[0].parent / "adapter")


@pytest.fixture(scope="module")
def probe(weights):
    """Questions as the trained model has seen them."""
    return without(load_weights(weights[0]).manifest["probe"]["inputs"], "labels")


def code_of(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    return code


@torch.no_grad()
def test_the_lines_of_the_card_give_the_trained_model_in_a_fresh_process(
    weights, adapter, probe, tmp_path
):
    (tmp_path / "code.py").write_text(code_of((adapter / "README.md").read_text()))
    torch.save(probe, tmp_path / "batch.pt")
    paths = [str(tmp_path / name) for name in ("code.py", "batch.pt", "logits.pt")]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", FRESH, *paths], cwd=adapter.parent, env=environment, check=True
    )
    trained = restore(weights[0]).model
    logits = trained(**probe).logits
    assert torch.equal(torch.load(paths[2]), logits)
    sliced = load_sliced("tiny", load_weights(weights[0]).manifest["letter_ids"])
    assert (sliced(**probe).logits - logits).abs().max() > 1e-3  # bridge and head do something
    sliced.head.load_state_dict(
        trained.base_model.model.head.modules_to_save["default"].state_dict()
    )
    assert not torch.equal(sliced(**probe).logits, logits)  # not the head alone


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_brings_head_and_adapters_and_the_result_merges(weights, adapter, probe, dtype):
    trained = restore(weights[0], dtype=str(dtype).removeprefix("torch.")).model
    sliced = load_sliced("tiny", load_weights(weights[0]).manifest["letter_ids"], dtype=dtype)
    sliced.head.float()
    model = PeftModel.from_pretrained(sliced, adapter)
    own = dict(model.named_parameters())
    assert all(torch.equal(own[name], p) for name, p in trained.named_parameters())
    assert torch.equal(model(**probe).logits, trained(**probe).logits)
    assert torch.equal(merge_bridge(model)(**probe).logits, merge_bridge(trained)(**probe).logits)


def test_the_folder_says_what_it_belongs_to(weights, adapter):
    assert sorted(path.name for path in adapter.iterdir()) == sorted(FILES)
    manifest = load_weights(weights[0]).manifest
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["r"], settings["lora_alpha"]) == (
        "tiny",
        3,
        6,
    )
    assert BridgeBlipConfig.from_pretrained(adapter).kept_decoder_layers == manifest["layers"]
    assert all(
        tensor.dtype == torch.float32
        for tensor in load_file(adapter / "adapter_model.safetensors").values()
    )
    card = (adapter / "README.md").read_text()
    facts = [f"{manifest['validation']['accuracy']:.4f}", f"`{manifest['prompt']}`", "rank 3, alpha 6", "25%",
             f"{manifest['budget']['total']:,}", f"A {manifest['letter_ids'][0]}", "[0, 3, 6, 9, "
                                                                                   "12, 15, 18, 21]",
             *manifest["versions"].values(), settings["target_modules"], "own terms"]  # fmt: skip
    assert not [fact for fact in facts if fact not in card]


def test_nothing_of_the_machine_is_in_the_folder(base, competition, tmp_path):
    """A base in a folder of its own is named, its place is not."""
    trained = train(
        competition / "train.csv", base, tmp_path / "checkpoint", TrainSettings(validation_fraction=0.25),
        BridgeSettings(rank=192, layers=LAYERS), features=None,
    ).weights[0]  # fmt: skip
    out = write_adapter(trained, tmp_path / "adapter")
    for path in out.iterdir():
        content = path.read_bytes()
        places = (base.parent, tmp_path, competition.parent, ROOT, ROOT.home())
        assert not [place for place in places if str(place).encode() + b"/" in content], path
    assert f"- Base: {base.name}, a folder" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    "base, name",
    [(REAL_BASE, REAL_BASE), ("tiny", "tiny"), ("/home/me/models/mine/", "mine"), (r"C:\Users\me\mine", "mine"),
     ("./models/mine", "mine"), ("~/models/mine", "mine"), ("../mine", "mine")],
)  # fmt: skip
def test_a_hub_id_keeps_its_name_and_a_path_its_last_part(base, name):
    assert _public_name(base) == name


def test_the_real_base_is_pinned(weights, tmp_path):
    loaded = load_weights(weights[0])
    save_weights(tmp_path / "weights-0.pt", loaded.tensors, loaded.manifest | {"base": REAL_BASE})
    out = write_adapter(tmp_path / "weights-0.pt", tmp_path / "adapter")
    settings = json.loads((out / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == (REAL_BASE, REAL_REVISION)
    assert f"base, revision = {REAL_BASE!r}, {REAL_REVISION!r}" in (out / "README.md").read_text()


def test_the_verb_takes_the_best_weights_and_replaces_only_an_adapter(weights, tmp_path, capsys):
    best = json.loads((weights[0].parent / "best.json").read_text())["best"]
    out = weights[0].parent / "shared"
    for _ in range(2):
        assert main(["share", "--out", str(out)]) == 0
        assert f"{best}: best of 2 epochs" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    (out / "notes.txt").write_text("mine")
    assert main(["share", "--out", str(out)]) == 2
    assert (
        "holds notes.txt" in capsys.readouterr().err and (out / "notes.txt").read_text() == "mine"
    )
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        write_adapter(weights[0], tmp_path / "file")


@pytest.mark.parametrize("name", ["somebody/bridge", "no name at all"])
def test_what_the_hub_does_not_take_is_one_line_and_the_folder_stays(
    weights, tmp_path, capsys, monkeypatch, name
):
    nowhere = partial(HfApi, endpoint="http://127.0.0.1:9", token="hf_none")
    monkeypatch.setattr(share, "HfApi", nowhere)
    out = tmp_path / "adapter"
    line = ["share", "--weights", str(weights[0]), "--out", str(out), "--push", name]
    assert main(line) == 2 and {path.name for path in out.iterdir()} == set(FILES)
    error = capsys.readouterr().err
    assert f"not uploaded to {name}" in error and "hf auth login" in error
    assert error.count("\n") == 1


def test_the_hub_gets_the_folders_four_files_privately(adapter, monkeypatch):
    asked = []

    class Hub:  # the real one would keep what it is given
        endpoint = "https://hub"

        def create_repo(self, name, private, exist_ok):
            asked.append((name, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            asked.append((repo_id, folder_path, sorted(allow_patterns)))

    monkeypatch.setattr(share, "HfApi", Hub)
    assert share.push_adapter(adapter, "me/bridge") == "https://hub/me/bridge"
    assert asked == [("me/bridge", True, True), ("me/bridge", adapter, sorted(FILES))]


def test_what_has_no_adapter_is_refused(weights, tmp_path):
    loaded = load_weights(weights[0])
    save_weights(
        tmp_path / "head.pt",
        loaded.tensors,
        loaded.manifest | {"bridge": vars(BridgeSettings(rank=0))},
    )
    save_weights(tmp_path / "short.pt", dict(list(loaded.tensors.items())[1:]), loaded.manifest)
    for name, message in (
        ("head", "rank 0.*rank above 0"),
        ("short", "do not fit"),
    ):
        with pytest.raises(InputError, match=message):
            write_adapter(tmp_path / f"{name}.pt", tmp_path / "adapter")
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_folder_that_holds_no_adapter_is_left_alone(weights, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("my own")
    with pytest.raises(
        InputError, match=r"holds README.md, which is no adapter: give another --out"
    ):
        write_adapter(weights[0], tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "my own"
