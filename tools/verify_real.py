"""The real base, held against what is known of it: for a machine that has a GPU and reaches the
hub.

    python tools/verify_real.py [--skip STEP ...] [--aokvqa FILE --coco FOLDER] [--competition
    FOLDER]

Steps: "weights" loads Hugging Face's whole model and the slice and counts; "parity" compares
pictures, tokens and letter logits with Hugging Face's own on real pictures; "zero-shot" scores the
unsliced base on A-OKVQA's validation questions; "notebooks" runs the three notebooks. Each result
goes to real-STEP.json in ``--out`` as soon as it is there, and a second run goes on behind it;
delete a file to measure again. Prints a table of what was asked and what was measured; exits with 1
if anything fails.
"""

import argparse
import gc
import hashlib
import json
import os
import platform
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from huggingface_hub import snapshot_download
from sklearn.datasets import load_sample_images
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
)
from transformers.image_utils import load_image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bridgeblip import InputError
from bridgeblip.bridge.base import REAL_BASE, REAL_REVISION, SMALL_FILES, resolve_base
from bridgeblip.bridge.model import load_sliced
from bridgeblip.bridge.processing import NUM_CHOICES, QuestionProcessor, render_prompt
from bridgeblip.bridge.settings import DEFAULT_DECODER_LAYERS
from bridgeblip.bundle.export import MERGING_SHARE, PARITY_BOUND
from bridgeblip.bundle.format import Bundle
from bridgeblip.bundle.predict import predict
from bridgeblip.data.prepare import prepare
from bridgeblip.data.questions import read_questions
from bridgeblip.data.tables import read_table
from bridgeblip.evidence.metrics import Estimate, measure, picture_groups
from bridgeblip.files import write_text
from bridgeblip.hosting.runtime import local_copy
from bridgeblip.machine import best_device, choose_precision
from experiments.bench import write_photo_questions
from experiments.contenders import PeakMemory

ROOT = Path(__file__).resolve().parent.parent
REAL_PARAMETERS = {"whole": 4_022_969_088, "sliced": 2_916_893_444}
REAL_LETTERS = [71, 272, 205, 309]
PUBLISHED_SCORE, PUBLISHED_ROWS = (
    0.79,
    1000,
)  # of the unsliced model on A-OKVQA's validation questions, by others
PROMPTS = [
    render_prompt("What is it?", ("temple", "flower", "river", "roof")),
    render_prompt(
        "Which of these is the largest thing in sight?",
        ("a tall tower", "the sky", "a leaf", "a stone"),
    ),
]
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "numpy", "pillow")
STEPS = ("weights", "parity", "zero-shot", "notebooks")


class Check(NamedTuple):
    """A line of the table."""

    what: str
    asked: str
    measured: str
    ok: bool | None  # None: not run


@dataclass(frozen=True)
class Run:
    """What every step works on."""

    args: argparse.Namespace
    folder: Path  # of the base, on this machine
    revision: str | None  # of the hub
    config: InstructBlipConfig
    processor: QuestionProcessor
    device: str
    dtype: torch.dtype

    @property
    def is_real(self) -> bool:
        """Whether the base is of the real one's shape: then the known numbers are asked for."""
        return self.args.base == REAL_BASE or has_real_shape(self.config)


@dataclass(frozen=True)
class Loaded:
    """What became of a model: loaded, asked once, and let go again."""

    parameters: int
    seconds: float  # from the first byte read to the logits
    memory_gb: float  # peak of this process, mapped weights included
    added_gb: float  # what loading and asking took of memory, without them
    kept_gb: float  # of the model's tensors
    gpu_gb: float | None
    logits: torch.Tensor  # (B, 4), fp32

    def __str__(self) -> str:
        gpu = "" if self.gpu_gb is None else f", {self.gpu_gb:.1f} GB of GPU memory"
        return f"{self.seconds:.0f} s, {self.memory_gb:.1f} GB of memory{gpu}"


def has_real_shape(config: InstructBlipConfig) -> bool:
    """Whether the base holds as many parameters as InstructBLIP-FlanT5-XL."""
    return count_parameters(config) == REAL_PARAMETERS


def count_parameters(config: InstructBlipConfig) -> dict[str, int]:
    """Parameters of the whole model, its LM head untied, and of the slice, counted in Hugging
    Face's class."""
    with torch.device("meta"):
        model = InstructBlipForConditionalGeneration(config)
    named = model.named_parameters(remove_duplicate=False)
    counts = {name: p.numel() for name, p in named if "embed_tokens" not in name}
    cut = set(range(config.text_config.num_decoder_layers)) - set(DEFAULT_DECODER_LAYERS)
    gone = ("language_model.lm_head.", *(f"language_model.decoder.block.{layer}." for layer in cut))
    kept = sum(count for name, count in counts.items() if not name.startswith(gone))
    return {
        "whole": sum(counts.values()),
        "sliced": kept + (config.text_config.d_model + 1) * NUM_CHOICES,
    }


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
def ask(run: Run, load: Callable, letters: Callable, inputs: dict[str, torch.Tensor]) -> Loaded:
    """Load a model, ask it once and let it go; ``letters(model, inputs)`` gives (B, 4)."""
    release()
    began = time.perf_counter()
    with PeakMemory(run.device) as peak:
        model = load()
        logits = (
            letters(model, {name: tensor.to(run.device) for name, tensor in inputs.items()})
            .float()
            .cpu()
        )
        seconds = time.perf_counter() - began
    count = sum(p.numel() for p in model.parameters())
    kept = sum(p.nbytes for p in model.parameters()) / 1e9
    del model
    release()
    return Loaded(count, seconds, peak.resident, peak.added, kept, peak.gpu, logits)


def ask_hugging_face(run: Run, inputs: dict[str, torch.Tensor]) -> Loaded:
    """Hugging Face's own model, and its first-step logits of the letters."""

    def load():
        where = {"dtype": run.dtype, "device_map": run.device}
        return InstructBlipForConditionalGeneration.from_pretrained(run.folder, **where).eval()

    def letters(model, batch):
        start = run.config.text_config.decoder_start_token_id
        first = torch.full_like(batch["input_ids"][:, :1], start)
        batch = batch | {"pixel_values": batch["pixel_values"].to(run.dtype)}
        logits = model(**batch, decoder_input_ids=first, use_cache=False).logits
        return logits[:, 0, run.processor.letter_ids]

    return ask(run, load, letters, inputs)


def ask_ours(run: Run, inputs: dict[str, torch.Tensor], layers) -> Loaded:
    """Our model with these decoder layers and the letters' rows as head."""
    return ask(
        run, lambda: load_ours(run, layers), lambda model, batch: model(**batch).logits, inputs
    )


def load_ours(run: Run, layers):
    return load_sliced(
        run.folder, run.processor.letter_ids, layers, dtype=run.dtype, device=run.device
    )


def hugging_face_processor(folder: Path) -> InstructBlipProcessor:
    """The base's own, with the Pillow image processor, which is the default only where torchvision
    is missing."""
    processor = InstructBlipProcessor.from_pretrained(folder)
    settings = processor.image_processor.to_dict()
    known = ("size", "image_mean", "image_std", "rescale_factor", "resample")
    processor.image_processor = BlipImageProcessorPil(**{key: settings[key] for key in known})
    return processor


def check_weights(run: Run) -> tuple[list[Check], dict]:
    """Load Hugging Face's model and the slice, ask both once, and count."""
    *_, inputs = model_inputs(run)
    models = {
        "whole": ask_hugging_face(run, inputs),
        "sliced": ask_ours(run, inputs, DEFAULT_DECODER_LAYERS),
    }
    counts = REAL_PARAMETERS if run.is_real else count_parameters(run.config)
    found, asked = run.processor.letter_ids, REAL_LETTERS
    if not run.is_real:
        tokenizer = hugging_face_processor(run.folder).tokenizer
        asked = tokenizer.convert_tokens_to_ids([f"▁{x}" for x in run.processor.letters])
    checks, facts = [Check("tokens of A, B, C, D", str(asked), str(found), found == asked)], {}
    for name, model in models.items():
        count, finite = model.parameters, bool(model.logits.isfinite().all())
        what, expected = f"{name}: parameters", counts[name]
        checks.append(Check(what, f"{expected:,}", f"{count:,}", count == expected))
        checks.append(Check(f"{name}: loaded and asked", "finite logits", str(model), finite))
        facts[name] = asdict(model) | {"logits": model.logits.tolist()}
    return checks, facts | {"letters": found}


def check_parity(run: Run) -> tuple[list[Check], dict]:
    """Compare the inputs with those of the base's own processor, then the letter logits of all
    decoder layers.

    The bounds are those of an export. In half precision one step of rounding of the largest logit
    comes on top: Hugging Face rounds the logits, ours stay in fp32, and in the Q-Former the two
    round in other places; see ``bridgeblip.bridge.model``.
    """
    pictures, prompts, inputs = model_inputs(run)
    images = [load_image(str(path)) for path in pictures]
    words = {"text": prompts, "padding": True, "return_tensors": "pt"}
    expected = hugging_face_processor(run.folder)(images=images, **words)
    equal = {name: torch.equal(tensor, expected[name]) for name, tensor in inputs.items()}
    theirs = ask_hugging_face(run, inputs).logits
    ours = ask_ours(run, inputs, range(run.config.text_config.num_decoder_layers)).logits
    difference = (ours - theirs).abs().max().item()
    spread = (theirs.max() - theirs.min()).item()
    step = torch.finfo(run.dtype).eps * theirs.abs().max().item()
    bound = MERGING_SHARE * spread + step
    if run.dtype == torch.float32:
        bound = max(PARITY_BOUND, 4 * step)
    checks = []
    for what, right in (("pixels", equal.pop("pixel_values")), ("tokens", all(equal.values()))):
        measured = "equal" if right else "different"
        asked = "equal to the bit"
        checks.append(Check(f"{what}, InstructBlipProcessor's", asked, measured, right))
    what, asked = "letter logits of all layers, from Hugging Face's", f"at most {bound:.1e}"
    checks.append(Check(what, asked, f"{difference:.1e}", difference <= bound))
    checks.append(Check("their spread", "above 0", f"{spread:.2f}", spread > 0))
    return checks, {
        "questions": len(prompts),
        "pictures": sorted({path.name for path in pictures}),
        "same letter": int((ours.argmax(-1) == theirs.argmax(-1)).sum()),
        "difference": difference,
        "bound": bound,
        "spread": spread,
        "logits": theirs.tolist(),
    }


def check_zero_shot(run: Run) -> tuple[list[Check], dict]:
    """Score the unsliced base, nothing trained, on A-OKVQA's validation questions."""
    csv = run.args.work / "aokvqa.csv"
    summary = prepare("aokvqa", [run.args.aokvqa], run.args.coco, csv, ["val"])
    print(summary)
    questions = read_questions(csv, need_answers=True)
    release()
    began = time.perf_counter()
    with PeakMemory(run.device) as peak:
        model = load_ours(run, range(run.config.text_config.num_decoder_layers))
        bundle = Bundle(model, run.processor, {}, torch.device(run.device))
        probabilities = predict(bundle, questions, permute_below=0).probabilities
        seconds = time.perf_counter() - began
    found = measure([q.answer for q in questions], probabilities, picture_groups(questions))
    asked, ok = judge(found["accuracy"]) if run.is_real else ("a score", True)
    what = f"unsliced, zero-shot, {found['questions']:,} A-OKVQA questions"
    return [Check(what, asked, str(found["accuracy"]), ok)], {
        "questions": found["questions"],
        "pictures": found["pictures"],
        "right": found["right"],
        "accuracy": asdict(found["accuracy"]),
        "left out": {why: len(rows) for why, rows in summary.left_out.items()},
        "seconds": seconds,
        "gpu_gb": peak.gpu,
    }


def judge(score: Estimate) -> tuple[str, bool]:
    """What is asked of the real base's score, and whether it is met: not clearly below what others
    have published."""
    low = PUBLISHED_SCORE - 1.96 * (PUBLISHED_SCORE * (1 - PUBLISHED_SCORE) / PUBLISHED_ROWS) ** 0.5
    return (
        f"about {PUBLISHED_SCORE}, published on {PUBLISHED_ROWS:,}: intervals that meet",
        score.high is not None and score.high >= low,
    )


def check_notebook(name: str, run: Run) -> tuple[list[Check], dict]:
    """Run a notebook in a process of its own; the GPU memory is what that process takes, its cache
    included."""
    from bridgeblip.embedded.demo import run_notebook  # nbclient, which other steps do without

    work, base = run.args.work.resolve(), str(run.args.base)
    now = hashlib.sha256(json.dumps(circumstances(run, ("competition",))).encode()).hexdigest()[:8]
    checkpoint = work / f"checkpoint-{now}"  # never another run's
    submission = work / f"submission-{now}.csv"
    competition = (run.args.competition or work / "competition").resolve()
    if not run.args.competition:
        write_photo_questions(competition, each=2)  # of twenty a split makes too little
    data = {"COMPETITION_DIR": str(competition), "CHECKPOINT_DIR": str(checkpoint)}
    parameters = {
        "train.ipynb": data | {"BASE": str(Path(base).resolve()) if Path(base).is_dir() else base},
        "torchscript.ipynb": {"CHECKPOINT_DIR": str(checkpoint)},
        "torchscript_inference.ipynb": data | {"SUBMISSION": str(submission)},
    }[name]
    goes_on = name == "train.ipynb" and (checkpoint / "state").exists()
    release()
    with tempfile.TemporaryDirectory() as cache, PeakMemory(run.device) as peak:
        # features and copies of an earlier day would cost no time
        os.environ["BRIDGEBLIP_CACHE"] = cache
        began = time.perf_counter()
        run_notebook(name, parameters, work / "notebooks" / name)
        seconds = time.perf_counter() - began
        questions = read_questions(local_copy(competition / "test.csv"), strict=False)
    took = f"{seconds:.0f} s" + ("" if peak.gpu is None else f", {peak.gpu:.1f} GB of GPU memory")
    took += ", going on from a saved state" if goes_on else ""
    checks = [Check(name, "runs to its end", took, True)]
    if name == "torchscript_inference.ipynb":
        count, asked = len(read_table(submission)), len(questions)
        checks.append(Check(f"{name}: answers", str(asked), str(count), count == asked))
    files = [path for path in (*sorted(checkpoint.glob("*.pt")), submission) if path.is_file()]
    sizes = {path.name: path.stat().st_size / 1e6 for path in files}
    return checks, {"seconds": seconds, "gpu_gb": peak.gpu, "goes on": goes_on, "MB": sizes}


# result -> (what measures it, the arguments that change it)
RESULTS: dict[str, tuple[Callable[[Run], tuple[list[Check], dict]], tuple[str, ...]]] = {
    "weights": (check_weights, ("dtype",)),
    "parity": (check_parity, ("dtype",)),
    "zero-shot": (check_zero_shot, ("dtype", "aokvqa", "coco")),
} | {
    f"notebooks-{Path(name).stem}": (partial(check_notebook, name), ("competition",))
    for name in ("train.ipynb", "torchscript.ipynb", "torchscript_inference.ipynb")
}


def circumstances(run: Run, arguments: tuple[str, ...]) -> dict:
    """What a result was measured on and with; one measured on anything else is measured again."""
    code = hashlib.sha256()
    for path in sorted([*(ROOT / "bridgeblip").rglob("*.py"), Path(__file__)]):
        code.update(path.read_bytes())
    device = f"{os.cpu_count()} cores, {platform.machine()}"
    if run.device != "cpu":
        device = torch.cuda.get_device_name(run.device)
    versions = {name: version(name) for name in PACKAGES}
    values = vars(run.args) | {"dtype": str(run.dtype).removeprefix("torch.")}
    return {
        "base": str(run.args.base),
        "revision": run.revision,
        "device": device,
        "versions": {"python": platform.python_version()} | versions,
        "code": code.hexdigest(),
    } | {name: str(values[name]) for name in arguments if values[name]}


def record(run: Run, name: str) -> list[Check]:
    """Return a result's lines: those of its file if they hold here and none failed, else measured
    now and stored."""
    measure_it, arguments = RESULTS[name]
    path, here = run.args.out / f"real-{name}.json", circumstances(run, arguments)
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        checks = [Check(**line) for line in stored["checks"]]
        if stored["on"] == here and all(check.ok for check in checks):
            print(f"{name}: kept as measured on {stored['date']}")
            return checks
    print(f"{name}: measuring on {here['device']}")
    try:
        checks, facts = measure_it(run)
    except Exception as error:  # a step that breaks has failed; the others still tell something
        traceback.print_exc()
        first, *_ = str(error).splitlines() or [""]
        failure = f"{type(error).__name__}: {first}"
        checks, facts = [Check(name, "runs to its end", failure, False)], {}
    content = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "on": here,
        "checks": [check._asdict() for check in checks],
        "measured": facts,
    }
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return checks


def open_run(args: argparse.Namespace) -> Run:
    """Fetch the base, if it comes from the hub, and choose device and number format."""
    is_here = Path(args.base).is_dir() or args.base == "tiny"
    folder = resolve_base(args.base)
    revision = None if is_here else folder.name  # a snapshot's folder is called after its commit
    if not is_here:
        snapshot_download(
            args.base, revision=revision, allow_patterns=[*SMALL_FILES, "*.safetensors"]
        )
    config, device = InstructBlipConfig.from_pretrained(folder), best_device()
    count = count_parameters(config)["whole"]
    dtype = getattr(torch, args.dtype) if args.dtype else choose_precision(device, count).dtype
    return Run(args, folder, revision, config, QuestionProcessor.from_base(folder), device, dtype)


def main(arguments: list[str] | None = None) -> int:
    """Run the steps; 0 if all is as asked, 1 if anything fails, 2 with one line on stderr for
    unusable input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base", default=REAL_BASE, help=f"hub id (this one at {REAL_REVISION}), folder, or tiny"
    )
    parser.add_argument(
        "--skip", nargs="+", default=[], choices=STEPS, metavar="STEP", help=", ".join(STEPS)
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="gets real-STEP.json")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("checkpoint/real"),
        help="gets what the notebooks write, 6 GB",
    )
    parser.add_argument("--aokvqa", type=Path, help="aokvqa_v1p0_val.json")
    parser.add_argument(
        "--coco", type=Path, help="folder that holds val2017/, the pictures of COCO 2017"
    )
    parser.add_argument(
        "--competition",
        type=Path,
        help="the organiser's files, for the notebooks; by default forty questions about parts of "
        "the sample photos",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="by default as training chooses"
    )
    args = parser.parse_args(arguments)
    if bool(args.aokvqa) != bool(args.coco):
        parser.error("--aokvqa and --coco go together")
    try:
        run = open_run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    rows = []
    for name in RESULTS:
        if name.startswith(tuple(args.skip)):
            continue
        if name == "zero-shot" and not args.aokvqa:
            missing = "not run: give --aokvqa FILE --coco FOLDER"
            checks = [Check("unsliced, zero-shot", "a score", missing, None)]
        else:
            checks = record(run, name)
        rows += [(name, *check) for check in checks]
    table = pd.DataFrame(rows, columns=["result", *Check._fields])
    table = table.replace({"ok": {None: "not run"}}).to_string(index=False, max_colwidth=90)
    print(f"\n{args.base} on {circumstances(run, ())['device']}\n{table}")
    return 1 if any(row[-1] is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
