"""One picture and one question; and what a bundle is."""

import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
from test_inference import make_bundle

from bridgeblip import InputError
from bridgeblip.__main__ import main
from bridgeblip.bundle.format import load_bundle
from bridgeblip.bundle.predict import predict
from bridgeblip.data.questions import Question
from bridgeblip.hosting.ask import BAR, ask, bars, upload


@pytest.fixture(scope="module")
def bundle_path(base, processor, tmp_path_factory):
    return make_bundle(base, processor, tmp_path_factory.mktemp("checkpoint"))


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
    question, answers = ask(bundle_path, None, "이것은 무엇입니까?", ["컵", " ", "bowl"])
    drawn = bars(question, answers)
    assert question.choices == ("컵", "bowl") and drawn.count("%") == 2
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
