"""What only a GPU and the hub can show, measured once by whoever has both, for all others.

    python tools/verify_real.py [--chat MODEL] [--skip STEP ...] [--aokvqa FILE COCO]

Steps: "base" holds the published weights against what is known of them and against Hugging Face's
own model, on real pictures; "chat" slices, tunes and merges a chat model; "notebooks" runs the
three notebooks on a few photos; "zero-shot" scores the unsliced base on A-OKVQA's validation
questions, if they are given. Says first what it downloads and how long it takes. Each row is stored
as it comes, and a second run goes on behind the last whole step.

Ends with one file to send back, real-CARD.json in --out: versions, what was asked and measured, and
what that means, without pictures and without this machine's folders.
"""

import argparse
import gc
import json
import os
import platform
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bridgeblip import HOME, InputError
from bridgeblip.bridge.base import (
    REAL_BASE,
    SMALL_FILES,
    hub_id,
    pinned_revision,
    resolve_base,
)
from bridgeblip.bridge.model import load_sliced
from bridgeblip.bridge.processing import QuestionProcessor, render_prompt
from bridgeblip.bridge.settings import DEFAULT_DECODER_LAYERS
from bridgeblip.bundle.export import PARITY_BOUND
from bridgeblip.bundle.format import Bundle
from bridgeblip.bundle.predict import predict
from bridgeblip.data.prepare import prepare
from bridgeblip.data.questions import read_questions
from bridgeblip.evidence.metrics import measure, picture_groups
from bridgeblip.files import cache_folder, digest_of, file_digest, read_json, write_text
from bridgeblip.machine import best_device, choose_precision
from bridgeblip.training.settings import TrainSettings
from bridgeblip.training.state import TrainingStopped
from bridgeblip.training.tensors import download
from bridgeblip.vlm import answer, families, merge, slicing, tune
from bridgeblip.vlm.settings import TuneSettings
from experiments.bench import write_photo_questions
from experiments.contenders import PeakMemory, hugging_face_processor
from tools.rows import Row, markdown

REAL_PARAMETERS = {"whole, Hugging Face's": 4_022_969_088, "sliced": 2_916_893_444}
REAL_LETTERS = [71, 272, 205, 309]
ROUNDING_SHARE = 0.02  # of the spread of letter logits, that half precision may part from its like
PUBLISHED_LOW = 0.765  # of 0.79 for the unsliced model, on 1,000 questions, by others
CHAT = {  # base: the layers that stay; parameters of the whole model, and then
    "OpenGVLab/InternVL3-2B-hf": ("block-21", 2_088_957_440, 1_761_372_672),
    "Qwen/Qwen2.5-VL-3B-Instruct": ("block-26", 3_754_622_976, 2_983_853_056),
}
PROMPTS = [
    render_prompt("What is it?", ("temple", "flower", "river", "roof")),
    render_prompt(
        "Which of these is the largest thing in sight?",
        ("a tall tower", "the sky", "a leaf", "a stone"),
    ),
]
COLUMNS = ("what", "asked", "measured", "ok", "s", "GB", "GPU GB")
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "numpy", "pillow")


@dataclass(frozen=True)
class Run:
    """What every step works on."""

    args: argparse.Namespace
    folder: Path  # of the base, on this machine
    config: InstructBlipConfig
    processor: QuestionProcessor
    device: str
    dtype: torch.dtype
    work: Path = Path()  # gets what the steps write
    on: dict | None = None  # what is measured, on and with what; with others all is measured anew


def model_inputs(run: Run) -> tuple[list[Path], list[str], dict[str, torch.Tensor]]:
    """Every picture with every prompt: the files, the prompts and the batch."""
    pairs = list(product(map(Path, load_sample_images().filenames), PROMPTS))
    pictures, prompts = (list(column) for column in zip(*pairs, strict=True))
    pixels = torch.stack([run.processor.load_pixels(picture) for picture in pictures])
    return pictures, prompts, run.processor.encode_prompts(prompts) | {"pixel_values": pixels}


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


@torch.inference_mode()
def ask(model: torch.nn.Module, run: Run, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The letters' logits (B, 4) in fp32: of our model, or of Hugging Face's own first step."""
    batch = {name: tensor.to(run.device) for name, tensor in inputs.items()}
    if isinstance(model, InstructBlipForConditionalGeneration):
        start = run.config.text_config.decoder_start_token_id
        batch["decoder_input_ids"] = torch.full_like(batch["input_ids"][:, :1], start)
        batch["pixel_values"] = batch["pixel_values"].to(run.dtype)
        return model(**batch, use_cache=False).logits[:, 0, run.processor.letter_ids].float().cpu()
    return model(**batch).logits.float().cpu()


def load_theirs(run: Run) -> InstructBlipForConditionalGeneration:
    where = {"dtype": run.dtype, "device_map": run.device}
    return InstructBlipForConditionalGeneration.from_pretrained(run.folder, **where).eval()


def load_ours(run: Run, layers=None) -> torch.nn.Module:
    """Our model with these decoder layers, or all, and the letters' rows as head."""
    layers = layers or range(run.config.text_config.num_decoder_layers)
    letters, where = run.processor.letter_ids, {"dtype": run.dtype, "device": run.device}
    return load_sliced(run.folder, letters, layers, **where)


LOADERS: dict[str, Callable[[Run], torch.nn.Module]] = {
    "whole, Hugging Face's": load_theirs,
    "whole, ours": load_ours,
    "sliced": lambda run: load_ours(run, DEFAULT_DECODER_LAYERS),
}


def check_base(run: Run) -> Iterator[Row]:
    """Count, and compare inputs and letter logits with those of the base's own processor and model.

    The bounds are those of an export. In half precision one step of rounding of the largest logit
    comes on top: Hugging Face rounds the logits, ours stay in fp32, and in the Q-Former the two
    round in other places; see ``bridgeblip.bridge.model``.
    """
    theirs, known = hugging_face_processor(run.folder), {}
    letters = theirs.tokenizer.convert_tokens_to_ids([f"▁{x}" for x in run.processor.letters])
    if run.args.base == REAL_BASE:
        letters, known = REAL_LETTERS, REAL_PARAMETERS
    found = str(run.processor.letter_ids)
    yield Row("letters' tokens", str(letters), found, found == str(letters))
    pictures, prompts, inputs = model_inputs(run)
    expected = theirs(
        images=[Image.open(path) for path in pictures],
        text=prompts,
        padding=True,
        return_tensors="pt",
    )
    equal = [name for name, tensor in inputs.items() if torch.equal(tensor, expected[name])]
    asked, found = ", ".join(inputs), ", ".join(equal)
    yield Row("equal to InstructBlipProcessor's", asked, found, asked == found)
    logits = {}
    for name, load in LOADERS.items():
        model = load(run)
        logits[name] = ask(model, run, inputs)
        count, finite = sum(p.numel() for p in model.parameters()), logits[name].isfinite().all()
        model = None  # or two would be in memory at once
        asked = f"finite logits, {known.get(name, count):,} parameters"
        yield Row(name, asked, f"{count:,}", bool(finite) and known.get(name, count) == count)
    whole, ours = logits["whole, Hugging Face's"], logits["whole, ours"]
    difference = (ours - whole).abs().max().item()
    spread = (whole.max() - whole.min()).item()
    step = torch.finfo(run.dtype).eps * whole.abs().max().item()
    exact = run.dtype == torch.float32
    bound = max(PARITY_BOUND, 4 * step) if exact else ROUNDING_SHARE * spread + step
    what = f"letter logits, ours from theirs, of a spread of {spread:.2f}"
    yield Row(what, f"at most {bound:.1e}", f"{difference:.1e}", difference <= bound < spread)


def check_chat(run: Run) -> Iterator[Row]:
    """Slice a chat model, tune it for a few steps, merge it and answer with it."""
    base = run.args.chat
    whole = families.empty_model(families.load_config(base))
    most = max(1, len(slicing.layers_of(whole)[1]) * 3 // 4)
    layers, *known = CHAT.get(base, (f"block-{most}", None, None))
    kinds = ("whole", layers), (whole, slicing.slice_empty(whole, layers)[0]), known
    for what, model, count in zip(*kinds, strict=True):
        asked, found = f"{count or model.num_parameters():,}", f"{model.num_parameters():,}"
        yield Row(f"{base}, {what}: parameters", asked, found, asked == found)
    _, facts = slicing.slice_model(base, None, layers)  # compares each tensor with its source
    yield Row("sliced", "each tensor its source's equal", f"of revision {facts['revision']}", True)
    data = write_photo_questions(run.work / "competition", each=2) / "train.csv"
    settings = TuneSettings(layers=layers, pixels=448 if base in CHAT else 0)
    tuned = tune.tune(base, data, run.work / "chat", settings, TrainSettings(batch_size=4))
    yield Row("tuned", "finite losses", str(tuned.history["loss"].dropna().round(3).tolist()), True)
    folder, distance, _ = merge.merge(run.work / "chat")
    yield Row("merged", f"at most {merge.TOLERANCE:.0e} apart", f"{distance:.1e}", True)
    answers = answer.predict(answer.load_tuned(folder, run.device), tuned.validation)
    apart = float(abs(answers.probabilities - tuned.probabilities).max())
    yield Row("its answers, from the run's", "at most 0.05 apart", f"{apart:.1e}", apart <= 0.05)


def check_notebooks(run: Run) -> Iterator[Row]:
    """Run each notebook in a process of its own; its GPU memory is what that process takes."""
    from bridgeblip.embedded.demo import run_notebook  # nbclient, which other steps do without

    data = write_photo_questions(run.work / "competition", each=2)  # of twenty a split is too small
    checkpoint, submission = run.work / "checkpoint", run.work / "submission.csv"
    base = str(run.folder.resolve()) if Path(run.args.base).is_dir() else run.args.base
    shared = {"COMPETITION_DIR": str(data), "CHECKPOINT_DIR": str(checkpoint)}
    for name, parameters, written in (
        ("train.ipynb", shared | {"BASE": base}, "checkpoint/weights-*.pt"),
        ("torchscript.ipynb", {"CHECKPOINT_DIR": str(checkpoint)}, "checkpoint/torchscript.pt"),
        ("torchscript_inference.ipynb", shared | {"SUBMISSION": str(submission)}, "submission.csv"),
    ):
        run_notebook(name, parameters, run.work / "notebooks" / name)
        sizes = [f"{f.name} {f.stat().st_size / 1e6:,.2f} MB" for f in run.work.glob(written)]
        yield Row(name, "runs to its end", f"writes {', '.join(sizes)}", True)
    counts = [len(path.read_text().splitlines()) for path in (data / "test.csv", submission)]
    yield Row("lines of the submission", str(counts[0]), str(counts[1]), counts[0] == counts[1])


def check_zero_shot(run: Run) -> Iterator[Row]:
    """Score the unsliced base, nothing trained, on A-OKVQA's validation questions."""
    csv = run.work / "aokvqa.csv"
    print(prepare("aokvqa", run.args.aokvqa[:1], run.args.aokvqa[1], csv, ["val"]))
    questions = read_questions(csv, need_answers=True)
    bundle = Bundle(load_ours(run), run.processor, {}, torch.device(run.device))
    probabilities = predict(bundle, questions, permute_below=0).probabilities
    found = measure([q.answer for q in questions], probabilities, picture_groups(questions))
    asked = f"an interval that reaches {PUBLISHED_LOW}, as the published 0.79's does"
    ok = run.args.base != REAL_BASE or (found["accuracy"].high or 0) >= PUBLISHED_LOW
    yield Row(
        f"{found['questions']:,} A-OKVQA questions, unsliced", asked, str(found["accuracy"]), ok
    )


# step: what measures it, and what it shows if all is as asked
STEPS: dict[str, tuple[Callable[[Run], Iterator[Row]], str]] = {
    "base": (
        check_base,
        "the base has the tensors that are asked for, and pictures, texts and weights are read as "
        "Hugging Face reads them",
    ),
    "chat": (check_chat, "a chat model can be sliced, bridged, tuned and merged"),
    "notebooks": (check_notebooks, "the three notebooks lead from questions to a submission"),
    "zero-shot": (check_zero_shot, "the unsliced base scores as others have published"),
}


def measure_step(run: Run, name: str, step: dict, store: Callable[[], None]) -> None:
    """Run a step and store each of its rows as it comes, with the time and memory that it took."""
    print(f"{name}: measuring", flush=True)
    step |= {"date": time.strftime("%Y-%m-%d %H:%M"), "rows": [], "whole": False, "failure": ""}
    rows = STEPS[name][0](run)
    try:
        while True:
            release()
            began = time.perf_counter()
            with PeakMemory(run.device) as peak:
                row = next(rows, None)
            if row is None:
                break
            took = time.perf_counter() - began, peak.resident, peak.gpu or 0.0
            cells = (*row, *(f"{figure:.1f}" for figure in took))
            step["rows"].append(dict(zip(COLUMNS, cells, strict=True)))
            store()
        step["whole"] = all(row["ok"] for row in step["rows"])
    except TrainingStopped:
        raise
    except Exception:  # this step has failed; the others still tell something
        step["failure"] = traceback.format_exc()
        print(step["failure"], file=sys.stderr)
    store()


def meaning(steps: dict[str, dict]) -> str:
    """What the rows amount to, for whoever reads no tables."""
    shown = [STEPS[name][1] for name, step in steps.items() if step["whole"]]
    failed = [name for name, step in steps.items() if not step["whole"]]
    left = [f"{name} (not run)" for name in STEPS if name not in steps]
    return (
        f"Shown on this machine: {'; '.join(shown) or 'nothing'}. Not shown: "
        f"{', '.join(failed + left) or 'nothing'}. What a model scores in a competition is not "
        f"measured here."
    )


def without_folders(text: str, args: argparse.Namespace) -> str:
    """A text whose absolute paths are file names alone: folders may bear their owner's name."""
    given = map(Path, (args.base, args.chat, args.out, args.work))
    for folder in (HOME, Path.home(), *(path.absolute().parent for path in given)):
        text = text.replace(f"{folder}/", "…/")  # which may have spaces
    return re.sub(r"(?<![\w./:])…?/(?:[^\s'\"`:,;|()\\/]+/)+", "…/", text)


def announce(bases: list[str], work: Path) -> None:
    """Say what will be downloaded, how long all takes, and how to go on."""
    minutes = 25.0
    for base in bases:
        try:
            files = snapshot_download(
                base,
                revision=pinned_revision(base, None),
                allow_patterns=[*SMALL_FILES, "*.safetensors"],
                dry_run=True,
            )
        except Exception:  # without a network; what is missing is said where it is needed
            files = []
        size = sum(file.file_size for file in files if file.will_download) / 1e9
        minutes += size / 0.05 / 60
        print(f"{base}: {size:.1f} GB to download")
    print(
        f"About {minutes:.0f} minutes on an A100 that downloads 50 MB a second: computed, not "
        f"measured. Up to 20 GB are written into {work}, which may be deleted afterwards. "
        f"Interrupted? Run it again: it goes on.",
        flush=True,
    )


def open_run(args: argparse.Namespace) -> Run:
    """Fetch the base, if it comes from the hub, and choose device and number format."""
    folder, device = resolve_base(args.base), best_device()
    if hub_id(args.base):
        download(args.base, folder.name, ["*.safetensors"])
    config = InstructBlipConfig.from_pretrained(folder)
    dtype = choose_precision(device, families.empty_model(config).num_parameters()).dtype
    versions = {name: version(name) for name in PACKAGES} | {"cuda": torch.version.cuda}
    sources = sorted([*(HOME / "bridgeblip").rglob("*.py"), Path(__file__)])
    on = {
        "card": torch.cuda.get_device_name(device) if device != "cpu" else platform.machine(),
        "base": without_folders(args.base, args),
        "revision": folder.name,  # a snapshot of the hub is called after its commit
        "chat": without_folders(args.chat, args),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": versions | {"python": platform.python_version()},
        "code": digest_of([file_digest(path) for path in sources])[:12],
    }
    work = args.work / digest_of(on)[:8]  # never another run's
    os.environ["BRIDGEBLIP_CACHE"] = str(work)  # with features of another day it would take no time
    return Run(args, folder, config, QuestionProcessor.from_base(folder), device, dtype, work, on)


def main(arguments: list[str] | None = None) -> int:
    """Run the steps; 0 if all is as asked, 1 if anything fails, 2 with one line on stderr for
    unusable input, 130 if stopped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default=REAL_BASE, help="hub id, folder, or tiny")
    parser.add_argument("--chat", default=next(iter(CHAT)), help="or " + [*CHAT][1])
    parser.add_argument("--skip", nargs="+", default=[], choices=STEPS, metavar="STEP")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--work", type=Path, default=cache_folder() / "real", help="gets 20 GB")
    parser.add_argument(
        "--aokvqa",
        nargs=2,
        type=Path,
        metavar=("FILE", "COCO"),
        help="aokvqa_v1p0_val.json; COCO holds val2017/",
    )
    args = parser.parse_args(arguments)
    chosen = [
        name for name in STEPS if name not in args.skip and (name != "zero-shot" or args.aokvqa)
    ]
    bases = [args.base] + [args.chat] * ("chat" in chosen)
    announce(list(filter(hub_id, bases)), args.work)
    try:
        run, steps = open_run(args), {}
        file = args.out / f"real-{re.sub('[^a-z0-9]+', '-', run.on['card'].lower())}.json"
        if file.is_file() and (stored := read_json(file))["on"] == run.on:
            steps = stored["steps"]

        def store():
            content = {"meaning": meaning(steps), "on": run.on, "steps": steps}
            text = json.dumps(content, indent=1, ensure_ascii=False)
            write_text(file, without_folders(text, args) + "\n")

        for name in chosen:
            step = steps.setdefault(name, {"whole": False})
            if step["whole"]:
                print(f"{name}: kept as measured on {step['date']}")
            else:
                measure_step(run, name, step, store)
    except (InputError, KeyboardInterrupt) as error:
        print(f"error: {error or 'stopped: run it again to go on'}", file=sys.stderr)
        return getattr(error, "exit_code", 130)
    rows = [{"step": name} | row for name, step in steps.items() for row in step["rows"]]
    print(without_folders(f"\n{markdown(rows) if rows else ''}\n\n{meaning(steps)}", args))
    print(f"\nThe file to send: {file}")
    return 0 if all(steps[name]["whole"] for name in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
