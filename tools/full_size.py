"""The real model's size on this machine, with random weights: loading, parity, and the whole road.

    python tools/full_size.py STEP --base FOLDER [--work FOLDER]

Steps, each meant for a process of its own because peak memory is a process's: "ours" loads the
slice and runs a forward, "theirs" does so with Hugging Face's class and cuts it, "parity-ours" and
"parity-theirs" write the letter logits of all 24 layers, "train" trains two steps, "export" and
"predict" go on from there; "epochs" times an epoch with and without cached image features. Each
prints one line of JSON. ``make_full_size_base.py`` writes the folder.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers import InstructBlipForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bridgeblip.bridge.base import TensorReader
from bridgeblip.bridge.export import export_bundle
from bridgeblip.bridge.model import load_sliced
from bridgeblip.bridge.processing import QuestionProcessor
from bridgeblip.bridge.settings import DEFAULT_DECODER_LAYERS
from bridgeblip.bridge.train import train
from bridgeblip.bundle.format import load_bundle
from bridgeblip.bundle.predict import predict
from bridgeblip.data.questions import read_questions
from bridgeblip.evidence.submission import write_submission
from bridgeblip.training.settings import TrainSettings
from experiments.bench import bridge_epochs, write_photo_questions
from experiments.contenders import PeakMemory

INPUTS = (
    "pixel_values",
    "qformer_input_ids",
    "qformer_attention_mask",
    "input_ids",
    "attention_mask",
)


def probe(processor: QuestionProcessor, work: Path, count: int) -> dict[str, torch.Tensor]:
    batch = processor.collate(
        read_questions(write_photo_questions(work / "photos") / "test.csv")[:count]
    )
    return {name: batch[name] for name in INPUTS}


def load_ours(base: Path, work: Path) -> dict:
    processor = QuestionProcessor.from_base(base)
    inputs = probe(processor, work, 1)
    began = time.monotonic()
    with PeakMemory() as peak, torch.inference_mode():
        model = load_sliced(base, processor.letter_ids, dtype=torch.bfloat16)
        loaded = time.monotonic() - began
        logits = model(**inputs).logits
        seconds = time.monotonic() - began
    kept = sum(p.nbytes for p in model.parameters())
    reader = TensorReader(base)  # the same tensors again, to count what is asked of the files
    names = [f"language_model.decoder.block.{i}." for i in DEFAULT_DECODER_LAYERS]
    own = [n for n in reader.shard_of if ".decoder.block." not in n or n.startswith(tuple(names))]
    reader.read([n for n in own if "lm_head" not in n], lambda name: torch.bfloat16)
    reader.read_rows("language_model.lm_head.weight", processor.letter_ids)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
        "seconds_to_load": loaded,
        "peak_over_kept": peak.bytes / kept,
        "asked_over_kept": reader.bytes_read / kept,
        "finite": bool(torch.isfinite(logits).all()),
    }


def load_theirs(base: Path, work: Path) -> dict:
    processor = QuestionProcessor.from_base(base)
    inputs = probe(processor, work, 1)
    began = time.monotonic()
    with PeakMemory() as peak, torch.inference_mode():
        model = InstructBlipForConditionalGeneration.from_pretrained(
            base, dtype=torch.bfloat16
        ).eval()
        decoder = model.language_model.decoder
        decoder.block = nn.ModuleList(decoder.block[i] for i in DEFAULT_DECODER_LAYERS)
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        model(**inputs, decoder_input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)
        seconds = time.monotonic() - began
    return {"seconds": seconds, "peak_bytes": peak.bytes}


def parity_ours(base: Path, work: Path) -> dict:
    processor = QuestionProcessor.from_base(base)
    model = load_sliced(base, processor.letter_ids, range(24), dtype=torch.float32)
    with torch.inference_mode():
        logits = model(**probe(processor, work, 2)).logits
    torch.save(logits.cpu(), work / "ours.pt")
    return {"logits": logits.tolist()}


def parity_theirs(base: Path, work: Path) -> dict:
    processor = QuestionProcessor.from_base(base)
    inputs = probe(processor, work, 2)
    model = InstructBlipForConditionalGeneration.from_pretrained(base, dtype=torch.float32).eval()
    with torch.inference_mode():
        output = model(
            **inputs, decoder_input_ids=torch.zeros(2, 1, dtype=torch.long), use_cache=False
        )
    logits = output.logits[:, 0, processor.letter_ids].float()
    ours = torch.load(work / "ours.pt", map_location="cpu", weights_only=True)
    return {
        "difference": (ours - logits).abs().max().item(),
        "spread": (logits.max() - logits.min()).item(),
    }


def train_two_steps(base: Path, work: Path) -> dict:
    photos = write_photo_questions(work / "photos")
    began = time.monotonic()
    settings = TrainSettings(batch_size=8, validation_fraction=0.2)
    with PeakMemory() as peak:
        result = train(
            photos / "train.csv", base, work / "checkpoint", settings, features=work / "features"
        )
    steps = int(result.history["step"].max())
    megabytes = result.weights[0].stat().st_size / 1e6
    return {
        "seconds": time.monotonic() - began,
        "peak_gb": peak.bytes / 1e9,
        "steps": steps,
        "weights_mb": megabytes,
    }


def export(base: Path, work: Path) -> dict:
    began = time.monotonic()
    with PeakMemory() as peak:
        out, parity = export_bundle(
            work / "checkpoint" / "weights-0.pt", work / "checkpoint" / "torchscript.pt"
        )
    live = sum(p.nbytes for p in torch.jit.load(str(out), map_location="cpu").parameters())
    shares = (parity["difference"] / parity["bound"]).groupby(parity["form"]).max()
    return {
        "seconds": time.monotonic() - began,
        "peak_over_live": peak.bytes / live,
        "file_over_live": out.stat().st_size / live,
        "difference_over_bound": shares.to_dict(),
    }


def answer(base: Path, work: Path) -> dict:
    photos = work / "photos"
    began = time.monotonic()
    with PeakMemory() as peak:
        bundle, questions = (
            load_bundle(work / "checkpoint" / "torchscript.pt"),
            read_questions(photos / "test.csv"),
        )
        answers = predict(bundle, questions, batch_size=4)
        submission = write_submission(
            questions, answers, photos / "sample_submission.csv", work / "submission.csv"
        )
    return {
        "seconds": time.monotonic() - began,
        "peak_gb": peak.bytes / 1e9,
        "answers": len(submission),
    }


def epochs(base: Path, work: Path) -> dict:
    """Two epochs over 12 distinct pictures without and with the cache of image features; the later
    ones count."""
    questions = read_questions(
        write_photo_questions(work / "photos") / "train.csv", need_answers=True
    )[:12]
    settings, seconds = TrainSettings(batch_size=4, epochs=2), {}
    for name, cached in (("uncached", False), ("cached", True)):
        seconds[name] = bridge_epochs(
            base, questions, settings, torch.bfloat16, work / "epochs", cached
        )[-1]
    return seconds | {"ratio": seconds["cached"] / seconds["uncached"]}


STEPS = {
    "epochs": epochs,
    "ours": load_ours,
    "theirs": load_theirs,
    "parity-ours": parity_ours,
    "parity-theirs": parity_theirs,
    "train": train_two_steps,
    "export": export,
    "predict": answer,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("full_size"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    print(json.dumps(STEPS[args.step](args.base, args.work)))
