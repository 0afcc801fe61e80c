import json
import re

import pytest
import torch

from bridgeblip import InputError
from bridgeblip.files import atomically, copy_missing, copy_verified
from bridgeblip.training.state import copy_state, newest_state, publish_state
from bridgeblip.training.weights import (
    choose_weights,
    load_weights,
    recorded_margin,
    save_best,
    save_weights,
    weights_path,
)

TENSORS = {"head.weight": torch.arange(8.0).view(4, 2), "lora_A": torch.ones(3)}
MANIFEST = {"base": "tiny", "revision": None, "layers": [0, 3], "bridge": {}, "dtype": "float32"}


def test_round_trip(tmp_path):
    path = weights_path(tmp_path / "new", 0)
    save_weights(path, TENSORS, MANIFEST)
    loaded = load_weights(path)
    assert path.name == "weights-0.pt" and loaded.manifest == MANIFEST
    assert all(torch.equal(loaded.tensors[name], TENSORS[name]) for name in TENSORS)
    assert torch.load(path, weights_only=True)["format"] == 1
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file stays


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    for written in (True, False):
        with pytest.raises(OSError, match="not stored"), atomically(path) as partial:
            if written:
                partial.write_text("new")
            raise OSError("it was not stored")
    with pytest.raises(OSError, match=r"No space left on device: '.*file'"), atomically(path):
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("damage", ["missing", "empty", "torn", "text", "foreign", "bare", "newer"])
def test_unusable_weights_are_one_clear_error(tmp_path, damage):
    path = tmp_path / "weights-0.pt"
    save_weights(path, TENSORS, MANIFEST)
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "foreign":
        torch.save({"model": 3}, path)
    elif damage == "bare":
        save_weights(path, TENSORS, {"base": "tiny"})
    elif damage == "newer":
        torch.save({"format": 99, "tensors": {}, "manifest": MANIFEST}, path)
    else:
        path.write_bytes(
            {"empty": b"", "torn": content[: len(content) // 2], "text": b"hello"}[damage]
        )
    with pytest.raises(InputError, match=r"weights-0\.pt"):
        load_weights(path)


def test_choice_of_weights(tmp_path):
    with pytest.raises(InputError, match=r"run train\.ipynb first"):
        choose_weights(tmp_path)
    for epoch in range(3):
        save_weights(weights_path(tmp_path, epoch), TENSORS, {})
        if epoch == 0:
            assert choose_weights(tmp_path) == (weights_path(tmp_path, 0), "the only weights file")
    with pytest.raises(InputError, match="3 weights files"):
        choose_weights(tmp_path)
    save_best(tmp_path, [0.5, 0.75, 0.75], [1.0, 0.8, 0.7])
    assert json.loads((tmp_path / "best.json").read_text())["best"] == "weights-2.pt"
    path, why = choose_weights(tmp_path)
    assert path.name == "weights-2.pt" and "best of 3 epochs" in why and "0.750" in why


def test_the_best_weights_must_be_there(tmp_path):
    save_best(tmp_path, [0.5, 0.4], [1.0, 1.0], 0.25)
    save_weights(weights_path(tmp_path, 1), TENSORS, {})
    with pytest.raises(
        InputError, match=r"best\.json names weights-0\.pt, which is not there: copy it back"
    ):
        choose_weights(tmp_path)
    assert recorded_margin(tmp_path / "weights-0.pt") == 0.25
    assert recorded_margin(tmp_path / "weights-1.pt") is None  # it was measured with others
    (tmp_path / "best.json").write_text("")
    with pytest.raises(InputError, match=r"best\.json can't be read"):
        choose_weights(tmp_path)


def test_each_place_gets_what_another_has(tmp_path):
    places = [tmp_path / "local", tmp_path / "drive"]
    for epoch, place in enumerate(places):
        save_weights(weights_path(place, epoch), TENSORS, MANIFEST | {"epoch": epoch})
    copy_missing(places, ["weights-0.pt", "weights-1.pt", "weights-2.pt"])
    for place in places:
        assert sorted(path.name for path in place.iterdir()) == ["weights-0.pt", "weights-1.pt"]
        assert load_weights(place / "weights-1.pt").manifest["epoch"] == 1


def stage(folder, step: int, run: dict, done: bool = False):
    staged = folder / ".staging"
    staged.mkdir(parents=True)
    (staged / "optimizer.pt").write_bytes(b"%d" % step)
    return publish_state(staged, folder, step, run, done)


def test_two_generations_of_state(tmp_path, capsys):
    run = {"base": "tiny", "settings": {"seed": 0}}
    assert newest_state([tmp_path], run) is None
    for step in (3, 6, 9):
        stage(tmp_path, step, run)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["step-6", "step-9"]
    newest = newest_state([tmp_path], run)
    assert newest.name == "step-9"
    (newest / "optimizer.pt").write_bytes(b"")
    assert newest_state([tmp_path], run).name == "step-6"
    assert "step-9: it is torn (optimizer.pt" in capsys.readouterr().out
    (newest / "state.json").unlink()
    assert newest_state([tmp_path], run).name == "step-6"
    (tmp_path / "state" / "step-6 (1)").mkdir()  # what Drive makes of a folder that comes twice
    assert newest_state([tmp_path], run).name == "step-6"


def test_another_run_that_has_not_ended_is_not_lost(tmp_path, capsys):
    run = {"base": "tiny", "dtype": "float32"}
    stage(tmp_path, 3, run)
    with pytest.raises(
        InputError,
        match=r"step-3 belongs to another run \(other base\) that has not ended\. Set",
    ):
        newest_state([tmp_path], run | {"base": "other"})
    assert newest_state([tmp_path], run).name == "step-3"
    settings = {"settings": {"epochs": 1, "seed": 0}}
    stage(tmp_path / "old", 3, run | {"settings": {"epochs": 1, "seed": 0, "head_rate": 2e-4}})
    with pytest.raises(InputError, match=r"other settings: head_rate\).*the version of bridgeblip"):
        newest_state([tmp_path / "old"], run | settings)
    stage(tmp_path, 6, run, done=True)
    assert newest_state([tmp_path], run | {"base": "other"}) is None
    assert "step-6: it belongs to another run (other base)" in capsys.readouterr().out
    stage(tmp_path / "second", 3, run | {"base": "other"})
    with pytest.raises(InputError, match=r"second.*has not ended"):  # a copy would replace it
        newest_state([tmp_path, tmp_path / "second"], run)


def test_states_of_a_later_step_are_an_earlier_runs(tmp_path):
    for step in (6, 9):
        stage(tmp_path, step, {"seed": 0})
    stage(tmp_path, 3, {"seed": 1})
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-3"]


def test_the_copy_at_a_second_place_is_found(tmp_path):
    first, second, run = tmp_path / "first", tmp_path / "second", {"seed": 0}
    copy_state(stage(first, 3, run), second)
    assert newest_state([tmp_path / "gone", second], run) == second / "state" / "step-3"
    assert [path.name for path in (second / "state").iterdir()] == ["step-3"]


def test_nan_is_never_best(tmp_path):
    save_best(tmp_path, [0.5, float("nan"), 0.4], [1.0, 0.5, 0.5])
    assert json.loads((tmp_path / "best.json").read_text())["best"] == "weights-0.pt"
    save_best(tmp_path, [float("nan"), 0.1], [float("nan")] * 2)
    assert json.loads((tmp_path / "best.json").read_text())["best"] == "weights-1.pt"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"best": 3}', '{"best": "weights-2.pt", "validation_accuracy": [1]}']
)
def test_a_malformed_record_of_the_best_is_one_line(text, tmp_path):
    save_weights(weights_path(tmp_path, 0), TENSORS, {})
    (tmp_path / "best.json").write_text(text)
    with pytest.raises(InputError, match=r"best\.json can't be read"):
        choose_weights(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run": [], "files": {}, "done": true}'])
def test_a_malformed_state_is_passed_over(text, tmp_path, capsys):
    run = {"base": "tiny"}
    for step in (3, 6):
        stage(tmp_path, step, run)
    (tmp_path / "state" / "step-6" / "state.json").write_text(text)
    assert newest_state([tmp_path], run).name == "step-3"
    assert re.search(r"step-6: it is torn \(.*state.json", capsys.readouterr().out)


@pytest.mark.parametrize("content", [{"tensors": {}}, {"format": 1, "tensors": [], "manifest": {}},
                                     {"format": 1, "tensors": {}, "manifest": None}])  # fmt: skip
def test_malformed_weights_are_one_line(content, tmp_path):
    torch.save(content, tmp_path / "weights-0.pt")
    with pytest.raises(InputError, match=r"weights-0\.pt lacks its format"):
        load_weights(tmp_path / "weights-0.pt")


def test_weights_of_an_earlier_run_are_named(tmp_path):
    for epoch in range(3):
        save_weights(weights_path(tmp_path, epoch), TENSORS, {})
    save_best(tmp_path, [0.5], [1.0])
    path, why = choose_weights(tmp_path)
    assert path.name == "weights-0.pt" and "weights-1.pt, weights-2.pt are an earlier run's" in why


def test_other_versions_are_named(tmp_path, capsys):
    stage(tmp_path, 3, {"base": "tiny", "versions": {"torch": "2.12"}})
    assert newest_state([tmp_path], {"base": "tiny", "versions": {"torch": "2.13"}})
    assert (
        "other versions, the last digits may differ: {'torch': '2.12'}" in capsys.readouterr().out
    )


def test_a_copy_reads_its_source_once(tmp_path, monkeypatch):
    source, reads = tmp_path / "source", []
    source.write_bytes(bytes(3_000_000))

    actual = open

    def counted(path, *how):
        reads.append(path)
        return actual(path, *how)

    monkeypatch.setattr("builtins.open", counted)
    copy_verified(source, tmp_path / "copy")
    assert reads.count(source) == 1
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()


def test_a_copy_that_fails_leaves_no_part_of_a_state(tmp_path, monkeypatch):
    first, second, run = tmp_path / "first", tmp_path / "second", {"seed": 0}
    state = stage(first, 3, run)
    copied = []

    def until_full(source, target):
        if copied:
            raise OSError(28, "No space left on device")
        copied.append(target)
        copy_verified(source, target)

    monkeypatch.setattr("bridgeblip.training.state.copy_verified", until_full)
    with pytest.raises(OSError, match="No space left"):
        copy_state(state, second)
    assert copied and not list((second / "state").iterdir())
