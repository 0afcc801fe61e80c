"""What the benchmark measures: each contender in a process of its own, which ``bench.py`` starts.

A process imports only what its contender needs, inside its function, for the time to its first
answer counts imports.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EACH = 4  # questions a picture, as in the official file
# So short that the stand-in's vocabulary needs about the tokens that the real one needs for words.
WORDS = (
    "a an the in on of to is it at by up or no one two six red big old dog cat man boy car bus box "
    "cup bag hat sky sun sea tree road sign left near blue"
).split()
UNSURE = 0.2  # share of the rows that "bundle, orders" asks again in every order
TRAINING_EPOCHS = 5
REPETITIONS = 3  # of the preprocessing of each picture


@dataclass(frozen=True)
class Plan:
    """What all processes of a benchmark have in common; another plan needs another folder."""

    base: str
    base_files: list
    """Name, size and time of change of each weights file."""
    pictures: int
    batch_size: int
    training_pictures: int
    training_batch: int
    device: str
    dtype: str
    cores: int
    versions: dict[str, str]

    def warmed(self, run: Callable):
        """What ``run`` returns; on a GPU the second time, once its kernels are loaded and chosen."""
        if self.device != "cpu":
            run()
        return run()


def result_path(out: Path, name: str, turn: int | None = None) -> Path:
    return out / "rounds" / f"{name}{'' if turn is None else f' {turn}'}.json"


def kept(out: Path, name: str, turn: int | None = None) -> dict:
    return json.loads(result_path(out, name, turn).read_text(encoding="utf-8"))


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
    import pandas as pd

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
        choices = [words(length) for length in lengths]
        question = f"{words(rng.randint(8, 16))}?"
        rows.append([f"TEST_{row:03d}", f"{row:03d}.jpg", question, *choices, rng.choice("ABCD")])
    table = pd.DataFrame(rows, columns=["ID", "img_path", "Question", *"ABCD", "answer"])
    table.to_csv(folder / "train.csv", index=False)
    table.drop(columns="answer").to_csv(folder / "test.csv", index=False)
    table[["ID"]].assign(answer="-").to_csv(folder / "sample_submission.csv", index=False)
    return folder


def _write_photo(folder: Path, each: int, number: int) -> None:
    """One picture, under ``each`` names."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

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


def questions_of(out: Path, name: str = "test.csv") -> list:
    from bridgeblip.data.questions import read_questions

    return read_questions(out / "work" / "questions" / name, need_answers=name == "train.csv")


def prompt_of(question) -> str:
    """The text that the model reads for a question."""
    from bridgeblip.bridge.processing import render_prompt

    return render_prompt(question.question, question.choices)


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

    def found(self) -> dict:
        """Bytes of this process's own, with mapped files, and on the GPU."""
        import resource

        import torch

        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found = {"anonymous": self.bytes, "resident": resident}
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.max_memory_allocated()
        return found


class Watched:
    """A model whose pictures, tokens and padding are counted."""

    def __init__(self, model):
        self._model = model
        self.pictures, self.tokens, self.padded = 0, 0, 0

    def __getattr__(self, name):
        method = getattr(self._model, name)

        def call(*args, **kwargs):
            if name == "encode_image":
                self.pictures += len(args[0])
            mask = kwargs.get("attention_mask")
            if mask is not None:
                self.tokens += int(mask.sum())
                self.padded += mask.numel()
            return method(*args, **kwargs)

        return call


def clock(run: Callable) -> float:
    """Seconds that ``run`` takes, to the end of its work on the GPU."""
    import torch

    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def timed_answers(plan: Plan, out: Path, began: float, answer: Callable) -> dict:
    """The first question alone, then all of them; ``began`` is when the process was started."""
    questions = questions_of(out)
    answer(questions[:1])
    first = time.time() - began
    seconds = plan.warmed(lambda: clock(lambda: answer(questions)))
    return {"first_answer_seconds": first, "seconds": seconds, "rows": len(questions)}


def count_operations(run: Callable[[], None]) -> int:
    """Operations, two a multiplication and addition, of all matrix products, convolutions and
    attentions of ``run``."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(query, key, value, *args, **kwargs):
        return sdpa_flop_count(query, key, value)

    # not among those that the counter knows
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={on_cpu: attention}) as counter:
        run()
    return counter.get_total_flops()


# ---------------------------------------------------------------- contenders: answering


class Generating:
    """``InstructBlipForConditionalGeneration.generate`` as a competent user writes it: batched, by
    length, in the machine's number format."""

    def __init__(self, base, device: str, dtype, batch_size: int, sliced: bool = False):
        from transformers import InstructBlipForConditionalGeneration, InstructBlipProcessor

        self.batch_size, self.device, self.dtype = batch_size, device, dtype
        self.processor = InstructBlipProcessor.from_pretrained(base)
        model = InstructBlipForConditionalGeneration.from_pretrained(base, dtype=dtype).eval()
        self.parameters = sum(p.numel() for p in model.parameters())
        # transformers sizes the decoder's cache by the encoder's depth
        text = model.config.text_config
        cache = text.num_layers >= text.num_decoder_layers
        self.settings = {"max_new_tokens": 2, "use_cache": cache}
        self.model = (_keep_layers(model) if sliced else model).to(device)
        self.watched = Watched(self.model)

    @classmethod
    def of(cls, plan: Plan, sliced: bool) -> "Generating":
        import torch

        return cls(plan.base, plan.device, getattr(torch, plan.dtype), plan.batch_size, sliced)

    def inputs(self, questions: Sequence) -> dict:
        from PIL import Image

        pictures = [Image.open(question.image).convert("RGB") for question in questions]
        texts = [prompt_of(question) for question in questions]
        inputs = self.processor(images=pictures, text=texts, padding=True, return_tensors="pt")
        return inputs.to(self.device, self.dtype)

    def answer(self, questions: Sequence) -> list[str]:
        lengths = [len(self.processor.tokenizer(prompt_of(q)).input_ids) for q in questions]
        rows = sorted(range(len(questions)), key=lambda row: -lengths[row])
        texts = [""] * len(rows)
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            inputs = self.inputs([questions[row] for row in batch])
            tokens = self.watched.generate(**inputs, **self.settings)
            answers = self.processor.batch_decode(tokens, skip_special_tokens=True)
            for row, text in zip(batch, answers, strict=True):
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
        found = timed_answers(plan, out, began, Generating.of(plan, sliced).answer)
        return found | peak.found()


def check_generate(plan: Plan, out: Path, began: float, sliced: bool) -> dict:
    import torch

    with torch.inference_mode():
        peer, questions = Generating.of(plan, sliced), questions_of(out)
        logits = peer.logits(questions[:EACH], kept(out, "prepare")["letter_ids"])
        operations = count_operations(lambda: peer.answer(questions))
    padding = 1 - peer.watched.tokens / peer.watched.padded
    found = {"logits": logits.tolist(), "operations": operations, "padding": padding}
    return found | {"parameters": peer.parameters}


def answer_with_bundle(plan: Plan, out: Path, began: float, orders: bool) -> dict:
    from bridgeblip.bundle.format import load_bundle
    from bridgeblip.bundle.predict import predict

    with PeakMemory() as peak:
        bundle = load_bundle(out / "work" / "torchscript.pt", plan.device)
        margin = _margin(out) if orders else 0

        def answer(questions):
            predict(bundle, questions, plan.batch_size, permute_below=margin)

        return timed_answers(plan, out, began, answer) | peak.found()


def check_bundle(plan: Plan, out: Path, began: float, orders: bool) -> dict:
    import torch

    from bridgeblip.bundle.format import load_bundle
    from bridgeblip.bundle.predict import predict
    from bridgeblip.evidence.answers import margins

    bundle = load_bundle(out / "work" / "torchscript.pt", plan.device)
    watched, questions, answers = Watched(bundle.model), questions_of(out), []
    batch = bundle.processor.collate(questions[:EACH])
    batch.pop("choice_mask")
    with torch.inference_mode():
        logits = bundle.model(**{name: tensor.to(plan.device) for name, tensor in batch.items()})

    def answer():
        margin = _margin(out) if orders else 0
        counted = replace(bundle, model=watched)
        answers.append(predict(counted, questions, plan.batch_size, permute_below=margin))

    operations = count_operations(answer)
    asked_again = sum("permuted" in flags for flags in answers[0].flags) / len(questions)
    return {
        "logits": logits.tolist(),
        "operations": operations,
        "padding": 1 - watched.tokens / watched.padded,
        "margins": margins(answers[0].probabilities).tolist(),
        "encoded": watched.pictures,
        "asked_again": asked_again,
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
    layers, dtype = range(kept(out, "prepare")["decoder_layers"]), getattr(torch, plan.dtype)
    model = load_sliced(plan.base, processor.letter_ids, layers, dtype=dtype, device=plan.device)
    batch = processor.collate(questions_of(out)[:EACH])
    with torch.inference_mode():
        output = model(**{name: tensor.to(plan.device) for name, tensor in batch.items()})
    return {"logits": output.logits.tolist()}


def measure_rate(plan: Plan, out: Path, began: float) -> dict:
    """Operations a second of this machine in the model's own matrix products, in their own shares
    and number format."""
    import torch
    from torch.utils.benchmark import Timer

    seconds, operations = 0.0, 0
    for rows, width, outputs, total in kept(out, "prepare")["products"]:
        inputs = torch.randn(rows, width).to(plan.device, getattr(torch, plan.dtype))
        # a layer's own weights are rarely at hand
        weights = [torch.randn(outputs, width).to(inputs) for _ in range(4)]
        names = {"linear": torch.nn.functional.linear, "inputs": inputs, "weights": weights}
        run = "for w in weights: linear(inputs, w)"
        with torch.inference_mode():
            timer = Timer(run, globals=names, num_threads=torch.get_num_threads())
            took = timer.blocked_autorange(min_run_time=0.3).median
        operations += total
        seconds += total / (2 * rows * width * outputs * len(weights) / took)
    return {"operations_per_second": operations / seconds}


# ---------------------------------------------------------------- contenders: training


def timed_epochs(trainer) -> list[float]:
    """Train; return the seconds of each epoch, from its beginning to the end of its last step."""
    import torch
    from transformers import TrainerCallback

    seconds = []

    class Timer(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            self.began = time.perf_counter()

        def on_epoch_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.began)

    trainer.add_callback(Timer())
    trainer.train()
    return seconds


def bridge_epochs(
    base, questions: list, settings, dtype, work: Path, cached: bool, device="cpu"
) -> list[float]:
    """Train the bridge as ``train`` sets it up, measuring and writing nothing; return seconds an
    epoch.

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
        paths = {key: path for path, key in keys.items()}
        fill(cache, sliced, processor, paths, settings.batch_size)
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

    questions = questions_of(out, "train.csv")[: plan.training_pictures * EACH]
    settings = TrainSettings(epochs=TRAINING_EPOCHS, batch_size=plan.training_batch)
    work, dtype = out / "work" / "training", getattr(torch, plan.dtype)
    run = partial(bridge_epochs, plan.base, questions, settings, dtype, work, True, plan.device)
    with PeakMemory() as peak:
        return {"epochs": plan.warmed(run)} | peak.found()


def train_peft(plan: Plan, out: Path, began: float) -> dict:
    """The usual recipe: LoRA on q and v of the whole language model, the letter as the text to
    generate."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    questions = questions_of(out, "train.csv")[: plan.training_pictures * EACH]
    with PeakMemory() as peak:
        peer = Generating.of(plan, sliced=False)

        def collate(rows):
            letters = ["ABCD"[row.answer] for row in rows]
            labels = peer.processor.tokenizer(letters, return_tensors="pt").input_ids
            return {**peer.inputs(rows), "labels": labels}

        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=["q", "v"])
        model = get_peft_model(peer.model, lora)
        gpu = torch.cuda.is_available()
        arguments = TrainingArguments(
            output_dir=str(out / "work" / "training"),
            num_train_epochs=TRAINING_EPOCHS,
            per_device_train_batch_size=plan.training_batch,
            learning_rate=2e-4,
            bf16=gpu and plan.dtype == "bfloat16",
            use_cpu=not gpu,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,  # collate puts the batch on the device itself
        )

        def run():
            settings = {"train_dataset": questions, "data_collator": collate}
            return timed_epochs(Trainer(model, arguments, **settings))

        return {"epochs": plan.warmed(run)} | peak.found()


# ---------------------------------------------------------------- preprocessing, start


def preprocess(plan: Plan, out: Path, began: float) -> dict:
    """Pictures a second and core: ours, and Pillow's bare decoding and resizing; and a second with
    ours in threads, as ``load_ahead`` feeds the model."""
    from PIL import Image

    from bridgeblip.bridge.processing import QuestionProcessor
    from bridgeblip.data.pictures import LOADERS, load_ahead

    processor = QuestionProcessor.from_base(plan.base)
    height, width = processor.image_size

    def bare(path):
        with Image.open(path) as image:
            image.resize((width, height), Image.Resampling.BICUBIC)

    ways = {"ours": processor.load_pixels, "pillow": bare}
    paths = [question.image for question in questions_of(out)[::EACH]] * REPETITIONS
    seconds = dict.fromkeys(ways, 0.0)
    for path in paths:  # in turns
        for name, way in ways.items():
            seconds[name] += clock(partial(way, path))
    threaded = clock(lambda: list(load_ahead(processor.load_pixels, [paths])))
    return {
        "per_second": {name: len(paths) / took for name, took in seconds.items()},
        "threads": LOADERS,
        "threaded_per_second": len(paths) / threaded,
    }


def start_up(plan: Plan, out: Path, began: float) -> dict:
    """Seconds of ``--help``, of importing the package, and to the first answer of the tiny bundle;
    cold processes."""
    work = out / "work"

    def seconds(*arguments: str) -> float:
        command = [sys.executable, *map(str, arguments)]
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start

    csv = write_photo_questions(work / "one", 1) / "test.csv"
    files = ["--model", work / "tiny" / "torchscript.pt", "--csv", csv]
    answer = ["-m", "bridgeblip", "predict", *files, "--out", work / "one" / "submission.csv"]
    return {
        "--help": seconds("-m", "bridgeblip", "--help"),
        "import bridgeblip": seconds("-c", "import bridgeblip"),
        "first answer of the tiny bundle": seconds(*answer),
    }


# ---------------------------------------------------------------- preparing


def prepare(plan: Plan, out: Path, began: float) -> dict:
    """Write questions and bundles, and count what the distinct work of answering costs at least."""
    import torch
    from transformers import InstructBlipConfig

    from bridgeblip.bridge.config import DEFAULT_DECODER_LAYERS, slice_config
    from bridgeblip.bridge.processing import QuestionProcessor

    work, processor = out / "work", QuestionProcessor.from_base(plan.base)
    share = 1.0
    while True:
        write_photo_questions(work / "questions", plan.pictures, EACH, share)
        questions = questions_of(out)
        if all(processor.fit(question) is question for question in questions):
            break
        share /= 2
    write_bundle(plan.base, work, getattr(torch, plan.dtype))
    write_bundle("tiny", work / "tiny", torch.float32)
    config = InstructBlipConfig.from_pretrained(plan.base)
    sliced = slice_config(config, DEFAULT_DECODER_LAYERS)
    lengths = processor.count_tokens([prompt_of(question) for question in questions])
    median = round(statistics.median(lengths))
    pictures = min(plan.batch_size, plan.pictures)
    return {
        "word_share": share,
        "median_tokens": median,
        "letter_ids": processor.letter_ids,
        "decoder_layers": config.text_config.num_decoder_layers,
        "stored_parameters": stored_parameters(plan.base),
        "floor_operations": count_floor(sliced, processor, questions),
        "products": matrix_products(sliced, pictures, plan.batch_size * median),
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
        picture = torch.empty(1, 3, *processor.image_size)
        embeds = model.encode_image(picture)
        total = count_operations(lambda: model.encode_image(picture)) * len(pictures)
        for question in questions:
            text = processor.encode_prompts([prompt_of(question)])
            total += count_operations(partial(model.score, embeds, **text))
    return total


def matrix_products(config, pictures: int, tokens: int) -> list[tuple[int, int, int, int]]:
    """The (rows, inputs, outputs, operations) of the linears of vision tower and encoder, nine
    tenths of the work."""
    from torch import nn

    from bridgeblip.bridge.model import empty_model

    model, products = empty_model(config), {}
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1
    parts = {model.vision_model: pictures * patches, model.language_model.encoder: tokens}
    for part, rows in parts.items():
        for linear in part.modules():
            if isinstance(linear, nn.Linear):
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
    "bridge": train_bridge,
    "peft": train_peft,
    "preprocessing": preprocess,
    "startup": start_up,
}
