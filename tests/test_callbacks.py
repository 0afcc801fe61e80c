import json
import os
import re
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import LAYERS, Script, launch, one_gpu_each
from safetensors import SafetensorError

from bridgeblip import InputError
from bridgeblip.bridge.lora import attach_bridge
from bridgeblip.bridge.model import load_sliced
from bridgeblip.bridge.settings import BridgeSettings
from bridgeblip.bridge.train import train
from bridgeblip.training.callbacks import AfterValidation, Averages, SelfCheck, TrainingError
from bridgeblip.training.settings import TrainSettings
from bridgeblip.training.state import Stopper, in_one_line
from bridgeblip.training.trainer import TrainingQuestions
from bridgeblip.training.weights import load_weights

SETTINGS = TrainSettings(
    epochs=2, batch_size=9, validation_fraction=0.25, learning_rate=1e-3, save_minutes=0
)
BRIDGE = BridgeSettings(rank=192, layers=LAYERS)


@pytest.fixture
def model(base, processor):
    return attach_bridge(load_sliced(base, processor.letter_ids, LAYERS), BRIDGE)


def steps(model, batch, check, count, rate=0.01, before=lambda: None):
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(count):
        model(**batch).loss.backward()
        before()
        check.on_pre_optimizer_step(None, None, None, optimizer=sgd)
        sgd.step()
        sgd.zero_grad()


def test_self_check_passes_what_learns(model, batch):
    check = SelfCheck(model)
    steps(model, batch, check, 1, rate=0.0)  # a warm-up step moves nothing and proves nothing
    assert check.steps == 0 and check.waiting
    steps(model, batch, check, 2)
    assert check.waiting == check.sums == {}


def test_self_check_names_what_does_not_learn(model, batch):
    """B that stays at zero keeps the gradient from its A, too."""
    check = SelfCheck(model)
    adapter = next(p for name, p in model.named_parameters() if "lora_B" in name)
    with pytest.raises(
        TrainingError, match=r"2 tensors that should learn had no gradient in 4 steps.*lora_A"
    ):
        steps(model, batch, check, 4, before=lambda: adapter.grad.zero_())


def test_self_check_does_not_count_steps_that_loss_scaling_skips(model, batch):
    """After an overflow clipping leaves zeros, and NaN where the infinity was."""
    check = SelfCheck(model)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(**batch).loss.backward()
    for group in sgd.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    group["params"][0].grad[0] = float("nan")
    for _ in range(3):
        check.on_pre_optimizer_step(None, None, None, optimizer=sgd)
    assert check.waiting and check.steps == 0


def test_self_check_of_a_model_with_packed_frozen_weights():
    """Four-bit weights lie in bytes, two in one; any trained tensor counts, whatever its name."""
    model = torch.nn.ModuleDict({"frozen": torch.nn.Linear(4, 4), "free": torch.nn.Linear(4, 2)})
    packed = torch.nn.Parameter(torch.arange(8, dtype=torch.uint8), requires_grad=False)
    model["frozen"].weight = packed
    model["frozen"].bias.requires_grad_(False)
    sgd = torch.optim.SGD(model["free"].parameters(), lr=0.1)
    check = SelfCheck(model)
    model["free"](torch.ones(3, 4)).sum().backward()
    packed.data[3] += 1
    with pytest.raises(TrainingError, match=r"1 frozen tensors have changed.*frozen\.weight"):
        check.on_pre_optimizer_step(None, None, None, optimizer=sgd)


def test_patience_asks_the_log_alone():
    written = []

    def stops(*accuracies):
        control = SimpleNamespace(should_training_stop=False)
        log = [{"before_accuracy": 0.9}] + [{"eval_accuracy": accuracy} for accuracy in accuracies]
        state = SimpleNamespace(log_history=log, is_world_process_zero=True)
        validated = AfterValidation(lambda *facts: written.append(facts), "accuracy", patience=2)
        validated.on_evaluate(None, state, control, {**log[-1], "epoch": 1.0})
        return control.should_training_stop

    assert not stops() and not written  # the model before any training
    assert not stops(0.5) and written[0][0] == [0.5] and written[0][2] == {"accuracy": 0.5}
    assert not stops(0.5, 0.4) and not stops(0.5, 0.4, 0.6)
    assert stops(0.5, 0.4, 0.5) and stops(0.5, 0.6, 0.6, 0.6)


def test_self_check_names_a_frozen_tensor_that_moves(model, batch):
    check = SelfCheck(model)
    with torch.no_grad():
        next(
            p for name, p in model.named_parameters() if "qformer.encoder.layer.0.attention" in name
        )[0] += 1e-6
    with pytest.raises(
        TrainingError, match=r"1 frozen tensors have changed.*qformer\.encoder\.layer\.0"
    ):
        steps(model, batch, check, 4)


def test_averages_are_applied_and_taken_back(model):
    averages = Averages(model, share=0.5)
    averages.on_train_begin(None, SimpleNamespace(max_steps=8, is_world_process_zero=True), None)
    head = dict(model.named_parameters())["base_model.model.head.modules_to_save.default.bias"]
    for step, value in enumerate((1.0, 2.0, 3.0), start=1):
        head.data.fill_(value)
        averages.on_step_end(None, SimpleNamespace(global_step=step), None)
    with averages.applied():
        assert head.mean().item() == pytest.approx(2)  # a plain mean at first
    assert head.mean().item() == 3
    again = Averages(model, share=0.5)
    again.take(averages.mean)
    assert all(torch.equal(again.mean[name], tensor) for name, tensor in averages.mean.items())


def test_choices_are_in_a_fresh_order_every_epoch(questions):
    shown = TrainingQuestions(questions, seed=3, shuffle_choices=True)
    orders = []
    for shown.epoch in (0, 1, 0):
        orders.append([q.choices for q in (shown[row] for row in range(len(shown)))])
        for row, question in enumerate(questions):
            assert shown[row].choices[shown[row].answer] == question.choices[question.answer]
            assert sorted(shown[row].choices) == sorted(question.choices)
    assert orders[0] == orders[2] != orders[1] and orders[0] != [q.choices for q in questions]
    three = questions[0].__class__("x", questions[0].image, "Which?", ("a", "b", "", "d"), 3)
    moved = TrainingQuestions([three] * 40, seed=0, shuffle_choices=True)
    assert {moved[row].choices[2] for row in range(40)} == {""}
    assert {moved[row].answer for row in range(40)} == {0, 1, 3}


RUN = """
import sys
import bridgeblip.bridge.processing as processing
import bridgeblip.bridge.train as training
from bridgeblip import InputError
from bridgeblip.bridge.settings import BridgeSettings
{plan}
settings = training.TrainSettings(
    epochs=2, batch_size=9, validation_fraction=0.25, learning_rate=1e-3, save_minutes=0, workers={workers}
)
try:
    training.train(sys.argv[1], sys.argv[2], sys.argv[3], settings, BridgeSettings(rank=192, layers=(0, 2, 5)), features={features})
except InputError as error:
    sys.exit(str(error))
"""


def run(competition, base, folder, plan="", workers=0, features="None") -> Script:
    code = RUN.format(plan=plan, workers=workers, features=features)
    return Script(code, competition / "train.csv", base, folder)


def run_on(competition, base, folder, **how) -> str:
    """Run it again, as whoever is told to does; return what it printed."""
    code, output = run(competition, base, folder, **how).end()
    assert code == 0 and "going on from" in output, output
    return output


@pytest.fixture(scope="module")
def whole(base, competition, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(competition / "train.csv", base, folder, SETTINGS, BRIDGE, features=None)
    return [load_weights(folder / f"weights-{epoch}.pt").tensors for epoch in range(2)]


def assert_same_end(folder, whole):
    for epoch in range(2):
        tensors = load_weights(folder / f"weights-{epoch}.pt").tensors
        assert all(torch.equal(tensors[name], whole[epoch][name]) for name in whole[epoch])


def test_asked_to_stop_it_saves_and_goes_on_later(base, competition, tmp_path, whole):
    process = run(competition, base, tmp_path)
    process.wait_for(lambda: list(tmp_path.glob("state/step-*")))
    process.send(signal.SIGINT)
    code, output = process.end()
    assert code == 1 and "stopped on request after step" in output, output
    assert not (tmp_path / "weights-1.pt").exists()
    run_on(competition, base, tmp_path, workers=1)  # with a loader process, too
    assert_same_end(tmp_path, whole)


LAST_STEP = """
import os, signal
from bridgeblip.training import trainer
step = trainer.StateKeeper.on_step_end
def on_step_end(self, args, state, *rest, **kwargs):
    if state.epoch == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    step(self, args, state, *rest, **kwargs)
trainer.StateKeeper.on_step_end = on_step_end
"""


def test_asked_to_stop_in_the_last_step_of_an_epoch(base, competition, tmp_path, whole):
    code, output = run(competition, base, tmp_path, LAST_STEP).end()
    assert code == 1 and "stopped on request after step" in output, output
    assert (tmp_path / "weights-0.pt").exists() and not (tmp_path / "weights-1.pt").exists()
    run_on(competition, base, tmp_path)
    assert_same_end(tmp_path, whole)


FULL_DISK = """
import resource, bridgeblip.training.callbacks as callbacks
publish, count = callbacks.publish_state, []
def fill_up(*args):
    count.append(publish(*args))
    if len(count) == 3:  # from now on no file may grow: what a full disk does to every write
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    return count[-1]
callbacks.publish_state = fill_up
"""
BROKEN_PICTURE = """
load, seen = processing.QuestionProcessor.load_pixels, []
def load_until(self, path):
    seen.append(path)
    if len(seen) == 130:  # in the middle of an epoch
        open(path, "wb").close()
    return load(self, path)
processing.QuestionProcessor.load_pixels = load_until
"""
NAN = """
import torch
forward, calls = training.AheadTrainer.training_step, []
def step(self, model, *args):
    calls.append(1)
    if len(calls) == 5:
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "lora_B" in name).fill_(float("nan"))
    return forward(self, model, *args)
training.AheadTrainer.training_step = step
"""


@pytest.mark.parametrize(
    "plan, expected",
    [
        (
            FULL_DISK,
            "File too large.*free some space, and run the same again to go on from the last state",
        ),
        (BROKEN_PICTURE, "can't be read"),
        (NAN, "the logits are not finite; the first module .* run the same again to go on"),
    ],
)
def test_what_breaks_in_the_middle_loses_nothing(
    plan, expected, base, competition, tmp_path, whole
):
    data = tmp_path / "competition"
    shutil.copytree(competition, data)
    folder = tmp_path / "checkpoint"
    code, output = run(data, base, folder, plan).end()
    assert code != 0 and re.search(expected, output), output
    assert "Traceback" not in output, output
    assert list(folder.glob("state/step-*")) and not list(folder.glob("state/.*")), output
    shutil.copytree(competition, data, dirs_exist_ok=True)  # the remedy
    run_on(data, base, folder)
    assert_same_end(folder, whole)


def test_a_writer_that_gives_no_number_may_find_the_disk_full_too(tmp_path):
    with pytest.raises(InputError, match=r"os error 28.: free some space"), in_one_line(tmp_path):
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")
    for words in ("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0",
                  "basic_ios::clear: iostream error"):  # fmt: skip
        said = re.escape(f"{words}: free some space")
        with pytest.raises(InputError, match=said), in_one_line(tmp_path):
            raise RuntimeError(words)


@pytest.mark.parametrize("usual, heard", [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_a_terminals_end_is_heard_but_with_nohup(usual, heard):
    before, stopper = signal.signal(signal.SIGHUP, usual), Stopper()
    with stopper.listening():
        os.kill(os.getpid(), signal.SIGHUP)
    signal.signal(signal.SIGHUP, before)
    assert stopper.asked == heard


def test_a_folder_that_cannot_be_written_is_refused_first(base, competition, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(InputError, match="can't be written"):
        train(competition / "train.csv", base, blocked / "checkpoint", SETTINGS, BRIDGE)


CACHE_GONE = """
import pathlib, shutil
from bridgeblip.training import trainer
step = trainer.StateKeeper.on_step_end
def on_step_end(self, args, state, *rest, **kwargs):
    step(self, args, state, *rest, **kwargs)
    if state.global_step == 3:
        shutil.rmtree(pathlib.Path(features))
trainer.StateKeeper.on_step_end = on_step_end
"""
COPY_GONE = """
import shutil
from bridgeblip.training import trainer
save = trainer.StateKeeper.on_save
def on_save(self, args, state, *rest, **kwargs):
    if state.global_step == 5:
        shutil.rmtree(self.folders[1])
    save(self, args, state, *rest, **kwargs)
trainer.StateKeeper.on_save = on_save
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="features that fit lie on the GPU")
def test_a_vanished_cache_is_named_and_filled_again(base, competition, tmp_path):
    """Missed by a loader's process."""
    features = tmp_path / "features"
    plan = f"features = {str(features)!r}\n" + CACHE_GONE
    _, output = run(competition, base, tmp_path, plan, 1, repr(str(features))).end()
    assert "see that it can be reached, and run the same again" in output, output
    assert "No such file" in output and "Traceback" not in output, output
    run_on(competition, base, tmp_path, features=repr(str(features)))
    assert (tmp_path / "weights-1.pt").exists()


def test_a_vanished_copy_has_its_own_remedy(base, competition, tmp_path):
    drive = tmp_path / "drive"
    how = f"None, copy_to={str(drive)!r}"
    _, output = run(competition, base, tmp_path, COPY_GONE, features=how).end()
    assert f"the copy in {drive} can't be written" in output and "Traceback" not in output, output
    assert not drive.exists() and (tmp_path / "state" / "step-5").is_dir()
    run_on(competition, base, tmp_path, features=how)
    assert (drive / "weights-1.pt").exists()


def test_a_signal_to_the_whole_group_saves_first(base, competition, tmp_path, whole):
    """Loaders' processes stay out of the group: they would end at once, and training with them."""
    process = run(competition, base, tmp_path, workers=2)
    process.wait_for(lambda: list(tmp_path.glob("state/step-*")))
    process.send(signal.SIGTERM, group=True)
    _, output = process.end()
    assert "stopped on request after step" in output and "Traceback" not in output, output
    run_on(competition, base, tmp_path)
    assert_same_end(tmp_path, whole)


TWO = """
import json, os, signal, sys
from bridgeblip.bridge.settings import BridgeSettings
from bridgeblip.training.settings import TrainSettings
from bridgeblip.bridge.train import train
size, kill = int(sys.argv[4]), sys.argv[5]
if kill == "kill":
    import bridgeblip.training.callbacks as callbacks
    old = callbacks.Averages.on_step_end
    def on_step_end(self, args, state, control, **kwargs):
        old(self, args, state, control, **kwargs)
        if state.global_step == 4 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    callbacks.Averages.on_step_end = on_step_end
settings = TrainSettings(
    epochs=2, batch_size=size, validation_fraction=0.25, learning_rate=1e-3, save_minutes=0
)
result = train(sys.argv[1], sys.argv[2], sys.argv[3], settings, BridgeSettings(192, dropout=0.0, layers=(0, 2, 5)))
if os.environ.get("RANK", "0") == "0":
    table = result.history
    print("HISTORY", json.dumps([table["loss"].dropna().tolist(), table["accuracy"].dropna().tolist()]))
"""


@one_gpu_each
def test_two_processes_train_as_one(base, competition, tmp_path):
    csv, printed = competition / "train.csv", []
    runs = [Script(TWO, csv, base, tmp_path / "1", 18, "no")]
    runs += launch(TWO, csv, base, tmp_path / "2", 9, "no")
    for process in runs:
        code, output = process.end()
        assert code == 0, output
        printed += re.findall(r"(?m)^HISTORY (.*)$", output)
    (one, one_accuracy), (two, two_accuracy) = map(json.loads, printed)
    assert len(one) == len(two) == 6
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-4
    assert one_accuracy == two_accuracy
    one, two = (json.loads((tmp_path / f"{n}/best.json").read_text()) for n in (1, 2))
    assert (one["best"], one["validation_accuracy"]) == (two["best"], two["validation_accuracy"])
    assert one["permute_below"] == pytest.approx(two["permute_below"], abs=1e-4)
    names = sorted(path.name for path in (tmp_path / "2").glob("weights-*"))
    assert names == ["weights-0.pt", "weights-1.pt"]


@one_gpu_each
def test_a_killed_process_ends_the_other(base, competition, tmp_path):
    began = time.monotonic()
    for process in launch(TWO, competition / "train.csv", base, tmp_path, 9, "kill"):
        code, output = process.end()
        assert code != 0, output
    assert code == -signal.SIGKILL and time.monotonic() - began < 120
