import json

import pytest
import torch

from bridgeblip import InputError
from bridgeblip.checkpoints import (
    choose_weights,
    load_weights,
    save_best,
    save_weights,
    weights_path,
    write_atomically,
)

TENSORS = {"head.weight": torch.arange(8.0).view(4, 2), "lora_A": torch.ones(3)}


def test_round_trip(tmp_path):
    path = weights_path(tmp_path / "new", 0)
    save_weights(path, TENSORS, {"base": "tiny", "layers": [0, 3]})
    loaded = load_weights(path)
    assert path.name == "weights-0.pt" and loaded.manifest == {"base": "tiny", "layers": [0, 3]}
    assert all(torch.equal(loaded.tensors[name], TENSORS[name]) for name in TENSORS)
    assert torch.load(path, weights_only=True)["format"] == 1
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file stays


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(partial):
        raise OSError("it was not stored")

    with pytest.raises(OSError, match="not stored"):
        write_atomically(path, lambda partial: partial.write_text("new"), verify=fail)
    with pytest.raises(OSError, match="not stored"):
        write_atomically(path, fail, verify=lambda partial: None)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("damage", ["missing", "empty", "torn", "text", "foreign", "newer"])
def test_unusable_weights_are_one_clear_error(tmp_path, damage):
    path = tmp_path / "weights-0.pt"
    save_weights(path, TENSORS, {})
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "foreign":
        torch.save({"model": 3}, path)
    elif damage == "newer":
        torch.save({"format": 99, "tensors": {}, "manifest": {}}, path)
    else:
        path.write_bytes({"empty": b"", "torn": content[: len(content) // 2], "text": b"hello"}[damage])
    with pytest.raises(InputError, match=r"weights-0\.pt"):
        load_weights(path)


def test_a_bare_state_dict_is_accepted(tmp_path):
    torch.save(TENSORS, tmp_path / "weights-0.pt")
    loaded = load_weights(tmp_path / "weights-0.pt")
    assert loaded.manifest is None and loaded.tensors.keys() == TENSORS.keys()


def test_choice_of_weights(tmp_path):
    with pytest.raises(InputError, match=r"run train\.ipynb first"):
        choose_weights(tmp_path)
    for epoch in range(3):
        save_weights(weights_path(tmp_path, epoch), TENSORS, {})
        if epoch == 0:
            assert choose_weights(tmp_path) == (weights_path(tmp_path, 0), "the only weights file")
    with pytest.raises(InputError, match="3 weights files"):
        choose_weights(tmp_path)
    save_best(tmp_path, [0.5, 0.75, 0.75])
    assert json.loads((tmp_path / "best.json").read_text())["best"] == "weights-1.pt"
    path, why = choose_weights(tmp_path)
    assert path.name == "weights-1.pt" and "best of 3 epochs" in why and "0.750" in why
