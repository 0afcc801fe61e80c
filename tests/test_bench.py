"""The benchmark on the tiny base: what it counts, compares, refuses and writes."""

import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from bridgeblip import InputError
from bridgeblip.bridge.base import LM_HEAD, TINY_BASE
from bridgeblip.bridge.processing import QuestionProcessor
from bridgeblip.bundle.format import load_bundle
from bridgeblip.bundle.predict import predict
from bridgeblip.data.pictures import picture_keys
from bridgeblip.data.questions import read_questions
from bridgeblip.training.tensors import SINGLE_FILE
from experiments import bench, contenders
from experiments.bench import (
    EACH,
    PARTS,
    agree,
    count_operations,
    main,
    order_of,
    page,
    run_bench,
    write_photo_questions,
)

TINY_PARAMETERS = 1_708_672


def run_here(name, out, environment):
    """A measurement in this process: a process of its own costs its imports."""
    plan = contenders.plan_of(out)
    if name in bench.WORKERS:
        return json.dumps(bench.WORKERS[name](plan, out))
    with torch.inference_mode():
        return json.dumps(contenders.main(name, out, time.time()))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A whole benchmark on the tiny base: one round of every part, two pictures."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "run_alone", run_here)
        run_bench("tiny", folder, rounds=1, pictures=2)
    return folder


@pytest.fixture(scope="module")
def results(out):
    return json.loads((out / "bench.json").read_text())


def test_questions_have_the_official_shape(tmp_path):
    folder = write_photo_questions(tmp_path, 10, 4, 1.0)
    questions = read_questions(folder / "train.csv", need_answers=True)
    assert len(questions) == len({q.image for q in questions}) == 40
    assert len(set(picture_keys(q.image for q in questions).values())) == 10
    lengths = sorted(len(f"{q.question} {' '.join(q.choices)}".split()) for q in questions)
    assert 38 <= lengths[20] <= 46 and lengths[-1] <= 69
    assert 12 <= max(len(choice.split()) for q in questions for choice in q.choices) <= 17


def test_operations_are_counted_as_by_hand():
    linears = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)).eval()
    traced = torch.jit.trace(linears, torch.randn(3, 8))
    by_hand = 2 * 5 * (8 * 16 + 16 * 4)
    assert count_operations(lambda: linears(torch.randn(5, 8))) == by_hand
    assert count_operations(lambda: traced(torch.randn(5, 8))) == by_hand
    query, key = torch.randn(2, 3, 7, 16), torch.randn(2, 3, 11, 16)
    attention, mask = nn.functional.scaled_dot_product_attention, torch.zeros(2, 1, 7, 11)
    by_hand = 2 * 2 * 2 * 3 * 7 * 11 * 16
    assert count_operations(lambda: attention(query, key, key)) == by_hand
    with torch.inference_mode():
        assert count_operations(lambda: attention(query, key, key, attn_mask=mask)) == by_hand


def test_the_floor_is_less_than_what_the_bundle_does(out, results):
    bundle = load_bundle(out / "work" / "torchscript.pt")
    questions = read_questions(out / "work" / "questions" / "test.csv")
    done = count_operations(lambda: predict(bundle, questions))
    assert 0.5 * done < results["prepared"]["floor"] < done


def test_every_part_is_measured(out, results):
    prepared, measured = results["prepared"], results["measured"]
    assert prepared["parameters"] == TINY_PARAMETERS
    bundle = measured["inference"]["bundle"]
    assert bundle["rows a second"]["median"] > 0
    assert bundle["over generate"]["median"] > 1 > bundle["share of the floor"]["median"]
    for name, part in measured["inference"].items():
        assert part["first answer, s"]["median"] > 0 and part["own memory, GB"]["median"] > 0, name
    for part in measured["training"].values():
        assert part["5 epochs, s"]["median"] > 0 and part["own memory, GB"]["median"] > 0
    assert measured["training"]["PEFT, generative"]["times as fast as PEFT"]["median"] == 1
    text = (out / "bench.md").read_text()
    assert text == page(results)
    for part in PARTS:
        assert f"## {part.capitalize()}" in text


def test_what_answers_first_is_imported_where_it_is_needed():
    """The time to the first answer counts imports: a contender must not pay for another's."""
    script = (
        "import sys, bridgeblip, experiments.contenders; "
        "print([m for m in ('torch', 'numpy', 'pandas', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_many_rows_cost_each_what_few_do(out, tmp_path):
    bundle = load_bundle(out / "work" / "torchscript.pt")
    noise, lines, costs = np.random.default_rng(0), ["ID,img_path,Question,A,B,C,D"], []
    for row in range(200):
        if row % EACH == 0:
            pixels = noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{row // EACH}.png")
        lines.append(f"{row},{row // EACH}.png,Which word fits the picture best?,cat,dog,cow,owl")
    for rows in (40, 200):
        (tmp_path / "test.csv").write_text("\n".join(lines[: rows + 1]))
        questions = read_questions(tmp_path / "test.csv")
        costs.append(count_operations(lambda q=questions: predict(bundle, q)) / rows)
    assert costs[0] == costs[1]


def test_measured_rounds_are_kept_and_more_are_added(out, results, monkeypatch):
    monkeypatch.setattr(bench, "run_alone", lambda name, *_: json.dumps(asked.append(name)))
    asked = []
    names = [name for part in PARTS.values() for name in part]
    with pytest.raises(TypeError):  # for nothing is measured in the second round
        run_bench("tiny", out, rounds=2, pictures=2)
    assert sorted(asked) == sorted(names)
    for name in names:
        (out / "rounds" / f"{name} 1.json").unlink()
    again = run_bench("tiny", out, rounds=1, pictures=2)
    assert again["measured"] == results["measured"] and sorted(asked) == sorted(names)


def test_a_measurement_is_a_process_of_its_own(out):
    found = json.loads(bench.run_alone("bundle", out, dict(os.environ)))
    assert all(value > 0 for value in found.values())


def test_contenders_take_turns_in_changing_order():
    assert order_of(["a", "b", "c"], 0) == ["a", "b", "c"] == order_of(["a", "b", "c"], 2)
    assert order_of(["a", "b", "c"], 1) == ["c", "b", "a"]


def test_another_bench_in_the_same_folder_is_refused(out, capsys):
    assert main(["--base", "tiny", "--pictures", "3", "--out", str(out)]) == 2
    assert "holds another bench (other pictures)" in capsys.readouterr().err


def test_on_a_gpu_everything_is_done_once_before_it_is_timed(tmp_path):
    for device, times in (("cpu", 1), ("cuda:0", 2)):
        calls = []

        def train(plan, out, calls=calls):
            calls.append(1)
            return len(calls)

        found = bench.train_epochs(train, SimpleNamespace(device=device), tmp_path)
        assert len(calls) == found["5 epochs, s"] == times


def test_sizes_follow_the_device(tmp_path, monkeypatch):
    for device, pictures in (("cpu", 5), ("cuda:0", 213)):
        monkeypatch.setattr(bench, "best_device", lambda device=device: device)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
        folder = tmp_path / device
        folder.mkdir()
        assert bench.keep_plan(TINY_BASE, folder)["pictures"] == pictures


def test_contenders_that_differ_are_not_timed(out, tmp_path):
    """Of two letters the LM head's rows are swapped: a bundle of the base as it was answers
    otherwise."""
    base = shutil.copytree(TINY_BASE, tmp_path / "base")
    tensors = load_file(base / SINGLE_FILE)
    first, second, *_ = QuestionProcessor.from_base(base).letter_ids
    tensors[LM_HEAD][[first, second]] = tensors[LM_HEAD][[second, first]]
    save_file(tensors, base / SINGLE_FILE, {"format": "pt"})
    folder = tmp_path / "bench"
    shutil.copytree(out / "work", folder / "work")
    plan = json.loads((out / "plan.json").read_text()) | {"base": str(base)}
    (folder / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(InputError, match=r"from the letter logits of generate, sliced.*nothing"):
        bench.prepare(contenders.plan_of(folder), folder)


def test_logits_are_held_to_the_bound_of_their_format():
    theirs = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    agree("peer", theirs + 0.02, theirs, torch.bfloat16)
    with pytest.raises(InputError, match="nothing was timed"):
        agree("peer", theirs + 0.02, theirs, torch.float32)
    with pytest.raises(InputError, match="nothing was timed"):
        agree("peer", theirs * float("nan"), theirs, torch.bfloat16)


def test_a_failing_process_ends_the_bench_with_its_own_words(out, tmp_path):
    shutil.copy(out / "plan.json", tmp_path)
    with pytest.raises(RuntimeError, match=r"PEFT, generative failed with exit code 1:[\s\S]*csv"):
        bench.run_alone("PEFT, generative", tmp_path, dict(os.environ))
