"""What happens around ``Trainer``'s steps: averaging, self-check, saving, stopping, and showing how
it goes."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import ProgressCallback, TrainerCallback

from bridgeblip.evidence.figures import training_figure
from bridgeblip.machine import peak_memory
from bridgeblip.messages import say
from bridgeblip.training.state import Stopper, copy_state, copying_to, publish_state
from bridgeblip.training.weights import best_epoch, trainable

AVERAGES_FILE = "averages.safetensors"


class TrainingError(RuntimeError):
    """Training does not do what it should; the message says what."""


class Averages(TrainerCallback):
    """Exponential moving average of the trained tensors (Polyak and Juditsky 1992), used to
    validate and to save.

    Args:
        share: how far back the average looks, as a share of all steps; 0 averages nothing.
    """

    def __init__(self, model: nn.Module, share: float):
        self.share, self.decay = share, 0.0
        self.live = trainable(model)
        self.mean = {name: p.detach().clone() for name, p in self.live.items()}

    def on_train_begin(self, args, state, control, **kwargs):
        back = self.share * state.max_steps
        self.decay = 1 - 1 / max(1.0, back)
        if 0 < back < 1 and state.is_world_process_zero:
            print(f"{state.max_steps} steps are too few to average over: the last weights count")

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        plain = (state.global_step - 1) / state.global_step  # a plain mean at first
        decay = min(self.decay, plain)
        torch._foreach_lerp_(list(self.mean.values()), list(self.live.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averaged tensors into the model for the time of a block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self):
        for name, parameter in self.live.items():
            parameter.data, self.mean[name] = self.mean[name], parameter.data

    def take(self, tensors: dict[str, torch.Tensor]) -> None:
        """Have other tensors stand for the average, such as those of an earlier epoch."""
        for name, tensor in tensors.items():
            self.mean[name].copy_(tensor)


class SelfCheck(TrainerCallback):
    """Proves in the first steps that all that should learn does, and that nothing else moves.

    Whatever is trained has had a gradient after ``STEPS`` steps with a learning rate: LoRA's A not
    at once, for it has none before B has moved from zero. Steps that fp16's loss scaling will skip
    do not count. The frozen tensors may be of any format, packed 4-bit weights included.
    """

    STEPS = 4

    def __init__(self, model: nn.Module):
        self.waiting, self.sums, self.steps = trainable(model), {}, 0
        for name, parameter in model.named_parameters():
            if name not in self.waiting:
                self.sums[name] = parameter, _checksum(parameter)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        groups = optimizer.param_groups
        if (not self.sums and not self.waiting) or not max(group["lr"] for group in groups):
            return
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if not all(gradient.isfinite().all() for gradient in gradients):
            return
        for name, parameter in list(self.waiting.items()):
            if parameter.grad is not None and parameter.grad.any():
                del self.waiting[name]
        self.steps += 1
        if self.waiting and self.steps == self.STEPS:
            raise TrainingError(
                f"{len(self.waiting)} tensors that should learn had no gradient in {self.STEPS} "
                f"steps, the first is {next(iter(self.waiting))!r}: the loss does not depend on "
                f"them"
            )
        if self.waiting:
            return
        moved = [n for n, (p, was) in self.sums.items() if not torch.equal(_checksum(p), was)]
        if moved:
            raise TrainingError(
                f"{len(moved)} frozen tensors have changed, the first is {moved[0]!r}"
            )
        self.sums = {}


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    """A sum over a tensor's bits."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(whole[tensor.element_size()]).sum()


def validations(log: list[dict], metric: str = "accuracy") -> tuple[list[float], list[float]]:
    """A validation metric and the loss of each epoch so far, by ``Trainer``'s log."""
    entries = [entry for entry in log if f"eval_{metric}" in entry]
    values = [entry[f"eval_{metric}"] for entry in entries]
    return values, [entry.get("eval_loss", math.nan) for entry in entries]


class AfterValidation(TrainerCallback):
    """Has what was validated written down, and stops training when the best is so many epochs ago.

    It asks the log alone: transformers' ``EarlyStoppingCallback`` counts by itself, anew after an
    interruption.

    Args:
        write: called in the main process alone, with metric and loss of each epoch so far and what
            was measured just now; the model has the averaged tensors then.
        metric: what is validated.
        patience: epochs without a better validation; 0 never stops.
    """

    def __init__(self, write: Callable[[list, list, dict], None], metric: str, patience: int = 0):
        self.write, self.metric, self.patience = write, metric, patience

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if f"eval_{self.metric}" not in metrics:
            return  # the model before any training
        values, losses = validations(state.log_history, self.metric)
        if state.is_world_process_zero:
            measured = {n.removeprefix("eval_"): v for n, v in metrics.items() if n != "epoch"}
            self.write(values, losses, measured)
        if self.patience and len(values) - 1 - best_epoch(values, losses) >= self.patience:
            control.should_training_stop = True


class StateKeeper(TrainerCallback):
    """Turns ``Trainer``'s checkpoints into generations of the resumable state, by the clock and at
    each epoch's end.

    At the end of an epoch the state is saved after the validation, never before: a run that goes on
    from it would skip the validation, and with it the weights file.

    Args:
        folders: the checkpoint folder, and perhaps a second one for copies.
        run: what the state belongs to: only an equal run goes on from it.

    Attributes:
        leaving: whether training ends because it was asked to, before its own end.
    """

    def __init__(
        self,
        folders: list[Path],
        run: dict[str, Any],
        averages: Averages,
        minutes: float,
    ):
        self.folders, self.run, self.averages, self.stopper = folders, run, averages, Stopper()
        self.seconds, self.saved_at = 60 * minutes, time.monotonic()
        self.asked = self.leaving = False

    def on_step_end(self, args, state, control, **kwargs):
        due = time.monotonic() - self.saved_at >= self.seconds
        self.asked = self.stopper.asked
        if args.world_size > 1:  # all processes save or stop, or none
            wishes = torch.tensor([due, self.asked], dtype=torch.int, device=args.device)
            torch.distributed.all_reduce(wishes, torch.distributed.ReduceOp.MAX)
            due, self.asked = map(bool, wishes)
        if state.epoch % 1 == 0:
            return  # an epoch ends here: on_epoch_end and on_save have the say
        if self.asked:
            self.leaving = control.should_training_stop = True
        control.should_save = due or self.leaving

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.leaving:  # in mid-epoch: what is done so far is no epoch to validate
            control.should_evaluate = control.should_save = False
        else:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if self.asked and not control.should_training_stop:  # which its own end does, too
            self.leaving = control.should_training_stop = True
        if args.world_size > 1:
            torch.distributed.barrier()  # every process has written its generators
        if state.is_world_process_zero:
            staged = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            averages = {name: tensor.cpu() for name, tensor in self.averages.mean.items()}
            save_file(averages, staged / AVERAGES_FILE)
            done = control.should_training_stop and not self.leaving
            published = publish_state(staged, self.folders[0], state.global_step, self.run, done)
            for folder in self.folders[1:]:
                with copying_to(folder):
                    copy_state(published, folder)
        self.saved_at = time.monotonic()


def history_table(log: list[dict], metric: str = "accuracy") -> pd.DataFrame:
    """``Trainer``'s log as a table: ``step``, ``epoch``, ``loss``; where validated the metric, its
    interval ``low`` to ``high``, and ``pictures``.

    Epochs are numbered as their weights files are, from 0; -1 is the model before any training.
    """
    rows, measures = [], (metric, "low", "high", "pictures")
    for entry in log:
        row = {"step": entry["step"], "epoch": -1, "loss": entry.get("loss")}
        if entry["step"]:
            row["epoch"] = math.ceil(entry["epoch"]) - 1
        for name in measures:
            row[name] = entry.get(f"eval_{name}", entry.get(f"before_{name}"))
        if row["loss"] is not None or row[metric] is not None:
            rows.append(row)
    return pd.DataFrame(rows).astype(dict.fromkeys(("loss", *measures), float))


class Progress(ProgressCallback):
    """One bar over all steps with loss and learning rate, one over each validation; in a notebook,
    a live figure."""

    SECONDS = 20  # between two drawings

    def __init__(self, live: bool):
        super().__init__()
        self.live, self.drawn_at, self.handle = live, 0.0, None

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(say("training"))
            self.training_bar.update(state.global_step)  # where it goes on from
            self.current_step = state.global_step
        self.began, self.first = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            shown = {"loss": f"{logs['loss']:.3f}", "rate": f"{logs['learning_rate']:.1e}"}
            self.training_bar.set_postfix(shown, refresh=False)
            if self.live and time.monotonic() - self.drawn_at > self.SECONDS:
                self._draw(state)

    def _draw(self, state):
        from IPython.display import display

        figure = training_figure(history_table(state.log_history))
        self.handle = self.handle or display(display_id=True)
        self.handle.update(figure)
        self.drawn_at = time.monotonic()

    def on_prediction_step(self, args, state, control, **kwargs):
        super().on_prediction_step(args, state, control, **kwargs)
        if self.prediction_bar is not None:
            self.prediction_bar.set_description(say("validating"), refresh=False)

    def on_evaluate(self, args, state, control, **kwargs):
        if self.prediction_bar is not None:
            self.prediction_bar.leave = False
        super().on_evaluate(args, state, control, **kwargs)

    on_predict = on_evaluate

    def on_train_end(self, args, state, control, **kwargs):
        if self.handle is not None:  # the whole one is drawn below, once
            self.handle.update({}, raw=True)
        super().on_train_end(args, state, control, **kwargs)
        if state.is_world_process_zero and state.global_step > self.first:
            seconds = time.monotonic() - self.began
            batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            rate = (state.global_step - self.first) * batch / seconds
            print(say("took", minutes=seconds / 60, rate=rate, memory=peak_memory()))


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and hasattr(shell, "kernel")
