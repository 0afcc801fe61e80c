"""What ``tune`` really wrote, taken on by every verb, beside a bundle; killed by the system; in 4
bits; by two processes."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import families
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file

from bridgeblip.__main__ import main
from bridgeblip.vlm.families import decoder_linears, load_model

BITS = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="4 bits need bitsandbytes"
)
VERBS = """
import shlex, sys
from bridgeblip.__main__ import main
sys.exit(any([main(shlex.split(line)) for line in sys.argv[1:]]))
"""


def done(line: str, code: int = 0) -> None:
    """Run a command line in this process."""
    assert main(line.split()) == code


def probabilities(folder) -> pd.DataFrame:
    return pd.read_csv(folder / "probabilities.csv").set_index("ID")[list("ABCD")]


def adapter(run) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return families.save("llava", tmp_path_factory.mktemp("llava") / "base", width=64)


@pytest.fixture(scope="module")
def run(llava, competition, tmp_path_factory):
    """A run on four-choice questions by the command line, long enough to move the answers."""
    out = tmp_path_factory.mktemp("runs") / "llava"
    done(
        f"tune --base {llava} --data {competition / 'train.csv'} --epochs 3 --batch-size 6 "
        f"--learning-rate 1e-2 --validation-fraction 0.25 --few no --dropout 0 --out {out}"
    )
    return out


def test_every_verb_takes_a_run_and_what_it_merges(run, llava, competition, tmp_path, capsys):
    done(f"merge {run} --out {tmp_path / 'merged'}")
    answers = competition.parent / "answers.csv"
    found, scores = {}, {}
    for name, model in {"run": run, "merged": tmp_path / "merged", "base": llava}.items():
        out = tmp_path / name / "submission.csv"
        ask = f"--model {model} --csv {competition / 'test.csv'}"
        done(f"predict {ask} --out {out}")
        done(f"evaluate {ask} --answers {answers} --out {tmp_path / name / 'report.html'}")
        found[name] = probabilities(out.parent)
        facts = json.loads((tmp_path / name / "report.json").read_text())
        scores[name] = facts["measures"]["accuracy"]["value"]
        assert ("method" in facts["manifest"]) == (name != "base")
    assert found["run"].index.equals(pd.read_csv(competition / "test.csv").set_index("ID").index)
    np.testing.assert_allclose(found["merged"], found["run"], atol=1e-5)
    assert np.abs(found["base"] - found["run"]).to_numpy().max() > 1e-3
    assert scores["merged"] == scores["run"]


def test_a_real_bundle_and_a_run_are_blended_and_compared(run, checkpoint, competition, tmp_path):
    bundle = checkpoint / "torchscript.pt"
    test, answers = competition / "test.csv", competition.parent / "answers.csv"
    for name, model in {"bridge": bundle, "run": run}.items():
        done(f"predict --model {model} --csv {test} --out {tmp_path / name / 'submission.csv'}")
    both = f"{tmp_path / 'bridge'} {tmp_path / 'run'}"
    done(f"blend {both} --out {tmp_path / 'blend' / 'submission.csv'}")
    one, two, mean = (probabilities(tmp_path / name) for name in ("bridge", "run", "blend"))
    np.testing.assert_allclose(mean, (one + two) / 2, atol=2e-6)
    page = tmp_path / "two.html"
    done(f"evaluate {both} --csv {test} --answers {answers} --out {page}")
    facts = json.loads(page.with_suffix(".json").read_text())
    assert str(tmp_path / "run") in page.read_text() and facts["verdict"]["sentence"]


def test_a_run_says_when_other_orders_pay_and_merging_keeps_it(run, tmp_path):
    facts = json.loads((run / "run.json").read_text())
    assert "permute_below" in facts  # None where they don't
    copied = tmp_path / "run"
    copied.mkdir()
    (copied / "adapter").symlink_to(run / "adapter")
    (copied / "run.json").write_text(json.dumps(facts | {"permute_below": 2}))
    done(f"merge {copied}")
    csv = tmp_path / "test.csv"
    Image.new("RGB", (40, 40), "red").save(tmp_path / "1.png")
    csv.write_text("ID,img_path,Question,A,B\n1,1.png,which?,one,two\n")
    done(f"predict --model {copied / 'merged'} --csv {csv} --out {tmp_path / 'a' / 's.csv'}")
    assert "permuted" in pd.read_csv(tmp_path / "a" / "probabilities.csv")["flags"][0]


def test_two_processes_tune_and_answer_as_one(run, llava, competition, tmp_path):
    """With half the batch each; the run of one process is the fixture's."""
    out, script = tmp_path / "two", tmp_path / "verbs.py"
    script.write_text(VERBS)
    tune = (
        f"tune --base {llava} --data {competition / 'train.csv'} --epochs 3 --batch-size 3 "
        f"--learning-rate 1e-2 --validation-fraction 0.25 --few no --dropout 0 --out {out}"
    )
    ask = f"predict --model {run} --csv {competition / 'test.csv'} --out"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*launch, "--standalone", script, tune, f"{ask} {tmp_path / 'b' / 'submission.csv'}"],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    for said in ("best epoch: accuracy", "20 answers"):
        assert ended.stdout.count(said) == 1
    one, two = (json.loads((r / "run.json").read_text()) for r in (run, out))
    for name in ("accuracy", "loss"):
        assert two["validation"][name] == pytest.approx(one["validation"][name], abs=1e-4)
    alone, shared = adapter(run), adapter(out)
    for name, tensor in alone.items():
        # Of a gradient next to 0, AdamW makes a whole step out of a rounding.
        assert (shared[name] - tensor).abs().flatten().quantile(0.99) < 2e-3, name
    done(f"{ask} {tmp_path / 'a' / 'submission.csv'}")
    np.testing.assert_allclose(
        probabilities(tmp_path / "b"), probabilities(tmp_path / "a"), atol=1e-6
    )


@pytest.fixture
def dialogues(tmp_path):
    """messages.txt, labels.csv and frames/, as the documents describe them."""
    folder = tmp_path / "frames"
    (folder / "frames").mkdir(parents=True)
    rows = []
    for number in range(10):
        name = f"{number}.png"
        Image.effect_noise((60, 40 + number), 90).convert("RGB").save(folder / "frames" / name)
        rows.append({"image": name, "rain": "yes", "cars": number, "colour": "red"})
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)
    page = (ROOT / "docs" / "other-models.md").read_text(encoding="utf-8")
    (form,) = re.findall(r'(?s)```\n(\[\{"question".*?)```', page)
    (folder / "messages.txt").write_text(form)
    return folder


@pytest.mark.parametrize("method", ["lora", pytest.param("qlora", marks=BITS)])
def test_the_documented_commands_for_dialogues(method, llava, dialogues, tmp_path, capsys):
    """LLaVA's, a local folder for the id; only the method where there is no bitsandbytes."""
    page = (ROOT / "docs" / "other-models.md").read_text(encoding="utf-8")
    lines = re.findall(r"python -m bridgeblip (.*runs/llava\b.*)", page)
    places = {
        "llava-hf/llava-1.5-7b-hf": llava, "frames/messages.txt": dialogues / "messages.txt",
        "runs/llava": tmp_path / "run", "--method qlora": f"--method {method} --few no",
    }  # fmt: skip
    assert len(lines) == 2
    for line in lines:
        for written, put in places.items():
            line = line.replace(written, str(put))
        done(line)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["task"] == "answer" and run["settings"]["gradient_checkpointing"]
    report = json.loads((tmp_path / "run" / "all.json").read_text())
    assert report["questions"] == 30 and "exact" in report["scores"]
    done(f"merge {tmp_path / 'run'}")
    assert ("from the run in 4 bits" in capsys.readouterr().out) == (method == "qlora")
    out = tmp_path / "a" / "captions.json"
    done(
        f"predict --model {tmp_path / 'run' / 'merged'} --csv {dialogues / 'messages.txt'} --out {out}"
    )
    assert len(json.loads(out.read_text())) == 30


@BITS
@pytest.mark.parametrize("family", families.FAMILIES)
def test_four_bits_are_in_the_decoder_alone(family, tmp_path):
    base = families.save(family, tmp_path / "base")
    model = load_model(base, bits=True)
    named = model.named_modules()
    bits = {name for name, module in named if type(module).__name__ == "Linear4bit"}
    assert bits == set(decoder_linears(load_model(base)))
