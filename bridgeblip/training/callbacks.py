"""What happens around ``Trainer``'s steps: averaging, self-check, saving, stopping, and showing how
it goes."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback

from bridgeblip.evidence.figures import training_figure
from bridgeblip.files import copy_verified
from bridgeblip.training.state import copy_state, publish_state
from bridgeblip.training.weights import (
    best_epoch,
    save_best,
    save_weights,
    trained_tensors,
    weights_path,
)

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
        self.live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.mean = {name: p.detach().clone() for name, p in self.live.items()}

    def on_train_begin(self, args, state, control, **kwargs):
        self.decay = 1 - 1 / max(1.0, self.share * state.max_steps)

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        decay = min(
            self.decay, (state.global_step - 1) / state.global_step
        )  # a plain mean at first
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

    def save(self, folder: Path) -> None:
        save_file(
            {name: tensor.cpu() for name, tensor in self.mean.items()}, folder / AVERAGES_FILE
        )

    def load(self, folder: Path) -> None:
        self.take(load_file(folder / AVERAGES_FILE))

    def take(self, tensors: dict[str, torch.Tensor]) -> None:
        """Have other tensors stand for the average, such as those of an earlier epoch."""
        for name, tensor in tensors.items():
            self.mean[name].copy_(tensor)


class SelfCheck(TrainerCallback):
    """Proves in the first steps that all that should learn does, and that nothing else moves.

    B starts at zero, so A has no gradient before B has moved: B and the head must have had one
    after two steps with a learning rate, A after two more. Steps that fp16's loss scaling will skip
    do not count.
    """

    def __init__(self, model: nn.Module):
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.stages = [
            {name: p for name, p in trainable.items() if "lora_A" not in name},
            {name: p for name, p in trainable.items() if "lora_A" in name},
        ]
        self.frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        self.sums = self._frozen_sums()
        self.steps = 0

    def _frozen_sums(self) -> dict[str, torch.Tensor]:
        """A checksum of each frozen tensor's bits."""
        whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        return {
            name: p.detach().view(whole[p.element_size()]).sum() for name, p in self.frozen.items()
        }

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if not self.stages or not max(group["lr"] for group in optimizer.param_groups):
            return
        gradients = [
            p.grad
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        if not all(gradient.isfinite().all() for gradient in gradients):
            return
        waiting = self.stages[0]
        for name in [name for name, p in waiting.items() if p.grad is not None and p.grad.any()]:
            del waiting[name]
        self.steps += 1
        if self.steps < 2 and waiting:
            return
        if waiting:
            raise TrainingError(
                f"{len(waiting)} tensors that should learn had no gradient in {self.steps} steps, "
                f"the first is "
                f"{next(iter(waiting))!r}: the loss does not depend on them"
            )
        self.stages.pop(0)
        self.steps = 0
        if not self.stages:
            self._check_frozen()

    def _check_frozen(self):
        moved = [
            name
            for name, total in self._frozen_sums().items()
            if not torch.equal(total, self.sums[name])
        ]
        if moved:
            raise TrainingError(
                f"{len(moved)} frozen tensors have changed, the first is {moved[0]!r}"
            )
        self.frozen, self.sums = {}, {}


def _accuracies(state) -> list[float]:
    """The validation accuracy of each epoch so far, by ``Trainer``'s log."""
    return [entry["eval_accuracy"] for entry in state.log_history if "eval_accuracy" in entry]


class WeightsKeeper(TrainerCallback):
    """Writes ``weights-N.pt`` after the validation of epoch N, and ``best.json``; the main process
    alone."""

    def __init__(
        self, folders: list[Path], manifest: dict[str, Any], probe: dict[str, torch.Tensor]
    ):
        self.folders, self.manifest, self.probe = folders, manifest, probe

    def on_evaluate(self, args, state, control, metrics, model, **kwargs):
        if "eval_accuracy" not in metrics or not state.is_world_process_zero:
            return
        accuracies = _accuracies(state)
        path = weights_path(self.folders[0], len(accuracies) - 1)
        measured = {
            name.removeprefix("eval_"): value
            for name, value in metrics.items()
            if name.startswith("eval_")
        }
        manifest = self.manifest | {"validation": measured}
        with torch.no_grad():
            device = next(model.parameters()).device
            inputs = {
                name: tensor.to(device) for name, tensor in self.probe.items() if name != "labels"
            }
            logits = model(**inputs).logits.cpu()
        manifest["probe"] = {"inputs": self.probe, "logits": logits}
        save_weights(path, trained_tensors(model), manifest)
        for folder in self.folders[1:]:
            copy_verified(path, folder / path.name)
        for folder in self.folders:
            save_best(folder, accuracies)


class Stopper:
    """Hears the stop button, Ctrl-C and SIGTERM, so that training can end after the step at hand,
    its state saved."""

    def __init__(self):
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals for the time of a block; the second one acts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals reach the main thread only
            return
        kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def restore():
            for number, handler in kept.items():
                signal.signal(number, handler)

        def ask(number, frame):
            self.asked = True
            restore()
            print("stopping after this step; once more to stop at once", file=sys.stderr)

        for number in kept:
            signal.signal(number, ask)
        try:
            yield
        finally:
            restore()


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
        stopper: Stopper,
        minutes: float,
    ):
        self.folders, self.run, self.averages, self.stopper = folders, run, averages, stopper
        self.seconds, self.saved_at = 60 * minutes, time.monotonic()
        self.asked = self.leaving = False

    def on_step_end(self, args, state, control, **kwargs):
        due = time.monotonic() - self.saved_at >= self.seconds
        wishes = torch.tensor([due, self.stopper.asked], dtype=torch.int, device=args.device)
        if args.world_size > 1:  # all processes save or stop, or none
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
        if (
            self.asked and not control.should_training_stop
        ):  # by its own end, or by what the validation came to
            self.leaving = control.should_training_stop = True
        if args.world_size > 1:
            torch.distributed.barrier()  # every process has written its generators
        if state.is_world_process_zero:
            staged = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.averages.save(staged)
            done = control.should_training_stop and not self.leaving
            published = publish_state(staged, self.folders[0], state.global_step, self.run, done)
            for folder in self.folders[1:]:
                copy_state(published, folder)
        self.saved_at = time.monotonic()


class Patience(TrainerCallback):
    """Stops training when the best validation is so many epochs ago.

    It asks the log alone: transformers' ``EarlyStoppingCallback`` counts by itself, anew after an
    interruption.
    """

    def __init__(self, epochs: int):
        self.epochs = epochs

    def on_evaluate(self, args, state, control, **kwargs):
        accuracies = _accuracies(state)
        if accuracies and len(accuracies) - 1 - best_epoch(accuracies) >= self.epochs:
            control.should_training_stop = True


def history_table(log: list[dict]) -> pd.DataFrame:
    """``Trainer``'s log as a table; row 0 is the slice before any training."""
    rows = []
    for entry in log:
        accuracy = entry.get("eval_accuracy", entry.get("before_accuracy"))
        if "loss" in entry or accuracy is not None:
            epoch = entry["epoch"] if entry["step"] else 0.0
            rows.append(
                {
                    "step": entry["step"],
                    "epoch": epoch,
                    "loss": entry.get("loss"),
                    "accuracy": accuracy,
                }
            )
    return pd.DataFrame(rows).astype({"loss": float, "accuracy": float})


class Progress(TrainerCallback):
    """One bar over all steps with loss and learning rate, one over each validation; in a notebook,
    a live figure."""

    SECONDS = 20  # between two drawings

    def __init__(self, live: bool):
        self.live, self.drawn_at = live, 0.0
        self.bar = self.validating = self.handle = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step",
                            mininterval=1)  # fmt: skip

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar:
            self.bar.update()

    def on_log(self, args, state, control, logs, **kwargs):
        if self.bar and "loss" in logs:
            self.bar.set_postfix(
                loss=f"{logs['loss']:.3f}", rate=f"{logs['learning_rate']:.1e}", refresh=False
            )
            if self.live and time.monotonic() - self.drawn_at > self.SECONDS:
                self._draw(state)

    def _draw(self, state):
        from IPython.display import display

        figure = training_figure(history_table(state.log_history))
        self.handle = self.handle or display(display_id=True)
        self.handle.update(figure)
        self.drawn_at = time.monotonic()

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if state.is_world_process_zero:
            if self.validating is None:
                self.validating = tqdm(
                    total=len(eval_dataloader), desc="validating", unit="batch", leave=False
                )
            self.validating.update()

    def on_evaluate(self, args, state, control, **kwargs):
        if self.validating is not None:
            self.validating.close()
            self.validating = None

    on_predict = on_evaluate

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar:
            if self.live:
                self._draw(state)
            self.bar.close()


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and hasattr(shell, "kernel")
