"""One picture and one question; and what a bundle is."""

import re
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from test_merge import run_of

from bridgeblip import InputError
from bridgeblip.__main__ import main
from bridgeblip.bundle.format import load_bundle
from bridgeblip.bundle.predict import predict
from bridgeblip.data.questions import Question
from bridgeblip.hosting.ask import BAR, ask, bars, upload
from bridgeblip.vlm.answer import answer_texts, load_tuned
from bridgeblip.vlm.answer import predict as answer


@pytest.fixture(scope="module")
def bundle_path(checkpoint):
    return checkpoint / "torchscript.pt"


@pytest.fixture(scope="module")
def picture(questions):
    return questions[0].image


def test_the_answer_is_that_of_predict_and_drawn_as_bars(bundle_path, picture, capsys):
    texts = ("cup", "bowl", "plate", "fork")
    bundle = load_bundle(bundle_path)
    expected = predict(bundle, [Question("1", picture, "What is shown?", texts)]).probabilities
    question, answers = ask(bundle, picture, "What is shown?", texts)
    assert (answers.probabilities == expected).all()
    assert main(["ask", str(bundle_path), str(picture), "What is shown?", *texts]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == bars(question, answers).splitlines() and lines[0] == "What is shown?"
    for letter, text, line, share in zip("ABCD", texts, lines[1:], expected[0], strict=True):
        assert re.match(rf"  {letter}\. {text} +{share:.1%}", line)
        assert line.count("█") == round(BAR * float(share))


def test_two_choices_will_do_and_what_is_odd_is_said(bundle_path, picture):
    # the last choice with a byte that is no UTF-8, as a terminal may give it
    question, answers = ask(bundle_path, None, "이것은 무엇입니까?", ["컵", " ", "bowl\udce9"])
    drawn = bars(question, answers)
    assert question.choices == ("컵", "bowl?") and drawn.count("%") == 2
    assert "note: answered without a picture" in drawn and "can't read" in drawn


@pytest.mark.parametrize(
    "given, error",
    [
        (("photo.jpg", "?", ["a"]), "got 1 choices: give two or more"),
        (("nowhere.jpg", "?", ["a", "b"]), "picture nowhere.jpg can't be read"),
        ((None, "?", list("abcde")), "5 choices"),
    ],
)
def test_what_cannot_be_asked_is_one_line(bundle_path, given, error):
    with pytest.raises(InputError, match=error) as raised:
        ask(bundle_path, *given)
    assert "\n" not in str(raised.value)


def test_a_picture_is_uploaded_where_there_is_a_dialogue(monkeypatch):
    with pytest.raises(InputError, match="only Colab can upload"):
        upload()
    chosen = {"cup.png": b""}
    colab = ModuleType("google.colab")
    colab.files = SimpleNamespace(upload=lambda: chosen)
    monkeypatch.setitem(sys.modules, "google", ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    assert upload().name == "cup.png"
    chosen.clear()
    with pytest.raises(InputError, match="no picture was chosen"):
        upload()


def test_inspect_says_what_a_file_is_whatever_it_records(bundle_path, base, capsys):
    assert main(["inspect", str(bundle_path)]) == 0
    printed = capsys.readouterr().out
    for fact in (str(base), "A, B, C, D", "[0, 2, 5]", "validation  not recorded", "Short answer:",
                 "float32", f"{bundle_path.stat().st_size / 1e6:,.1f} MB"):  # fmt: skip
        assert fact in printed
    assert main(["inspect", str(bundle_path.with_name("weights-0.pt"))]) == 2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of ``tune``, and merged beside it."""
    run, _ = run_of(
        "llava", tmp_path_factory.mktemp("tuned"), pictures=["a", "b"],
        validation={"accuracy": 0.75, "low": 0.5, "high": 0.875},
    )  # fmt: skip
    assert main(["merge", str(run)]) == 0
    return run


@pytest.mark.parametrize("name", [".", "merged"])
def test_runs_of_other_models_are_asked_and_inspected_too(run, name, picture, capsys):
    model, texts = str(run / name), ("cup", "bowl", "접시")
    tuned = load_tuned(model)
    asked = Question("1", picture, "What is shown?", texts)
    question, answers = ask(model, picture, "What is shown?", texts)
    np.testing.assert_array_equal(answers.probabilities, answer(tuned, [asked]).probabilities)
    capsys.readouterr()
    assert main(["ask", model, str(picture), "What is shown?", *texts]) == 0
    assert capsys.readouterr().out.splitlines() == bars(question, answers).splitlines()
    assert main(["ask", model, str(picture)]) == 0
    (text,) = answer_texts(tuned, [Question("1", picture, "", ())])[0]
    assert capsys.readouterr().out == f"{text}\n"
    assert main(["inspect", model]) == 0
    printed = capsys.readouterr().out
    for fact in (str(run.parent / "base"), "letters", "2 distinct pictures",
                 "accuracy 0.750, 95% interval 0.500 to 0.875"):  # fmt: skip
        assert fact in printed
    assert ("an ordinary model folder" in printed) == (name == "merged")


def test_a_model_that_is_none_is_one_line(tmp_path, picture, capsys):
    for command in (
        ["ask", str(tmp_path), str(picture), "?", "a", "b"],
        ["inspect", str(tmp_path)],
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(tmp_path) in error


def test_what_a_folder_needs_and_is_not_there_is_one_line(run, picture, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bridgeblip.vlm.answer", None)
    monkeypatch.delattr("bridgeblip.vlm.answer", raising=False)
    assert main(["ask", str(run), str(picture), "?", "a", "b"]) == 2
    assert "pip install 'bridgeblip[train]'" in capsys.readouterr().err
