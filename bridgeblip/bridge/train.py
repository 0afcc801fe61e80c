"""Training the bridge and the head with Hugging Face's ``Trainer``, so that it survives the
night."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import nn

from bridgeblip import InputError
from bridgeblip.bridge.ahead import AheadTrainer
from bridgeblip.bridge.features import (
    CachedPictures,
    FeatureCache,
    encoder_key,
    fill,
)
from bridgeblip.bridge.plan import Plan, build_bridge, load_slice, plan_training
from bridgeblip.bridge.settings import BridgeSettings
from bridgeblip.data.questions import Question
from bridgeblip.evidence.report import write_report
from bridgeblip.files import cache_folder, copy_missing, require_writable
from bridgeblip.messages import say
from bridgeblip.training.callbacks import history_table, validations
from bridgeblip.training.hold import holding
from bridgeblip.training.settings import TrainSettings
from bridgeblip.training.state import STATE_FOLDER, in_one_line, mirror, newest_state
from bridgeblip.training.trainer import (
    TrainingQuestions,
    optimizer,
    read_before,
    training_arguments,
)
from bridgeblip.training.weights import (
    BEST_FILE,
    best_epoch,
    load_weights,
    save_best,
    save_weights,
    trained_tensors,
    weights_path,
)

PROBE_SIZE = 3  # questions whose logits travel with the weights
REPORT_FILE = "report.html"


@dataclass(frozen=True)
class TrainResult:
    """What training leaves behind."""

    # One row a logged step: ``step``, ``epoch``, ``loss``; where validated ``accuracy`` on so many
    # ``pictures``, its interval ``low`` to ``high``. An epoch has its weights file's number; -1 is
    # the bare slice.
    history: pd.DataFrame
    validation: list[Question]
    # (validation questions, choices), by the weights of the best epoch.
    probabilities: np.ndarray
    # The same without the pictures: what the questions alone give away.
    blank_probabilities: np.ndarray
    # The files written, one an epoch.
    weights: list[Path]


def train(
    train_csv: str | Path,
    base: str | Path,
    checkpoint_dir: str | Path,
    settings: TrainSettings = TrainSettings(),
    bridge: BridgeSettings = BridgeSettings(),
    features: str | Path | None = "default",
    copy_to: str | Path | None = None,
) -> TrainResult:
    """Slice ``base``, bridge it, train adapters and head, and write ``weights-N.pt`` after each
    epoch: ``plan_training``, ``load_slice``, ``build_bridge`` and ``train_model`` in one.

    Called again after any interruption, with the same settings, it goes on in the middle of the
    epoch and ends with the same tensors; called again after the end, it trains nothing and returns
    the same result. The result and the report are of the epoch that validates best, whose weights
    an export takes.

    Raises:
        InputError: if the questions, pictures or the base can't be used, or the folder is held by a
            live run or has the state of another one that has not ended; before anything long.
        TrainingStopped: after the stop button, Ctrl-C or SIGTERM.
    """
    with in_one_line(Path(checkpoint_dir)):
        plan = plan_training(train_csv, base, checkpoint_dir, settings, bridge, copy_to)
        with holding(plan.places, plan.process.is_main_process):
            return train_model(plan, build_bridge(plan, load_slice(plan)), features)


def train_model(
    plan: Plan, model: nn.Module, features: str | Path | None = "default"
) -> TrainResult:
    """Train what ``build_bridge`` gives; see ``train``.

    Args:
        features: folder of the cache of image features; None encodes the pictures anew in every
            epoch.
    """
    main = plan.process.is_main_process
    with in_one_line(plan.places[0]), holding(plan.places, main):
        resumed = newest_state(plan.places, plan.identity)
        if resumed is None and getattr(model, "has_begun", False):
            raise InputError(
                "this model has been trained on, and no state of that is there: build it anew"
            )
        sliced = model.get_base_model() if isinstance(model, PeftModel) else model
        pictures = _cached_pictures(features, sliced, plan)
        grey = plan.processor.blank_pixels[None].to(plan.device)
        blank = partial(blank_pictures, sliced.encode_image(grey).detach().cpu())
        settings, collate = plan.settings, partial(plan.processor.collate, pictures=pictures)
        trainer = AheadTrainer(
            model,
            training_arguments(plan.places[0], settings, plan.dtype),
            train_dataset=TrainingQuestions(plan.training, settings.seed, settings.shuffle_choices),
            eval_dataset=plan.validation,
            data_collator=collate,
            pictures=pictures,
            optimizers=(optimizer(model, settings), None),
            average=settings.average,
        )
        probe = plan.processor.collate(plan.validation[:PROBE_SIZE])
        model.has_begun = True
        write = partial(_write_weights, trainer, plan, probe)
        trainer.go(settings, plan.places, plan.identity, resumed, write)
        return _conclude(trainer, plan, blank)


def _conclude(trainer: AheadTrainer, plan: Plan, blank: Callable) -> TrainResult:
    """Measure the best epoch's weights, those that exporting takes, and write the report."""
    history = history_table(trainer.state.log_history)
    accuracies, losses = validations(trainer.state.log_history)
    weights = _load_best(trainer, plan, accuracies, losses)
    questions = plan.validation
    once = trainer.answer(questions)
    unseen = trainer.answer(questions, partial(plan.processor.collate, pictures=blank))
    margin = trainer.permutation_margin(questions, once)
    if plan.process.is_main_process:
        named = ("base", "revision", "layers", "bridge", "train", "dtype", "pictures")
        report = plan.places[0] / REPORT_FILE
        facts = write_report(
            report,
            questions,
            once,
            blank_probabilities=unseen,
            before=read_before(plan.places, len(questions)),
            references={"sliced, not yet bridged": history["accuracy"].dropna().iloc[0]},
            manifest={key: plan.manifest[key] for key in named},
            data=f"{len(questions):,} validation questions",
        )
        save_best(plan.places[0], accuracies, losses, margin)
        mirror(plan.places, [BEST_FILE, REPORT_FILE, report.with_suffix(".json").name])
        print(say("verdict", sentence=facts["verdict"]["sentence"], report=report))
    return TrainResult(history, questions, once, unseen, weights)


def _load_best(
    trainer: AheadTrainer, plan: Plan, accuracies: Sequence[float], losses: Sequence[float]
) -> list[Path]:
    """Have the best epoch's weights answer; return the files of all epochs that are there.

    Raises:
        InputError: if the best is gone, or another run's: nothing is reported of that.
    """
    folder = plan.places[0]
    paths = [weights_path(folder, epoch) for epoch in range(len(accuracies))]
    if plan.process.is_main_process:
        copy_missing(plan.places, [path.name for path in paths])
    plan.process.wait_for_everyone()
    best = paths[best_epoch(accuracies, losses)]
    remedy = f"put it back, or delete {folder / STATE_FOLDER} to train anew"
    if not best.is_file():
        raise InputError(f"{best} is gone although training has ended: {remedy}")
    weights = load_weights(best)
    if weights.manifest.get("run") != plan.manifest["run"]:
        raise InputError(f"{best} is not this run's, so nothing is reported of it: {remedy}")
    trainer.averages.take(weights.tensors)
    for path in paths:
        if not path.is_file():
            plan.process.print(f"note: {path} is gone; it is not the best, so nothing hangs on it")
    return list(filter(Path.is_file, paths))


def _write_weights(
    trainer: AheadTrainer,
    plan: Plan,
    probe: dict[str, torch.Tensor],
    accuracies: list[float],
    losses: list[float],
    measured: dict[str, float],
) -> None:
    """Write ``weights-N.pt`` of the epoch just validated, and ``best.json``.

    Args:
        probe: a batch whose logits by these weights travel with them.
    """
    path = weights_path(plan.places[0], len(accuracies) - 1)
    with torch.no_grad():
        logits = trainer.model(**trainer._prepare_inputs(probe)).logits.cpu()
    kept = {"validation": measured, "probe": {"inputs": probe, "logits": logits}}
    save_weights(path, trained_tensors(trainer.model), plan.manifest | kept)
    save_best(plan.places[0], accuracies, losses)
    mirror(plan.places, [path.name, BEST_FILE])


def blank_pictures(embeds: torch.Tensor, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
    """Give every question the mean grey picture, encoded once."""
    # Repeated, not expanded: CUDA can't pin a tensor whose rows share their place.
    return {"image_embeds": embeds.repeat(len(questions), 1, 1)}


def _cached_pictures(
    features: str | Path | None, sliced: nn.Module, plan: Plan
) -> CachedPictures | None:
    """Fill the cache of image features and return its reader, or None where there is to be no
    cache."""
    if features is None:
        return None
    folder = cache_folder() if features == "default" else features
    cache = FeatureCache(folder, encoder_key(sliced, plan.processor))
    remedy = "set $BRIDGEBLIP_CACHE to another one, or keep no cache (--no-cache)"
    require_writable(cache.folder, remedy)
    pictures = {key: path for path, key in reversed(plan.picture_keys.items())}
    share = (plan.process.process_index, plan.process.num_processes)
    fits = fill(cache, sliced, plan.processor, pictures, share=share)
    if not all(gather_object([fits])):
        plan.process.print(
            f"the features of {len(pictures)} pictures don't fit in {cache.root}: encoding in "
            f"every epoch"
        )
        return None
    return CachedPictures(cache, plan.picture_keys, plan.device)
