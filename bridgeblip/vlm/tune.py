"""Tuning any vision-language model with Hugging Face's ``Trainer``: by the letters' logits where
there are choices, by the text where captions or answers are wanted."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from peft import load_peft_weights, set_peft_model_state_dict
from torch import nn

from bridgeblip import InputError
from bridgeblip.data.questions import Question
from bridgeblip.evidence.metrics import picture_groups
from bridgeblip.evidence.report import write_report
from bridgeblip.evidence.texts import score_texts, write_text_report
from bridgeblip.files import replace_folder, require_writable, write_text
from bridgeblip.machine import process_rank
from bridgeblip.messages import say
from bridgeblip.training.callbacks import (
    BestKeeper,
    Patience,
    Progress,
    SelfCheck,
    StateKeeper,
    history_table,
    in_notebook,
    validations,
)
from bridgeblip.training.hold import holding
from bridgeblip.training.settings import TrainSettings
from bridgeblip.training.state import STATE_FOLDER, newest_state
from bridgeblip.training.stopping import in_one_line
from bridgeblip.training.trainer import (
    AveragingTrainer,
    TrainingQuestions,
    keep_before,
    measure_letters,
    optimizer,
    read_before,
    training_arguments,
)
from bridgeblip.vlm.answer import Tuned, answer_texts
from bridgeblip.vlm.batches import BEAMS, LONGEST_TEXT
from bridgeblip.vlm.families import load_model
from bridgeblip.vlm.learner import Collator, Teacher, load_learner
from bridgeblip.vlm.plan import Plan, plan_tuning
from bridgeblip.vlm.settings import (
    ADAPTER_FOLDER,
    MODEL_FOLDER,
    RUN_FILE,
    TuneSettings,
    read_run,
)

REPORT_FILE = "report.html"


@dataclass(frozen=True)
class TuneResult:
    """What tuning leaves behind, by the weights of the best epoch."""

    history: pd.DataFrame
    """One row a logged step; see ``training.callbacks.history_table``."""
    validation: list[Question]
    probabilities: np.ndarray | None
    """(validation questions, choices), or None where texts are wanted."""
    texts: list[str]
    """What the model writes, a text a validation question; empty where there are choices."""


def tune(
    base: str | Path,
    data: str | Path,
    out: str | Path,
    settings: TuneSettings = TuneSettings(),
    train_settings: TrainSettings = TrainSettings(),
    revision: str | None = None,
    images: str | Path | None = None,
    split: str | None = None,
    continue_from: str | Path | None = None,
) -> TuneResult:
    """Tune ``base`` on the questions in ``data`` and keep the best epoch in ``out``: ``adapter/``
    or ``model/``, ``run.json`` and a report.

    Called again after any interruption, with the same settings, it goes on in the middle of the
    epoch and ends with the same tensors; called again after the end, it only reports.

    Args:
        images, split: see ``data.texts.read_task``.
        continue_from: an earlier run on the same base, whose best weights are the start.

    Raises:
        InputError: if data, pictures, base or the earlier run can't be used, or ``out`` is held by
            a live run or has the state of another one that has not ended; before anything long.
        TrainingStopped: after the stop button, Ctrl-C or SIGTERM.
    """
    process_rank()  # refuses what another program has left in the environment
    process, out = PartialState(cpu=not torch.cuda.is_available()), Path(out)
    if process.is_main_process:
        require_writable(out)
    with in_one_line(out), holding([out] if process.is_main_process else []):
        plan = plan_tuning(
            base, data, out, settings, train_settings, revision, images, split, continue_from
        )
        resumed = newest_state([out], plan.identity)
        teacher = Teacher(load_learner(plan), plan)
        trainer, keeper = _trainer(plan, teacher)
        trainer.go(resumed, keeper)
        return _conclude(trainer, plan)


def write_texts(model: nn.Module, plan: Plan, questions: Sequence[Question]) -> list[str]:
    """Return what a model writes for each question; several processes share the work."""
    how = {"batch_size": 2 * plan.train.batch_size, "most": LONGEST_TEXT}
    beams = BEAMS[plan.settings.task]
    return answer_texts(Tuned(model, plan.batches), questions, beams=beams, **how)[0]


def _trainer(plan: Plan, teacher: Teacher) -> tuple[AveragingTrainer, StateKeeper]:
    settings, train = plan.settings, plan.train
    bf16 = plan.dtype == torch.bfloat16 and settings.method == "full"
    trainer = AveragingTrainer(
        teacher,
        training_arguments(plan.out, train, plan.dtype, bf16),
        train_dataset=TrainingQuestions(plan.training, train.seed, train.shuffle_choices),
        eval_dataset=plan.validation,
        data_collator=Collator(plan),
        optimizers=(optimizer(teacher, train), None),
        average=train.average,
    )
    # The mean over a batch's rows is divided by the accumulated steps, not by their tokens.
    trainer.model_accepts_loss_kwargs = False
    groups = picture_groups(plan.validation)
    trainer.compute_metrics = partial(measure_letters, trainer, [plan.out], groups)
    if not plan.letters:
        trainer.compute_metrics = partial(_score_texts, trainer, plan)
    keeper = StateKeeper([plan.out], plan.identity, trainer.averages, train.save_minutes)
    trainer.add_callback(SelfCheck(teacher))
    trainer.add_callback(Progress(live=in_notebook() and plan.letters > 0))
    trainer.add_callback(BestKeeper(partial(_write_run, trainer, plan), plan.metric))
    trainer.add_callback(keeper)
    if train.patience:
        trainer.add_callback(Patience(train.patience, plan.metric))
    return trainer, keeper


def _score_texts(trainer: AveragingTrainer, plan: Plan, prediction: Any) -> dict[str, float]:
    """Measure what the model writes for the validation questions; the very first is kept."""
    texts = write_texts(trainer.model.model, plan, plan.validation)
    keep_before(trainer, [plan.out], texts)
    return score_texts(plan.settings.task, plan.validation, texts)


def _write_run(trainer: AveragingTrainer, plan: Plan) -> None:
    """Store the model as it is, and say what it is."""
    model, full = trainer.model.model, plan.settings.method == "full"

    def fill(folder: Path) -> None:
        if full:
            model.save_pretrained(folder)
            plan.batches.processor.save_pretrained(folder)
        else:
            model.save_pretrained(folder, save_embedding_layers=False)

    replace_folder(plan.out / (MODEL_FOLDER if full else ADAPTER_FOLDER), fill)
    latest = trainer.state.log_history[-1].items()
    measured = {n.removeprefix("eval_"): v for n, v in latest if n.startswith("eval_")}
    _write_facts(plan.out, plan.facts | {"validation": measured})


def _write_facts(out: Path, facts: dict) -> None:
    write_text(out / RUN_FILE, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def _take_best(trainer: AveragingTrainer, plan: Plan) -> None:
    """Give the model the weights of the best epoch.

    Raises:
        InputError: if they are gone, or another run's.
    """
    remedy = f"put it back, or delete {plan.out / STATE_FOLDER} to tune anew"
    try:
        found = read_run(plan.out)["run"] == plan.facts["run"]
    except InputError as error:
        raise InputError(f"{error}; {remedy}") from error
    if not found:
        raise InputError(f"{plan.out / RUN_FILE} is not this run's: {remedy}")
    model = trainer.model.model
    if plan.settings.method == "full":
        best = load_model(plan.out / MODEL_FOLDER, device=plan.device)
        model.load_state_dict(best.state_dict())
    else:
        set_peft_model_state_dict(model, load_peft_weights(str(plan.out / ADAPTER_FOLDER)))
    trainer.averages.take(trainer.averages.live)


def _conclude(trainer: AveragingTrainer, plan: Plan) -> TuneResult:
    """Measure the best epoch's weights and write the report."""
    log = trainer.state.log_history
    plan.process.wait_for_everyone()
    _take_best(trainer, plan)
    history, questions = history_table(log, plan.metric), plan.validation
    report, probabilities, texts = plan.out / REPORT_FILE, None, []
    named = (
        "base",
        "revision",
        "layers",
        "task",
        "method",
        "settings",
        "train",
        "dtype",
        "pictures",
    )
    about = {"manifest": {key: plan.facts[key] for key in named}}
    about["data"] = f"{len(questions):,} validation questions"
    about["before"] = read_before([plan.out], len(questions))
    if plan.letters:
        probabilities = trainer.answer(questions)
        margin = trainer.permutation_margin(questions, probabilities)
        about["blank_probabilities"] = trainer.answer(questions, Collator(plan, blank=True))
        before = history["accuracy"].dropna().iloc[0]
        write = partial(write_report, report, questions, probabilities)
        about["references"] = {"before tuning": before}
        if plan.process.is_main_process:
            _write_facts(plan.out, read_run(plan.out) | {"permute_below": margin})
    else:
        trainer.model.eval()
        texts = write_texts(trainer.model.model, plan, questions)
        write = partial(write_text_report, report, plan.settings.task, questions, texts)
    if plan.process.is_main_process:
        facts = write(**about)
        best = max(validations(log, plan.metric)[0])
        print(say("best_epoch", metric=plan.metric, score=best))
        print(say("verdict", sentence=facts["verdict"]["sentence"], report=report))
    return TuneResult(history, questions, probabilities, texts)
