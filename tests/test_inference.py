import json
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LAYERS, ROOT
from torch import nn

from bridgeblip import InputError, inference
from bridgeblip.checkpoints import save_weights
from bridgeblip.config import BridgeSettings
from bridgeblip.export import export_bundle, restore
from bridgeblip.inference import Bundle, letters_of, load_bundle, predict, write_submission
from bridgeblip.model import attach_bridge, load_sliced, trained_tensors
from bridgeblip.questions import read_questions


@pytest.fixture(scope="module")
def bundle_path(base, processor, tmp_path_factory):
    torch.manual_seed(0)
    model = attach_bridge(load_sliced(base, processor.letter_ids, LAYERS), BridgeSettings(rank=192))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("checkpoint")
    manifest = {"base": str(base), "revision": None, "layers": list(LAYERS), "bridge": vars(BridgeSettings(rank=192))}
    save_weights(folder / "weights-0.pt", trained_tensors(model), manifest)
    return export_bundle(folder / "weights-0.pt", folder / "torchscript.pt")[0]


@pytest.fixture(scope="module")
def bundle(bundle_path):
    return load_bundle(bundle_path)


@pytest.fixture(scope="module")
def asked(competition):
    return read_questions(competition / "test.csv")


def test_answers_as_the_trained_model_does(bundle, bundle_path, asked):
    trained = restore(bundle_path.with_name("weights-0.pt")).model
    expected = predict(Bundle(trained, bundle.processor, {}, torch.device("cpu")), asked)
    probabilities = predict(bundle, asked)
    assert letters_of(probabilities) == letters_of(expected) and len(set(letters_of(probabilities))) > 1
    np.testing.assert_allclose(probabilities, expected, atol=1e-4)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)


def test_batch_size_order_and_window_change_nothing(bundle, asked, monkeypatch):
    expected = predict(bundle, asked)
    np.testing.assert_allclose(predict(bundle, asked, batch_size=1), expected, atol=1e-4)
    np.testing.assert_allclose(predict(bundle, asked[::-1], batch_size=7)[::-1], expected, atol=1e-4)
    monkeypatch.setattr(inference, "PICTURES_A_WINDOW", 2)
    np.testing.assert_allclose(predict(bundle, asked), expected, atol=1e-4)


def test_each_distinct_picture_is_encoded_once(bundle, asked):
    encoded = []

    class Counting(nn.Module):
        score = staticmethod(bundle.model.score)

        def encode_image(self, pixels):
            encoded.append(len(pixels))
            return bundle.model.encode_image(pixels)

    predict(Bundle(Counting(), bundle.processor, {}, torch.device("cpu")), asked)
    assert len(asked) == 20 and sum(encoded) == 5


def test_missing_choices_get_no_probability(bundle, competition, tmp_path):
    table = pd.read_csv(competition / "test.csv", dtype=str)
    table["D"] = ""
    table["img_path"] = [str(competition / path) for path in table["img_path"]]
    table.to_csv(tmp_path / "test.csv", index=False)
    probabilities = predict(bundle, read_questions(tmp_path / "test.csv"))
    assert (probabilities[:, 3] == 0).all()
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)


def test_blank_images_do_not_look(bundle, asked):
    blank = predict(bundle, asked, blank_images=True)
    assert not np.allclose(blank, predict(bundle, asked), atol=1e-3)
    same_prompt = [q for q in asked if q.prompt == asked[0].prompt]
    assert np.allclose(predict(bundle, same_prompt, blank_images=True), blank[0], atol=1e-5)


def test_submission_follows_the_sample(bundle, asked, competition, tmp_path):
    sample = pd.read_csv(competition / "sample_submission.csv", dtype=str).iloc[::-1]
    sample.columns = ["id", "Answer"]
    sample.to_csv(tmp_path / "sample.csv", index=False)
    probabilities = predict(bundle, asked)
    write_submission(asked, probabilities, tmp_path / "sample.csv", tmp_path / "out" / "submission.csv")
    written = pd.read_csv(tmp_path / "out" / "submission.csv", dtype=str)
    assert list(written.columns) == ["id", "Answer"] and list(written["id"]) == list(sample["id"])
    assert list(written["Answer"]) == letters_of(probabilities)[::-1]
    detail = pd.read_csv(tmp_path / "out" / "probabilities.csv")
    np.testing.assert_allclose(detail[list("ABCD")], probabilities, atol=1e-6)
    sample.iloc[1:].to_csv(tmp_path / "sample.csv", index=False)
    with pytest.raises(InputError, match="differ in 1 IDs"):
        write_submission(asked, probabilities, tmp_path / "sample.csv", tmp_path / "submission.csv")
    assert not (tmp_path / "submission.csv").exists()


@pytest.mark.parametrize("damage", ["missing", "weights only", "torn", "text", "foreign", "newer", "other processor"])
def test_unusable_bundles_are_one_clear_error(bundle_path, tmp_path, damage):
    path = tmp_path / "torchscript.pt"
    content = bundle_path.read_bytes()
    if damage == "weights only":
        (tmp_path / "weights-0.pt").write_bytes(b"")
    elif damage in ("torn", "text"):
        path.write_bytes({"torn": content[: len(content) // 2], "text": b"hello"}[damage])
    elif damage != "missing":
        files = dict.fromkeys([*inference.PROCESSOR_FILES, "manifest.json"], "")
        model = torch.jit.load(str(bundle_path), _extra_files=files)
        manifest = json.loads(files["manifest.json"])
        manifest |= {"newer": {"format": 99}, "other processor": {"processor": "another"}}.get(damage, {})
        files["manifest.json"] = json.dumps(manifest)
        torch.jit.save(model, str(path), _extra_files={} if damage == "foreign" else files)
    hint = {"missing": "train.ipynb first", "weights only": "torchscript.ipynb first", "newer": "update bridgeblip"}
    with pytest.raises(InputError, match=rf"torchscript\.pt.*{hint.get(damage, '')}"):
        load_bundle(path)


def test_needs_neither_transformers_nor_peft(bundle_path, competition, tmp_path):
    """In a process that can import none of them, the command answers the test set from the file alone."""
    script = f"""
        import sys
        for name in ("transformers", "peft", "accelerate", "sklearn", "matplotlib", "huggingface_hub"):
            sys.modules[name] = None
        from bridgeblip.__main__ import main
        code = main(["predict", "--model", {str(bundle_path)!r}, "--csv", {str(competition / "test.csv")!r},
                     "--out", {str(tmp_path / "submission.csv")!r}])
        sys.exit(code)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "20 answers" in done.stdout
    assert set(pd.read_csv(tmp_path / "submission.csv")["answer"]) <= set("ABCD")
