import hashlib
import io
import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bridgeblip.__main__ import main
from bridgeblip.data.pictures import picture_key, picture_keys
from bridgeblip.data.questions import letter, letters, read_questions
from bridgeblip.embedded.digits import write_competition
from bridgeblip.evidence import metrics
from bridgeblip.evidence.answers import Answers, read_probabilities, with_answers
from bridgeblip.evidence.figures import (
    answer_figure,
    confusion_figure,
    question_sheet,
    reliability_figure,
    training_figure,
)
from bridgeblip.evidence.metrics import Estimate, accuracy_of
from bridgeblip.evidence.report import judge, write_comparison, write_report
from bridgeblip.evidence.submission import write_submission


@pytest.fixture
def probabilities(questions):
    values = np.full((len(questions), 4), 0.1)
    given = [q.answer if i % 4 else (q.answer + 1) % 4 for i, q in enumerate(questions)]
    values[np.arange(len(questions)), given] = 0.7
    return values


def texts(figure) -> str:
    figure.savefig(io.BytesIO(), format="png")  # it can be drawn
    return "\n".join(text.get_text() for axes in figure.axes for text in [*axes.texts, axes.title])


def test_accuracy(questions, probabilities):
    assert accuracy_of(questions, probabilities) == 0.75


def test_figures_say_what_they_show(questions, probabilities):
    assert "75.0% of 72 right" in texts(confusion_figure(questions, probabilities))
    sheet = texts(question_sheet(questions[:6], probabilities[:6]))
    for question in questions[:6]:
        assert question.id in sheet and question.choices[0] in sheet
    assert sheet.count("▶") == 6 and sheet.count("✓") == 6 and "70%" in sheet
    assert "▶" not in texts(question_sheet(questions[:3]))
    texts(answer_figure(probabilities))


def test_training_figure_starts_before_training():
    rows = [{"step": 0, "epoch": -1, "accuracy": 0.3, "low": 0.2, "high": 0.4, "pictures": 40}]
    rows += [{"step": i, "epoch": (i - 1) // 5, "loss": 2 / i} for i in range(1, 11)]
    rows += [{"step": 5, "epoch": 0, "accuracy": 0.8}, {"step": 10, "epoch": 1, "accuracy": 0.9}]
    figure = training_figure(pd.DataFrame(rows))
    drawn = texts(figure)
    assert all(text in drawn for text in ("0.30", "0.80", "0.90", "Validation on 40 pictures"))
    figure.draw_without_rendering()
    low, high = figure.axes[1].get_xlim()
    ticks = [
        t.get_text() for t in figure.axes[1].get_xticklabels() if low <= t.get_position()[0] <= high
    ]
    assert ticks == ["before", "0", "1"]
    assert "95% interval" in figure.axes[1].get_legend_handles_labels()[1]
    bare = training_figure(pd.DataFrame(rows)[["step", "epoch", "loss", "accuracy"]])
    assert "95% interval" not in bare.axes[1].get_legend_handles_labels()[1]
    texts(bare)
    one = pd.DataFrame(rows[:1] + rows[-1:], columns=["step", "epoch", "loss", "accuracy"])
    texts(training_figure(one))


def test_a_dollar_is_no_mathematics(questions):
    odd = replace(
        questions[0],
        id="$1$",
        question="Solve $\\begin{x}$ for $5",
        choices=("$", "$$", "$_$", "d"),
    )
    assert "$_$" in texts(question_sheet([odd]))


def test_people_see_what_the_model_sees(questions, tmp_path):
    grey, clear = tmp_path / "grey.png", tmp_path / "clear.png"
    Image.fromarray(np.array([[0, 30000], [60000, 65535]], np.uint16)).save(grey)
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(clear)
    sheet = question_sheet([replace(questions[0], image=path) for path in (grey, clear)])
    drawn = [np.asarray(axes.images[0].get_array()) for axes in sheet.axes if axes.images]
    assert drawn[0][..., 0].tolist() == [[0, 117], [233, 255]] and (drawn[1] == 255).all()


def test_reliability_figure_shows_every_bin():
    names = ("above", "up_to", "rows", "confidence", "accuracy")
    bins = [
        dict(zip(names, (0.5, 0.6, 10, 0.55, Estimate(0.4, 0.2, 0.7)), strict=True)),
        dict(zip(names, (0.9, 1.0, 90, 0.97, Estimate(0.95, 0.9, 0.99)), strict=True)),
    ]
    figure = reliability_figure(bins)
    texts(figure)
    upper, lower = figure.axes
    assert list(upper.lines[1].get_xdata()) == [0.55, 0.97]
    assert list(upper.lines[1].get_ydata()) == [0.4, 0.95]
    texts(reliability_figure([bins[1] | {"accuracy": Estimate(0.95)}]))
    assert [bar.get_height() for bar in lower.patches] == [10, 90]


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """160 test questions with answers, and a prediction of them that is written as predict writes
    it."""
    folder = tmp_path_factory.mktemp("judged")
    write_competition(folder, folder / "answers.csv", {"train": 1, "test": 40})
    asked = with_answers(read_questions(folder / "test.csv"), folder / "answers.csv")
    generator = np.random.default_rng(8)
    truth = np.array([q.answer for q in asked])
    scores = generator.normal(size=(len(asked), 4))
    scores[np.arange(len(asked)), truth] += generator.normal(2.5, 1.5, len(asked))
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    unsure = (probabilities.max(1) < 0.6).tolist()
    flags = [
        ["permuted"] * u + ["order"] * (u and i % 3 == 0) + ["blank"] * (i == 7)
        for i, u in enumerate(unsure)
    ]
    answers = Answers(probabilities.astype(np.float32), flags, [""] * len(asked))
    write_submission(asked, answers, None, folder / "submission.csv")
    table = pd.read_csv(folder / "test.csv").assign(answer=[letter(i) for i in truth])
    table.to_csv(folder / "answered.csv", index=False)
    return folder, asked


class Page(HTMLParser):
    """What a page shows: text by section, the rows of its tables, its cards."""

    def __init__(self, html):
        super().__init__()
        self.sections, self.rows, self.cards, self.open = {"": ""}, {"": []}, [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        if tag == "h2":
            self.sections["new"], self.rows["new"] = "", []
        elif tag == "tr":
            self.rows[list(self.rows)[-1]].append([])
        elif tag in ("td", "th"):
            self.rows[list(self.rows)[-1]][-1].append("")
        elif tag == "article":
            self.cards.append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "h2" in self.open:
            self.sections[data], self.rows[data] = self.sections.pop("new"), self.rows.pop("new")
        elif "style" not in self.open:
            self.sections[list(self.sections)[-1]] += data
            if "td" in self.open or "th" in self.open:
                self.rows[list(self.rows)[-1]][-1][-1] += data
            if "article" in self.open:
                self.cards[-1] += f" {data}"

    def bars(self, section):
        """Name with note, value with interval of each row of bars."""
        return [cells[:2] for cells in self.rows[section][1:]]


def shown(estimate):
    if estimate["low"] is None:
        return f"{estimate['value']:.1%}"
    return f"{estimate['value']:.1%}{100 * estimate['low']:.1f}–{estimate['high']:.1%}"


def test_every_number_is_found_again_in_the_probabilities_file(judged, tmp_path):
    """The page shows what the JSON holds, and the JSON what anyone computes from the CSV files."""
    folder, asked = judged
    table = pd.read_csv(folder / "probabilities.csv").merge(
        pd.read_csv(folder / "answered.csv"), on="ID"
    )
    values = table[["A_x", "B_x", "C_x", "D_x"]].to_numpy()
    table["given"] = [letter(i) for i in values.argmax(1)]
    table["right"] = table["given"] == table["answer"]
    table["sure"] = values.max(1)
    table["picture"] = [
        hashlib.md5((folder / path).read_bytes()).hexdigest() for path in table["img_path"]
    ]
    probabilities, flags = read_probabilities(folder, asked)
    assert (probabilities.to_numpy() == values).all()
    blank = np.roll(values, 1, axis=0)
    write_report(
        tmp_path / "report.html", asked, probabilities, flags=flags, blank_probabilities=blank,
        references={"head only": 0.5}, cost={"seconds": 3.25, "rows": 1160}, manifest={"a": 1},
        problems=pd.DataFrame({"ID": ["TEST_0007"], "reason": ["too dark"]}),
    )  # fmt: skip
    facts = json.loads((tmp_path / "report.json").read_text())
    page = Page((tmp_path / "report.html").read_text())
    found = facts["measures"]

    assert (found["questions"], found["pictures"]) == (160, table["picture"].nunique()) == (160, 40)
    assert found["right"] == table["right"].sum()
    assert found["accuracy"]["value"] == pytest.approx(table["right"].mean())
    by_picture = table.groupby("picture")["right"].sum().to_numpy()
    again = np.random.default_rng(77).choice(by_picture, (4000, 40)).sum(1) / 160
    assert [found["accuracy"]["low"], found["accuracy"]["high"]] == pytest.approx(
        np.quantile(again, [0.025, 0.975]), abs=0.03
    )
    head = page.sections[""]
    assert (
        f"{table['right'].mean():.1%}" in head
        and f"{table['right'].sum()} of 160 questions on 40" in head
    )
    assert f"{found['accuracy']['low']:.1%} to {found['accuracy']['high']:.1%}" in head
    assert facts["verdict"]["sentence"] in head

    right_blank = np.array([letter(i) for i in blank.argmax(1)]) == table["answer"]
    assert facts["blank"]["first"]["value"] == pytest.approx(right_blank.mean())
    assert facts["blank"]["difference"]["value"] == pytest.approx(
        (table["right"] * 1 - right_blank * 1).mean()
    )
    against = page.bars("Against simpler ways to answer")
    assert [cells[1] for cells in against] == [
        shown(found["accuracy"]), "25.0%",
        f"{table['answer'].value_counts(normalize=True).max():.1%}", "50.0%", shown(facts["blank"]["first"]),
    ]  # fmt: skip
    points = {name: f"{100 * value:+.1f}" for name, value in facts["blank"]["difference"].items()}
    sentence = f"worth {points['value']} points (95% interval {points['low']} to {points['high']})"
    assert sentence in page.sections["Against simpler ways to answer"]

    assert found["confusion"] == pd.crosstab(table["answer"], table["given"]).to_numpy().tolist()
    given = table["given"].value_counts()
    recall = table.groupby("answer")["right"].agg(["mean", "size"])
    assert [part["accuracy"]["value"] for part in found["recall"]] == pytest.approx(
        list(recall["mean"])
    )
    assert page.bars("By right letter") == [
        [f"{part['name']}right for {recall['size'][part['name']]} questions, "
         f"given to {given[part['name']]}",
         shown(part["accuracy"])]
        for part in found["recall"]
    ]  # fmt: skip

    words = table["flags"].fillna("")
    asked_again, depends = words.str.contains("permuted"), words.str.contains("order")
    orders = facts["orders"]
    assert orders["asked_again"] == asked_again.sum()
    assert orders["consistent"]["value"] == pytest.approx(1 - depends.sum() / asked_again.sum())
    kind = np.where(
        ~asked_again, "asked in one", np.where(depends, "the answer dep", "the same answ")
    )
    expected = table.groupby(kind)["right"].agg(["mean", "size"])
    assert [part["accuracy"]["value"] for part in orders["accuracy"]] == pytest.approx(
        list(expected["mean"])
    )
    assert [part["rows"] for part in orders["accuracy"]] == list(expected["size"])
    text = page.sections["Does the order of the choices matter?"]
    assert (
        f"{asked_again.sum()} questions" in text
        and f"{orders['consistent']['value']:.1%} (95%" in text
    )

    bins = table.groupby(np.ceil(table["sure"] * 10).astype(int)).agg(
        {"right": "mean", "sure": "mean", "ID": "size"}
    )
    assert [b["accuracy"]["value"] for b in found["reliability"]] == pytest.approx(
        list(bins["right"])
    )
    assert [b["confidence"] for b in found["reliability"]] == pytest.approx(list(bins["sure"]))
    error = (bins["ID"] * (bins["right"] - bins["sure"]).abs()).sum() / 160
    assert found["calibration_error"] == pytest.approx(error)
    text = page.sections["Is it as often right as it is sure?"]
    assert f"probability of {table['sure'].mean():.1%}" in text and f"error: {error:.3f} (" in text

    opener = table["Question"].str.lower().str.split().str[:2].str.join(" ")
    common = opener.value_counts()
    opener = opener.where(opener.map(common) >= 10, "other openers")
    length = table[["A_y", "B_y", "C_y", "D_y"]].map(lambda text: len(text.split())).max(axis=1)
    length = pd.cut(
        length,
        [0, 1, 3, 6, 99],
        labels=["1 word", "2 to 3 words", "4 to 6 words", "7 words or more"],
    )
    for name, kinds, heading in [
        ("openers", opener, "By how the question begins"),
        ("choice_lengths", length.astype(str), "By length of the longest choice"),
    ]:
        expected = table.groupby(kinds)["right"].agg(["mean", "size"])
        assert {part["name"]: part["rows"] for part in facts[name]} == dict(expected["size"])
        for part in facts[name]:
            assert part["accuracy"]["value"] == pytest.approx(expected["mean"][part["name"]])
            note = f"{part['rows']} question{'s' * (part['rows'] != 1)}"
            assert [part["name"] + note, shown(part["accuracy"])] in page.bars(heading)

    wrong = table[~table["right"]].sort_values("sure", ascending=False, kind="stable")
    table["margin again"] = np.sort(values)[:, -1] - np.sort(values)[:, -2]
    unsure = table.sort_values("margin again", kind="stable")
    assert facts["mistakes"] == list(wrong["ID"][:12]) and facts["least_certain"] == list(
        unsure["ID"][:12]
    )
    assert len(page.cards) == 24
    rows = [*wrong[:12].index, *unsure[:12].index]
    for i, card in zip(rows, page.cards, strict=True):
        for name, value in zip(letters(4), values[i], strict=True):
            mark = " ".join(
                [
                    ", ".join(
                        w
                        for w in ("right", "given")
                        if name == table.loc[i, w.replace("right", "answer")]
                    )
                ]
            )
            expected = f"{name}. {table.loc[i, name + '_y']} {mark} {value:.0%}".replace("  ", " ")
            assert (
                expected in card and table.loc[i, "ID"] in card and table.loc[i, "Question"] in card
            )
    assert all(
        f"sure to {sure:.1%}" in card
        for sure, card in zip(wrong["sure"], page.cards[:12], strict=False)
    )
    for margin, card in zip(unsure["margin again"], page.cards[12:], strict=False):
        assert f"{100 * margin:.1f} points apart" in card

    data = dict(page.rows["Data"][:10])
    assert (
        data["questions"] == "160"
        and data["distinct pictures"] == "40"
        and facts["data"]["questions"] == 160
    )
    assert (
        data["questions answered without looking"] == "1"
        and data["questions with the same choice twice"] == "0"
    )
    assert page.rows["Data"][-1] == ["TEST_0007", "too dark"]
    assert page.rows["Cost"] == [["seconds", "3.25"], ["rows", "1,160"]]


def test_answers_before_and_after_training_stand_side_by_side(judged, tmp_path):
    folder, asked = judged
    after, _ = read_probabilities(folder, asked)
    after = after.to_numpy()
    before = np.roll(after, 1, axis=1)
    changed = before.argmax(1) != after.argmax(1)
    facts = write_report(tmp_path / "report.html", asked, after, before=before)
    gained, right = facts["training"]["gained"], [q.answer for q in asked]
    assert facts["training"]["changed"] == changed.sum() == len(asked)
    assert gained == ((after.argmax(1) == right) & (before.argmax(1) != right)).sum()
    page = Page((tmp_path / "report.html").read_text())
    section = " ".join(page.sections["Before and after training"].split())
    assert f"{gained} wrong ones are right now" in section
    for choice in range(4):
        assert f"{before[0, choice]:.0%} → {after[0, choice]:.0%}" in page.cards[0]
    assert f"{letter(before[0].argmax())} before, {letter(after[0].argmax())} now" in page.cards[0]
    write_report(tmp_path / "report.html", asked, after)
    assert "Before and after" not in (tmp_path / "report.html").read_text()


def test_data_notes_count_what_is_odd(judged, tmp_path):
    _, asked = judged
    first = asked[0]
    other = (first.answer + 1) % 4
    odd = [
        first,
        replace(first, id="again"),
        replace(first, id="contradicts", answer=other),
        replace(first, id="short", choices=("x", "x", "", "y"), answer=0),
        replace(first, id="lost", image=None),
    ]
    notes = write_report(tmp_path / "report.html", odd, np.eye(4)[[q.answer for q in odd]])["data"]
    assert list(notes.values()) == [5, 2, 1, 2, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "given, blank, pictures, other, kind, expected",
    [
        (
            "good",
            "chance",
            40,
            0.5,
            "good",
            "Believe it, for questions and pictures like these: between",
        ),
        ("good", None, 40, 0.5, "doubt", "whether it looks at the pictures was not measured."),
        ("good", "chance", 40, 0.9, "doubt", "it is not shown to beat 'head only', 90.0%."),
        (
            "good",
            None,
            20,
            0.9,
            "doubt",
            "20 pictures are few; whether it looks at the pictures was not measured",
        ),
        ("B", None, 40, 0.5, "bad", "100% of all answers are B."),
        ("chance", None, 40, 0.5, "bad", "its interval reaches down to guessing, 25.0%."),
        ("good", "good", 40, 0.5, "bad", "without them it scores 90.0%."),
    ],
)
def test_verdict(given, blank, pictures, other, kind, expected):
    at, truth, groups = np.arange(160), np.arange(160) % 4, np.arange(160) % pictures
    runs = {"good": truth + (at % 10 == 0), "chance": truth + at // 40, "B": 1 + 0 * at}
    runs = {name: np.eye(4)[letters % 4] for name, letters in runs.items()}
    facts = {
        "measures": metrics.measure(truth, runs[given], groups),
        "blank": blank and metrics.compare(truth, runs[blank], runs[given], groups),
        "chance": {"guessing": 0.25, "always A": 0.25},
        "references": {"head only": other},
        "learned": None,
    }
    found, sentence = judge(facts)
    assert found == kind and expected in sentence


@pytest.mark.parametrize("bundle", [False, True])
def test_what_the_model_has_learned_from_is_named(judged, tmp_path, bundle):
    _, asked = judged
    right = np.eye(4)[[q.answer for q in asked]]
    keys = [key[:16] for key in picture_keys(q.image for q in asked).values()]

    def judge_with(pictures):
        manifest = {"base": "hub/base", "pictures": pictures}
        manifest = {"format": 1, "trained": manifest} if bundle else manifest
        return write_report(tmp_path / "r.html", asked, right, manifest=manifest, data="a/b.csv")

    facts = judge_with(keys)
    expected = "Don't believe this score: the model has learned from 40 of the 40 pictures."
    assert facts["verdict"] == {"kind": "bad", "sentence": expected}
    title = f"<title>base on b.csv, {facts['about']['date']}</title>"
    assert title in (tmp_path / "r.html").read_text()
    facts = judge_with([keys[0], "0" * 16])
    assert facts["verdict"]["kind"] == "doubt" and facts["learned"] == 1
    assert "the model has learned from 1 of the 40 pictures" in facts["verdict"]["sentence"]
    assert Page((tmp_path / "r.html").read_text()).rows["Where the model comes from"][-1][1] == "2"
    assert "learned" not in judge_with(["0" * 16])["verdict"]["sentence"]
    facts = write_report(tmp_path / "r.html", asked, right, manifest={"base": "b"})
    assert (
        facts["learned"] is None
        and "Not measured: whether the model has learned" in (tmp_path / "r.html").read_text()
    )


def test_nothing_is_concluded_from_few_pictures(judged, tmp_path):
    _, asked = judged
    few = asked[:36]  # on nine pictures
    right = np.eye(4)[[q.answer for q in few]]
    facts = write_report(tmp_path / "r.html", few, right, blank_probabilities=right[::-1])
    sentence = "Nothing can be concluded: 9 of at least 10 pictures that are needed."
    assert facts["verdict"] == {"kind": "doubt", "sentence": sentence}
    page = Page((tmp_path / "r.html").read_text())
    head = page.sections[""]
    assert head.index(sentence) < head.index("100.0%") and "interval" not in head
    assert json.loads((tmp_path / "r.json").read_text())["measures"]["accuracy"]["low"] is None
    keys = [picture_key(few[0].image)[:16]]
    facts = write_report(tmp_path / "r.html", few, right, manifest={"pictures": keys})
    assert "(the model has learned from 1 of the 9 pictures)." in facts["verdict"]["sentence"]
    facts = write_comparison(tmp_path / "r.html", few, right, right[::-1])
    assert facts["verdict"]["sentence"].startswith("Nothing can be concluded: 9 of")


def test_comparison_says_whether_a_gain_is_noise(judged, tmp_path):
    folder, asked = judged
    probabilities = read_probabilities(folder / "probabilities.csv", asked)[0].to_numpy()
    truth = np.array([q.answer for q in asked])
    right = probabilities.argmax(1) == truth
    mended, spoiled = probabilities.copy(), np.flatnonzero(right)[:1]
    mended[~right] = np.eye(4)[truth[~right]]
    mended[spoiled] = np.eye(4)[(truth[spoiled] + 1) % 4]
    out = tmp_path / "comparison.html"

    facts = write_comparison(out, asked, probabilities, mended, names=("runs/<a>", "runs/b"))
    assert (
        facts["verdict"]["kind"] == "good"
        and "better, and that is more than noise" in facts["verdict"]["sentence"]
    )
    assert json.loads((tmp_path / "comparison.json").read_text())["changed"] == facts["changed"]
    page = Page(out.read_text())
    assert len(facts["changed"]) == (~right).sum() + 1 and "runs/<a>" in page.sections[""]
    expected = {
        asked[i].id: [
            letter(truth[i]),
            letter(probabilities[i].argmax()),
            letter(mended[i].argmax()),
        ]
        for i in np.flatnonzero(probabilities.argmax(1) != mended.argmax(1))
    }
    assert {row[0]: row[1:4] for row in page.rows["All answers that changed"][1:]} == expected
    change = facts["comparison"]["difference"]
    assert change.value == pytest.approx(((~right).sum() - 1) / 160)
    assert f"{100 * change.value:+.1f} points" in page.sections[""]
    assert len(page.cards) == 12 + 1

    def verdict(*runs, **settings):
        return write_comparison(out, asked, *runs, **settings)["verdict"]

    assert "worse, and that is more than noise" in verdict(mended, probabilities)["sentence"]
    assert "same letter to all 160" in verdict(probabilities, probabilities)["sentence"]
    noise = probabilities.copy()
    noise[spoiled] = mended[spoiled]
    assert "may be noise" in verdict(probabilities, noise)["sentence"]
    assert "0 answers mended, 1 spoiled" in verdict(probabilities, noise)["sentence"]


def test_evaluate_a_bundle_then_its_results(judged, checkpoint, tmp_path, capsys):
    folder, _ = judged
    bundle, out = checkpoint / "torchscript.pt", tmp_path / "report.html"
    few = pd.read_csv(folder / "test.csv").head(40)
    few["img_path"] = [str(folder / path) for path in few["img_path"]]
    few.to_csv(tmp_path / "few.csv", index=False)
    csv = ["--csv", str(tmp_path / "few.csv"), "--answers", str(folder / "answers.csv")]
    assert main(["evaluate", "--model", str(bundle), *csv, "--out", str(out)]) == 0
    printed, facts = capsys.readouterr().out, json.loads((tmp_path / "report.json").read_text())
    assert facts["verdict"]["sentence"] in printed and f"wrote {out}" in printed
    assert (
        facts["blank"]
        and facts["cost"]["seconds to answer"] > 0
        and facts["manifest"]["format"] == 1
    )
    assert facts["problems"] == [] and facts["measures"]["questions"] == 40

    answered = ["--csv", str(folder / "answered.csv")]
    assert main(["evaluate", str(folder), *answered, "--out", str(out)]) == 0
    facts = json.loads((tmp_path / "report.json").read_text())
    assert facts["measures"]["questions"] == 160 and facts["blank"] is None
    both = [str(folder), str(folder / "probabilities.csv")]
    assert main(["evaluate", *both, *answered, "--out", str(tmp_path / "both.html")]) == 0
    assert (
        "same letter to all 160 questions" in capsys.readouterr().out
        and (tmp_path / "both.json").is_file()
    )
    for wrong in ([*both, "third"], ["--out", "report.json"]):
        assert main(["evaluate", *wrong, *answered]) == 2
        assert "expected at most two, and a name in .html" in capsys.readouterr().err
    assert main(["evaluate", "--model", str(bundle), "--csv", str(folder / "test.csv")]) == 2
    assert "lacks the column answer" in capsys.readouterr().err


def test_a_sheet_of_no_questions_is_empty():
    assert not [axes for axes in question_sheet([]).axes if axes.get_title()]
