"""The real model's size on this machine, with random weights: loading, parity, and the whole road.

    python tools/full_size.py STEP --base FOLDER [--work FOLDER]

Steps, each meant for a process of its own because peak memory is a process's: "ours" loads the slice and
runs a forward, "theirs" does so with Hugging Face's class and cuts it, "parity-ours" and "parity-theirs"
write the letter logits of all 24 layers, "train" trains two steps, "export" and "predict" go on from there; "epochs"
times an epoch with and without cached image features. Each prints one line of JSON. ``make_full_size_base.py`` writes
the folder.
"""

import argparse
import json
import random
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn
from transformers import InstructBlipForConditionalGeneration, TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bridgeblip.base import TensorReader
from bridgeblip.config import DEFAULT_DECODER_LAYERS, BridgeSettings
from bridgeblip.export import export_bundle
from bridgeblip.features import CachedPictures, FeatureCache, encoder_key, fill
from bridgeblip.inference import load_bundle, predict
from bridgeblip.model import attach_bridge, load_sliced
from bridgeblip.processing import QuestionProcessor
from bridgeblip.questions import LETTERS, picture_keys, read_questions
from bridgeblip.submission import write_submission
from bridgeblip.training import (
    BridgeTrainer,
    TrainingQuestions,
    TrainSettings,
    accuracy,
    optimizer,
    train,
    training_arguments,
)

INPUTS = ("pixel_values", "qformer_input_ids", "qformer_attention_mask", "input_ids", "attention_mask")


class PeakMemory:
    """Peak anonymous memory of this process, in bytes, while the block runs; polled 50 times a second."""

    def __enter__(self):
        self.bytes, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()
        return self

    def _poll(self):
        while not self._done.wait(0.02):
            status = Path("/proc/self/status").read_text()
            self.bytes = max(self.bytes, int(status.split("RssAnon:")[1].split()[0]) * 1024)

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()


def write_photo_questions(folder: Path) -> Path:
    """Write 20 four-way questions about crops of scikit-learn's two sample photos; answers are arbitrary."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = random.Random(0), []
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    words = ["temple", "flower", "tree", "river", "roof", "leaf", "stone", "sky"]
    for i in range(20):
        photo = photos[i % 2]
        left, top = rng.randrange(photo.width // 2), rng.randrange(photo.height // 2)
        photo.crop((left, top, left + photo.width // 2, top + photo.height // 2)).save(folder / f"{i:02d}.jpg")
        question = "What is the largest thing that can be seen in this part of the photo?"
        rows.append([f"TEST_{i:02d}", f"{i:02d}.jpg", question, *rng.sample(words, 4), LETTERS[i % 4]])
    table = pd.DataFrame(rows, columns=["ID", "img_path", "Question", *LETTERS, "answer"])
    table.to_csv(folder / "train.csv", index=False)
    table.drop(columns="answer").to_csv(folder / "test.csv", index=False)
    table[["ID"]].assign(answer="-").to_csv(folder / "sample_submission.csv", index=False)
    return folder


def probe(processor: QuestionProcessor, folder: Path, count: int) -> dict[str, torch.Tensor]:
    batch = processor.collate(read_questions(write_photo_questions(folder) / "test.csv")[:count])
    return {name: batch[name] for name in INPUTS}


def load_ours(base: Path, work: Path) -> dict:
    processor = QuestionProcessor.from_base(base)
    inputs = probe(processor, work / "photos", 1)
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
    inputs = probe(processor, work / "photos", 1)
    began = time.monotonic()
    with PeakMemory() as peak, torch.inference_mode():
        model = InstructBlipForConditionalGeneration.from_pretrained(base, dtype=torch.bfloat16).eval()
        decoder = model.language_model.decoder
        decoder.block = nn.ModuleList(decoder.block[i] for i in DEFAULT_DECODER_LAYERS)
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        model(**inputs, decoder_input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)
        seconds = time.monotonic() - began
    return {"seconds": seconds, "peak_bytes": peak.bytes}


def parity_ours(base: Path, work: Path) -> dict:
    processor = QuestionProcessor.from_base(base)
    model = load_sliced(base, processor.letter_ids, range(24), dtype=torch.bfloat16)
    with torch.inference_mode():
        logits = model(**probe(processor, work / "photos", 2)).logits
    torch.save(logits, work / "ours.pt")
    return {"logits": logits.tolist()}


def parity_theirs(base: Path, work: Path) -> dict:
    processor = QuestionProcessor.from_base(base)
    inputs = probe(processor, work / "photos", 2)
    model = InstructBlipForConditionalGeneration.from_pretrained(base, dtype=torch.bfloat16).eval()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with torch.inference_mode():
        output = model(**inputs, decoder_input_ids=torch.zeros(2, 1, dtype=torch.long), use_cache=False)
    logits = output.logits[:, 0, processor.letter_ids].float()
    ours = torch.load(work / "ours.pt", weights_only=True)
    return {"difference": (ours - logits).abs().max().item(), "spread": (logits.max() - logits.min()).item()}


def train_two_steps(base: Path, work: Path) -> dict:
    photos = write_photo_questions(work / "photos")
    began = time.monotonic()
    settings = TrainSettings(batch_size=8, validation_fraction=0.2)
    with PeakMemory() as peak:
        result = train(photos / "train.csv", base, work / "checkpoint", settings, features=work / "features")
    steps = int(result.history["step"].max())
    megabytes = result.weights[0].stat().st_size / 1e6
    return {"seconds": time.monotonic() - began, "peak_gb": peak.bytes / 1e9, "steps": steps, "weights_mb": megabytes}


def export(base: Path, work: Path) -> dict:
    began = time.monotonic()
    with PeakMemory() as peak:
        out, parity = export_bundle(work / "checkpoint" / "weights-0.pt", work / "checkpoint" / "torchscript.pt")
    live = sum(p.nbytes for p in torch.jit.load(str(out)).parameters())
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
        bundle, questions = load_bundle(work / "checkpoint" / "torchscript.pt"), read_questions(photos / "test.csv")
        answers = predict(bundle, questions, batch_size=4)
        submission = write_submission(questions, answers, photos / "sample_submission.csv", work / "submission.csv")
    return {"seconds": time.monotonic() - began, "peak_gb": peak.bytes / 1e9, "answers": len(submission)}


class EpochTimer(TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self.last = time.monotonic() - self.began

    def on_epoch_end(self, args, state, control, **kwargs):
        self.seconds.append(self.last)


def epochs(base: Path, work: Path) -> dict:
    """Two epochs over 12 distinct pictures without and with the cache of image features; the later ones count."""
    questions = read_questions(write_photo_questions(work / "photos") / "train.csv", need_answers=True)[:12]
    processor = QuestionProcessor.from_base(base)
    sliced = load_sliced(base, processor.letter_ids, dtype=torch.bfloat16)
    keys = picture_keys(q.image for q in questions)
    cache = FeatureCache(work / "features", encoder_key(sliced, processor))
    fill(cache, sliced, processor, {key: path for path, key in keys.items()}, 4)
    model, seconds = attach_bridge(sliced, BridgeSettings()), {}
    settings = TrainSettings(batch_size=4, epochs=2)
    for name, pictures in (("uncached", None), ("cached", CachedPictures(cache, keys))):
        timer = EpochTimer()
        arguments = training_arguments(work / "epochs", settings, torch.bfloat16)
        arguments.eval_strategy = "no"
        trainer = BridgeTrainer(
            model,
            arguments,
            train_dataset=TrainingQuestions(questions, 0, True),
            eval_dataset=questions[:1],
            data_collator=partial(processor.collate, pictures=pictures),
            compute_metrics=accuracy,
            optimizers=(optimizer(model, settings), None),
            callbacks=[timer],
        )
        trainer.train()
        seconds[name] = timer.seconds[-1]
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("full_size"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    print(json.dumps(STEPS[args.step](args.base, args.work)))
