"""One file from a chat model: exact, small, and alone."""

import json
import subprocess
import sys
import textwrap

import families
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from test_merge import run_of
from torch import nn

from bridgeblip import InputError
from bridgeblip.__main__ import main
from bridgeblip.bundle import predict as bundled
from bridgeblip.bundle.format import as_traced, load_bundle
from bridgeblip.bundle.gate import ParityError
from bridgeblip.bundle.trace import constants_of, graphs
from bridgeblip.data.pictures import open_picture
from bridgeblip.data.questions import Question, read_questions
from bridgeblip.files import write_text
from bridgeblip.vlm import answer, export
from bridgeblip.vlm.answer import load_tuned
from bridgeblip.vlm.batches import letter_logits
from bridgeblip.vlm.merge import merge

LETTERS = 5
SETTINGS = {"pixels": 56, "system": "", "prompt": ""}
FACTS = {"letters": LETTERS, "settings": SETTINGS, "permute_below": 0.01}


@pytest.fixture(scope="module", params=["llava", "internvl"])
def run(request, tmp_path_factory):
    return run_of(request.param, tmp_path_factory.mktemp(request.param), **FACTS)[0]


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
    rows = read_questions(competition / "test.csv")[:36]
    rows.append(Question("blank", None, "What?", ("a", "b", "c", "d", "e")))
    encoded, encode = [], bundled._encode_pictures
    monkeypatch.setattr(bundled, "_encode_pictures", lambda bundle, pixels, size: encoded.extend(pixels) or encode(bundle, pixels, size))
    ours = bundled.predict(bundle, rows)
    theirs = answer.predict(live, rows)
    assert len(encoded) == len({row.image for row in rows})
    np.testing.assert_allclose(ours.probabilities, theirs.probabilities, atol=1e-5)
    assert (ours.flags, ours.problems) == (theirs.flags, theirs.problems)
    assert any("permuted" in flags for flags in ours.flags)
