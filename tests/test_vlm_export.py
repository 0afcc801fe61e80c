"""One file from a chat model: exact, small, and alone."""

import subprocess
import sys
import textwrap
from dataclasses import replace

import families
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from test_merge import run_of

from bridgeblip import InputError
from bridgeblip.__main__ import main
from bridgeblip.bundle import predict as bundled
from bridgeblip.bundle.export import ParityError
from bridgeblip.bundle.format import as_traced, load_bundle
from bridgeblip.bundle.trace import constants_of, graphs
from bridgeblip.data.pictures import open_picture
from bridgeblip.data.questions import NUM_CHOICES, Question, read_questions
from bridgeblip.evidence.answers import letters_of
from bridgeblip.vlm import answer
from bridgeblip.vlm.answer import load_tuned
from bridgeblip.vlm.batches import letter_logits
from bridgeblip.vlm.export import FEATURES, export_chat, llava_features
from bridgeblip.vlm.merge import merge
from bridgeblip.vlm.processing import ChatProcessor

LETTERS = 5
SETTINGS = {"pixels": 56, "system": "", "prompt": ""}
FACTS = {"letters": LETTERS, "settings": SETTINGS, "permute_below": 0.01}


@pytest.fixture(scope="module", params=["llava", "internvl"])
def run(request, tmp_path_factory):
    """Of a base of whose four decoder layers two have stayed."""
    folder = tmp_path_factory.mktemp(request.param)
    return run_of(request.param, folder, layers=[0, 3], **FACTS)[0]


@pytest.fixture(scope="module")
def path(run):
    out = run / "torchscript.pt"
    assert main(["export", "--weights", str(run), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def bundle(path):
    return load_bundle(path)


@pytest.fixture(scope="module")
def live(run):
    return load_tuned(run)


def asked(questions, lengths):
    """Questions of different lengths, and with different choices."""
    chosen = []
    for question, words in zip(questions, lengths, strict=False):
        text = " ".join(["what is seen here"] * words)
        chosen.append(Question("1", question.image, text, ("one", "two", "three")))
    return chosen


@pytest.mark.parametrize("lengths", [[1], [9], [30], [1, 1], [9, 1], [2, 30, 1, 5, 9], [3] * 5])
def test_exact_whatever_batch_length_and_padding(bundle, live, questions, lengths):
    rows = asked(questions, lengths)
    processor = bundle.processor
    batch = live.batches.ask(rows, [open_picture(row.image) for row in rows])
    with torch.inference_mode():
        expected = letter_logits(live.model, batch, processor.letter_ids)
    texts = processor.encode_prompts([processor.prompt(row) for row in rows])
    pixels = torch.stack([processor.load_pixels(row.image) for row in rows])
    assert torch.equal(pixels, batch["pixel_values"])
    for row in range(len(rows)):  # theirs is padded on the left
        ids = texts["input_ids"][row][texts["attention_mask"][row].bool()]
        assert torch.equal(ids, batch["input_ids"][row][batch["attention_mask"][row].bool()])
    with as_traced():
        logits = bundle.model(pixel_values=pixels, **texts)
        apart = bundle.model.score(bundle.model.encode_image(pixels), **texts)
    assert logits.shape == (len(rows), LETTERS) and torch.equal(logits, apart)
    assert (logits - expected).abs().max() <= 1e-4
    assert expected.std() > 1e-2  # there is something to compare


def test_follows_its_inputs_anywhere(path, bundle):
    loaded = torch.jit.load(str(path), map_location="meta")
    for kind in ("DeviceObjType", "TensorType"):
        assert not [node for graph in graphs(loaded) for node in constants_of(graph, kind)]
    pixels = torch.empty(2, 3, *bundle.processor.image_size, device="meta")
    texts = bundle.processor.encode_prompts(["a", "b c d"])
    with as_traced():
        logits = loaded(pixels, *(tensor.to("meta") for tensor in texts.values()))
    assert logits.shape == (2, LETTERS) and logits.device.type == "meta"


def test_answers_as_the_live_model_does(bundle, live, competition, monkeypatch):
    rows = read_questions(competition / "test.csv")
    rows.append(Question("blank", None, "What?", ("a", "b", "c", "d", "e")))
    long = " ".join(["and"] * 3000)
    loaded, load = [], bundle.processor.load_pixels
    monkeypatch.setattr(
        bundle.processor, "load_pixels", lambda path: loaded.append(path) or load(path)
    )
    ours, theirs = bundled.predict(bundle, rows), answer.predict(live, rows)
    assert len(loaded) == len({row.image.read_bytes() for row in rows[:-1]}) < len(rows) / 2
    np.testing.assert_allclose(ours.probabilities, theirs.probabilities, atol=1e-5)
    assert letters_of(ours.probabilities) == letters_of(theirs.probabilities)
    assert (ours.flags, ours.problems) == (theirs.flags, theirs.problems)
    assert {"permuted", "blank"} <= {flag for flags in ours.flags for flag in flags}
    shortened = bundled.predict(bundle, [replace(rows[0], question=long)])
    assert "shortened" in shortened.flags[0] and shortened.probabilities.sum() == pytest.approx(1)


def test_alone_it_answers_and_says_what_it_is(path, bundle, competition, tmp_path):
    """In a process that can import none of the training libraries."""
    csv, out = competition / "test.csv", tmp_path / "submission.csv"
    picture = str(read_questions(csv)[0].image)
    commands = [
        ["predict", "--model", str(path), "--csv", str(csv), "--out", str(out)],
        ["ask", str(path), picture, "What is <image> shown?", *"abcde"],
        ["inspect", str(path)],
        ["doctor", "--stage", "predict", "--csv", str(csv), "--checkpoint-dir", str(path.parent)],
    ]
    script = f"""
        import sys
        for name in ("transformers", "peft", "accelerate", "huggingface_hub", "torchvision"):
            sys.modules[name] = None
        sys.path.insert(0, {str(ROOT)!r})
        from bridgeblip.__main__ import main
        sys.exit(max(main(command) for command in {commands!r}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", decoder layers [0, 3]" in done.stdout
    assert "E. e" in done.stdout and "answers     A, B, C, D, E" in done.stdout
    assert done.stdout.count("\nprompt ") == 1 and "A. {choice}\\nB. {choice}" in done.stdout
    expected = bundled.predict(bundle, read_questions(csv))
    assert list(pd.read_csv(out)["answer"]) == letters_of(expected.probabilities)


def test_a_merged_folder_gives_the_same_file(run, bundle, live, tmp_path):
    merge(run)
    path, parity = export_chat(run / "merged", tmp_path / "torchscript.pt", "bfloat16")
    assert list(parity["form"].unique()) == ["merged", "bfloat16", "reloaded"]
    other = load_bundle(path)
    assert other.processor.fingerprint == bundle.processor.fingerprint
    assert {p.dtype for p in other.model.parameters()} == {torch.bfloat16}
    assert path.stat().st_size < 0.9 * (run / "torchscript.pt").stat().st_size


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_only_what_lives_is_in_the_file(family, tmp_path):
    angles = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}  # as InternVL3 has it
    model, processor = families.build(family, width=384, rope_parameters=angles)
    dead, tower = [], model.model.vision_tower
    if family == "llava":  # whose head is not tied, and the layer before the last is looked at
        dead = [model.lm_head, tower.encoder.layers[-1]]
    else:
        processor.image_processor.crop_to_patches = False
    model.save_pretrained(tmp_path / "wide")
    processor.save_pretrained(tmp_path / "wide")
    path, _ = export_chat(tmp_path / "wide", tmp_path / "torchscript.pt")
    live = model.num_parameters() + NUM_CHOICES * 384
    live -= sum(parameter.numel() for module in dead for parameter in module.parameters())
    assert sum(p.numel() for p in load_bundle(path).model.parameters()) == live
    assert path.stat().st_size <= 1.03 * 4 * live


@pytest.mark.parametrize(
    "family, facts, reason",
    [("blip", {}, "it is a 'blip' model, none of llava, internvl"),
     ("llava", {"task": "caption"}, "it writes texts"),
     ("internvl", {"settings": SETTINGS | {"pixels": 0}}, "it cuts pictures into tiles")],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_pointed_to_merge(family, facts, reason, tmp_path):
    run, _ = run_of(family, tmp_path, **facts)
    with pytest.raises(InputError, match=f"can't become one file: {reason}.*; merge") as raised:
        export_chat(run, tmp_path / "torchscript.pt")
    assert "\n" not in str(raised.value) and not (tmp_path / "torchscript.pt").exists()
    assert main(["export", "--weights", str(run), "--base", "tiny"]) == 2


def test_faults_stop_the_export(tmp_path, monkeypatch):
    run, _ = run_of("llava", tmp_path)
    flipped = ChatProcessor.shrink
    with monkeypatch.context() as planted, pytest.raises(InputError, match="can be carried"):
        planted.setattr(ChatProcessor, "shrink", lambda *given: flipped(*given)[::-1])
        export_chat(run, tmp_path / "torchscript.pt")
    monkeypatch.setitem(FEATURES, "llava", lambda *given: -llava_features(*given))
    with pytest.raises(ParityError, match="merged"):
        export_chat(run, tmp_path / "torchscript.pt")
    assert not (tmp_path / "torchscript.pt").exists()
