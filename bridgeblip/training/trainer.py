"""Hugging Face's ``Trainer``, so that training survives the night."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback, get_available_reporting_integrations
from transformers.trainer import TRAINER_STATE_NAME

from bridgeblip import InputError
from bridgeblip.data.questions import Question, ask_in_orders
from bridgeblip.evidence.answers import choose_permutation_margin
from bridgeblip.evidence.metrics import clustered_mean, picture_groups
from bridgeblip.files import read_json, write_text
from bridgeblip.machine import NonFiniteError
from bridgeblip.messages import say
from bridgeblip.training.callbacks import (
    AVERAGES_FILE,
    AfterValidation,
    Averages,
    Progress,
    SelfCheck,
    StateKeeper,
    in_notebook,
)
from bridgeblip.training.settings import TrainSettings
from bridgeblip.training.state import STATE_FOLDER, TrainingStopped, read_state
from bridgeblip.training.weights import load_trained, trainable, trained_tensors

TRAINED_FILE = "trained.safetensors"
BEFORE_FILE = "before.json"  # what is answered before any training
STAGING_FOLDER = ".staging"
SHARED_MEMORY = Path("/dev/shm")  # through which loaders hand over their batches


class TrainingQuestions(Dataset):
    """The training questions; their choices in an order of their own in every epoch, the answer
    following.

    The order depends on seed, epoch and row alone: neither a resumed run nor more loaders change
    it.
    """

    def __init__(self, questions: Sequence[Question], seed: int, shuffle_choices: bool):
        self.questions, self.seed, self.shuffle_choices, self.epoch = (
            questions,
            seed,
            shuffle_choices,
            0,
        )

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
    """Measures before the first step, and tells the training questions which epoch it is before
    their loader starts."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        # Not before ``train``: a model that was evaluated first counts as prepared, and several
        # processes would then train it without ever adding up their gradients.
        if state.global_step == 0:
            self.trainer.evaluate(metric_key_prefix="before")

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        train_dataloader.dataset.epoch = int(state.epoch)


class AveragingTrainer(Trainer):
    """``Trainer`` that validates with averaged weights, and whose checkpoints hold the trained
    tensors alone."""

    def __init__(self, model, args, average: float = 0.0, **kwargs):
        super().__init__(model, args, **kwargs)
        self.averages = Averages(model, average)
        self.trained = list(trainable(model).values())
        # Walking all of the frozen parameters in every step would cost the host its time.
        model.zero_grad = self._zero_grad
        self.inputs = {}
        self.remove_callback(PrinterCallback)
        self.add_callback(self.averages)
        self.add_callback(Opening(self))

    def training_step(self, model, inputs, *args):
        self.inputs = inputs
        products = torch.backends.cuda.matmul  # of fp32 matrices, here the adapters': in TF32
        before = getattr(products, "fp32_precision", None)  # torch before 2.9 stays in fp32
        if before is not None:
            products.fp32_precision = "tf32"
        try:
            return super().training_step(model, inputs, *args)
        finally:
            if before is not None:
                products.fp32_precision = before

    def _zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.trained:
            parameter.grad = None

    def _clip_grad_norm(self, model):
        return self.accelerator.clip_grad_norm_(self.trained, self.args.max_grad_norm)

    def floating_point_ops(self, inputs):
        return 0  # nobody asks, and counting walks all parameters in every step

    def log(self, logs, *args, **kwargs):
        """Log, and refuse numbers that are not finite: they are here, so asking waits for nothing,
        and nothing of this step is saved yet."""
        # Steps whose gradient is infinite are skipped by fp16's loss scaling.
        watched = ("loss",) if self.args.fp16 else ("loss", "grad_norm")
        if not all(math.isfinite(logs.get(name, 0.0)) for name in watched):
            self.model.eval()
            with torch.no_grad():
                self.model(**self._prepare_inputs(self.inputs))  # may name the module at fault
            raise NonFiniteError(
                f"the loss or its gradient is not finite in step {self.state.global_step}: lower "
                f"the learning rate, or in float16 use bfloat16 or float32"
            )
        super().log(logs, *args, **kwargs)

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

    def permutation_margin(self, questions: Sequence[Question], once: np.ndarray) -> float | None:
        """Return the margin below which it pays to ask the questions in every order of their
        choices, see ``choose_permutation_margin``, and say so.

        Args:
            once: what ``answer`` makes of them.
        """
        views = ask_in_orders(
            questions, once, range(len(once)), lambda rows, shown: self.answer(shown)
        )
        often = np.array([np.mean(seen, axis=0) for seen in views])
        margin = choose_permutation_margin(once, often, [q.answer for q in questions])
        if self.args.should_save:
            print(say("orders_pay", margin=margin) if margin else say("orders_idle"))
        return margin

    def go(
        self,
        settings: TrainSettings,
        places: list[Path],
        run: dict[str, Any],
        resumed: Path | None,
        write: Callable[[list, list, dict], None],
        metric: str = "accuracy",
    ) -> None:
        """Train, from a saved state if there is one; its states go to ``places`` and belong to
        ``run``. Letters are measured unless something else is.

        Args:
            write, metric: see ``AfterValidation``.

        Raises:
            TrainingStopped: if it ends because it was asked to; all is saved.
        """
        require_shared_memory(settings, self.data_collator([self.train_dataset[0]]))
        if self.compute_metrics is None:
            groups = picture_groups(self.eval_dataset)
            self.compute_metrics = partial(measure_letters, self, places, groups)
        keeper = StateKeeper(places, run, self.averages, settings.save_minutes)
        live = in_notebook() and metric == "accuracy"
        validated = AfterValidation(write, metric, settings.patience)
        for callback in (SelfCheck(self.model), Progress(live), keeper, validated):
            self.add_callback(callback)
        if resumed:
            self.averages.take(load_file(resumed / AVERAGES_FILE))
        if self.args.should_save:  # in one process of several
            print(say("resume", state=resumed) if resumed else say("begin"))
            shutil.rmtree(self.args.output_dir, ignore_errors=True)  # what a killed save has left
        # At its end, or stopped early: only what it came to is wanted.
        if resumed and read_state(resumed)["done"]:
            self._load_from_checkpoint(resumed)
            self.state = TrainerState.load_from_json(str(resumed / TRAINER_STATE_NAME))
            return
        if self.args.should_save:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            writer = SummaryWriter(str(places[0] / "tensorboard"))
            self.add_callback(TensorBoardCallback(writer))
        try:
            with keeper.stopper.listening():
                self.train(resume_from_checkpoint=str(resumed) if resumed else None)
        finally:
            if self.args.should_save:
                shutil.rmtree(self.args.output_dir, ignore_errors=True)  # what a failed save left
        if keeper.leaving:
            raise TrainingStopped(
                f"stopped on request after step {self.state.global_step} of "
                f"{self.state.max_steps}; all is saved in {places[0] / STATE_FOLDER}: run "
                f"the same again to go on"
            )

    def save_model(self, output_dir=None, _internal_call=False):
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file(trained_tensors(self.model), Path(output_dir) / TRAINED_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        load_trained(self.model, load_file(Path(resume_from_checkpoint) / TRAINED_FILE))


def require_service(name: str) -> None:
    """Refuse a service that ``Trainer`` would only miss once the model is loaded.

    Raises:
        InputError: if it is unknown, or its package is not installed.
    """
    known = get_available_reporting_integrations()
    if name not in ("", "none", *known):
        raise InputError(
            f"report_to is {name!r}, which is not installed here, or nothing that Trainer knows: "
            f"installed are {', '.join(known)}; pip install {name}, or leave it out"
        )


def require_shared_memory(settings: TrainSettings, row: dict[str, Any]) -> None:
    """Refuse loaders whose batches don't fit where they are handed over: they would wait for
    ever."""
    size = sum(getattr(tensor, "nbytes", 0) for tensor in row.values())
    # Each is two batches ahead, which to validate are twice as large.
    need = 4 * settings.workers * settings.batch_size * size
    if need and SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free < need:
        raise InputError(
            f"{settings.workers} workers need {need / 1e6:.1f} MB of shared memory, "
            f"{SHARED_MEMORY} has less: set workers to 0, or give the container more (--shm-size)"
        )


def training_arguments(
    checkpoint_dir: str | Path,
    settings: TrainSettings,
    dtype=torch.float32,
    bf16: bool = False,
) -> TrainingArguments:
    """The ``Trainer``'s arguments that follow from the settings.

    Args:
        dtype: of the model; float16 has its loss scaled.
        bf16: whether products of a float32 model are computed in bfloat16.
    """
    gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(Path(checkpoint_dir) / STATE_FOLDER / STAGING_FOLDER),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=2 * settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_ratio,  # below 1 it is a share of all steps
        max_grad_norm=settings.max_grad_norm,
        fp16=gpu
        and dtype
        == torch.float16,  # scales the loss; autocast, which comes with it, stops at the model
        bf16=bf16,
        use_cpu=not gpu,
        eval_strategy="epoch",
        save_strategy="no",  # StateKeeper says when
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would wait for the GPU in every step, and hide them
        disable_tqdm=True,  # Progress has the bars
        dataloader_num_workers=settings.workers,
        dataloader_pin_memory=gpu,
        accelerator_config={"non_blocking": gpu},  # what is pinned needs no waiting for
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=settings.report_to or [],
        seed=settings.seed,
        full_determinism=settings.deterministic,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = (
            1  # several GPUs are for several processes, never for the threads of DataParallel
        )
    return arguments


def optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over the trainable tensors."""
    trained = list(trainable(model).values())
    return torch.optim.AdamW(trained, settings.learning_rate, weight_decay=settings.weight_decay)


def keep_before(trainer: Trainer, places: Sequence[Path], answers: list) -> None:
    """Keep what is answered before the first step, for the report; a row a validation question."""
    if trainer.state.global_step == 0 and trainer.args.should_save:
        for place in places:
            write_text(place / BEFORE_FILE, json.dumps(answers, ensure_ascii=False))


def read_before(places: Sequence[Path], rows: int) -> list | None:
    """Return what ``keep_before`` has kept; None if it is gone."""
    for place in places:
        path = place / BEFORE_FILE
        if path.is_file() and len(kept := read_json(path, list)) == rows:
            return kept
    return None


def measure_letters(
    trainer: Trainer, places: Sequence[Path], groups: Sequence[int], prediction: EvalPrediction
) -> dict[str, float]:
    """Measure the accuracy; the very first answers are kept in ``places``."""
    probabilities = torch.from_numpy(prediction.predictions).softmax(-1)
    keep_before(trainer, places, probabilities.tolist())
    return accuracy(prediction, groups)


def accuracy(prediction: EvalPrediction, groups: Sequence[int] | None = None) -> dict[str, float]:
    """Return a validation's "accuracy" and, from ten groups on, "low" and "high", its 95%
    interval.

    Args:
        groups: (N,), equal where rows show the same of the "pictures", which are counted; by
            default each has its own.
    """
    right = prediction.label_ids == prediction.predictions.argmax(-1)
    if groups is None or len(groups) != len(right):  # rows that are asked in other orders, too
        groups = range(len(right))
    found = clustered_mean(right, groups)
    measures = {"accuracy": right.mean(), "pictures": len(set(groups))}
    if found.low is not None:
        measures |= {"low": found.low, "high": found.high}
    return {name: float(value) for name, value in measures.items()}
