import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn

from bridgeblip import InputError
from bridgeblip.__main__ import main
from bridgeblip.bridge.base import TINY_BASE
from bridgeblip.data.pictures import picture_keys
from bridgeblip.data.questions import read_questions
from experiments.bench import check_logits, markdown, order_of, run_bench
from experiments.contenders import (
    Watched,
    count_operations,
    kept,
    stored_parameters,
    write_photo_questions,
)

FEW, MANY = 100, 2_000


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A whole bench on the tiny base: one round of every part, two pictures."""
    folder = tmp_path_factory.mktemp("bench")
    run_bench("tiny", folder, rounds=1, pictures=2, scaling=(FEW, MANY))
    return folder


@pytest.fixture(scope="module")
def results(out):
    return json.loads((out / "bench.json").read_text())


def test_questions_have_the_official_shape(tmp_path):
    questions = read_questions(
        write_photo_questions(tmp_path, 10, 4, 1.0) / "train.csv", need_answers=True
    )
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
    attention = nn.functional.scaled_dot_product_attention
    mask = torch.zeros(2, 1, 7, 11)
    assert count_operations(lambda: attention(query, key, key)) == 2 * 2 * 2 * 3 * 7 * 11 * 16
    with torch.inference_mode():
        assert (
            count_operations(lambda: attention(query, key, key, attn_mask=mask))
            == 2 * 2 * 2 * 3 * 7 * 11 * 16
        )


def test_the_floor_is_less_than_what_each_contender_does(results):
    found = results["inference"]
    done = {name: row["operations_per_row"] for name, row in found["contenders"].items()}
    assert (
        found["floor_operations_per_row"]
        < done["bundle"]
        < done["generate sliced"]
        < done["generate"]
    )
    assert done["bundle"] < done["bundle, orders"]
    # By hand: the vision tower on 17 tokens, and its patches of 8 x 8 pixels. ``generate`` encodes
    # a picture for each of its four questions, the bundle once.
    width, wide, tokens = 64, 128, 17
    linears = 3 * tokens * (4 * width * width + 2 * width * wide) + 16 * 3 * 8 * 8 * width
    attention = 3 * 2 * tokens * tokens * width
    saved = 2 * (linears + attention) * 3 / 4
    sliced_more = done["generate sliced"] - done["bundle"]
    assert sliced_more > saved and found["encoded_pictures"] == 2


def test_watched_counts_padding_and_pictures():
    class Model:
        parameters = 3

        def encode_image(self, pixels):
            return pixels

        def score(self, embeds, attention_mask):
            return embeds

    watched = Watched(Model())
    watched.encode_image(torch.zeros(5, 3))
    watched.score(torch.zeros(2), attention_mask=torch.tensor([[1, 1, 1], [1, 0, 0]]))
    assert (watched.pictures, watched.tokens, watched.padded, watched.parameters) == (5, 4, 6, 3)
    watched.reset()
    assert (watched.pictures, watched.tokens, watched.seconds) == (0, 0, 0.0)


def test_every_part_is_measured(out, results):
    assert (
        results["prepared"]["stored_parameters"] == stored_parameters(str(TINY_BASE)) == 1_708_672
    )
    assert kept(out, "check generate")["parameters"] == 1_708_672
    bundle, orders = (
        results["inference"]["contenders"][name] for name in ("bundle", "bundle, orders")
    )
    assert results["inference"]["asked_again"] == 0.25  # two of eight: the nearest to a fifth
    assert 0 <= bundle["padding"]["median"] < 1 and bundle["rows_per_second"]["median"] > 0
    assert bundle["over_generate"]["median"] > 1 and orders["share_of_floor"]["median"] < 1
    for part in results["training"]["contenders"].values():
        assert (
            part["all_epochs"]["median"]
            > part["first_epoch"]["median"] + part["later_epochs"]["median"]
            > 0
        )
    profile = results["rounds"]["profile"][0]
    assert all(0.5 < sum(stage["shares"].values()) <= 1 for stage in profile["stages"].values())
    assert set(results["rounds"]["preprocessing"][0]["per_second"]) == {"ours", "pillow", "draft"}
    assert results["rounds"]["preprocessing"][0]["threaded_per_second"] > 0
    assert (out / "bench.md").read_text() == markdown(results)
    page = (out / "bench.md").read_text()
    for heading in (
        "Inference",
        "Where the bundle's time goes",
        "Training",
        "Preprocessing",
        "Start",
        "Many rows",
    ):
        assert f"## {heading}" in page


def test_start_up_is_quick(results):
    took = results["rounds"]["startup"][0]
    assert (
        took["--help"] < 2 and took["import bridgeblip"] < 2
    )  # what is asked is 0.5 s, on a machine at rest
    assert took["first answer of the tiny bundle"] < 15  # asked: 5 s


def test_importing_the_package_and_the_bench_loads_nothing_heavy():
    script = "import sys, bridgeblip, experiments.bench; " \
             "print([m for m in ('torch', 'numpy', 'pandas', 'transformers', 'PIL') if m in sys.modules])"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_many_rows_cost_each_what_few_do(results):
    few, many = (results["rounds"][name][0] for name in ("few rows", "many rows"))
    assert (few["rows"], many["rows"]) == (FEW, MANY)
    assert many["operations_per_row"] == few["operations_per_row"]
    assert many["encoded_per_picture"] == few["encoded_per_picture"] == 1
    assert many["resident"] < 1.06 * few["resident"]


def test_measured_rounds_are_kept_and_more_are_added(out, results):
    before = {path.name: path.stat().st_mtime_ns for path in (out / "rounds").iterdir()}
    again = run_bench("tiny", out, rounds=2, pictures=2, scaling=(FEW, MANY), only="startup")
    after = {path.name: path.stat().st_mtime_ns for path in (out / "rounds").iterdir()}
    assert {name: after[name] for name in before} == before and after.keys() - before.keys() == {
        "startup 1.json"
    }
    assert (
        again["rounds"]["startup"][:1] == results["rounds"]["startup"]
        and len(again["rounds"]["startup"]) == 2
    )
    assert again["inference"] == results["inference"]


def test_contenders_take_turns_in_changing_order():
    assert order_of(["a", "b", "c"], 0) == ["a", "b", "c"] == order_of(["a", "b", "c"], 2)
    assert order_of(["a", "b", "c"], 1) == ["c", "b", "a"]


def test_another_bench_in_the_same_folder_is_refused(out, capsys):
    assert main(["bench", "--base", "tiny", "--pictures", "3", "--out", str(out)]) == 2
    assert "holds another bench (other pictures, scaling)" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["other weights", "parameters missing"])
def test_contenders_that_differ_are_not_timed(out, tmp_path, fault):
    copy = tmp_path / "bench"
    (copy / "rounds").mkdir(parents=True)
    for name in (
        "prepare",
        "check generate",
        "check generate sliced",
        "check unsliced",
        "check bundle",
    ):
        shutil.copy(out / "rounds" / f"{name}.json", copy / "rounds")
    shutil.copy(out / "plan.json", copy)
    path = copy / "rounds" / "check generate.json"
    if fault == "other weights":
        base = shutil.copytree(TINY_BASE, tmp_path / "base")
        change_head(base)
        plan = json.loads((copy / "plan.json").read_text()) | {"base": str(base)}
        (copy / "plan.json").write_text(json.dumps(plan))
        path.unlink()  # measured again, on the other base
        (copy / "work").symlink_to(out / "work")
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"parameters": 1_700_000}))
    message = {"other weights": "check unsliced gives letter logits "
                                ".* nothing was timed", "parameters missing":
               "the peer holds 1,700,000 parameters, its files "
               "1,708,672: nothing was timed"}  # fmt: skip
    with pytest.raises(InputError, match=message[fault]):
        check_logits(plan_of(copy), copy)
    assert not list((copy / "rounds").glob("* 0.json"))


def change_head(base):
    """Swap two letters' rows of the LM head in the file."""
    from safetensors.torch import load_file, save_file

    from bridgeblip.bridge.base import LM_HEAD
    from bridgeblip.bridge.processing import QuestionProcessor

    file = next(base.glob("*.safetensors"))
    tensors, (first, second, *_) = load_file(file), QuestionProcessor.from_base(base).letter_ids
    tensors[LM_HEAD][[first, second]] = tensors[LM_HEAD][[second, first]]
    save_file(tensors, file, {"format": "pt"})


def plan_of(out):
    from experiments.contenders import Plan

    return Plan(**json.loads((out / "plan.json").read_text()))


def test_a_failing_contender_ends_the_bench_with_its_own_words(out, tmp_path):
    copy = tmp_path / "bench"
    (copy / "rounds").mkdir(parents=True)
    shutil.copy(out / "plan.json", copy)
    shutil.copy(out / "rounds" / "prepare.json", copy / "rounds")
    with pytest.raises(
        RuntimeError, match=r"check generate failed with exit code 1:[\s\S]*test\.csv not found"
    ):
        check_logits(plan_of(copy), copy)
