"""Training the bridge and the head with Hugging Face's ``Trainer``, so that it survives the
night."""

import hashlib
import json
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
from torch import nn
from transformers import (
    InstructBlipConfig,
    enable_full_determinism,
    set_seed,
)
from transformers.integrations import TensorBoardCallback

from bridgeblip import InputError
from bridgeblip.bridge.base import resolve_base
from bridgeblip.bridge.budget import BUDGET_LIMIT, certify_budget
from bridgeblip.bridge.config import (
    DEFAULT_DECODER_LAYERS,
    BridgeSettings,
    decoder_layers,
    slice_config,
)
from bridgeblip.bridge.features import (
    CachedPictures,
    FeatureCache,
    default_folder,
    encoder_key,
    fill,
)
from bridgeblip.bridge.lora import attach_bridge
from bridgeblip.bridge.model import load_sliced
from bridgeblip.bridge.processing import PROMPT_TEMPLATE, QuestionProcessor
from bridgeblip.data.orders import ask_in_orders
from bridgeblip.data.pictures import picture_keys
from bridgeblip.data.questions import Question, read_questions, split_by_picture
from bridgeblip.evidence.answers import choose_permutation_margin
from bridgeblip.evidence.report import write_report
from bridgeblip.files import copy_missing, copy_verified, require_writable
from bridgeblip.machine import choose_precision
from bridgeblip.training.callbacks import (
    Patience,
    Progress,
    SelfCheck,
    StateKeeper,
    Stopper,
    WeightsKeeper,
    history_table,
    in_notebook,
)
from bridgeblip.training.settings import NOT_THE_RESULT, TrainSettings
from bridgeblip.training.state import STATE_FOLDER, newest_state, state_is_done
from bridgeblip.training.trainer import (
    BridgeTrainer,
    TrainingQuestions,
    TrainingStopped,
    accuracy,
    optimizer,
    training_arguments,
)
from bridgeblip.training.weights import best_epoch, load_weights, save_best, weights_path

PROBE_SIZE = 3  # questions whose logits travel with the weights
REPORT_FILE = "report.html"


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
    """Slice ``base``, bridge it, train adapters and head, and write ``weights-N.pt`` after each
    epoch.

    Called again after any interruption, with the same settings, it goes on in the middle of the
    epoch and ends with the same tensors; called again after the end, it trains nothing and returns
    the same result. The result and the report are of the epoch that validates best, whose weights
    an export takes.

    Args:
        base: "tiny", a folder, or a hub id, of which ``revision`` is taken.
        layers: which decoder layers stay: a name of ``config.LAYER_SELECTIONS``, or indices.
        budget_limit: most parameters that the merged model may have.
        features: folder of the cache of image features; None encodes the pictures anew in every
            epoch.
        copy_to: a second checkpoint folder, such as one on Drive, that gets a verified copy of
            every file.

    Raises:
        InputError: if the questions, pictures or the base can't be used, or the folder has the
            state of another run that has not ended; before anything long starts.
        TrainingStopped: after the stop button, Ctrl-C or SIGTERM.
    """
    checkpoint_dir = Path(checkpoint_dir)
    places = [checkpoint_dir, Path(copy_to)] if copy_to else [checkpoint_dir]
    process = PartialState(cpu=not torch.cuda.is_available())
    for place in places if process.is_main_process else ():
        require_writable(place)
    plan = _plan(
        train_csv, base, revision, decoder_layers(layers), settings, bridge, budget_limit, process
    )
    resumed = newest_state(places, plan.identity)
    model, pictures, blank = _load(plan, features, process)
    trainer, keeper = _trainer(plan, model, pictures, places)
    if process.is_main_process and not (resumed and state_is_done(resumed)):
        trainer.add_callback(_tensorboard(checkpoint_dir))
    trainer.go(resumed, keeper.stopper)
    if keeper.leaving:
        raise TrainingStopped(
            f"stopped on request after step {trainer.state.global_step} of "
            f"{trainer.state.max_steps}; all is saved in "
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
    processor.encode_prompts(
        [processor.prompt(q) for q in questions]
    )  # refuses too long prompts now rather than in mid-epoch
    (enable_full_determinism if settings.deterministic else set_seed)(settings.seed)
    config = slice_config(InstructBlipConfig.from_pretrained(folder), layers)
    budget = certify_budget(config, budget_limit)
    device = (
        process.device if process.device.type == "cuda" else torch.device("cpu")
    )  # it may say cpu:0
    precision = choose_precision(device, budget["total"])
    process.print(
        f"{budget['total']:,} parameters of at most {budget_limit:,}; computing in {precision}"
    )
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
    """Return the sliced model with its bridge, the reader of cached image features or None, and
    blank pictures."""
    settings, bridge = plan.settings, plan.bridge
    letter_ids, init = plan.processor.letter_ids, bridge.head_init
    sliced = load_sliced(
        plan.base, letter_ids, plan.layers, init, plan.dtype, plan.device, plan.revision
    )
    sliced.label_smoothing = settings.label_smoothing
    pictures = _cached_pictures(
        features, sliced, plan.processor, plan.picture_keys, settings.batch_size, process
    )
    blank = BlankPictures(
        sliced.encode_image(plan.processor.blank_pixels[None].to(plan.device)).detach().cpu()
    )
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
    trainer.add_callback(
        WeightsKeeper(places, plan.manifest, collate(plan.validation[:PROBE_SIZE]))
    )
    trainer.add_callback(keeper)
    if settings.patience:
        trainer.add_callback(Patience(settings.patience))
    return trainer, keeper


def _conclude(
    trainer: "BridgeTrainer",
    plan: _Plan,
    blank: "BlankPictures",
    places: list[Path],
    process: PartialState,
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
            f"{lost[0]} is gone although training has ended: put it back, or delete "
            f"{places[0] / STATE_FOLDER} to "
            "train anew"
        )
    trainer.averages.take(load_weights(weights[best_epoch(accuracies)]).tensors)
    questions = plan.validation
    once = trainer.answer(questions)
    unseen = trainer.answer(questions, partial(plan.processor.collate, pictures=blank))
    views = ask_in_orders(
        questions, once, range(len(once)), lambda rows, shown: trainer.answer(shown)
    )
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
            manifest={
                key: plan.manifest[key]
                for key in ("base", "revision", "layers", "bridge", "train", "dtype")
            },
        )
        for place in places:
            save_best(place, accuracies, margin)
        for place in places[1:]:
            for path in (report, report.with_suffix(".json")):
                copy_verified(path, place / path.name)
        print(f"{facts['verdict']['sentence']} More in {report}")
    return TrainResult(history, questions, once, unseen, weights)


class BlankPictures:
    """Gives every question the mean grey picture, encoded once."""

    def __init__(self, embeds: torch.Tensor):
        self.embeds = embeds

    def __call__(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        # Repeated, not expanded: CUDA can't pin a tensor whose rows share their place.
        return {"image_embeds": self.embeds.repeat(len(questions), 1, 1)}


def _cached_pictures(
    features, sliced, processor, keys: dict[Path, str], batch_size: int, process: PartialState
):
    """Fill the cache of image features and return its reader, or None where there is to be no
    cache."""
    if features is None:
        return None
    cache = FeatureCache(
        default_folder() if features == "default" else features, encoder_key(sliced, processor)
    )
    pictures = {key: path for path, key in reversed(keys.items())}
    share = (process.process_index, process.num_processes)
    fits = fill(cache, sliced, processor, pictures, batch_size, share=share)
    if not all(gather_object([fits])):
        process.print(
            f"the features of {len(pictures)} pictures don't fit in {cache.root}: encoding in "
            f"every epoch"
        )
        return None
    return CachedPictures(cache, keys)


def _identity(
    manifest: dict, questions: Sequence[Question], keys: dict[Path, str], processes: int
) -> dict[str, Any]:
    """What must be the same for a run to go on: its weights' manifest, its questions, its
    processes."""
    rows = json.dumps([[q.id, keys[q.image], q.question, q.choices, q.answer] for q in questions])
    kept = {
        key: value
        for key, value in manifest.items()
        if key not in ("versions", "config", "budget", "train")
    }
    settings = {key: value for key, value in manifest["train"].items() if key not in NOT_THE_RESULT}
    run = kept | {
        "settings": settings,
        "questions": hashlib.sha256(rows.encode()).hexdigest(),
        "processes": processes,
    }
    return json.loads(json.dumps(run))


def _tensorboard(checkpoint_dir: Path) -> TensorBoardCallback:
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    return TensorBoardCallback(SummaryWriter(str(checkpoint_dir / "tensorboard")))


def _contract(processor: QuestionProcessor) -> dict:
    """What whoever uses the weights must agree on, and the versions that made them."""
    return {
        "letters": list(processor.letters),
        "letter_ids": processor.letter_ids,
        "prompt": PROMPT_TEMPLATE,
        "processor": processor.fingerprint,
        "versions": {
            name: version(name) for name in ("torch", "transformers", "peft", "accelerate")
        },
    }
