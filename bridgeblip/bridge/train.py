"""Training the bridge and the head with Hugging Face's ``Trainer``, so that it survives the night."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    EvalPrediction,
    InstructBlipConfig,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    enable_full_determinism,
    set_seed,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME

from bridgeblip import InputError
from bridgeblip.bridge.base import resolve_base
from bridgeblip.bridge.budget import BUDGET_LIMIT, certify_budget
from bridgeblip.bridge.config import DEFAULT_DECODER_LAYERS, BridgeSettings, decoder_layers, slice_config
from bridgeblip.bridge.features import CachedPictures, FeatureCache, default_folder, encoder_key, fill
from bridgeblip.bridge.model import attach_bridge, load_sliced, load_trained, trained_tensors
from bridgeblip.bridge.processing import QuestionProcessor
from bridgeblip.bundle.predict import ask_in_orders, choose_permutation_margin
from bridgeblip.data.questions import LETTERS, PROMPT_TEMPLATE, Question, picture_keys, read_questions, split_by_picture
from bridgeblip.evidence.report import write_report
from bridgeblip.machine import choose_precision
from bridgeblip.training.callbacks import (
    Averages,
    Patience,
    Progress,
    SelfCheck,
    StateKeeper,
    Stopper,
    WeightsKeeper,
    history_table,
    in_notebook,
)
from bridgeblip.training.weights import (
    STATE_FOLDER,
    best_epoch,
    copy_missing,
    copy_verified,
    load_weights,
    newest_state,
    require_writable,
    save_best,
    state_is_done,
    weights_path,
)

PROBE_SIZE = 3  # questions whose logits travel with the weights
TRAINED_FILE = "trained.safetensors"
STAGING_FOLDER = ".staging"
REPORT_FILE = "report.html"


class TrainingStopped(InputError):
    """Training ended because it was asked to; its state is saved."""

    exit_code = 130


@dataclass(frozen=True)
class TrainSettings:
    """How long and how fast to train. The defaults suit a few thousand questions; ``choose(few=True)`` sixty."""

    epochs: int = 1
    """Passes over the training questions; each writes a weights file."""
    batch_size: int = 16
    """Questions a step on one device."""
    accumulation: int = 1
    """Steps whose gradients are added before the weights move."""
    learning_rate: float = 2e-4
    """Peak rate of the adapters."""
    head_learning_rate: float = 2e-4
    """Peak rate of the head, which starts from good rows and needs no more."""
    weight_decay: float = 0.01
    warmup: float = 0.05
    """Share of all steps in which the rate rises to its peak; then it falls along a cosine."""
    clip: float = 1.0
    """Longest gradient that moves the weights; longer ones are scaled down."""
    shuffle_choices: bool = True
    """Show the choices in a fresh order in every epoch, so that no letter is learned by heart."""
    label_smoothing: float = 0.05
    """Share of the target spread over all choices: keeps the probabilities honest on few questions."""
    average: float = 0.05
    """Share of all steps that the moving average of the weights looks back; 0 takes the last weights as they are."""
    patience: int = 0
    """Epochs without a better validation accuracy after which training stops; 0 never stops early."""
    validation_fraction: float = 0.1
    """Share of the distinct pictures whose questions are only for measuring."""
    seed: int = 0
    deterministic: bool = False
    """Use only operations that give the same bits each time, even where a GPU has quicker ones."""
    workers: int = 0
    """Processes that load pictures beside the training one."""
    save_minutes: float = 5.0
    """Time between two saved states, the most that a disconnect costs."""

    @classmethod
    def choose(cls, few: bool = False, **changes) -> "TrainSettings":
        """The defaults or, if ``few``, the profile for some sixty questions; a change that is None changes nothing."""
        profile = FEW if few else {}
        return cls(**profile | {name: value for name, value in changes.items() if value is not None})


# For sixty questions: more passes, a gentler start, more pictures to measure on.
FEW = {"epochs": 8, "batch_size": 8, "warmup": 0.1, "label_smoothing": 0.1, "validation_fraction": 0.2}


NOT_THE_RESULT = ("workers", "save_minutes")  # settings that a resumed run may change


@dataclass(frozen=True)
class TrainResult:
    """What training leaves behind."""

    history: pd.DataFrame
    """One row a logged step: ``step``, ``epoch``, ``loss``, and ``accuracy`` where validated."""
    validation: list[Question]
    probabilities: np.ndarray
    """(validation questions, choices), by the weights of the best epoch."""
    blank_probabilities: np.ndarray
    """The same without the pictures: what the questions alone give away."""
    weights: list[Path]
    """The files written, one an epoch."""


def train(
    train_csv: str | Path,
    base: str | Path,
    checkpoint_dir: str | Path,
    settings: TrainSettings = TrainSettings(),
    bridge: BridgeSettings = BridgeSettings(),
    layers: str | Sequence[int] = DEFAULT_DECODER_LAYERS,
    revision: str | None = None,
    budget_limit: int = BUDGET_LIMIT,
    features: str | Path | None = "default",
    copy_to: str | Path | None = None,
) -> TrainResult:
    """Slice ``base``, bridge it, train adapters and head, and write ``weights-N.pt`` after each epoch.

    Called again after any interruption, with the same settings, it goes on in the middle of the epoch and
    ends with the same tensors; called again after the end, it trains nothing and returns the same result. The
    result and the report are of the epoch that validates best, whose weights an export takes.

    Args:
        base: "tiny", a folder, or a hub id, of which ``revision`` is taken.
        layers: which decoder layers stay: a name of ``config.LAYER_SELECTIONS``, or indices.
        budget_limit: most parameters that the merged model may have.
        features: folder of the cache of image features; None encodes the pictures anew in every epoch.
        copy_to: a second checkpoint folder, such as one on Drive, that gets a verified copy of every file.

    Raises:
        InputError: if the questions, pictures or the base can't be used, or the folder has the state of another run
            that has not ended; before anything long starts.
        TrainingStopped: after the stop button, Ctrl-C or SIGTERM.
    """
    checkpoint_dir = Path(checkpoint_dir)
    places = [checkpoint_dir, Path(copy_to)] if copy_to else [checkpoint_dir]
    process = PartialState(cpu=not torch.cuda.is_available())
    for place in places if process.is_main_process else ():
        require_writable(place)
    plan = _plan(train_csv, base, revision, decoder_layers(layers), settings, bridge, budget_limit, process)
    resumed = newest_state(places, plan.identity)
    model, pictures, blank = _load(plan, features, process)
    trainer, keeper = _trainer(plan, model, pictures, places)
    if process.is_main_process and not (resumed and state_is_done(resumed)):
        trainer.add_callback(_tensorboard(checkpoint_dir))
    trainer.go(resumed, keeper.stopper)
    if keeper.leaving:
        raise TrainingStopped(
            f"stopped on request after step {trainer.state.global_step} of {trainer.state.max_steps}; all is saved in "
            f"{checkpoint_dir / STATE_FOLDER}: run the same again to go on"
        )
    return _conclude(trainer, plan, blank, places, process)


@dataclass(frozen=True)
class _Plan:
    """All that is decided before anything long starts."""

    base: str | Path
    revision: str | None
    layers: list[int]
    settings: TrainSettings
    bridge: BridgeSettings
    training: list[Question]
    validation: list[Question]
    picture_keys: dict[Path, str]
    """Content key of each picture."""
    processor: QuestionProcessor
    device: torch.device
    dtype: torch.dtype
    manifest: dict[str, Any]
    """What each weights file says of itself."""
    identity: dict[str, Any]
    """What a saved state must agree with."""


def _plan(train_csv, base, revision, layers, settings, bridge, budget_limit, process) -> _Plan:
    """Seed, read and split the questions, look at base and machine; arguments as for ``train``."""
    questions = read_questions(train_csv, need_answers=True)
    training, validation = split_by_picture(questions, settings.validation_fraction, settings.seed)
    folder = resolve_base(base, revision)
    processor = QuestionProcessor.from_base(folder)
    processor.encode_prompts([q.prompt for q in questions])  # refuses too long prompts now rather than in mid-epoch
    (enable_full_determinism if settings.deterministic else set_seed)(settings.seed)
    config = slice_config(InstructBlipConfig.from_pretrained(folder), layers)
    budget = certify_budget(config, budget_limit)
    device = process.device if process.device.type == "cuda" else torch.device("cpu")  # it may say cpu:0
    precision = choose_precision(device, budget["total"])
    process.print(f"{budget['total']:,} parameters of at most {budget_limit:,}; computing in {precision}")
    manifest = {
        "base": str(base),
        "revision": revision,
        "layers": layers,
        "bridge": asdict(bridge),
        "train": asdict(settings),
        "dtype": str(precision.dtype).removeprefix("torch."),
        "budget": budget | {"limit": budget_limit},
        "config": config.to_json_string(),
    } | _contract(processor)
    keys = picture_keys(q.image for q in questions)
    identity = _identity(manifest, questions, keys, process.num_processes)
    return _Plan(
        base, revision, layers, settings, bridge, training, validation, keys, processor, device, precision.dtype,
        manifest, identity,
    )  # fmt: skip


def _load(plan: _Plan, features: str | Path | None, process: PartialState):
    """Return the sliced model with its bridge, the reader of cached image features or None, and blank pictures."""
    settings, bridge = plan.settings, plan.bridge
    letter_ids, init = plan.processor.letter_ids, bridge.head_init
    sliced = load_sliced(plan.base, letter_ids, plan.layers, init, plan.dtype, plan.device, plan.revision)
    sliced.label_smoothing = settings.label_smoothing
    pictures = _cached_pictures(features, sliced, plan.processor, plan.picture_keys, settings.batch_size, process)
    blank = BlankPictures(sliced.encode_image(plan.processor.blank_pixels[None].to(plan.device)).detach().cpu())
    return attach_bridge(sliced, bridge), pictures, blank


def _trainer(
    plan: _Plan, model: nn.Module, pictures: CachedPictures | None, places: list[Path]
) -> tuple["BridgeTrainer", StateKeeper]:
    settings, collate = plan.settings, plan.processor.collate
    trainer = BridgeTrainer(
        model,
        training_arguments(places[0], settings, plan.dtype),
        train_dataset=TrainingQuestions(plan.training, settings.seed, settings.shuffle_choices),
        eval_dataset=plan.validation,
        data_collator=partial(collate, pictures=pictures),
        compute_metrics=accuracy,
        optimizers=(optimizer(model, settings), None),
        average=settings.average,
    )
    keeper = StateKeeper(places, plan.identity, trainer.averages, Stopper(), settings.save_minutes)
    trainer.add_callback(SelfCheck(model))
    trainer.add_callback(Progress(live=in_notebook()))
    trainer.add_callback(WeightsKeeper(places, plan.manifest, collate(plan.validation[:PROBE_SIZE])))
    trainer.add_callback(keeper)
    if settings.patience:
        trainer.add_callback(Patience(settings.patience))
    return trainer, keeper


def _conclude(
    trainer: "BridgeTrainer", plan: _Plan, blank: "BlankPictures", places: list[Path], process: PartialState
) -> TrainResult:
    """Measure the best epoch's weights, those that exporting takes, and write the report."""
    history = history_table(trainer.state.log_history)
    before, *accuracies = history["accuracy"].dropna().tolist()
    weights = [weights_path(places[0], epoch) for epoch in range(len(accuracies))]
    if process.is_main_process:
        copy_missing(places, [path.name for path in weights])
    process.wait_for_everyone()
    lost = [path for path in weights if not path.is_file()]
    if lost:
        raise InputError(
            f"{lost[0]} is gone although training has ended: put it back, or delete {places[0] / STATE_FOLDER} to "
            "train anew"
        )
    trainer.averages.take(load_weights(weights[best_epoch(accuracies)]).tensors)
    questions = plan.validation
    once = trainer.answer(questions)
    unseen = trainer.answer(questions, partial(plan.processor.collate, pictures=blank))
    views = ask_in_orders(questions, once, range(len(once)), lambda rows, shown: trainer.answer(shown))
    often = np.array([np.mean(seen, axis=0) for seen in views])
    margin = choose_permutation_margin(once, often, [q.answer for q in questions])
    pays = f"pays below a margin of {margin:.2f}" if margin else "does not pay"
    process.print(f"asking in other orders too {pays}")
    if process.is_main_process:
        report = places[0] / REPORT_FILE
        facts = write_report(
            report,
            questions,
            once,
            blank_probabilities=unseen,
            references={"sliced, not yet bridged": before},
            manifest={key: plan.manifest[key] for key in ("base", "revision", "layers", "bridge", "train", "dtype")},
        )
        for place in places:
            save_best(place, accuracies, margin)
        for place in places[1:]:
            for path in (report, report.with_suffix(".json")):
                copy_verified(path, place / path.name)
        print(f"{facts['verdict']['sentence']} More in {report}")
    return TrainResult(history, questions, once, unseen, weights)


class TrainingQuestions(Dataset):
    """The training questions; their choices in an order of their own in every epoch, the answer following.

    The order depends on seed, epoch and row alone: neither a resumed run nor more loaders change it.
    """

    def __init__(self, questions: Sequence[Question], seed: int, shuffle_choices: bool):
        self.questions, self.seed, self.shuffle_choices, self.epoch = questions, seed, shuffle_choices, 0

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, row: int) -> Question:
        question = self.questions[row]
        if not self.shuffle_choices:
            return question
        filled = [i for i, choice in enumerate(question.choices) if choice]
        order = np.random.default_rng([self.seed, self.epoch, row]).permutation(filled)
        return question.reordered(dict(zip(filled, order.tolist(), strict=True)))


class Opening(TrainerCallback):
    """Measures before the first step, and tells the training questions which epoch it is before their loader starts."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        # Not before ``train``: a model that was evaluated first counts as prepared, and several processes would then
        # train it without ever adding up their gradients.
        if state.global_step == 0:
            self.trainer.evaluate(metric_key_prefix="before")

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        train_dataloader.dataset.epoch = int(state.epoch)


class BridgeTrainer(Trainer):
    """``Trainer`` that validates with averaged weights, and whose checkpoints hold the trained tensors alone."""

    def __init__(self, model, args, average: float = 0.0, **kwargs):
        super().__init__(model, args, **kwargs)
        self.averages = Averages(model, average)
        self.remove_callback(PrinterCallback)
        self.add_callback(self.averages)
        self.add_callback(Opening(self))

    def evaluate(self, *args, **kwargs):
        with self.averages.applied():
            return super().evaluate(*args, **kwargs)

    def answer(self, questions: Sequence[Question], collate=None) -> np.ndarray:
        """Return probabilities (questions, choices) by the averaged weights."""
        usual, self.data_collator = self.data_collator, collate or self.data_collator
        with self.averages.applied():
            logits = self.predict(questions).predictions
        self.data_collator = usual
        return torch.from_numpy(logits).softmax(-1).numpy()

    def go(self, resumed: Path | None, stopper: Stopper) -> None:
        """Train, from a saved state if there is one.

        Raises:
            InputError: if the state can't be saved; that of before is still there.
        """
        if resumed:
            self.averages.load(resumed)
        if self.args.should_save:  # in one process of several
            print(f"going on from {resumed}" if resumed else "starting from step 0")
            shutil.rmtree(self.args.output_dir, ignore_errors=True)  # what a killed save has left
        if resumed and state_is_done(resumed):  # at its end, or stopped early: only what it came to is wanted
            self._load_from_checkpoint(resumed)
            self.state = TrainerState.load_from_json(str(resumed / TRAINER_STATE_NAME))
            return
        try:
            with stopper.listening():
                self.train(resume_from_checkpoint=str(resumed) if resumed else None)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"training stopped at step {self.state.global_step}, a file could not be written ({error}): free some "
                "space and run the same again; it goes on from the last whole state"
            ) from error

    def save_model(self, output_dir=None, _internal_call=False):
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file(trained_tensors(self.model), Path(output_dir) / TRAINED_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        load_trained(self.model, load_file(Path(resume_from_checkpoint) / TRAINED_FILE))


class BlankPictures:
    """Gives every question the mean grey picture, encoded once."""

    def __init__(self, embeds: torch.Tensor):
        self.embeds = embeds

    def __call__(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        return {"image_embeds": self.embeds.expand(len(questions), -1, -1)}


def _cached_pictures(features, sliced, processor, keys: dict[Path, str], batch_size: int, process: PartialState):
    """Fill the cache of image features and return its reader, or None where there is to be no cache."""
    if features is None:
        return None
    cache = FeatureCache(default_folder() if features == "default" else features, encoder_key(sliced, processor))
    pictures = {key: path for path, key in reversed(keys.items())}
    share = (process.process_index, process.num_processes)
    fits = fill(cache, sliced, processor, pictures, batch_size, share=share)
    if not all(gather_object([fits])):
        process.print(f"the features of {len(pictures)} pictures don't fit in {cache.root}: encoding in every epoch")
        return None
    return CachedPictures(cache, keys)


def _identity(manifest: dict, questions: Sequence[Question], keys: dict[Path, str], processes: int) -> dict[str, Any]:
    """What must be the same for a run to go on: its weights' manifest, its questions, its processes."""
    rows = json.dumps([[q.id, keys[q.image], q.question, q.choices, q.answer] for q in questions])
    kept = {key: value for key, value in manifest.items() if key not in ("versions", "config", "budget", "train")}
    settings = {key: value for key, value in manifest["train"].items() if key not in NOT_THE_RESULT}
    run = kept | {"settings": settings, "questions": hashlib.sha256(rows.encode()).hexdigest(), "processes": processes}
    return json.loads(json.dumps(run))


def _tensorboard(checkpoint_dir: Path) -> TensorBoardCallback:
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    return TensorBoardCallback(SummaryWriter(str(checkpoint_dir / "tensorboard")))


def _contract(processor: QuestionProcessor) -> dict:
    """What whoever uses the weights must agree on, and the versions that made them."""
    return {
        "letters": list(LETTERS),
        "letter_ids": processor.letter_ids,
        "prompt": PROMPT_TEMPLATE,
        "processor": processor.fingerprint,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
    }


def training_arguments(checkpoint_dir: str | Path, settings: TrainSettings, dtype=torch.float32) -> TrainingArguments:
    """The ``Trainer``'s arguments that follow from the settings.

    No gradient checkpointing: gradients flow through the kept decoder layers alone, for a single token, so
    that there are hardly any activations to recompute.
    """
    gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(Path(checkpoint_dir) / STATE_FOLDER / STAGING_FOLDER),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=2 * settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,  # below 1 it is a share of all steps
        max_grad_norm=settings.clip,
        fp16=gpu and dtype == torch.float16,  # scales the loss; autocast, which comes with it, stops at the model
        use_cpu=not gpu,
        eval_strategy="epoch",
        save_strategy="no",  # StateKeeper says when
        logging_steps=1,
        disable_tqdm=True,  # Progress has the bars
        dataloader_num_workers=settings.workers,
        dataloader_pin_memory=gpu,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        seed=settings.seed,
        full_determinism=settings.deterministic,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several GPUs are for several processes, never for the threads of DataParallel
    return arguments


def optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over the trainable tensors, adapters and head each with their own rate."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if "lora_" in name], "lr": settings.learning_rate},
        {"params": [p for name, p in named if "lora_" not in name], "lr": settings.head_learning_rate},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=settings.weight_decay)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(accuracy_score(prediction.label_ids, prediction.predictions.argmax(-1)))}
