"""Answering with a run, a folder or an id; the model is a small LLaVA, whose processor needs no
torchvision."""

import json
from collections import Counter
from dataclasses import replace

import families
import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn

from bridgeblip import InputError
from bridgeblip.__main__ import main
from bridgeblip.bundle import predict as bundle_predict
from bridgeblip.data.questions import Question, read_questions
from bridgeblip.embedded.digits import write_competition
from bridgeblip.evidence.answers import kept_folder, letters_of
from bridgeblip.vlm import answer
from bridgeblip.vlm.answer import answer_texts, load_tuned, predict
from bridgeblip.vlm.families import decoder_linears


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of weights large enough to matter."""
    model, processor = families.build("llava")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    path = tmp_path_factory.mktemp("models") / "llava"
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def run(folder):
    """A run as tune leaves it, its adapter large enough to matter."""
    tuned = load_tuned(folder).model
    adapted = get_peft_model(tuned, LoraConfig(r=4, target_modules=decoder_linears(tuned)))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    path = folder.parent / "run"
    adapted.save_pretrained(path / "adapter")
    facts = {"base": str(folder), "revision": None, "task": "choice", "method": "lora"}
    facts["dtype"] = "float32"
    (path / "run.json").write_text(json.dumps(facts | {"settings": {"prompt": "One letter."}}))
    return path


@pytest.fixture(scope="module")
def tuned(run):
    return load_tuned(run)


@pytest.fixture(scope="module")
def asked(competition):
    return read_questions(competition / "test.csv")


def test_852_rows_in_order_every_one_answered_each_picture_opened_once(
    folder, tmp_path_factory, monkeypatch
):
    official = tmp_path_factory.mktemp("official") / "competition"
    write_competition(official, official.parent / "answers.csv", {"train": 1, "test": 213})
    opened = Counter()
    real = answer.open_picture

    def watched(path):
        opened[path.read_bytes()] += 1
        return real(path)

    monkeypatch.setattr(answer, "open_picture", watched)
    out = official.parent / "submission.csv"
    csv = official / "test.csv"
    assert main(["predict", "--model", str(folder), "--csv", str(csv), "--out", str(out)]) == 0
    assert len(opened) == 213 and set(opened.values()) == {1}
    written = pd.read_csv(out)
    assert list(written["ID"]) == list(pd.read_csv(csv)["ID"]) and len(written) == 852
    assert written["answer"].isin(list("ABCD")).all() and written["answer"].nunique() > 1
    table = pd.read_csv(out.with_name("probabilities.csv"))
    np.testing.assert_allclose(table[list("ABCD")].sum(axis=1), 1, atol=1e-5)
    assert not kept_folder(out).exists()


def test_batches_orders_and_kept_windows_do_not_change_answers(
    tuned, asked, tmp_path, monkeypatch, capsys
):
    expected = predict(tuned, asked, batch_size=5)
    alone = predict(tuned, asked, batch_size=1)
    np.testing.assert_allclose(alone.probabilities, expected.probabilities, atol=1e-5)
    every = predict(tuned, asked, permute_below=2)
    assert all("permuted" in flags for flags in every.flags)
    monkeypatch.setattr(bundle_predict, "PICTURES_A_WINDOW", 1)
    out = tmp_path / "submission.csv"
    predict(tuned, asked, batch_size=5, out=out)
    kept = sorted(kept_folder(out).iterdir())
    kept[1].unlink()
    again = predict(tuned, asked, batch_size=5, out=out)
    assert f"{len(kept) - 1} of {len(kept)} windows are answered" in capsys.readouterr().out
    np.testing.assert_allclose(again.probabilities, expected.probabilities, atol=1e-5)
    blank = predict(tuned, asked, blank_images=True)
    assert all("blank" in flags for flags in blank.flags)
    assert not np.allclose(blank.probabilities, expected.probabilities, atol=1e-3)


def test_a_run_answers_with_its_adapter_and_its_wording(folder, tuned, asked):
    assert (
        tuned.batches.prompt == "One letter."
        and "lora" in type(tuned.model.base_model).__name__.lower()
    )
    plain = replace(load_tuned(folder), batches=tuned.batches)
    ours, theirs = predict(tuned, asked).probabilities, predict(plain, asked).probabilities
    assert not np.allclose(ours, theirs, atol=1e-2)
    merged = tuned.model.merge_and_unload()
    np.testing.assert_allclose(
        predict(replace(tuned, model=merged), asked).probabilities, ours, atol=1e-4
    )


def test_rows_that_can_not_be_asked_are_named_and_answered(folder, asked, tmp_path):
    base = load_tuned(folder)
    base.batches.context = 150
    torn = tmp_path / "torn.png"
    torn.write_bytes(b"no picture")
    rows = [
        asked[0],
        replace(asked[1], question="which digit " * 50),
        replace(asked[2], image=torn),
        replace(asked[3], choices=("one", "two", "", "")),
        replace(asked[4], image=None, problem="picture lost.png not found"),
    ]
    answers = predict(base, rows)
    assert [bool(problem) for problem in answers.problems] == [False, True, True, False, True]
    assert "tokens with picture and answer, more than the 150" in answers.problems[1]
    np.testing.assert_allclose(answers.probabilities[1], 0.25)
    assert "torn.png can't be read" in answers.problems[2] and "blank" in answers.flags[2]
    assert (answers.probabilities[3, 2:] == 0).all() and answers.flags[4] == ["blank"]
    np.testing.assert_allclose(answers.probabilities.sum(1), 1, atol=1e-5)
    texts, written = answer_texts(base, [replace(row, choices=()) for row in rows[:3]], most=5)
    assert texts[0] and not texts[1] and "tokens with picture" in written.problems[1]


def test_korean_rows_with_small_columns(folder, tmp_path, capsys):
    """Tuned and answered."""
    question = "이 사진의 색은 무엇인가요?,빨강,파랑,초록,노랑"
    rows = {"train": ["id,path,question,a,b,c,d,answer"], "test": ["id,path,question,a,b,c,d"]}
    for number in range(12):
        name = f"가{number}.png"
        Image.new("RGB", (40, 40), (20 * number, 0, 0)).save(tmp_path / name)
        rows["train"].append(f"TRAIN_{number},{name},{question},{'abcd'[number % 4]}")
        rows["test"].append(f"TEST_{number},{name},{question}")
    for name, lines in rows.items():
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ids = [f"TEST_{number}" for number in range(12)]
    sample = pd.DataFrame({"id": ids, "answer": "a"})
    sample.to_csv(tmp_path / "sample_submission.csv", index=False)
    run, out, csv = tmp_path / "run", tmp_path / "out" / "submission.csv", tmp_path / "test.csv"
    tune = f"tune --base {folder} --data {tmp_path / 'train.csv'} --few no --out {run}"
    assert main(tune.split()) == 0
    assert main(f"predict --model {run} --csv {csv} --out {out}".split()) == 0
    assert "can't read" not in capsys.readouterr().out  # byte by byte, Hangul is read
    written = pd.read_csv(out, dtype=str)
    assert list(written.columns) == ["id", "answer"] and list(written["id"]) == ids
    assert written["answer"].isin(list("abcd")).all()


def test_reports_and_blends_across_families(folder, run, competition, tmp_path, capsys):
    csv = competition / "test.csv"
    known = ["--csv", str(csv), "--answers", str(competition.parent / "answers.csv")]
    rows, results = read_questions(csv), []
    for model in (folder, run):
        out = tmp_path / model.name / "submission.csv"
        assert main(["predict", "--model", str(model), "--csv", str(csv), "--out", str(out)]) == 0
        results.append(out.with_name("probabilities.csv"))
    uniform = pd.DataFrame({"ID": [row.id for row in rows], **dict.fromkeys("ABCD", 0.25)})
    bridge = tmp_path / "bridge" / "probabilities.csv"  # such as a bundle's
    bridge.parent.mkdir()
    uniform.to_csv(bridge, index=False)
    blended = tmp_path / "blend" / "submission.csv"
    assert main(["blend", *map(str, [*results, bridge]), "--out", str(blended)]) == 0
    assert len(pd.read_csv(blended)) == len(rows)
    page = tmp_path / "comparison.html"
    both = ["evaluate", str(bridge), str(results[1]), *known, "--out", str(page)]
    assert main(both) == 0 and page.is_file()
    page = tmp_path / "report.html"
    assert main(["evaluate", "--model", str(run), *known, "--out", str(page)]) == 0
    facts = json.loads(page.with_suffix(".json").read_text())
    assert facts["manifest"]["method"] == "lora" and facts["cost"]["weights, MB"] > 0
    expected = letters_of(predict(load_tuned(run), rows).probabilities)
    assert list(pd.read_csv(tmp_path / "run" / "submission.csv")["answer"]) == expected


def test_captions_are_written_in_cocos_form_and_judged(folder, tmp_path, capsys):
    for n in range(3):
        Image.effect_noise((40 + n, 40), 90).convert("RGB").save(tmp_path / f"{n}.png")
    images = [{"id": n, "file_name": f"{n}.png"} for n in range(3)]
    said = [{"image_id": n, "caption": f"the digit {n} in grey"} for n in range(3)]
    csv = tmp_path / "val.json"
    csv.write_text(json.dumps({"images": images, "annotations": said}))
    out = tmp_path / "captions.json"
    arguments = ["--model", str(folder), "--csv", str(csv), "--out"]
    assert main(["predict", *arguments, str(tmp_path / "submission.csv")]) == 0
    rows = json.loads(out.read_text())
    assert [row["image_id"] for row in rows] == [0, 1, 2] and not kept_folder(out).exists()
    page = tmp_path / "report.html"
    assert main(["evaluate", *arguments, str(page)]) == 0 and page.is_file()
    other = tmp_path / "right.json"
    other.write_text(json.dumps(said))
    two = ["evaluate", str(out), str(other), "--csv", str(csv), "--out", str(page)]
    assert main(two) == 0
    scores = json.loads(page.with_suffix(".json").read_text())
    assert scores["scores"]["BLEU-4"] > scores["before"]["BLEU-4"]
    same = ["predict", "--model", str(folder), "--csv", str(csv), "--out", str(csv)]
    assert main(same) == 2 and "would be overwritten" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["other base", "no adapter", "no base", "captions", "no model"])
def test_bad_input_is_one_line_before_the_work(folder, run, competition, tmp_path, capsys, fault):
    model, csv = tmp_path / "run", competition / "test.csv"
    facts = json.loads((run / "run.json").read_text())
    model.mkdir()
    if fault == "other base":
        facts["base"] = str(families.save("llava", tmp_path / "other", layers=1))
    if fault == "no base":
        facts["base"] = str(tmp_path / "nowhere")
    if fault != "no model":
        (model / "run.json").write_text(json.dumps(facts))
    if fault not in ("no adapter", "no model"):
        (model / "adapter").symlink_to(run / "adapter")
    if fault == "captions":
        csv = tmp_path / "train.json"
        csv.write_text(json.dumps({"images": [{"id": 1, "file_name": "1.png"}], "annotations": []}))
    out = str(tmp_path / "submission.csv")
    assert main(["predict", "--model", str(model), "--csv", str(csv), "--out", out]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        said.startswith("error: ")
        and {
            "other base": "give the base that it was tuned on",
            "no adapter": "adapter is gone",
            "no base": "no model can be loaded from",
            "captions": "holds captions, not",
            "no model": "no model can be loaded from",
        }[fault]
        in said
    )


def test_half_precision_answers_alike(folder, asked):
    half = load_tuned(folder, dtype=torch.bfloat16)
    answers = predict(half, asked)
    assert half.model.dtype == torch.bfloat16
    exact = predict(load_tuned(folder), asked).probabilities
    np.testing.assert_allclose(answers.probabilities, exact, atol=0.1)


def test_four_bits_need_bitsandbytes(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="4 bits need bitsandbytes"):
        answer.load_model(folder, bits=True)


def test_a_question_that_says_nothing_asks_for_a_caption(tuned):
    rendered = tuned.batches.render(Question("1", None, "", ()))
    assert "One letter." in rendered and "option" not in rendered


def test_doctor_looks_at_what_tune_needs(folder, competition, tmp_path, capsys):
    csv = competition / "train.csv"
    stage = ["doctor", "--stage", "tune", "--base"]
    assert main([*stage, str(folder), "--csv", str(csv)]) == 0
    said = capsys.readouterr().out
    assert " tokens, a picture takes at most" in said and "counted once" in said
    assert "distinct pictures" in said and "memory: about" in said and "task choice" in said
    assert main([*stage, str(folder), "--csv", str(csv), "--targets", "nothing"]) == 1
    said = capsys.readouterr().out
    assert "problem  the decoder has no linear layers called nothing" in said
    blip = families.save("blip", tmp_path / "blip")
    Image.new("RGB", (40, 40)).save(tmp_path / "1.png")
    korean = tmp_path / "train.csv"
    korean.write_text("image,question,answer\n1.png,이것은 무엇인가요?,one\n")
    main([*stage, str(blip), "--csv", str(korean)])
    assert "the vocabulary can't read all of 1 of 1 questions" in capsys.readouterr().out
    assert main([*stage, str(tmp_path / "nowhere"), "--csv", str(csv)]) == 1
    assert "no model can be loaded from" in capsys.readouterr().out
