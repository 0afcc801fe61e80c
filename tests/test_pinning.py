"""What a CUDA machine's loader does to every batch, emulated: it copies each tensor to pinned
memory, and refuses one whose elements share their place."""

import pytest
import torch
from conftest import LAYERS
from torch.utils.data import dataloader

from bridgeblip.bridge.settings import BridgeSettings
from bridgeblip.bridge.train import train
from bridgeblip.training.settings import TrainSettings

SETTINGS = TrainSettings(batch_size=16, validation_fraction=0.25, learning_rate=1e-3)


def pin_like_aten(tensor: torch.Tensor) -> torch.Tensor:
    """ATen's ``_pin_memory``, with ordinary memory for the pinned one."""
    if tensor.device.type != "cpu":
        raise RuntimeError(f"cannot pin {tensor.type()}: only dense CPU tensors can be pinned")
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    storage = torch.UntypedStorage((reach + 1) * tensor.element_size())
    pinned = torch.empty(0, dtype=tensor.dtype)
    pinned.set_(storage, 0, tensor.shape, tensor.stride())
    return pinned.copy_(tensor)


@pytest.fixture
def pinned(monkeypatch) -> list[torch.Size]:
    """Every loader pins; the shapes of what was pinned."""
    shapes = []
    begin = dataloader._BaseDataLoaderIter.__init__

    def begin_pinning(self, loader):
        begin(self, loader)
        self._pin_memory = True

    def pin(tensor, device=None):
        shapes.append(tensor.shape)
        return pin_like_aten(tensor)

    monkeypatch.setattr(dataloader._BaseDataLoaderIter, "__init__", begin_pinning)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    return shapes


def test_the_emulation_refuses_what_cuda_refuses():
    torch.testing.assert_close(pin_like_aten(torch.ones(3, 4).t()), torch.ones(4, 3))
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        pin_like_aten(torch.ones(1, 4).expand(3, -1))


@pytest.mark.parametrize("features", ["kept", None])
def test_every_batch_can_be_pinned(features, base, competition, tmp_path, pinned):
    """Training, validation, blank pictures and other orders, with cached features and without; and
    the same when ``train`` is called again and only measures."""
    cache = features and tmp_path / "features"
    counts = []
    for _ in range(2):
        pinned.clear()
        bridge = BridgeSettings(rank=192, layers=LAYERS)
        result = train(competition / "train.csv", base, tmp_path, SETTINGS, bridge, features=cache)
        counts.append(len(pinned))
        dimensions = {len(shape) for shape in pinned}
        assert 3 in dimensions  # image features, of blank pictures at least
        assert (4 in dimensions) == (features is None)  # pictures
        assert result.blank_probabilities.shape == result.probabilities.shape
    assert counts[0] > counts[1] > 0
    assert (tmp_path / "report.html").is_file() and (tmp_path / "best.json").is_file()
