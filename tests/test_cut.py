import json

import numpy as np
import pandas as pd
import pytest

from bridgeblip.embedded.digits import NUMBERS, digit_pictures
from experiments import cut
from experiments.cut import WHOLE, Run


def made(accuracies: dict[str, float], base="tiny", rank=96, seeds=2) -> list[dict]:
    """Runs that answer so many of 200 questions, by layers."""
    runs = []
    for layers, accuracy in accuracies.items():
        for seed in range(seeds if rank else 1):
            run = Run(base, layers, rank, seed=seed)
            right = (np.arange(200) % 100 < 100 * accuracy).astype(int)
            fields = {"base": base, "layers": layers, "rank": rank, "questions": 0, "seed": seed}
            found = {"kept": run.kept, "kind": run.kind, "right": right.tolist(), "trained": 9}
            runs.append(fields | found)
    return runs


@pytest.fixture
def summary() -> pd.DataFrame:
    bridged = {WHOLE: 0.9, "even-22": 0.9, "even-20": 0.8, "even-18": 0.9, "block-22": 0.89}
    bridged |= {"block-20": 0.89, "every-third": 0.7}
    runs = made(bridged) + made({"even-22": 0.5, "block-22": 0.6}, rank=0)
    return cut.summarise(pd.DataFrame(runs), np.arange(200) // 4)


def test_every_run_has_a_file_of_its_own():
    runs = list(cut.runs_of(list(cut.BASES), cut.PARTS, 3))
    assert len({run.file for run in runs}) == len(runs) == len(set(runs))
    kept = {run.kept for run in runs}
    assert kept == {24, *cut.KEPT}


def test_what_tells_most_runs_first():
    runs = list(cut.runs_of(["tiny"], cut.PARTS, 3))
    assert [run.rank for run in runs[:20]].count(0) == 19
    assert {run.seed for run in runs[19:38]} == {0}


def test_a_cut_is_held_against_all_layers_with_the_same_seeds(summary):
    found = summary.set_index(["layers", "rank"])["against"]
    assert found["even-20", 96].value == pytest.approx(-0.1)
    assert found["even-22", 0].value == pytest.approx(-0.4)
    assert found[WHOLE, 96].value == 0


def test_where_all_layers_have_not_run_nothing_is_said():
    summary = cut.summarise(pd.DataFrame(made({"even-22": 0.9})), np.arange(200) // 4)
    assert summary["against"].isna().all()
    assert cut.deepest(summary, "tiny", "even") == 24


def test_where_cuts_are_missing_there_is_no_verdict(summary):
    assert cut.judge(summary, ["tiny"]) == "tiny: 5 of 14 bridged cuts have run, no verdict."


def test_a_cut_behind_one_that_does_not_hold_does_not_count(summary, monkeypatch):
    monkeypatch.setattr(cut, "CURVE", ["even-22", "even-20", "even-18", "block-22", "block-20"])
    assert cut.deepest(summary, "tiny", "even") == 22  # 18 holds, 20 does not
    assert cut.deepest(summary, "tiny", "block") == 20
    verdict = cut.judge(summary, ["tiny"])
    assert "(2 seeds): within 2 points" in verdict
    assert "22 of 24 layers (spread evenly) and 20 of 24 layers (all but a block" in verdict


def test_the_page_names_what_has_not_run(summary, tmp_path):
    text = cut.page(summary, "All held.", [Run("tiny", "even-4", 384, 60, 2)], {"date": "today"})
    assert "1 runs of the whole: tiny, rank 384, 60 questions, seeds 2: 1" in text
    assert "unbridged" in text and "-10.0" in text
    cut.cut_figure(summary, ["tiny"]).savefig(tmp_path / "cut.png")


def test_a_run_is_kept_and_taken_again(tmp_path, monkeypatch, capsys):
    class Quick(cut.Bench):
        def __init__(self):
            self.training, self.tests = [], [[None] * 200]
            self.groups = np.arange(200) // 4

        def measure(self, run):
            with (tmp_path / "measured").open("a") as file:
                print(run, file=file)
            return {"right": [1, 0] * 100, "trained": 5, "seconds": 1}

        def identity(self, run):
            return {"run": run.layers}

    monkeypatch.setattr(cut, "bench", lambda seeds: Quick())
    words = ["--bases", "tiny", "--parts", "depth", "--seeds", "1", "--out", str(tmp_path)]
    assert cut.main([*words, "--jobs", "2"]) == cut.main(words) == 0
    assert len((tmp_path / "measured").read_text().splitlines()) == 38
    kept = json.loads((tmp_path / "runs" / Run("tiny", "even-4", 96).file).read_text())
    assert kept["identity"]["run"] == "even-4"
    assert "holds down to 4 of 24 layers" in capsys.readouterr().out
    assert (tmp_path / "cut.png").is_file()
    assert "tiny, rank 96, all questions, seeds 1, 2: 38" in (tmp_path / "cut.md").read_text()


def test_each_seed_has_other_questions_about_the_same_test_pictures():
    first, second = cut.Bench(2).tests
    assert [q.image for q in first] == [q.image for q in second]
    asked = [[(q.question, *q.choices, q.answer) for q in test] for test in (first, second)]
    assert sum(a == b for a, b in zip(*asked, strict=True)) < len(first) / 10
    digits = [NUMBERS[digit] for _, digit in digit_pictures()["test"] for _ in range(4)]
    pairs = zip(second, digits, strict=True)
    named = [
        q.choices[q.answer] == d for q, d in pairs if q.question.startswith("Which digit is s")
    ]
    assert len(named) > 20 and all(named)
