"""What any GPU can show of bridgeblip, in one command of six minutes.

    python tools/verify_gpu.py [--only STEP ...] [--tiny]

Draws a stand-in of the real model's size on the GPU and goes the whole road on it, what matters
most first. Each row is stored as it comes, in --out under the card's name, as JSON and as a table;
a step that no longer fits the time says so, and --only repeats some in their place. --tiny goes the
same road on the tiny base, on any machine; --cpu goes it at the real size without a GPU, for which
it takes 24 GB of memory and half an hour. --tests runs the tests that have CUDA paths, with the GPU
in sight.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

# before cuBLAS starts: the deterministic runs need it
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from transformers import InstructBlipConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bridgeblip import InputError
from bridgeblip.bridge import export as exporting
from bridgeblip.bridge import train as training
from bridgeblip.bridge.base import resolve_base, slice_config
from bridgeblip.bridge.budget import held_memory
from bridgeblip.bridge.processing import QuestionProcessor
from bridgeblip.bridge.settings import DEFAULT_DECODER_LAYERS, BridgeSettings
from bridgeblip.bundle.export import PARITY_BOUND
from bridgeblip.bundle.format import Bundle, as_traced, load_bundle
from bridgeblip.bundle.predict import predict
from bridgeblip.bundle.trace import constants_of, graphs
from bridgeblip.data.pictures import LOADERS, picture_key
from bridgeblip.data.questions import Question, read_questions
from bridgeblip.data.tables import read_table
from bridgeblip.files import is_out_of_memory, write_text
from bridgeblip.hosting import checks
from bridgeblip.machine import best_device, choose_precision
from bridgeblip.training import trainer
from bridgeblip.training.settings import TrainSettings
from bridgeblip.training.state import TrainingStopped
from bridgeblip.training.weights import load_weights
from experiments.bench import EACH, count_floor, write_photo_questions
from experiments.contenders import Generating, PeakMemory, ceiling, clock
from tools import make_full_size_base as maker
from tools import verify_real as real
from tools.rows import Row, at_most, markdown

ROOT = Path(__file__).resolve().parent.parent
CUDA_TESTS = ("pinning", "training", "precision", "features", "export", "inference", "callbacks")
SECONDS = 360
LAUNCHES, WAITS = 2900, 2  # most of a training step in bfloat16; see tests/test_step.py


class NotRun(Exception):
    """A step, or a part of one, that this machine can't do; the message says why."""


class Check:
    """What the steps have in common: the machine, what earlier steps have made, and the rows."""

    def __init__(self, out: Path, work: Path, tiny: bool):
        self.work, self.tiny, self.step, self.rows = work, tiny, "", []
        self.device = best_device()
        self.cuda = self.device != "cpu"
        self.small = tiny or not self.cuda
        self.card = torch.cuda.get_device_name(self.device) if self.cuda else "cpu"
        name = re.sub(r"\W+", "-", self.card.lower()) + ("-tiny" if tiny else "")
        self.file = out / f"gpu-{name}.json"
        self.pictures = 12 if self.small else 213
        self.dtype = choose_precision(self.device, 10 if tiny else 3 * 10**9).dtype

    def row(self, what: str, asked: str, measured: str, ok: bool | None = None) -> None:
        """Print and store a row; ``ok`` is None where nothing is asked, or nothing could be run."""
        self.rows.append({"step": self.step} | Row(what, asked, measured, ok).shown())
        print(" | ".join(self.rows[-1].values()), flush=True)
        versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
        facts = {"card": self.card, "date": time.strftime("%Y-%m-%d"), "versions": versions}
        write_text(self.file, json.dumps(facts | {"rows": self.rows}, indent=1) + "\n")
        title = f"# {self.card}, {facts['date']}, torch {torch.__version__}"
        write_text(self.file.with_suffix(".md"), f"{title}\n\n{markdown(self.rows)}\n")

    @cached_property
    def ceiling(self) -> float:
        """Operations a second of a large matrix product, in the number format of the model."""
        return ceiling(self.device, self.dtype)

    @cached_property
    def questions(self) -> Path:
        """Four questions on each picture, of the official length where the model reads as much."""
        share = 0.1 if self.tiny else 1.0
        return write_photo_questions(self.work / "questions", self.pictures, EACH, share)

    @cached_property
    def asked(self) -> list[Question]:
        """The questions without answers, as short as the model reads them."""
        processor = QuestionProcessor.from_base(resolve_base(self.base))
        return [processor.fit(q) for q in read_questions(self.questions / "test.csv")]

    @cached_property
    def floor(self) -> tuple[float, float]:
        """Operations of encoding a picture, and of answering a row once it is encoded."""
        config = slice_config(self.config, DEFAULT_DECODER_LAYERS)
        processor = QuestionProcessor.from_base(resolve_base(self.base))
        picture, texts = count_floor(config, processor, self.asked[:EACH])
        return picture, texts / EACH

    @cached_property
    def base(self) -> str:
        if self.tiny:
            return "tiny"
        if "FULL_SIZE_BASE" in os.environ:
            return os.environ["FULL_SIZE_BASE"]
        folder = self.work / "base"
        if not (folder / "model.safetensors.index.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            try:
                maker.write_base(maker.FULL_SIZE_CONFIG, folder, device=self.device)
            except InputError as error:  # the disk
                raise NotRun(str(error)) from error
        return str(folder)

    @cached_property
    def config(self) -> InstructBlipConfig:
        return InstructBlipConfig.from_pretrained(resolve_base(self.base))

    @cached_property
    def weights(self) -> Path:
        """Of a short training, unless a step has trained."""
        return self.train("weights", 48, batch_size=8).weights

    @cached_property
    def bundle(self) -> Path:
        return self.export("bundle", self.device)

    def export(self, name: str, place: str) -> Path:
        with patch.object(exporting, "export_device", lambda dtype: place), PeakMemory() as memory:
            path, table = exporting.export_bundle(self.weights, self.work / f"{name}.pt")
        worst = (table["difference"] / table["bound"]).max()
        self.row(f"export on {place}", "gate", f"worst {worst:.2f} of its bound", table["ok"].all())
        share = memory.added * 1e9 / path.stat().st_size
        self.at_real_size(at_most("its peak of memory over the bundle's bytes", 1.25, share))
        return path

    def at_real_size(self, row: Row) -> None:
        """A row that asks something of the real size on a CPU alone, and else only tells."""
        asks = not (self.tiny or self.cuda)
        self.row(*row if asks else row._replace(asked="", ok=None))

    def held(self, bridge: BridgeSettings | None, dtype: torch.dtype) -> float:
        """GB by the README's table."""
        config = slice_config(self.config, DEFAULT_DECODER_LAYERS)
        return held_memory(config, dtype, bridge)["total"] / 1e9

    def peak(self) -> float:
        """GB of GPU memory since the last call; nothing without a GPU."""
        if not self.cuda:
            return math.nan
        peak = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return peak

    def train(
        self, name: str, rows: int, stop: int = 0, fresh: bool = True, watched=None, **settings
    ) -> SimpleNamespace:
        """Train on the first rows; tell path and tensors of the weights, seconds a step and GB.

        Args:
            stop: the step after which training is asked to stop.
            fresh: begin anew, whatever an earlier run has left.
            watched: a profiler that is to see the fifth and the sixth step.
        """
        csv, folder, ends = self.questions / f"train{rows}.csv", self.work / name, []
        read_table(self.questions / "train.csv").head(rows).to_csv(csv, index=False)
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)

        class Watching(trainer.Progress):
            def on_step_end(self, *args, **kwargs):
                ends.append(time.perf_counter())
                if watched and len(ends) in (4, 6):
                    (watched.start if len(ends) == 4 else watched.stop)()
                if len(ends) == stop:
                    os.kill(os.getpid(), signal.SIGTERM)
                super().on_step_end(*args, **kwargs)

        self.peak()
        with patch.object(trainer, "Progress", Watching), PeakMemory() as memory:
            chosen, features = TrainSettings(**settings), self.work / "features"
            result = training.train(csv, self.base, folder, chosen, features=features)
        weights, gaps = result.weights[-1], np.diff(ends[6:])  # before that it warms up
        return SimpleNamespace(
            weights=weights,
            report=(folder / "best.json").is_file()
            and ((folder / "report.html").is_file() or not find_spec("matplotlib")),
            tensors=load_weights(weights).tensors,
            seconds=float(gaps.mean()) if len(gaps) else math.nan,
            peak=self.peak(),
            memory=memory.own,
        )


# ---------------------------------------------------------------- steps


def machine(check: Check) -> None:
    """Its ceilings: matrix products, and copying to the GPU."""
    found = checks.Findings()
    checks.check_gpu(found, "problem")
    for finding in found:
        ok = finding.level != "problem"
        check.row(f"{check.card}, {os.cpu_count()} cores", "computes", finding.what, ok)
    formats = (torch.float32, torch.float16, torch.bfloat16) if check.cuda else (check.dtype,)
    for dtype in formats:
        rate = ceiling(check.device, dtype) / 1e12
        check.row(f"matrix product, {dtype}", "", f"{rate:.2f} TFLOP/s")
    if check.cuda:
        host = torch.randn(2**26).pin_memory()
        seconds = statistics.median(clock(lambda: host.to(check.device)) for _ in range(3))
        check.row("host to device, pinned", "", f"{host.nbytes / seconds / 1e9:.1f} GB/s")


def base(check: Check) -> None:
    """The stand-in, drawn on the GPU."""
    seconds = clock(lambda: check.base)
    asked, ok = ("under 40 s", seconds < 40) if check.cuda else ("there", True)
    check.row("stand-in", asked, f"{seconds:.1f} s", ok)
    seconds = clock(lambda: check.questions)
    check.row(f"{check.pictures * EACH} questions", "", f"{seconds:.1f} s")


def train(check: Check) -> None:
    """A whole training, report and all, twice; a second size of batch."""
    _, row = check.floor
    rows = check.pictures * EACH
    for batch in (4,) if check.small else (16, 64):
        watched = profile()
        found = check.train(f"train-{batch}", rows, batch_size=batch, watched=watched)
        rate, name = batch / found.seconds, f"batch {batch}, {check.dtype}"
        speed = f"{found.seconds * 1e3:.0f} ms a step, {rate:.0f} rows/s"
        share = f"{rate * row / check.ceiling:.2f} of the ceiling"
        check.row(f"training, {name}", "", f"{speed}, {share} (forward, no padding)")
        check.row(
            f"training, {name}: report and best.json", "there", str(found.report), found.report
        )
        if check.cuda:
            held = f"{check.held(BridgeSettings(), check.dtype):.2f} GB held"
            asked, ok = (f"{held}; below 12", found.peak < 12) if batch == 16 else (held, None)
            check.row(f"its peak of GPU memory, {name}", asked, f"{found.peak:.2f} GB", ok)
        memory = found.memory
        check.row(f"its peak of memory, {name}", "at most 24", f"{memory:.2f} GB", memory <= 24)
        check.weights = found.weights
        launched(check, watched.key_averages())
    again = check.train(f"train-{batch}", rows, batch_size=batch, fresh=False)
    check.row("called again", "the same weights", str(again.weights), again.report)


def launched(check: Check, events) -> None:
    """Kernel launches and waits of a training step, of two that the profiler saw."""
    launches = sum(e.count for e in events if "LaunchKernel" in e.key) / 2
    waiting = ("cudaStreamSynchronize", "cudaEventSynchronize")  # the rest is the profiler's own
    waits = sum(e.count for e in events if e.key in waiting) / 2
    if not check.cuda:
        check.row("launches and waits of a training step", "", "not run: needs CUDA")
        return
    asked, most = f"at most {LAUNCHES} and {WAITS}", WAITS + (check.dtype == torch.float16)
    ok = launches <= LAUNCHES and waits <= most
    check.row("launches and waits of a training step", asked, f"{launches:.0f}, {waits:.1f}", ok)
    busy = sum(e.self_device_time_total for e in events if e.device_type == DeviceType.CUDA)
    check.row("time of its kernels", "", f"{busy / 2e3:.0f} ms")


def parity(check: Check) -> None:
    """The unsliced model's letter logits, held against Hugging Face's own."""
    folder = resolve_base(check.base)
    processor = QuestionProcessor.from_base(folder)
    args = argparse.Namespace(base=check.base)
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        for dtype in (torch.bfloat16, torch.float32):
            run = real.Run(args, folder, check.config, processor, check.device, dtype)
            for what, asked, measured, ok in real.check_base(run):
                check.row(f"{what}, {dtype}", asked, measured, ok)
        if not check.small:
            return
        run = replace(run, dtype=check.dtype)
        *_, inputs = real.model_inputs(run)
        with PeakMemory(check.device) as peak:
            model = real.load_ours(run, DEFAULT_DECODER_LAYERS)
            real.ask(model, run, inputs)
        share = peak.added * 1e9 / sum(parameter.nbytes for parameter in model.parameters())
        check.at_real_size(at_most("peak of memory in loading over kept bytes", 1.2, share))
    finally:
        torch.backends.cudnn.allow_tf32 = tf32


def export(check: Check) -> None:
    """Exported on the GPU and on the CPU, each read on the other and without any device."""
    places = {check.device: "bundle", "cpu": "bundle-cpu"}
    processor = QuestionProcessor.from_base(resolve_base(check.base))
    batch = processor.collate(check.asked[:8])
    batch.pop("choice_mask")
    logits = {}
    for made, name in places.items():
        path = check.export(name, made)
        check.__dict__.setdefault("bundle", path)
        model = torch.jit.load(str(path), map_location="cpu")
        kinds = {kind: 0 for kind in ("DeviceObjType", "TensorType")}
        for graph in graphs(model):
            for kind in kinds:
                kinds[kind] += len(constants_of(graph, kind))
        check.row(f"made on {made}: constants in the graphs", "no device, no tensor", str(kinds),
                  not any(kinds.values()))  # fmt: skip
        del model
        for place in dict.fromkeys(("meta", "cpu", check.device)):
            began = time.perf_counter()
            model = torch.jit.load(str(path), map_location=place).eval()
            inputs = {name: tensor.to(place) for name, tensor in batch.items()}
            with torch.inference_mode(), torch.jit.optimized_execution(False):
                found = model(**inputs).float()
            took = time.perf_counter() - began
            there = found.device.type == place.split(":")[0]
            what, measured = f"made on {made}, read on {place}", f"{took:.1f} s, on {found.device}"
            check.row(what, f"answers on {place}", measured, there)
            if place != "meta":
                logits[made, place] = found.cpu()
            del model, found, inputs
            real.release()
    first = logits[check.device, check.device]
    bound = max(PARITY_BOUND, real.ROUNDING_SHARE * (first.max() - first.min()).item())
    for (made, place), found in logits.items():
        gap, top = (found - first).abs().max().item(), first.topk(2).values
        clear = top[:, 0] - top[:, 1] > 2 * bound
        same = bool((found.argmax(-1) == first.argmax(-1))[clear].all())
        check.row(f"logits, made on {made}, on {place}", f"{bound:.1e}, the same letters",
                  f"{gap:.1e}", gap <= bound and same)  # fmt: skip


def answer(check: Check) -> None:
    """All rows, and some of them by ``generate``."""
    bundle = load_bundle(check.bundle, check.device)
    questions = check.asked
    parts(check, bundle, questions)
    picture, row = check.floor
    operations = check.pictures * picture + len(questions) * row
    check.peak()
    best, answers = math.inf, []
    for batch, what in ((32, "shapes new"), (32, "shapes known"), (128, "shapes new")):
        run = partial(predict, bundle, questions, batch, permute_below=0)
        seconds = clock(lambda run=run: answers.append(run().probabilities.argmax(-1)))
        best = min(best, seconds)
        share = f"{operations / check.ceiling / seconds:.2f} of the ceiling"
        check.row(f"answering {len(questions)} rows, batch {batch}, {what}", "",
                  f"{seconds:.2f} s, {len(questions) / seconds:.0f} rows/s, {share}")  # fmt: skip
    if check.cuda:
        held = check.held(None, check.dtype)
        check.row("its peak of GPU memory", f"{held:.2f} GB held", f"{check.peak():.2f} GB")
    differ, most = int((answers[0] != answers[-1]).sum()), max(1, len(questions) // 50)
    measured = f"{differ} of {len(questions)} differ"
    check.row("letters, batch 32 and 128", f"at most {most} differ", measured, differ <= most)
    del bundle
    real.release()
    some = questions[: 8 if check.small else 256]
    with torch.inference_mode():
        peer = Generating(resolve_base(check.base), check.device, check.dtype, 32)
        peer.answer(some[:32])
        theirs = clock(partial(peer.answer, some)) / len(some)
    times = theirs / (best / len(questions))
    asked, ok = ("", None) if check.small else ("at least 2.0", times >= 2.0)
    check.row("speed against generate, batch 32", asked, f"{times:.2f} times", ok)


def parts(check: Check, bundle: Bundle, questions: list[Question]) -> None:
    """What a window of 32 pictures takes, each part alone."""
    paths = list({picture_key(q.image): q.image for q in questions}.values())
    with ThreadPoolExecutor(LOADERS) as pool:
        loaded = []
        seconds = clock(lambda: loaded.extend(pool.map(bundle.processor.load_pixels, paths)))
    check.row(f"decoding alone, {LOADERS} threads", "", f"{len(paths) / seconds:.0f} pictures/s")
    pixels = torch.stack(loaded[:32])
    texts = bundle.processor.encode_prompts([bundle.processor.prompt(q) for q in questions[:32]])
    texts = {name: tensor.to(check.device) for name, tensor in texts.items()}
    with torch.inference_mode(), as_traced():
        encode = partial(bundle.model.encode_image, pixels.to(check.device))
        embeds = encode()[:1].expand(len(texts["input_ids"]), -1, -1).contiguous()
        score = partial(bundle.model.score, embeds, **texts)
        alone = {
            f"tower, {len(pixels)} pictures": encode,
            f"language part, {len(embeds)} rows": score,
        }
        for what, run in alone.items():
            run()  # warms up
            seconds = statistics.median(clock(run) for _ in range(5))
            check.row(f"its {what}", "", f"{seconds * 1e3:.1f} ms")


def half(check: Check) -> None:
    """float16 with a scaled loss, and without flash attention, as on a T4."""
    if not check.cuda:
        raise NotRun("needs CUDA")
    capability = patch.object(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with capability, sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        found = check.train("half", 256, batch_size=16)
    finite = all(tensor.isfinite().all() for tensor in found.tensors.values())
    held = check.held(BridgeSettings(), torch.float16)
    measured = f"{found.seconds * 1e3:.0f} ms a step, {found.peak:.2f} GB, {held:.2f} held"
    ok = finite and found.peak < 15
    check.row("training in float16, batch 16", "finite, under 15 GB", measured, ok)


def memory(check: Check) -> None:
    """Answering halves its batches where memory is short, and gives the same letters."""
    if not check.cuda:
        raise NotRun("needs CUDA")
    bundle = load_bundle(check.bundle, check.device)
    questions = check.asked[:128]
    expected = predict(bundle, questions, 32, permute_below=0).probabilities
    real.release()
    total = torch.cuda.get_device_properties(check.device).total_memory
    try:
        for spare in (400, 250, 150):
            limit = torch.cuda.memory_reserved() + spare * 2**20
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = predict(bundle, questions, 128, permute_below=0).probabilities
            halved = sum("halving" in str(warning.message) for warning in caught)
            same = (found.argmax(-1) == expected.argmax(-1)).mean()
            check.row(f"{spare} MiB to spare, batch 128", "the same letters",
                      f"halved {halved} times, {same:.3f} alike", same > 0.98)  # fmt: skip
            if halved:
                break
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def resume(check: Check) -> None:
    """Twice the same, and stopped in the middle and resumed; by default and deterministic."""
    rows = 40 if check.small else 256
    for strict in (False, True):
        name = "deterministic" if strict else "default"
        train = partial(check.train, rows=rows, batch_size=12, deterministic=strict)
        whole = train(f"whole-{name}").tensors
        others = {"twice": train(f"again-{name}").tensors}
        try:
            train(f"cut-{name}", stop=2)
            raise RuntimeError("the signal did not stop the training")
        except TrainingStopped:
            others["stopped and resumed"] = train(f"cut-{name}", fresh=False).tensors
        for what, tensors in others.items():
            gap = max((whole[key] - tensors[key]).abs().max().item() for key in whole)
            exact = strict or not check.cuda
            asked = "the same to the bit" if exact else ""
            check.row(f"{what}, {name}", asked, f"{gap:.1e} apart", gap == 0 if exact else None)
    torch.use_deterministic_algorithms(False)


# step -> (seconds that it is given, what it does)
STEPS: dict[str, tuple[int, Callable[[Check], None]]] = {
    "machine": (10, machine),
    "base": (45, base),
    "train": (70, train),
    "export": (60, export),
    "answer": (40, answer),
    "parity": (40, parity),
    "half": (20, half),
    "memory": (15, memory),
    "resume": (60, resume),
}


def run_step(check: Check, name: str, seconds_left: float) -> None:
    """A step, whose faults are rows."""
    seconds, run = STEPS[name]
    check.step = name
    try:
        if seconds_left < seconds:
            raise NotRun(f"{seconds} s needed, {seconds_left:.0f} left: --only {name} runs it")
        run(check)
    except NotRun as reason:
        check.row(name, "", f"not run: {reason}")
    except Exception as error:
        first = (str(error).splitlines() or [""])[0][:200]
        if is_out_of_memory(error):
            check.row(name, "", f"not run: too little memory ({first})")
        else:
            traceback.print_exc()
            check.row(name, "runs to its end", f"{type(error).__name__}: {first}", False)
    real.release()


def main(arguments: list[str] | None = None) -> int:
    """Run the steps; 0 if all is as asked, 1 if anything fails, 2 with one line on stderr for
    unusable input."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "results", help="gets gpu-CARD.json, .md"
    )
    parser.add_argument("--work", type=Path, help="25 GB; by default where most room is")
    parser.add_argument("--seconds", type=float, help=f"for all steps ({SECONDS})")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP",
                        help=f"some of: {', '.join(STEPS)}")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="on the tiny base, on any machine")
    parser.add_argument("--cpu", action="store_true", help="at the real size without a GPU")
    parser.add_argument("--tests", action="store_true", help="run the tests that have CUDA paths")
    args = parser.parse_args(arguments)
    if not (args.tiny or args.cpu) and not torch.cuda.is_available():
        print("error: no CUDA GPU here: --tiny goes the same road without one", file=sys.stderr)
        return 2
    if args.tests:
        files = [f"tests/test_{name}.py" for name in CUDA_TESTS]
        return subprocess.run([sys.executable, "-m", "pytest", *files], cwd=ROOT).returncode
    places = [path for path in (Path("/dev/shm"), Path("/tmp"), Path.cwd()) if path.is_dir()]
    roomiest = max(places, key=lambda path: shutil.disk_usage(path).free)
    check = Check(args.out, args.work or roomiest / "bridgeblip-gpu", args.tiny)
    seconds = args.seconds or (math.inf if args.tiny or args.cpu else SECONDS)
    if check.file.is_file():  # what other steps have found stays
        stored = json.loads(check.file.read_text(encoding="utf-8"))["rows"]
        check.rows = [row for row in stored if row["step"] not in args.only]
    for name in args.only:
        run_step(check, name, seconds - (time.monotonic() - began))
    failed = sum(row["verdict"] == "FAIL" for row in check.rows)
    print(f"{failed} rows failed; {check.file} and .md hold all of them")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
