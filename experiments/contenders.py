"""What the bench measures: each contender, and what else is timed or counted, in a process of its
own.

    python -m experiments.contenders NAME FOLDER RESULT BEGAN

``bench`` starts these. Stands outside the order of imports, as ``__main__`` does: a process imports
only what its contender needs, inside its function, for the time to its first answer counts imports.
"""

import json
import math
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EACH = 4  # questions a picture, as in the official file
WORDS = (
    "a an the in on of to is it at by up or no one two six red big old dog cat man boy car bus box "
    "cup bag hat sky sun "
    "sea tree road sign left near blue"
    # so short that the stand-in's vocabulary needs about the tokens that the real one needs for real
    # words
).split()
UNSURE = 0.2  # share of the rows that "bundle, orders" asks again in every order
TRAINING_PICTURES = 2
TRAINING_EPOCHS = 5
TRAINING_BATCH = 4
REPETITIONS = 3  # of the preprocessing of each picture


def prompt_of(question) -> str:
    """The text that the model reads for a question."""
    from bridgeblip.bridge.processing import render_prompt

    return render_prompt(question.question, question.choices)


@dataclass(frozen=True)
class Plan:
    """What all processes of a bench share; another plan needs another folder."""

    base: str
    base_files: list
    """Name, size and time of change of each weights file."""
    pictures: int
    batch_size: int
    device: str
    dtype: str
    cores: int
    scaling: list[int]
    training_pictures: int
    versions: dict[str, str]


def result_path(out: Path, name: str, turn: int | None = None) -> Path:
    return out / "rounds" / f"{name}{'' if turn is None else f' {turn}'}.json"


def kept(out: Path, name: str, turn: int | None = None) -> dict:
    return json.loads(result_path(out, name, turn).read_text(encoding="utf-8"))


def prepared(out: Path) -> dict:
    return kept(out, "prepare")


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
    import numpy as np
    import pandas as pd
    from PIL import Image
    from sklearn.datasets import load_sample_images

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng, grain, rows = random.Random(0), np.random.default_rng(0), []
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]

    def words(count: float) -> str:
        return " ".join(rng.choices(WORDS, k=max(1, round(count * share))))

    for picture in range(pictures):
        photo = photos[picture % len(photos)]
        left, top = rng.randrange(photo.width // 4), rng.randrange(photo.height // 4)
        size = (rng.randint(1000, 2000), rng.randint(1000, 1500))
        crop = photo.resize(
            size, Image.Resampling.BICUBIC, (left, top, left + photo.width // 2, top + 300)
        )
        noisy = np.asarray(crop) + grain.normal(
            0, 4, (*size[::-1], 1)
        )  # a camera's: else the file would be too small
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(
            folder / f"{picture * each:03d}.jpg", quality=90
        )
        for row in range(picture * each, (picture + 1) * each):
            if row % each:
                shutil.copyfile(folder / f"{picture * each:03d}.jpg", folder / f"{row:03d}.jpg")
            lengths = [min(13, rng.triangular(1, 17, 3)) for _ in range(4)]
            lengths[row % 4] = min(17, 1.5 * lengths[row % 4])
            question = f"{words(rng.randint(8, 16))}?"
            rows.append(
                [
                    f"TEST_{row:03d}",
                    f"{row:03d}.jpg",
                    question,
                    *map(words, lengths),
                    rng.choice("ABCD"),
                ]
            )
    table = pd.DataFrame(rows, columns=["ID", "img_path", "Question", *"ABCD", "answer"])
    table.to_csv(folder / "train.csv", index=False)
    table.drop(columns="answer").to_csv(folder / "test.csv", index=False)
    table[["ID"]].assign(answer="-").to_csv(folder / "sample_submission.csv", index=False)
    return folder


def write_many_questions(folder: Path, rows: int) -> Path:
    """Write ``rows`` questions, four on each of ``rows / 4`` pictures of noise; all of one length,
    so that no batch has padding, whoever is in it.
    """
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    lines = ["ID,img_path,Question,A,B,C,D"]
    for row in range(rows):
        name = f"{row // EACH}.png"
        if row % EACH == 0:
            Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
                folder / name
            )
        lines.append(f"{row},{name},Which of these words fits the picture best?,cat,dog,cow,owl")
    (folder / "test.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder / "test.csv"


# ---------------------------------------------------------------- measuring


class PeakMemory:
    """Peak anonymous memory of this process, in bytes, while the block runs; polled 50 times a
    second."""

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


class Watched:
    """A model whose calls are timed; rows, tokens and padding of the language model's inputs are
    counted."""

    def __init__(self, model):
        self._model, self.reset = model, partial(Watched.__init__, self, model)
        self.seconds, self.pictures, self.tokens, self.padded = 0.0, 0, 0, 0

    def __getattr__(self, name):
        method = getattr(self._model, name)
        if not callable(method):
            return method

        def call(*args, **kwargs):
            began = time.perf_counter()
            result = method(*args, **kwargs)
            _synchronize()
            self.seconds += time.perf_counter() - began
            mask = kwargs.get("attention_mask")
            if name == "encode_image":
                self.pictures += len(args[0])
            elif mask is not None:
                self.tokens, self.padded = self.tokens + int(mask.sum()), self.padded + mask.numel()
            return result

        return call


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _memory(peak: PeakMemory) -> dict:
    import resource

    import torch

    found = {
        "anonymous": peak.bytes,
        "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    return found | ({"gpu": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {})


def _timed_answers(
    questions: list, answer: Callable, watched: Watched, began: float, peak: PeakMemory
) -> dict:
    """The first question alone, then all of them."""
    answer(questions[:1])
    first = time.time() - began
    watched.reset()
    start = time.perf_counter()
    answer(questions)
    _synchronize()
    seconds = time.perf_counter() - start
    return {
        "first_answer_seconds": first,
        "seconds": seconds,
        "rows": len(questions),
        "padding": 1 - watched.tokens / watched.padded,
        "outside_model": 1 - watched.seconds / seconds,
    } | _memory(peak)


def count_operations(run: Callable[[], None]) -> int:
    """Operations, two a multiplication and addition, of all matrix products, convolutions and
    attentions of ``run``."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(query, key, value, *args, **kwargs):
        return sdpa_flop_count(query, key, value)

    on_cpu = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    )  # not among those that the counter knows
    with FlopCounterMode(display=False, custom_mapping={on_cpu: attention}) as counter:
        run()
    return counter.get_total_flops()


# ---------------------------------------------------------------- contenders: answering


def _questions(out: Path, name: str = "test.csv") -> list:
    from bridgeblip.data.questions import read_questions

    return read_questions(out / "work" / "questions" / name, need_answers=name == "train.csv")


class Generating:
    """``InstructBlipForConditionalGeneration.generate`` as a competent user writes it: batched, by
    length, in bf16."""

    def __init__(self, plan: Plan, sliced: bool):
        import torch
        from transformers import InstructBlipForConditionalGeneration, InstructBlipProcessor

        self.batch_size, self.device, self.dtype = (
            plan.batch_size,
            plan.device,
            getattr(torch, plan.dtype),
        )
        self.processor = InstructBlipProcessor.from_pretrained(plan.base)
        model = InstructBlipForConditionalGeneration.from_pretrained(
            plan.base, dtype=self.dtype
        ).eval()
        self.parameters = sum(p.numel() for p in model.parameters())
        text = (
            model.config.text_config
        )  # transformers sizes the decoder's cache by the encoder's depth
        self.settings = {
            "max_new_tokens": 2,
            "use_cache": text.num_layers >= text.num_decoder_layers,
        }
        self.model = (_keep_layers(model) if sliced else model).to(plan.device)
        self.watched = Watched(self.model)

    def inputs(self, questions: Sequence) -> dict:
        from PIL import Image

        pictures = [Image.open(question.image).convert("RGB") for question in questions]
        texts = [prompt_of(question) for question in questions]
        inputs = self.processor(images=pictures, text=texts, padding=True, return_tensors="pt")
        return inputs.to(self.device, self.dtype)

    def answer(self, questions: Sequence) -> list[str]:
        lengths = [
            len(self.processor.tokenizer(prompt_of(question)).input_ids) for question in questions
        ]
        rows = sorted(range(len(questions)), key=lambda row: -lengths[row])
        texts = [""] * len(rows)
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            tokens = self.watched.generate(
                **self.inputs([questions[row] for row in batch]), **self.settings
            )
            for row, text in zip(
                batch, self.processor.batch_decode(tokens, skip_special_tokens=True), strict=True
            ):
                texts[row] = text
        return texts

    def logits(self, questions: Sequence, letter_ids: list[int]):
        asked = self.settings | {"output_logits": True, "return_dict_in_generate": True}
        output = self.model.generate(**self.inputs(questions), **asked)
        return output.logits[0][:, letter_ids].float()


def _keep_layers(model):
    """Cut the decoder as a user does: fewer blocks, numbered anew for the cache."""
    from torch import nn

    from bridgeblip.bridge.config import DEFAULT_DECODER_LAYERS

    decoder = model.language_model.decoder
    decoder.block = nn.ModuleList(decoder.block[index] for index in DEFAULT_DECODER_LAYERS)
    for index, block in enumerate(decoder.block):
        block.layer[0].SelfAttention.layer_idx = block.layer[1].EncDecAttention.layer_idx = index
    return model


def generate(plan: Plan, out: Path, began: float, sliced: bool) -> dict:
    import torch

    with PeakMemory() as peak, torch.inference_mode():
        peer = Generating(plan, sliced)
        return _timed_answers(_questions(out), peer.answer, peer.watched, began, peak)


def check_generate(plan: Plan, out: Path, began: float, sliced: bool) -> dict:
    import torch

    with torch.inference_mode():
        peer, questions = Generating(plan, sliced), _questions(out)
        logits = peer.logits(questions[:EACH], prepared(out)["letter_ids"])
        operations = count_operations(lambda: peer.answer(questions))
    return {"logits": logits.tolist(), "operations": operations, "parameters": peer.parameters}


def _load_bundle(plan: Plan, out: Path):
    from dataclasses import replace

    from bridgeblip.bundle.format import load_bundle

    bundle = load_bundle(out / "work" / "torchscript.pt", plan.device)
    watched = Watched(bundle.model)
    return replace(bundle, model=watched), watched


def answer_with_bundle(plan: Plan, out: Path, began: float, orders: bool) -> dict:
    from bridgeblip.bundle.predict import predict

    with PeakMemory() as peak:
        bundle, watched = _load_bundle(plan, out)
        margin, flags = _margin(out) if orders else 0, []

        def answer(questions):
            flags.extend(predict(bundle, questions, plan.batch_size, permute_below=margin).flags)

        result = _timed_answers(_questions(out), answer, watched, began, peak)
    return result | {
        "asked_again": sum("permuted" in words for words in flags[1:]) / result["rows"]
    }


def check_bundle(plan: Plan, out: Path, began: float, orders: bool) -> dict:
    import torch

    from bridgeblip.bundle.predict import predict
    from bridgeblip.evidence.answers import margins

    bundle, watched = _load_bundle(plan, out)
    questions, found = _questions(out), []

    def answer():
        margin = _margin(out) if orders else 0
        found.append(
            predict(bundle, questions, plan.batch_size, permute_below=margin).probabilities
        )

    batch = bundle.processor.collate(questions[:EACH])
    batch = {
        name: tensor.to(plan.device) for name, tensor in batch.items() if name != "choice_mask"
    }
    with torch.inference_mode():
        logits = bundle.model._model(**batch)
    operations = count_operations(answer)
    return {
        "logits": logits.tolist(),
        "operations": operations,
        "margins": margins(found[0]).tolist(),
        "encoded": watched.pictures,
    }


def _margin(out: Path) -> float:
    """The margin that the least sure fifth of the rows lies below."""
    ordered = sorted(kept(out, "check bundle")["margins"])
    count = round(UNSURE * len(ordered))
    return (ordered[count - 1] + ordered[count]) / 2


def check_unsliced(plan: Plan, out: Path, began: float) -> dict:
    """Our model with all decoder layers: what ``generate`` must agree with."""
    import torch

    from bridgeblip.bridge.model import load_sliced
    from bridgeblip.bridge.processing import QuestionProcessor

    processor = QuestionProcessor.from_base(plan.base)
    layers, dtype = range(prepared(out)["decoder_layers"]), getattr(torch, plan.dtype)
    model = load_sliced(plan.base, processor.letter_ids, layers, dtype=dtype, device=plan.device)
    batch = processor.collate(_questions(out)[:EACH])
    with torch.inference_mode():
        return {
            "logits": model(
                **{name: tensor.to(plan.device) for name, tensor in batch.items()}
            ).logits.tolist()
        }


def measure_rate(plan: Plan, out: Path, began: float) -> dict:
    """Operations a second of this machine in the model's own matrix products, in their own shares
    and number format."""
    return {"operations_per_second": matrix_rate(plan, out, plan.dtype)}


def matrix_rate(plan: Plan, out: Path, dtype: str) -> float:
    import torch
    from torch.utils.benchmark import Timer

    seconds, operations = 0.0, 0
    for rows, width, outputs, total in prepared(out)["products"]:
        inputs = torch.randn(rows, width).to(plan.device, getattr(torch, dtype))
        weights = [
            torch.randn(outputs, width).to(inputs) for _ in range(4)
        ]  # a layer's own is rarely at hand
        names = {"linear": torch.nn.functional.linear, "inputs": inputs, "weights": weights}
        with torch.inference_mode():
            timer = Timer(
                "for w in weights: linear(inputs, w)",
                globals=names,
                num_threads=torch.get_num_threads(),
            )
            took = timer.blocked_autorange(min_run_time=0.3).median
        operations += total
        seconds += total / (2 * rows * width * outputs * len(weights) / took)
    return operations / seconds


def profile_stages(plan: Plan, out: Path, began: float) -> dict:
    """Which operations the time of each of the bundle's stages goes to, one batch; and rates by
    number format."""
    import torch
    from torch.profiler import profile

    bundle, _ = _load_bundle(plan, out)
    questions, model = _questions(out), bundle.model
    pictures = bundle.processor.load_pictures(questions[: EACH * plan.batch_size : EACH])[
        "pixel_values"
    ]
    pictures = pictures.to(plan.device)
    asked = questions[: plan.batch_size]
    texts = bundle.processor.encode_prompts([prompt_of(question) for question in asked])
    texts = {name: tensor.to(plan.device) for name, tensor in texts.items()}
    stages = {}
    with torch.inference_mode(), torch.jit.optimized_execution(False):
        embeds = model.encode_image(pictures)[[row // EACH for row in range(len(asked))]]
        for name, run in (
            ("encode_image", lambda: model.encode_image(pictures)),
            ("score", lambda: model.score(embeds, **texts)),
        ):
            run()
            with profile() as profiler:
                start = time.perf_counter()
                run()
                _synchronize()
                seconds = time.perf_counter() - start
            key = (
                "self_device_time_total"
                if plan.device.startswith("cuda")
                else "self_cpu_time_total"
            )
            spent = {event.key: getattr(event, key) for event in profiler.key_averages()}
            shares = {name: took / sum(spent.values()) for name, took in spent.items()}
            largest = sorted(shares, key=lambda name: -shares[name])[:10]
            stages[name] = {"seconds": seconds, "shares": {name: shares[name] for name in largest}}
    rates = {
        dtype: matrix_rate(plan, out, dtype) for dtype in dict.fromkeys([plan.dtype, "float32"])
    }
    return {"stages": stages, "operations_per_second": rates}


# ---------------------------------------------------------------- contenders: training


def timed_epochs(trainer) -> list[float]:
    """Train; return the seconds of each epoch, from its beginning to the end of its last step."""
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        seconds: list[float] = []  # noqa: RUF012

        def on_epoch_begin(self, args, state, control, **kwargs):
            self.began = time.perf_counter()
            self.seconds.append(0.0)

        def on_step_end(self, args, state, control, **kwargs):
            _synchronize()
            self.seconds[-1] = time.perf_counter() - self.began

    timer = Timer()
    trainer.add_callback(timer)
    trainer.train()
    return timer.seconds


def bridge_epochs(
    base, questions: list, settings, dtype, work: Path, cached: bool, device="cpu"
) -> list[float]:
    """Train the bridge as ``training.train`` sets it up, measuring and writing nothing; return
    seconds an epoch.

    The first one includes filling the cache of image features, which begins empty.
    """
    from bridgeblip.bridge.config import BridgeSettings
    from bridgeblip.bridge.features import CachedPictures, FeatureCache, encoder_key, fill
    from bridgeblip.bridge.lora import attach_bridge
    from bridgeblip.bridge.model import load_sliced
    from bridgeblip.bridge.processing import QuestionProcessor
    from bridgeblip.data.pictures import picture_keys
    from bridgeblip.training.trainer import (
        BridgeTrainer,
        TrainingQuestions,
        accuracy,
        optimizer,
        training_arguments,
    )

    processor, pictures, filled = QuestionProcessor.from_base(base), None, 0.0
    sliced = load_sliced(base, processor.letter_ids, dtype=dtype, device=device)
    if cached:
        shutil.rmtree(work / "features", ignore_errors=True)
        start, keys = time.perf_counter(), picture_keys(q.image for q in questions)
        cache = FeatureCache(work / "features", encoder_key(sliced, processor))
        fill(
            cache, sliced, processor, {key: path for path, key in keys.items()}, settings.batch_size
        )
        pictures, filled = CachedPictures(cache, keys), time.perf_counter() - start
    model = attach_bridge(sliced, BridgeSettings())
    arguments = training_arguments(work, settings, dtype)
    arguments.eval_strategy = "no"
    trainer = BridgeTrainer(
        model,
        arguments,
        train_dataset=TrainingQuestions(questions, settings.seed, settings.shuffle_choices),
        eval_dataset=questions[:1],
        data_collator=partial(processor.collate, pictures=pictures),
        compute_metrics=accuracy,
        optimizers=(optimizer(model, settings), None),
        average=settings.average,
    )
    first, *others = timed_epochs(trainer)
    return [first + filled, *others]


def train_bridge(plan: Plan, out: Path, began: float) -> dict:
    import torch

    from bridgeblip.training.settings import TrainSettings

    questions = _questions(out, "train.csv")[: TRAINING_PICTURES * EACH]
    settings = TrainSettings(epochs=TRAINING_EPOCHS, batch_size=TRAINING_BATCH)
    with PeakMemory() as peak:
        work, dtype = out / "work" / "training", getattr(torch, plan.dtype)
        seconds = bridge_epochs(plan.base, questions, settings, dtype, work, True, plan.device)
        return {"epochs": seconds} | _memory(peak)


def train_peft(plan: Plan, out: Path, began: float) -> dict:
    """The usual recipe: LoRA on q and v of the whole language model, the letter as the text to
    generate."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    questions = _questions(out, "train.csv")[: TRAINING_PICTURES * EACH]
    with PeakMemory() as peak:
        peer = Generating(plan, sliced=False)

        def collate(rows):
            answers = peer.processor.tokenizer(
                ["ABCD"[row.answer] for row in rows], return_tensors="pt"
            )
            return {**peer.inputs(rows), "labels": answers.input_ids}

        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=["q", "v"])
        model = get_peft_model(peer.model, lora)
        gpu = torch.cuda.is_available()
        arguments = TrainingArguments(
            output_dir=str(out / "work" / "training"),
            num_train_epochs=TRAINING_EPOCHS,
            per_device_train_batch_size=TRAINING_BATCH,
            learning_rate=2e-4,
            bf16=gpu and plan.dtype == "bfloat16",
            use_cpu=not gpu,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,  # collate puts the batch on the device itself
        )
        trainer = Trainer(model, arguments, train_dataset=questions, data_collator=collate)
        return {"epochs": timed_epochs(trainer)} | _memory(peak)


# ---------------------------------------------------------------- preprocessing, start, many rows


def preprocess(plan: Plan, out: Path, began: float) -> dict:
    """Pictures a second and core: ours, Pillow's bare decoding and resizing, and ours after a draft
    decoding; and pictures a second with ours in threads, as ``load_ahead`` feeds the model."""
    import torch
    from PIL import Image

    from bridgeblip.bridge.processing import QuestionProcessor
    from bridgeblip.data.pictures import LOADERS, load_ahead

    processor = QuestionProcessor.from_base(plan.base)
    height, width = processor.image_size
    paths = [question.image for question in _questions(out)[::EACH]]

    def bare(path):
        with Image.open(path) as image:
            image.resize((width, height), Image.Resampling.BICUBIC)

    def draft(path):
        with Image.open(path) as image:
            image.draft("RGB", (2 * width, 2 * height))
            return processor.pixels(image)

    ways = {"ours": processor.load_pixels, "pillow": bare, "draft": draft}
    seconds = dict.fromkeys(ways, 0.0)
    for path in paths * REPETITIONS:
        for name, way in ways.items():
            start = time.perf_counter()
            way(path)
            seconds[name] += time.perf_counter() - start
    groups = [paths] * REPETITIONS
    start = time.perf_counter()
    threaded = sum(map(len, load_ahead(processor.load_pixels, groups))) / (
        time.perf_counter() - start
    )
    step = torch.from_numpy(processor.levels[:, 1:2] - processor.levels[:, :1])[
        ..., None
    ]  # a grey level, as a number
    levels = [(draft(path) - processor.load_pixels(path)).abs() / step for path in paths]
    return {
        "per_second": {name: len(paths) * REPETITIONS / took for name, took in seconds.items()},
        "threads": LOADERS,
        "threaded_per_second": threaded,
        "draft_levels": {
            "largest": max(level.max().item() for level in levels),
            "mean": statistics.mean(level.mean().item() for level in levels),
        },
    }


def start_up(plan: Plan, out: Path, began: float) -> dict:
    """Seconds of ``--help``, of importing the package, and to the first answer of the tiny bundle;
    cold processes."""
    work = out / "work"

    def seconds(*arguments: str) -> float:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
        return time.perf_counter() - start

    csv, submission = write_many_questions(work / "one", 1), work / "one" / "submission.csv"
    answer = (
        "predict",
        "--model",
        work / "tiny" / "torchscript.pt",
        "--csv",
        csv,
        "--out",
        submission,
    )
    return {
        "--help": seconds("-m", "bridgeblip", "--help"),
        "import bridgeblip": seconds("-c", "import bridgeblip"),
        "first answer of the tiny bundle": seconds("-m", "bridgeblip", *map(str, answer)),
    }


def answer_many(plan: Plan, out: Path, began: float, rows: int) -> dict:
    """The tiny bundle on many rows: operations a row, encoder calls a picture, peak memory."""
    from dataclasses import replace
    from tempfile import TemporaryDirectory

    from bridgeblip.bundle.format import load_bundle
    from bridgeblip.bundle.predict import predict
    from bridgeblip.data.questions import read_questions
    from bridgeblip.evidence.submission import write_submission

    bundle = load_bundle(out / "work" / "tiny" / "torchscript.pt")
    watched = Watched(bundle.model)
    with PeakMemory() as peak, TemporaryDirectory() as folder:
        csv = write_many_questions(Path(folder), rows)

        def answer():
            questions = read_questions(csv, strict=False)
            answers = predict(
                replace(bundle, model=watched), questions, out=Path(folder) / "submission.csv"
            )
            write_submission(questions, answers, None, Path(folder) / "submission.csv")

        operations = count_operations(answer)
        return {
            "rows": rows,
            "operations_per_row": operations / rows,
            "encoded_per_picture": watched.pictures / len(range(0, rows, EACH)),
        } | _memory(peak)


# ---------------------------------------------------------------- preparing


def prepare(plan: Plan, out: Path, began: float) -> dict:
    """Write questions and bundles, and count what the distinct work of answering costs at least."""
    import torch
    from transformers import InstructBlipConfig

    from bridgeblip.bridge.config import DEFAULT_DECODER_LAYERS, slice_config
    from bridgeblip.bridge.processing import QuestionProcessor
    from bridgeblip.data.questions import read_questions

    work, processor = out / "work", QuestionProcessor.from_base(plan.base)
    share = 1.0
    while True:
        folder = write_photo_questions(work / "questions", plan.pictures, EACH, share)
        questions = read_questions(folder / "test.csv")
        if all(processor.fit(question) is question for question in questions):
            break
        share /= 2
    write_bundle(plan.base, work, getattr(torch, plan.dtype))
    write_bundle("tiny", work / "tiny", torch.float32)
    (work / "one").mkdir(exist_ok=True)
    config = InstructBlipConfig.from_pretrained(plan.base)
    sliced = slice_config(config, DEFAULT_DECODER_LAYERS)
    lengths = processor.count_tokens([prompt_of(question) for question in questions])
    median = round(statistics.median(lengths))
    return {
        "word_share": share,
        "median_tokens": median,
        "letter_ids": processor.letter_ids,
        "decoder_layers": config.text_config.num_decoder_layers,
        "stored_parameters": stored_parameters(plan.base),
        "floor_operations": count_floor(sliced, processor, questions),
        "products": matrix_products(
            sliced, min(plan.batch_size, plan.pictures), plan.batch_size * median
        ),
    }


def stored_parameters(base: str) -> int:
    """Count the numbers in the weights files of a base: what a whole model, LM head of its own
    included, must hold."""
    from safetensors import safe_open

    count = 0
    for path in Path(base).glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            count += sum(math.prod(shard.get_slice(name).get_shape()) for name in shard.keys())  # noqa: SIM118
    return count


def write_bundle(base: str, folder: Path, dtype) -> Path:
    """Export the sliced base as it is, unbridged, its head the letters' rows of the LM head."""
    from bridgeblip.bridge.base import resolve_base
    from bridgeblip.bridge.config import DEFAULT_DECODER_LAYERS, BridgeSettings
    from bridgeblip.bridge.export import export_bundle
    from bridgeblip.bridge.lora import attach_bridge
    from bridgeblip.bridge.model import load_sliced
    from bridgeblip.bridge.processing import QuestionProcessor
    from bridgeblip.training.weights import save_weights, trained_tensors

    bundle, bridge = folder / "torchscript.pt", BridgeSettings(rank=0)
    if not bundle.is_file():
        letter_ids = QuestionProcessor.from_base(resolve_base(base)).letter_ids
        tensors = trained_tensors(attach_bridge(load_sliced(base, letter_ids, dtype=dtype), bridge))
        manifest = {
            "base": str(base),
            "revision": None,
            "layers": list(DEFAULT_DECODER_LAYERS),
            "bridge": asdict(bridge),
            "dtype": str(dtype).removeprefix("torch."),
        }
        save_weights(folder / "weights-0.pt", tensors, manifest)
        export_bundle(folder / "weights-0.pt", bundle)
    return bundle


def count_floor(config, processor, questions: list) -> int:
    """Count, without weights, the operations of the distinct work: each picture once, texts without
    padding."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers.initialization import no_init_weights

    from bridgeblip.bridge.export import TraceableModel
    from bridgeblip.bridge.model import BridgeBlipForMultipleChoice
    from bridgeblip.data.pictures import picture_keys

    pictures = set(picture_keys(question.image for question in questions).values())
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), no_init_weights():
        model = TraceableModel(BridgeBlipForMultipleChoice(config)).eval()
        embeds = [model.encode_image(torch.empty(1, 3, *processor.image_size))]
        vision = count_operations(
            lambda: model.encode_image(torch.empty(1, 3, *processor.image_size))
        )
        texts = [processor.encode_prompts([prompt_of(question)]) for question in questions]
        return vision * len(pictures) + sum(
            count_operations(partial(model.score, *embeds, **text)) for text in texts
        )


def matrix_products(config, pictures: int, tokens: int) -> list[tuple[int, int, int, int]]:
    """The (rows, inputs, outputs, operations) of the linears of vision tower and encoder, nine
    tenths of the work."""
    from torch import nn

    from bridgeblip.bridge.model import empty_model

    model, products = empty_model(config), {}
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1
    for part, rows in (
        (model.vision_model, pictures * patches),
        (model.language_model.encoder, tokens),
    ):
        for linear in (module for module in part.modules() if isinstance(module, nn.Linear)):
            shape = (rows, linear.in_features, linear.out_features)
            products[shape] = products.get(shape, 0) + 2 * math.prod(shape)
    return [(*shape, total) for shape, total in products.items()]


WORKERS = {
    "prepare": prepare,
    "check unsliced": check_unsliced,
    "check generate": partial(check_generate, sliced=False),
    "check generate sliced": partial(check_generate, sliced=True),
    "check bundle": partial(check_bundle, orders=False),
    "check bundle, orders": partial(check_bundle, orders=True),
    "generate": partial(generate, sliced=False),
    "generate sliced": partial(generate, sliced=True),
    "bundle": partial(answer_with_bundle, orders=False),
    "bundle, orders": partial(answer_with_bundle, orders=True),
    "rate": measure_rate,
    "profile": profile_stages,
    "bridge": train_bridge,
    "peft": train_peft,
    "preprocessing": preprocess,
    "startup": start_up,
    "few rows": lambda plan, out, began: answer_many(plan, out, began, plan.scaling[0]),
    "many rows": lambda plan, out, began: answer_many(plan, out, began, plan.scaling[1]),
}


def work_once(name: str, out: Path, result: Path, began: float) -> None:
    """Do one measurement in this process and write what it found; ``began`` is when the process was
    started."""
    from bridgeblip.files import write_text

    plan = Plan(**json.loads((out / "plan.json").read_text(encoding="utf-8")))
    write_text(result, json.dumps(WORKERS[name](plan, out, began)))


if __name__ == "__main__":
    work_once(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]))
