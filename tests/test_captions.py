import json
import os
import random
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from bridgeblip import InputError
from bridgeblip.data.questions import Question
from bridgeblip.evidence import captions, texts
from bridgeblip.evidence.answers import Answers
from bridgeblip.evidence.submission import write_captions
from bridgeblip.evidence.texts import read_texts, score_answers, score_captions
from bridgeblip.evidence.texts import write_text_report as report

RIGHT = [["a cat on a mat", "one cat lies there"], ["a big dog runs"], ["two red cars in a street"]]
SAID = ["a cat on the mat", "a dog runs", "a street"]

EXPECTED = [0.5458775936321948, 0.4349656780598882, 0.30612649242662787, 5.4310196902530834e-05,
            0.6980876849658393, 2.4141738937777677]  # fmt: skip


@pytest.fixture
def captioned(tmp_path):
    """A question on each of 12 pictures, with captions of its own."""
    asked = []
    for number in range(12):
        picture = tmp_path / f"{number}.png"
        Image.new("RGB", (16, 16), (20 * number, 99, 0)).save(picture)
        right = (f"the picture shows thing {number} here", f"thing {number} is in it")
        asked.append(Question(str(number), picture, "", (), references=right))
    return asked


def test_scores_equal_the_reference_implementation():
    # of pycocoevalcap 1.2 on the same tokens
    scores = score_captions(RIGHT, SAID)
    assert list(scores) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]
    assert list(scores.values()) == pytest.approx(EXPECTED, abs=1e-9)


MANY = int(os.environ.get("BRIDGEBLIP_EXAMPLES", "0"))


@pytest.mark.skipif(not (MANY or find_spec("pycocoevalcap")), reason="needs pycocoevalcap")
def test_many_scores_equal_the_reference_implementation():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    chance = random.Random(0)
    words = [f"word{number}" for number in range(60)]
    right, given = [], []
    for _ in range(MANY or 40):
        row = [chance.choices(words, k=chance.randint(1, 14)) for _ in range(chance.randint(1, 5))]
        near = [*chance.choice(row), *chance.choices(words, k=chance.randint(0, 3))]
        right.append(row)
        given.append(chance.choice([near, [], row[0], chance.choices(words, k=6)]))
    truth = {i: [" ".join(text) for text in row] for i, row in enumerate(right)}
    said = {i: [" ".join(text)] for i, text in enumerate(given)}
    theirs = Bleu(4).compute_score(truth, said, verbose=0)[0]
    theirs += [score().compute_score(truth, said)[0] for score in (Rouge, Cider)]
    ours = captions.bleu(right, given)
    ours += [np.mean(score(right, given)) for score in (captions.rouge, captions.cider)]
    assert ours == pytest.approx(theirs, abs=1e-9)


def test_texts_equal_to_their_references_score_as_high_as_can_be():
    scores = score_captions(RIGHT, [row[0] for row in RIGHT])
    assert scores["BLEU-4"] == pytest.approx(1) and scores["ROUGE-L"] == pytest.approx(1)
    assert score_captions(RIGHT[:1], ["a cat on a mat"])["CIDEr"] == 0  # of one picture


def test_an_empty_caption_scores_nothing_and_breaks_nothing():
    scores = score_captions(RIGHT, ["", "", ""])
    assert max(scores.values()) < 1e-6


@pytest.mark.parametrize("text, expected", [
    ("A man's dog isn't, can't!", "a man 's dog is n't ca n't"),
    ("It cannot (see) 1,000.", "it can not -lrb- see -rrb- 1,000"),
    ("black-and-white t-shirt...", "black-and-white t-shirt"),
    ("at 10:30 a.m. on St. John's", "at 10:30 a.m. on st. john 's"),
    ("두 마리의 고양이.", "두 마리의 고양이"),
])  # fmt: skip
def test_tokens_are_the_treebank_s(text, expected):
    assert captions.tokens(text) == expected.split()


@pytest.mark.parametrize("one, other", [
    ("Two dogs.", "2 dogs"), ("the cat", "A cat"), ("dont know", "don't know"), ("none", "0"),
    ("red, blue", "red blue"), ("1,000", "1000"), ("black/white", "black white"), ("예.", "예"),
    ("3.5", "3.5 "),
])  # fmt: skip
def test_answers_are_compared_as_vqa_does(one, other):
    assert texts.normalized(one) == texts.normalized(other)
    assert texts.normalized("3.5") != texts.normalized("35")


def test_answers_that_are_numbers_have_a_mean_error():
    scores = score_answers([["3"], ["ten"], ["2"], ["red"]], ["three", "7", "many", "Red."])
    assert scores == {"exact": 0.5, "numbers missed": 1, "mean error": 1.5}
    assert score_answers([["red"]], ["5"]) == {"exact": 0.0}
    assert score_answers([["-4"]], ["4"])["mean error"] == 8


def test_captions_file_is_coco_s_and_comes_back(tmp_path, captioned):
    asked = [replace(captioned[0], id="391895"), replace(captioned[1], id="frames/1.png")]
    answers = Answers(np.zeros((2, 0)), [[], []], ["", "too dark"])
    said = write_captions(tmp_path / "captions.json", asked, ["a cat", "고양이"], answers)
    assert "2 texts" in said and "too dark" in (tmp_path / "problems.csv").read_text()
    rows = json.loads((tmp_path / "captions.json").read_text(encoding="utf-8"))
    assert rows == [
        {"image_id": 391895, "caption": "a cat"},
        {"image_id": "frames/1.png", "caption": "고양이"},
    ]
    assert read_texts(tmp_path / "captions.json", asked[::-1]) == ["고양이", "a cat"]
    (tmp_path / "s.csv").write_text('id,answer\nframes/1.png,"b, c"\n391895,d\n')
    assert read_texts(tmp_path / "s.csv", asked) == ["d", "b, c"]
    with pytest.raises(InputError, match="no text for 1 of 1 questions, such as"):
        read_texts(tmp_path / "s.csv", [replace(asked[0], id="5")])
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="expected a list of image_id and caption"):
        read_texts(tmp_path / "x.json", asked)


@pytest.fixture
def judged(tmp_path, captioned):
    def judge(said, task="caption", asked=captioned, **how):
        facts = report(tmp_path / "r.html", task, asked, said, data="captions.json", **how)
        assert (
            json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["verdict"]
            == facts["verdict"]
        )
        assert facts["verdict"]["sentence"] in (tmp_path / "r.html").read_text(encoding="utf-8").replace("&#39;", "'")  # fmt: skip
        return facts

    return judge


def test_right_captions_are_believed(judged, captioned):
    said = [q.references[0] for q in captioned]
    facts = judged(said, before=["a thing"] * 12)
    assert facts["verdict"]["kind"] == "good" and facts["looking"].low > 0
    assert facts["change"].low > 0 and facts["scores"]["CIDEr"] > facts["before"]["CIDEr"]
    assert judged(["a thing"] * 11 + ["a"], before=said)["verdict"]["kind"] == "bad"


def test_captions_that_fit_other_pictures_are_doubted(judged, captioned):
    said = [q.references[0] for q in captioned]
    facts = judged(np.roll(said, 5).tolist())
    assert facts["verdict"]["kind"] == "doubt"
    assert "fit other pictures as well" in facts["verdict"]["sentence"]


@pytest.mark.parametrize("said, words", [
    (["a thing"] * 12, "all 12 texts are the same one"),
    ([""] * 12, "all 12 texts are empty"),
    (["", *["thing 1 is", "thing 2 is"] * 5, "thing"], "1 texts are empty"),
])  # fmt: skip
def test_what_says_nothing_is_said(judged, said, words):
    assert words in judged(said)["verdict"]["sentence"]


def test_one_picture_says_nothing(judged, captioned):
    facts = judged(["thing"], asked=captioned[:1])
    assert "Nothing can be concluded from one picture" in facts["verdict"]["sentence"]


def test_answers_are_held_against_the_most_frequent_one(judged, captioned):
    asked = [
        replace(q, question="how many?", references=(str(i % 3),)) for i, q in enumerate(captioned)
    ]
    facts = judged([q.references[0] for q in asked], "answer", asked)
    assert facts["scores"]["exact"] == 1 and facts["scores"]["mean error"] == 0
    assert facts["simpler"]["the most frequent right text, always"]["exact"] == pytest.approx(1 / 3)
    assert facts["verdict"]["kind"] == "good"
