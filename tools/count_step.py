"""What a training step asks of a GPU and of its host, counted without a GPU.

python tools/count_step.py

Operations are counted on ``meta`` at true size: what is no view is a kernel on a GPU. Waits are
counted in a whole ``train()`` on the tiny base: a number read from a tensor, which on a GPU waits
for it. There the products take next to no time, so a step's CPU time is what its host does; it is
measured in turns with the code of ``BEFORE``.
"""

import contextlib
import copy
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

BATCH, TOKENS, PROMPT = 16, 110, 78
MOST_OPERATIONS, MOST_HOST, ROUNDS = 2900, 0.6, 3
BEFORE = "59337e6"  # the last commit that encoded step by step, all modules in one folder
VIEWS = (
    *("view", "expand", "permute", "transpose", "slice", "select", "unsqueeze", "squeeze"),
    *("detach", "t.default", "as_strided", "alias", "unbind", "split", "_unsafe_view"),
    *("empty", "sym_", "size", "stride"),
)


class Operations(TorchDispatchMode):
    """Counts operations that are no views and have a tensor of one device in hand."""

    def __init__(self, device: str):
        super().__init__()
        self.device, self.found = device, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        name = str(function).split(".", 1)[1]
        tensors = torch.utils._pytree.tree_leaves((args, kwargs, result))
        there = any(isinstance(t, torch.Tensor) and t.device.type == self.device for t in tensors)
        if there and not name.startswith(VIEWS):
            self.found[name] += 1
        return result


def meta_model(dtype: torch.dtype):
    """The sliced and bridged model at true size, without memory."""
    from make_full_size_base import FULL_SIZE_CONFIG
    from transformers import InstructBlipConfig

    from bridgeblip.bridge.base import stored_dtype
    from bridgeblip.bridge.config import slice_config
    from bridgeblip.bridge.lora import attach_bridge
    from bridgeblip.bridge.model import empty_model
    from bridgeblip.bridge.settings import BridgeSettings

    whole = InstructBlipConfig.from_dict(copy.deepcopy(FULL_SIZE_CONFIG))
    model = empty_model(slice_config(whole, range(0, 24, 3)))
    for name, p in model.named_parameters():
        p.data = torch.empty(p.shape, dtype=stored_dtype(name, dtype), device="meta")
    model.to("meta").requires_grad_(False)
    model.language_model.set_input_embeddings(model.language_model.shared)
    model.label_smoothing = 0.05
    return attach_bridge(model, BridgeSettings()).to("meta")


def count_operations() -> dict[str, float]:
    """Kernels of a step at batch 16 and 110 tokens, in bfloat16, by what makes them."""
    from bridgeblip.bridge import ahead

    model = meta_model(torch.bfloat16).train()
    trained = [p for p in model.parameters() if p.requires_grad]

    def ones(*shape):
        return torch.ones(*shape, dtype=torch.long, device="meta")

    batch = {
        "qformer_input_ids": ones(BATCH, PROMPT), "qformer_attention_mask": ones(BATCH, PROMPT),
        "input_ids": ones(BATCH, TOKENS), "attention_mask": ones(BATCH, TOKENS),
        "choice_mask": ones(BATCH, 4).bool(), "labels": ones(BATCH),
        "image_embeds": torch.empty(BATCH, 257, 1408, dtype=torch.bfloat16, device="meta"),
    }  # fmt: skip
    steps = ahead.STEPS_AHEAD
    lengths = [(TOKENS, PROMPT)] * BATCH * steps
    optimizer = torch.optim.AdamW(trained, foreach=True)
    average = [p.detach().clone() for p in trained]

    def work(name, run):
        with Operations("meta") as operations:
            result = run()
        counts[name] = sum(operations.found.values())
        return result

    def update():
        # What CUDA does by itself and ``meta`` only when told.
        place, support = "torch.nn.utils.clip_grad", lambda *tensors: True
        with (
            mock.patch(f"{place}._has_foreach_support", support),
            mock.patch(f"{place}._device_has_foreach_support", support),
        ):
            torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, trained, 0.1)

    counts = {}
    no_context = mock.patch("bridgeblip.bridge.model.without_autocast", contextlib.nullcontext)
    with no_context, mock.patch.object(torch.Tensor, "__bool__", lambda tensor: False):
        block = work(
            "encode",
            lambda: ahead.encode_block(model, [batch] * steps, lengths, ahead.ROWS_AT_ONCE),
        )
        counts["encode"] /= steps
        output = work("decode", lambda: model(**block[0]))
        work("backward", output.loss.backward)
        update()  # the first one makes AdamW's moments
        work("update", update)
    return counts


STEPS = """
import contextlib, json, sys, tempfile, time
folder, questions, what = sys.argv[1:4]
sys.path.insert(0, folder)
import torch
from torch.utils._python_dispatch import TorchDispatchMode
try:
    from bridgeblip.bridge.train import train
    from bridgeblip.training.callbacks import Averages
    from bridgeblip.training.settings import TrainSettings
except ImportError:  # before the modules were in folders
    from bridgeblip.callbacks import Averages
    from bridgeblip.training import TrainSettings, train

# What happens on the host in any case.
HOST = {"collate", "_get_value", "_multi_tensor_adamw", "_single_tensor_adamw", "_adamw"}
reads, seconds, found = [], [], []


class Reads(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.equal")):
            frame, stack = sys._getframe(), set()
            while frame:
                stack.add(frame.f_code.co_name)
                frame = frame.f_back
            if not stack & HOST:
                found.append(str(function))
        return function(*args, **kwargs or {})


def on_step_begin(self, args, state, control, **kwargs):
    reads.append(len(found))
    seconds.append(time.process_time())


Averages.on_step_begin = on_step_begin
torch.set_num_threads(1)
settings = TrainSettings(batch_size=16, validation_fraction=0.1, save_minutes=1e6)
with tempfile.TemporaryDirectory() as out, Reads() if what == "waits" else contextlib.nullcontext():
    train(questions, "tiny", out, settings, features=out + "/features")
# Eight steps, in which all that is done for a block of them is done once; the self-check is over.
print(json.dumps([(values[-2] - values[-10]) / 8 for values in (reads, seconds)]))
"""


def run_steps(folder: Path, questions: Path, what: str) -> tuple[float, float]:
    """Train on the tiny base with the code in ``folder``; return waits and seconds of a step."""
    command = [sys.executable, "-c", STEPS, str(folder), str(questions), what]
    done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    waits, seconds = json.loads(done.stdout.splitlines()[-1])
    return waits, seconds


def made_questions(folder: Path) -> Path:
    from bridgeblip.embedded.digits import write_competition

    write_competition(folder / "questions", folder / "answers.csv", {"train": 64, "test": 1})
    return folder / "questions" / "train.csv"


def scaled_waits() -> int:
    """What loss scaling adds in float16."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([weight], 0.1), torch.amp.GradScaler("cpu")
    scaler.scale(weight.sum()).backward()
    with Operations("cpu") as operations:
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    return operations.found["_local_scalar_dense.default"]


def check_step() -> list[tuple[str, str, str, bool]]:
    """Operations, waits and host time of a training step; the latter against the code of before."""
    counts = count_operations()
    total = sum(counts.values())
    parts = ", ".join(f"{name} {count:.0f}" for name, count in counts.items())
    with tempfile.TemporaryDirectory() as work:
        questions, before = made_questions(Path(work)), Path(work) / "before"
        waits, _ = run_steps(ROOT, questions, "waits")
        halves = waits + scaled_waits()
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run(
            [*git, "add", "--detach", str(before), BEFORE], check=True, capture_output=True
        )
        try:
            times = []
            for _ in range(ROUNDS):
                then, now = (run_steps(place, questions, "time")[1] for place in (before, ROOT))
                times.append((then, now))
            ratio = min(now for _, now in times) / min(then for then, _ in times)
        finally:
            subprocess.run([*git, "remove", "--force", str(before)], check=True)
    least = " and ".join(f"{1000 * min(column):.0f}" for column in zip(*times, strict=True))
    return [
        (
            f"operations of a step ({parts})",
            f"at most {MOST_OPERATIONS}",
            f"{total:.0f}",
            total <= MOST_OPERATIONS,
        ),
        ("waits for the GPU, bfloat16", "at most 2", f"{waits:.2f}", waits <= 2),
        ("waits for the GPU, float16", "at most 3", f"{halves:.2f}", halves <= 3),
        (
            f"host time of a step over before's ({least} ms)",
            f"at most {MOST_HOST}",
            f"{ratio:.2f}",
            ratio <= MOST_HOST,
        ),
    ]


if __name__ == "__main__":
    rows = check_step()
    for row in rows:
        print(*row, sep=" | ")
    sys.exit(not all(row[-1] for row in rows))
