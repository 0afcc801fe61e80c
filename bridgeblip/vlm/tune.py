"""Tuning any vision-language model with Hugging Face's ``Trainer``: by the letters' logits where
there are choices, by the text where captions or answers are wanted."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from peft import load_peft_weights, set_peft_model_state_dict
from torch import nn

from bridgeblip import InputError
from bridgeblip.data.questions import Question
from bridgeblip.evidence.report import write_report
from bridgeblip.evidence.texts import score_texts, write_text_report
from bridgeblip.files import replacing, write_text
from bridgeblip.machine import process_rank
from bridgeblip.messages import say
from bridgeblip.training.callbacks import history_table, validations
from bridgeblip.training.hold import holding
from bridgeblip.training.settings import TrainSettings
from bridgeblip.training.state import STATE_FOLDER, in_one_line, newest_state
from bridgeblip.training.trainer import (
    AveragingTrainer,
    TrainingQuestions,
    keep_before,
    optimizer,
    read_before,
    training_arguments,
)
from bridgeblip.training.weights import best_epoch
from bridgeblip.vlm.answer import Tuned, answer_texts
from bridgeblip.vlm.batches import BEAMS, LONGEST_TEXT
from bridgeblip.vlm.families import load_model
from bridgeblip.vlm.plan import Collator, Plan, Teacher, load_learner, plan_tuning
from bridgeblip.vlm.settings import FOLDERS, RUN_FILE, TuneSettings, read_run

REPORT_FILE = "report.html"


@dataclass(frozen=True)
class TuneResult:
    """What tuning leaves behind, by the weights of the best epoch."""

    # One row a logged step; see ``training.callbacks.history_table``.
    history: pd.DataFrame
    validation: list[Question]
    # (validation questions, choices), or None where texts are wanted.
    probabilities: np.ndarray | None
    # What the model writes, a text a validation question; empty where there are choices.
    texts: list[str]


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
    rank, _ = process_rank()  # refuses what another program has left in the environment
    out = Path(out)
    with in_one_line(out), holding([out], rank == 0):
        plan = plan_tuning(
            base, data, out, settings, train_settings, revision, images, split, continue_from
        )
        resumed = newest_state([out], plan.identity)
        teacher = Teacher(load_learner(plan), plan)
        trainer = _trainer(plan, teacher)
        write = partial(_write_run, trainer, plan)
        trainer.go(plan.train, [plan.out], plan.identity, resumed, write, plan.metric)
        return _conclude(trainer, plan)


def write_texts(model: nn.Module, plan: Plan, questions: Sequence[Question]) -> list[str]:
    """Return what a model writes for each question; several processes share the work."""
    how = 2 * plan.train.batch_size, BEAMS[plan.settings.task], LONGEST_TEXT
    return answer_texts(Tuned(model, plan.batches), questions, *how)[0]


def _trainer(plan: Plan, teacher: Teacher) -> AveragingTrainer:
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
    if not plan.letters:
        trainer.compute_metrics = partial(_score_texts, trainer, plan)
    return trainer


def _score_texts(trainer: AveragingTrainer, plan: Plan, prediction: Any) -> dict[str, float]:
    """Measure what the model writes for the validation questions; the very first is kept."""
    texts = write_texts(trainer.model.model, plan, plan.validation)
    keep_before(trainer, [plan.out], texts)
    return score_texts(plan.settings.task, plan.validation, texts)


def _write_run(
    trainer: AveragingTrainer,
    plan: Plan,
    values: list[float],
    losses: list[float],
    measured: dict[str, float],
) -> None:
    """Store the model as it is, if it is the best so far, and say what it is."""
    if best_epoch(values, losses) < len(values) - 1:
        return
    method = plan.settings.method
    how = {} if method == "full" else {"save_embedding_layers": False}
    with replacing(plan.out / FOLDERS[method]) as folder:
        trainer.model.model.save_pretrained(folder, **how)
        if method == "full":
            plan.batches.processor.save_pretrained(folder)
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
    model, best = trainer.model.model, plan.out / FOLDERS[plan.settings.method]
    if plan.settings.method == "full":
        model.load_state_dict(load_model(best, device=plan.device).state_dict())
    else:
        set_peft_model_state_dict(model, load_peft_weights(str(best)))
    trainer.averages.take(trainer.averages.live)


def _conclude(trainer: AveragingTrainer, plan: Plan) -> TuneResult:
    """Measure the best epoch's weights and write the report."""
    plan.process.wait_for_everyone()
    _take_best(trainer, plan)
    log, questions = trainer.state.log_history, plan.validation
    history, probabilities, texts = history_table(log, plan.metric), None, []
    named = "base revision layers task method settings train dtype pictures".split()
    about = {
        "manifest": {key: plan.facts[key] for key in named},
        "data": f"{len(questions):,} validation questions",
        "before": read_before([plan.out], len(questions)),
    }
    report = plan.out / REPORT_FILE
    if plan.letters:
        probabilities = trainer.answer(questions)
        margin = trainer.permutation_margin(questions, probabilities)
        unseen = [replace(question, image=None) for question in questions]
        about["blank_probabilities"] = trainer.answer(unseen)
        about["references"] = {"before tuning": history["accuracy"].dropna().iloc[0]}
        write = partial(write_report, report, questions, probabilities)
        if plan.process.is_main_process:
            _write_facts(plan.out, read_run(plan.out) | {"permute_below": margin})
    else:
        trainer.model.eval()
        texts = write_texts(trainer.model.model, plan, questions)
        write = partial(write_text_report, report, plan.settings.task, questions, texts)
    if plan.process.is_main_process:
        verdict = write(**about)["verdict"]
        best = max(validations(log, plan.metric)[0])
        print(say("best_epoch", metric=plan.metric, score=best))
        print(say("verdict", sentence=verdict["sentence"], report=report))
    return TuneResult(history, questions, probabilities, texts)
