import importlib.util
import json

import families
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from bridgeblip import InputError
from bridgeblip.__main__ import main
from bridgeblip.files import write_text
from bridgeblip.vlm import merge as merging
from bridgeblip.vlm.batches import Batches
from bridgeblip.vlm.families import load_model, load_processor
from bridgeblip.vlm.merge import logits_of, merge, parted, probe
from bridgeblip.vlm.plan import attach_lora
from bridgeblip.vlm.settings import TuneSettings
from bridgeblip.vlm.slicing import slice_model


def run_of(family, folder, method="lora", layers=(), **facts):
    """A run whose adapter does something, as ``tune`` leaves it; returns (run, base).

    Args:
        layers: those of four that stay; none: the base has two, and all stay.
    """
    base = source = families.save(family, folder / "base", layers=4 if layers else 2)
    if layers:
        source, kept = slice_model(base, None, layers)
        facts |= {"layers": layers, "tensors": kept["tensors"]}
    bits = method == "qlora"
    model = attach_lora(load_model(source, bits=bits), TuneSettings(rank=4))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    model.save_pretrained(folder / "run" / "adapter", save_embedding_layers=False)
    settings = {"pixels": 0, "system": "", "prompt": ""}
    known = {"base": str(base), "revision": None, "method": method, "dtype": "float32"}
    run = known | {"settings": settings, "task": "choice"} | facts
    write_text(folder / "run" / "run.json", json.dumps(run))
    return folder / "run", base


@pytest.mark.parametrize("family", families.PUBLISHED)
def test_the_auto_classes_load_what_the_adapter_gave(family, tmp_path, capsys):
    run, base = run_of(family, tmp_path)
    assert main(["merge", str(run)]) == 0
    assert "within" in capsys.readouterr().out
    processor = AutoProcessor.from_pretrained(run / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(run / "merged").eval()
    batch = Batches(processor, merged.config).ask(*probe())
    plain = load_model(base)
    own = Batches(load_processor(base), plain.config).ask(*probe())
    before = logits_of(plain, own)
    expected = logits_of(PeftModel.from_pretrained(plain, run / "adapter").eval(), own)
    assert parted(before, expected) > 1e-2  # the adapter does something
    assert parted(logits_of(merged, batch), expected) < 1e-4
    assert (run / "merged" / "run.json").read_text() == (run / "run.json").read_text()


def test_what_parts_is_not_written(tmp_path, monkeypatch):
    run, _ = run_of("llava", tmp_path)
    usual = LoraModel.merge_and_unload

    def merge_wrongly(self):
        merged = usual(self)
        weight = next(p for n, p in merged.named_parameters() if "language_model.layers.1.mlp" in n)
        weight.data.add_(0.01)
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", merge_wrongly)
    with pytest.raises(InputError, match=r"parts from base and adapter by .*nothing is written"):
        merge(run)
    assert not (run / "merged").exists()


def test_bad_runs_are_refused_in_one_line(tmp_path):
    run, base = run_of("llava", tmp_path)
    with pytest.raises(InputError, match=r"is no run of tune: it has no run\.json"):
        merge(base)
    with pytest.raises(InputError, match=r"is there already and no merged run"):
        merge(run, base)
    facts = json.loads((run / "run.json").read_text())
    write_text(run / "run.json", json.dumps(facts | {"method": "full"}))
    (run / "adapter").rename(run / "model")
    with pytest.raises(InputError, match=r"has no adapter: .*model is an ordinary folder already"):
        merge(run)


def test_an_adapter_that_does_not_fit_its_base_is_refused(tmp_path):
    """Tensors under other names would be left out without a word."""
    run, _ = run_of("llava", tmp_path)
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name.replace("layers.1", "layers.9"): t for name, t in tensors.items()}, path)
    with pytest.raises(
        InputError, match=r"adapter does not fit .*base .*tensors have no counterpart"
    ):
        merge(run)


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="4 bits need bitsandbytes"
)
def test_after_four_bits_the_base_in_full_precision_is_merged(tmp_path, capsys):
    """Which stays nearer to the run than merging into four bits does."""
    run, base = run_of("qwen2_5_vl", tmp_path, "qlora")
    _, distance, bits_distance = merge(run)
    assert distance <= merging.TOLERANCE
    bits = load_model(base, bits=True)
    adapted = PeftModel.from_pretrained(bits, run / "adapter").eval()
    batch = Batches(load_processor(base), bits.config).ask(*probe())
    expected = logits_of(adapted, batch)
    into_bits = parted(logits_of(adapted.merge_and_unload(), batch), expected)
    assert bits_distance <= into_bits / 2
