"""What a training step asks of a GPU and of its host, counted without a GPU.

Operations are counted on ``meta`` at true size: what is no view is a kernel on a GPU. Waits are
counted in a whole ``train()`` on the tiny base: a number read from a tensor, which on a GPU waits
for it.
"""

import contextlib
import copy
import inspect
import traceback
from collections import Counter
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import InstructBlipConfig

from bridgeblip.bridge import ahead
from bridgeblip.bridge.base import slice_config, stored_dtype
from bridgeblip.bridge.lora import attach_bridge
from bridgeblip.bridge.model import empty_model
from bridgeblip.bridge.settings import BridgeSettings
from bridgeblip.bridge.train import train
from bridgeblip.embedded.digits import write_competition
from bridgeblip.training.callbacks import Averages
from bridgeblip.training.settings import TrainSettings
from tools.make_full_size_base import FULL_SIZE_CONFIG
from tools.verify_gpu import LAUNCHES, WAITS

BATCH, TOKENS, PROMPT = 16, 110, 78
VIEWS = (
    *("view", "expand", "permute", "transpose", "slice", "select", "unsqueeze", "squeeze"),
    *("detach", "t.default", "as_strided", "alias", "unbind", "split", "_unsafe_view"),
    *("empty", "sym_", "size", "stride"),
)
# What happens on the host in any case.
HOST = {"collate", "_get_value", "_multi_tensor_adamw", "_single_tensor_adamw", "_adamw"}


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


class Reads(TorchDispatchMode):
    """Counts the numbers that are read from tensors, but for what is on the host in any case."""

    def __init__(self):
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.equal")):
            callers = {
                frame.f_code.co_name for frame, _ in traceback.walk_stack(inspect.currentframe())
            }
            self.found += not callers & HOST
        return function(*args, **kwargs or {})


def test_a_step_has_few_kernels():
    counts = count_operations()
    assert 1000 < sum(counts.values()) <= LAUNCHES, counts


def test_a_step_hardly_waits(tmp_path, monkeypatch):
    counts, reads = [], Reads()

    def on_step_begin(self, args, state, control, **kwargs):
        counts.append(reads.found)

    monkeypatch.setattr(Averages, "on_step_begin", on_step_begin)
    write_competition(tmp_path, tmp_path / "answers.csv", {"train": 64, "test": 1})
    settings = TrainSettings(batch_size=16, validation_fraction=0.1, save_minutes=1e6)
    out, features = tmp_path / "out", tmp_path / "features"
    with reads:
        train(tmp_path / "train.csv", "tiny", out, settings, features=features)
    # Eight steps, in which all that is done for a block of them is done once; the self-check is
    # over.
    assert reads.found and counts[-2] - counts[-10] <= 8 * WAITS
