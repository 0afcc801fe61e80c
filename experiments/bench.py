"""Speed and memory against Hugging Face's own InstructBLIP: same weights, same questions, same
machine, one run.

    python experiments/bench.py [--base FOLDER] [--out FOLDER]

Every measurement is a process of its own; the contenders take turns, in changing order, for several
rounds. What a round has measured lies in ``rounds/`` and is not measured again. On a GPU there are
more questions, in larger batches, and each contender does its work once before it is timed.
"""

import argparse
import json
import os
import platform
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from sklearn.datasets import load_sample_images
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import InstructBlipConfig, Trainer, TrainingArguments
from transformers.initialization import no_init_weights

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bridgeblip import InputError
from bridgeblip.bridge.ahead import AheadTrainer
from bridgeblip.bridge.base import resolve_base, slice_config
from bridgeblip.bridge.budget import count_parts
from bridgeblip.bridge.export import INPUTS, TraceableModel, export_bundle
from bridgeblip.bridge.features import CachedPictures, FeatureCache, encoder_key, fill
from bridgeblip.bridge.lora import attach_bridge
from bridgeblip.bridge.model import BridgeBlipForMultipleChoice, empty_model, load_sliced
from bridgeblip.bridge.processing import QuestionProcessor
from bridgeblip.bridge.settings import DEFAULT_DECODER_LAYERS, BridgeSettings
from bridgeblip.bundle.export import PARITY_BOUND, RELOADING_SHARE
from bridgeblip.bundle.format import load_bundle
from bridgeblip.bundle.predict import predict
from bridgeblip.data.pictures import picture_keys
from bridgeblip.data.questions import read_questions
from bridgeblip.evidence.answers import margins
from bridgeblip.files import write_text
from bridgeblip.machine import best_device, choose_precision
from bridgeblip.training.settings import TrainSettings
from bridgeblip.training.tensors import INDEX_FILE
from bridgeblip.training.trainer import (
    TrainingQuestions,
    accuracy,
    optimizer,
    training_arguments,
)
from bridgeblip.training.weights import save_weights, trained_tensors
from experiments.contenders import (
    Generating,
    PeakMemory,
    clock,
    plan_of,
    prompt_of,
    questions_of,
)
from tools.make_full_size_base import FULL_SIZE_CONFIG, write_base
from tools.rows import markdown

ROOT = Path(__file__).resolve().parent.parent
EACH = 4  # questions a picture, as in the official file
# So short that the stand-in's vocabulary needs about the tokens that the real one needs for words.
WORDS = (
    "a an the in on of to is it at by up or no one two six red big old dog cat man boy car bus box "
    "cup bag hat sky sun sea tree road sign left near blue"
).split()
LONGEST_PROMPT = 512  # tokens that the real model reads
UNSURE = 0.2  # share of the rows that "bundle, orders" asks again in every order
EPOCHS = 5
PARTS = {
    "inference": ["generate", "generate, sliced", "bundle", "bundle, orders"],
    "training": ["bridge, cached features", "PEFT, generative"],
}
# By device: a GPU that gets as little as a CPU would be measured while it warms up.
SIZES = {
    "cpu": {"pictures": 5, "batch_size": 8, "training_pictures": 2, "training_batch": 2},
    "cuda": {"pictures": 213, "batch_size": 32, "training_pictures": 64, "training_batch": 16},
}


# ---------------------------------------------------------------- questions


def write_photo_questions(
    folder: str | Path, pictures: int = 20, each: int = 1, share: float = 0.25
) -> Path:
    """Write four-way questions about crops of scikit-learn's two sample photos; the answers are
    arbitrary.

    JPEG photos, 1000 to 2000 pixels wide, each stored under ``each`` names. With a ``share`` of 1
    the texts are as long as the official ones: question and choices a median of 42 words together,
    69 at most; a choice up to 17.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:
        list(pool.map(partial(_write_photo, folder, each), range(pictures)))
    rng, rows = random.Random(0), []

    def words(count: float) -> str:
        return " ".join(rng.choices(WORDS, k=max(1, round(count * share))))

    for row in range(pictures * each):
        lengths = [min(13, rng.triangular(1, 17, 3)) for _ in range(4)]
        lengths[row % 4] = min(17, 1.5 * lengths[row % 4])
        question = f"{words(rng.randint(8, 16))}?"
        name, right = f"{row:03d}.jpg", rng.choice("ABCD")
        rows.append([f"TEST_{row:03d}", name, question, *map(words, lengths), right])
    table = pd.DataFrame(rows, columns=["ID", "img_path", "Question", *"ABCD", "answer"])
    table.to_csv(folder / "train.csv", index=False)
    table.drop(columns="answer").to_csv(folder / "test.csv", index=False)
    table[["ID"]].assign(answer="-").to_csv(folder / "sample_submission.csv", index=False)
    return folder


def _write_photo(folder: Path, each: int, number: int) -> None:
    """One picture, under ``each`` names."""
    rng = np.random.default_rng(number)
    photo = Image.fromarray(load_sample_images().images[number % 2])
    left, top = rng.integers(photo.width // 4), rng.integers(photo.height // 4)
    size = (int(rng.integers(1000, 2001)), int(rng.integers(1000, 1501)))
    box = (left, top, left + photo.width // 2, top + 300)
    crop = np.asarray(photo.resize(size, Image.Resampling.BICUBIC, box))
    noisy = crop + rng.normal(0, 4, (*size[::-1], 1))  # a camera's: else the file is too small
    first = folder / f"{number * each:03d}.jpg"
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(first, quality=90)
    for other in range(1, each):
        shutil.copyfile(first, folder / f"{number * each + other:03d}.jpg")


# ---------------------------------------------------------------- preparing


def count_operations(run: Callable[[], None]) -> int:
    """Operations, two a multiplication and addition, of all matrix products, convolutions and
    attentions of ``run``."""

    def attention(query, key, value, *args, **kwargs):
        return sdpa_flop_count(query, key, value)

    # not among those that the counter knows
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={on_cpu: attention}) as counter:
        run()
    return counter.get_total_flops()


def export(plan: SimpleNamespace, out: Path) -> dict:
    """Write questions and a bundle; return its letter logits of some, and the margin below which
    ``UNSURE`` of its answers lie."""
    work, processor = out / "work", QuestionProcessor.from_base(plan.base)
    share = min(1.0, processor.prompt_limit / LONGEST_PROMPT)
    write_photo_questions(work / "questions", plan.pictures, EACH, share)
    export_bundle(write_weights(plan.base, work, plan.dtype), work / "torchscript.pt")
    questions = [processor.fit(question) for question in questions_of(out)]
    bundle = load_bundle(work / "torchscript.pt", plan.device)
    answers = predict(bundle, questions, plan.batch_size, permute_below=0)
    batch = processor.collate(questions[:EACH])
    with torch.inference_mode():
        logits = bundle.model(**{name: batch[name].to(plan.device) for name in INPUTS})
    margin = float(np.quantile(margins(answers.probabilities), UNSURE))
    return {"logits": logits.tolist(), "margin": margin}


def prepare(plan: SimpleNamespace, out: Path) -> dict:
    """Hold the bundle against the sliced peer, and count what the distinct work takes at least; in
    a process of its own, for two models at once need not fit.

    Raises:
        InputError: if letter logits differ by more than in an export: then nothing is to be timed.
    """
    processor = QuestionProcessor.from_base(plan.base)
    questions = [processor.fit(question) for question in questions_of(out)]
    with torch.inference_mode():
        peer = Generating(plan.base, plan.device, plan.dtype, plan.batch_size, sliced=True)
        theirs = peer.logits(questions[:EACH], processor.letter_ids).cpu()
    agree("generate, sliced", torch.tensor(plan.logits), theirs, plan.dtype)
    config = slice_config(InstructBlipConfig.from_pretrained(plan.base), DEFAULT_DECODER_LAYERS)
    lengths = processor.count_tokens([prompt_of(question) for question in questions])
    picture, texts = count_floor(config, processor, questions)
    return {
        "parameters": peer.parameters,
        "median tokens": round(statistics.median(lengths)),
        "floor": plan.pictures * picture + texts,
    }


def agree(peer: str, ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> None:
    """Refuse letter logits (B, 4) of ours that part from the peer's by more than in an export."""
    spread = (theirs.max() - theirs.min()).item()
    bound = PARITY_BOUND if dtype == torch.float32 else RELOADING_SHARE * spread
    difference = (ours - theirs).abs().max().item()
    print(f"letter logits, ours and those of {peer}: {difference:.1e} apart, {bound:.1e} allowed")
    if not difference <= bound:
        raise InputError(
            f"ours are {difference:.1e} from the letter logits of {peer}, at most {bound:.1e} is "
            f"allowed: nothing was timed. The contenders must hold the same weights: run again "
            f"with another --out"
        )


def write_weights(base: str, folder: Path, dtype) -> Path:
    """Write the sliced base's weights as they are, unbridged, its head the letters' rows of the LM
    head."""
    bridge, processor = BridgeSettings(rank=0), QuestionProcessor.from_base(resolve_base(base))
    model = attach_bridge(load_sliced(base, processor.letter_ids, dtype=dtype), bridge).eval()
    inputs = processor.collate(read_questions(folder / "questions" / "test.csv")[:EACH])
    with torch.no_grad():
        logits = model(**inputs).logits
    manifest = {
        "base": str(base),
        "revision": None,
        "layers": list(DEFAULT_DECODER_LAYERS),
        "bridge": asdict(bridge),
        "dtype": str(dtype).removeprefix("torch."),
        "probe": {"inputs": inputs, "logits": logits},
    }
    path = folder / "weights-0.pt"
    save_weights(path, trained_tensors(model), manifest)
    return path


def count_floor(config, processor, questions: list) -> tuple[int, int]:
    """Count, without weights, the operations of encoding one picture, and of answering the
    ``questions``, without padding, once their pictures are encoded."""
    texts = 0
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), no_init_weights():
        model = TraceableModel(BridgeBlipForMultipleChoice(config)).eval()
        picture = torch.empty(1, 3, *processor.image_size)
        embeds = model.encode_image(picture)
        one = count_operations(lambda: model.encode_image(picture))
        for question in questions:
            text = processor.encode_prompts([prompt_of(question)])
            texts += count_operations(partial(model.score, embeds, **text))
    return one, texts


# ---------------------------------------------------------------- training


def train_bridge(plan: SimpleNamespace, out: Path) -> float:
    """Seconds of training the bridge as ``train`` sets it up, measuring and writing nothing;
    filling the cache of image features, which begins empty, is part of it."""
    work, processor = out / "work" / "training", QuestionProcessor.from_base(plan.base)
    questions = questions_of(out, "train.csv")[: plan.training_pictures * EACH]
    settings = TrainSettings(epochs=EPOCHS, batch_size=plan.training_batch)
    kept = {"dtype": plan.dtype, "device": plan.device}
    sliced = load_sliced(plan.base, processor.letter_ids, **kept)
    shutil.rmtree(work / "features", ignore_errors=True)
    began, keys = time.perf_counter(), picture_keys(q.image for q in questions)
    cache = FeatureCache(work / "features", encoder_key(sliced, processor))
    fill(cache, sliced, processor, {key: path for path, key in keys.items()})
    pictures, filled = CachedPictures(cache, keys, plan.device), time.perf_counter() - began
    model = attach_bridge(sliced, BridgeSettings())
    arguments = training_arguments(work, settings, plan.dtype)
    arguments.eval_strategy = "no"
    trainer = AheadTrainer(
        model,
        arguments,
        train_dataset=TrainingQuestions(questions, settings.seed, settings.shuffle_choices),
        eval_dataset=questions[:1],
        data_collator=partial(processor.collate, pictures=pictures),
        pictures=pictures,
        compute_metrics=accuracy,
        optimizers=(optimizer(model, settings), None),
        average=settings.average,
    )
    return filled + clock(trainer.train)


def train_peft(plan: SimpleNamespace, out: Path) -> float:
    """Seconds of the usual recipe: LoRA on q and v of the whole language model, the letter as the
    text to generate."""
    peer = Generating(plan.base, plan.device, plan.dtype, plan.batch_size)

    def collate(rows):
        letters = ["ABCD"[row.answer] for row in rows]
        labels = peer.processor.tokenizer(letters, return_tensors="pt").input_ids
        return {**peer.inputs(rows), "labels": labels}

    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=["q", "v"])
    gpu = plan.device != "cpu"
    arguments = TrainingArguments(
        output_dir=str(out / "work" / "training"),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=plan.training_batch,
        learning_rate=2e-4,
        bf16=gpu and plan.dtype == torch.bfloat16,
        use_cpu=not gpu,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,  # collate puts the batch on the device itself
    )
    questions = questions_of(out, "train.csv")[: plan.training_pictures * EACH]
    settings = {"train_dataset": questions, "data_collator": collate}
    return clock(Trainer(get_peft_model(peer.model, lora), arguments, **settings).train)


def train_epochs(way: Callable, plan: SimpleNamespace, out: Path) -> dict:
    """Train that ``way``; on a GPU twice, the second time with its kernels loaded and chosen."""
    with PeakMemory() as peak:
        for _ in range(1 if plan.device == "cpu" else 2):
            seconds = way(plan, out)
    return {f"{EPOCHS} epochs, s": seconds, "own memory, GB": peak.own}


WORKERS = {
    "export": export,
    "prepare": prepare,
    "bridge, cached features": partial(train_epochs, train_bridge),
    "PEFT, generative": partial(train_epochs, train_peft),
}


# ---------------------------------------------------------------- rounds


def run_bench(
    base: str | Path | None = None,
    out: str | Path = "bench",
    rounds: int = 5,
    pictures: int | None = None,
    command: str = "python experiments/bench.py",
) -> dict:
    """Measure, round by round, and write ``bench.json`` and ``bench.md`` into ``out``; return what
    the JSON holds.

    Run again with the same arguments, it goes on where it stopped; with more rounds, it adds them.

    Args:
        base: a folder or "tiny"; by default the stand-in of the real model's size.
        pictures: if not those of ``SIZES``.

    Raises:
        InputError: if ``out`` holds another benchmark.
        RuntimeError: if a measurement fails, with the end of what it printed.
    """
    out = Path(out).resolve()
    (out / "rounds").mkdir(parents=True, exist_ok=True)
    plan = keep_plan(_base_folder(base, out), out, pictures)
    exported = measure(out, "export", 0)
    write_text(out / "plan.json", json.dumps(plan | exported, indent=2))
    prepared = measure(out, "prepare", 0)
    for turn in range(rounds):
        for names in PARTS.values():
            for name in order_of(names, turn):
                measure(out, name, turn)
    results = plan | {
        "command": command,
        "date": date.today().isoformat(),
        "prepared": prepared,
        "measured": summarize(plan, prepared, out),
    }
    write_text(out / "bench.json", json.dumps(results, indent=2) + "\n")
    write_text(out / "bench.md", page(results))
    return results


def _base_folder(base: str | Path | None, out: Path) -> Path:
    """The folder of the base; by default the stand-in of the real size, written if need be."""
    if base:
        return resolve_base(base).resolve()
    standin = out / "work" / "base"
    if not (standin / INDEX_FILE).is_file():
        write_base(FULL_SIZE_CONFIG, standin)
    return standin


def keep_plan(base: Path, out: Path, pictures: int | None = None) -> dict:
    """What all processes have in common, kept in the folder; refuse a folder that has another."""
    device, config = best_device(), InstructBlipConfig.from_pretrained(base)
    parameters = sum(
        count_parts(empty_model(slice_config(config, DEFAULT_DECODER_LAYERS))).values()
    )
    plan = {
        "base": str(base),
        "device": device,
        "machine": platform.machine() if device == "cpu" else torch.cuda.get_device_name(device),
        "cores": torch.get_num_threads(),
        "dtype": str(choose_precision(device, parameters).dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "pillow")},
    }
    plan |= SIZES[device.split(":")[0]] | ({"pictures": pictures} if pictures else {})
    path = out / "plan.json"
    there = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else plan
    other = [key for key, value in plan.items() if there.get(key) != value]
    if other:
        raise InputError(
            f"{out} holds another bench (other {', '.join(other)}): give another --out, or "
            f"remove it"
        )
    write_text(path, json.dumps(there, indent=2))
    return plan


def measure(out: Path, name: str, turn: int) -> dict:
    """Have a process of its own do one measurement, unless the result is there; return it."""
    path = out / "rounds" / f"{name} {turn}.json"
    if not path.is_file():
        print(f"{time.strftime('%H:%M:%S')} {path.stem}", flush=True)
        # Of the bundle's file nothing is remembered; "bundle, orders" finds its digest known.
        cache = out / "work" / "cache"
        if name == "bundle":
            shutil.rmtree(cache, ignore_errors=True)
        write_text(path, run_alone(name, out, os.environ | {"BRIDGEBLIP_CACHE": str(cache)}))
    return json.loads(path.read_text(encoding="utf-8"))


def run_alone(name: str, out: Path, environment: dict[str, str]) -> str:
    """Run a worker, or a contender of ``contenders.py``, in a process of its own; return the line
    of JSON that it prints last."""
    script = "bench" if name in WORKERS else "contenders"
    command = [sys.executable, str(Path(__file__).with_name(f"{script}.py"))]
    command += ["--measure"] * (script == "bench") + [name, str(out), repr(time.time())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(
            f"{name} failed with exit code {done.returncode}:\n{done.stderr[-3000:]}"
        )
    return done.stdout.splitlines()[-1]


def order_of(contenders: list[str], turn: int) -> list[str]:
    """Who comes when in round ``turn``: what heats up or fills a cache harms none more than the
    others."""
    return contenders if turn % 2 == 0 else contenders[::-1]


# ---------------------------------------------------------------- the tables


def summarize(plan: dict, prepared: dict, out: Path) -> dict:
    """What lies in ``rounds/``, by part, contender and measure: median, least and most."""
    rows, found = plan["pictures"] * EACH, {}
    for part, names in PARTS.items():
        turns = {}
        for name in names:
            files = sorted((out / "rounds").glob(f"{name} [0-9]*.json"))
            turns[name] = pd.DataFrame([json.loads(file.read_text()) for file in files])
        for own in turns.values():
            if part == "training":
                peer = turns["PEFT, generative"][f"{EPOCHS} epochs, s"]
                own["times as fast as PEFT"] = peer / own[f"{EPOCHS} epochs, s"]
                continue
            seconds, rate, peer = own["seconds"], own["operations a second"], turns["generate"]
            own["rows a second"] = rows / seconds
            own["over generate"] = peer["seconds"] / seconds
            first = own["first answer, s"] / peer["first answer, s"]
            own["first answer over generate's"] = first
            own["share of the floor"] = prepared["floor"] / rate / seconds
        found[part] = {}
        for name, own in turns.items():
            found[part][name] = own.agg(["median", "min", "max"]).to_dict()
    return found


def page(results: dict) -> str:
    """The tables as a page: medians, least and most of the rounds in brackets."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    prepared, questions = results["prepared"], results["pictures"] * EACH
    training = min(results["training_pictures"], results["pictures"]) * EACH
    parts = [
        "# Speed and memory",
        f"    {results['command']}",
        f"{results['date']}, {results['machine']}, {results['cores']} cores, device "
        f"{results['device']}, {results['dtype']}; {versions}. The base holds "
        f"{prepared['parameters']:,} parameters. {questions} questions on {results['pictures']} "
        f"pictures, a median of {prepared['median tokens']} tokens, in batches of "
        f"{results['batch_size']}; to train on, {training} in batches of "
        f"{results['training_batch']}. Each measurement is a process of its own; medians of the "
        f"rounds, least and most in brackets; ratios are taken within a round.",
        f"Before anything was timed, the bundle's letter logits were held against those of the "
        f"sliced peer. The floor is "
        f"{prepared['floor'] / questions / 1e9:.4g} GFLOP a row (each picture once, no padding, "
        f"the kept decoder layers) at the rate of a large matrix product, taken in the same "
        f"process. With four orders the bundle asked "
        f"{UNSURE:.0%} of the rows again, those it was least sure of. Training the bridge includes "
        f"encoding the pictures.",
    ]
    for part, contenders in results["measured"].items():
        rows = []
        for name, measures in contenders.items():
            rows.append({part: name} | {what: cell(found) for what, found in measures.items()})
        parts += [f"## {part.capitalize()}", markdown(rows)]
    return "\n\n".join(parts) + "\n"


def cell(spread: dict[str, float]) -> str:
    median, least, most = (f"{spread[key]:.3g}" for key in ("median", "min", "max"))
    return median if least == most else f"{median} ({least} to {most})"


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 2 with one line on stderr for unusable input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--measure"]:  # a process that ``measure`` has started
        out = Path(arguments[2])
        print(json.dumps(WORKERS[arguments[1]](plan_of(out), out)))
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", help="folder, or tiny; by default a stand-in of the real size")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="gets tables and rounds")
    parser.add_argument("--rounds", type=int, default=5, help="run again to go on or add some (5)")
    parser.add_argument("--pictures", type=int, help="four questions each (5; on a GPU 213)")
    args = parser.parse_args(arguments)
    command = shlex.join(["python", "experiments/bench.py", *arguments])
    try:
        results = run_bench(**vars(args), command=command)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{page(results)}\nwrote {args.out / 'bench.md'} and bench.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
