import json
import shutil

import pytest
import torch

from bridgeblip import InputError
from bridgeblip.bridge.base import LM_HEAD, TINY_BASE, open_base, resolve_base, source_name


def test_names():
    assert resolve_base("tiny") == TINY_BASE
    kept = (0, 2, 5)
    assert source_name("language_model.decoder.block.2.layer.1.EncDecAttention.q.weight", kept) == (
        "language_model.decoder.block.5.layer.1.EncDecAttention.q.weight"
    )
    bias = "language_model.decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert source_name(bias, (3, 5)) == bias  # exists in the base's block 0 only
    encoder = "language_model.encoder.block.2.layer.0.SelfAttention.q.weight"
    assert source_name(encoder, kept) == encoder


@pytest.mark.parametrize("name", ["no/such/folder", "./missing", "missing"])
def test_missing_base_is_one_clear_error(name):
    with pytest.raises(InputError, match=r"not found|hub id"):
        resolve_base(name)


def test_unreachable_hub_id_says_what_to_do(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("bridgeblip.training.tensors.snapshot_download", fail)
    with pytest.raises(InputError, match=r"no network.*folder of a copy"):
        resolve_base("Salesforce/instructblip-flan-t5-xl")


def test_a_download_that_breaks_off_says_what_to_do(base, tmp_path, monkeypatch):
    """The small files of a hub id are there; a shard is not, or there are none in safetensors."""
    shutil.copytree(base, tmp_path / "hub", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(
        "bridgeblip.training.tensors.snapshot_download",
        lambda *args, **kwargs: str(tmp_path / "hub"),
    )
    with pytest.raises(InputError, match=r"some/model is neither.*[Oo]ffline.*the connection"):
        open_base("some/model").read(["query_tokens"], lambda name: torch.float32)
    monkeypatch.setattr("bridgeblip.training.tensors.model_info", lambda *args, **kwargs: None)
    with pytest.raises(
        InputError, match=r"base some/model has no model-.*expected weights in safetensors"
    ):
        open_base("some/model").read(["query_tokens"], lambda name: torch.float32)

    def download(*args, allow_patterns, **kwargs):
        if "safetensors" in str(allow_patterns):
            raise OSError("No space left on device")
        return str(tmp_path / "hub")

    monkeypatch.setattr("bridgeblip.training.tensors.snapshot_download", download)
    with pytest.raises(InputError, match=r"No space left on device.*the disk's space"):
        open_base("some/model").read(["query_tokens"], lambda name: torch.float32)


def test_reads_tensors_and_rows(base, hf_model):
    reader = open_base(base)
    assert len(set(reader.shard_of.values())) > 1  # the fixture is sharded like the real one
    assert torch.equal(
        reader.read(["query_tokens"], lambda name: torch.float32)["query_tokens"],
        hf_model.query_tokens,
    )
    assert torch.equal(
        reader.read_rows(LM_HEAD, [7, 4]), hf_model.language_model.lm_head.weight[[7, 4]]
    )


def test_broken_folders_are_named(base, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    with pytest.raises(InputError, match=r"no\.such\.tensor"):
        open_base(folder).read(["no.such.tensor"], lambda name: torch.float32)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"]["query_tokens"]
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(InputError, match=f"{shard.name}.*truncated"):
        open_base(folder).read(["query_tokens"], lambda name: torch.float32)
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard.name}.*missing"):
        open_base(folder).read(["query_tokens"], lambda name: torch.float32)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        resolve_base(folder)
