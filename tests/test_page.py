import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import jinja2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bridgeblip.evidence import page
from bridgeblip.evidence.report import write_comparison, write_report

HOSTILE = "<script>alert(1)</script> & \"'"


class Tags(HTMLParser):
    """Every tag with its attributes, and all that is text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def is_self_contained(html):
    tags = Tags(html).tags
    assert not {tag for tag, _ in tags} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "a",
    }
    for _, attributes in tags:
        assert not [
            name
            for name in attributes
            if name.startswith("on") or name in ("href", "srcset", "background")
        ]
        assert attributes.get("src", "data:image/").startswith("data:image/")
    without_data = re.sub(r'src="data:[^"]*"', "", html)
    return (
        "http" not in without_data.replace("http-equiv", "")
        and "url(" not in without_data
        and "@import" not in html
    )


@pytest.fixture
def hostile(questions, tmp_path):
    """Questions whose texts and file try to break the page, some Korean, and probabilities."""
    broken = tmp_path / "broken.jpg"
    broken.write_text("no picture")
    texts = {
        "id": HOSTILE,
        "question": HOSTILE,
        "choices": (HOSTILE, "<b>", "사과", ""),
        "answer": 1,
        "image": broken,
    }
    asked = [replace(questions[0], **texts), *questions[1:12]]
    asked[1] = replace(asked[1], question="이 사진에 무엇이 보입니까?", image=None)
    return asked, np.tile([0.7, 0.1, 0.1, 0.1], (12, 1))


def test_all_text_is_escaped_and_nothing_is_fetched(hostile, tmp_path):
    asked, probabilities = hostile
    out = tmp_path / "report.html"
    write_report(
        out, asked, probabilities, references={HOSTILE: 0.5}, cost={HOSTILE: HOSTILE},
        manifest={HOSTILE: [HOSTILE, "한국어"]}, problems=pd.DataFrame({"ID": [HOSTILE], "reason": ["<i>" * 40]}),
    )  # fmt: skip
    html = out.read_text(encoding="utf-8")
    assert is_self_contained(html) and "<script" not in html
    text = Tags(html).text
    assert text.count(HOSTILE) >= 8 and "<b>" in text and "<i>" * 40 in text
    assert "이 사진에 무엇이 보입니까?" in text and "한국어" in text and "사과" in text
    assert html.count("no readable picture") == 4  # two pictures, each in two sections
    assert (
        '<meta name="viewport" content="width=device-width' in html
        and "prefers-color-scheme: dark" in html
    )
    assert len(html) < 300_000
    write_comparison(out, asked, probabilities, probabilities[:, ::-1], names=(HOSTILE, "b"))
    html = out.read_text(encoding="utf-8")
    assert is_self_contained(html) and "<script" not in html and HOSTILE in Tags(html).text


def test_sections_without_input_say_so(questions, tmp_path):
    right = np.eye(4)[[q.answer for q in questions]]
    write_report(tmp_path / "report.html", questions, right)
    text = Tags((tmp_path / "report.html").read_text(encoding="utf-8")).text
    for lacking in (
        "the score "
        "without looking", "other models on these questions", "no flags came",
        "no list of them", "no times and sizes", "no manifest",
    ):  # fmt: skip
        assert re.search(rf"Not measured: [^.]*{lacking}", text), lacking
    assert "There are none: every answer is right." in text
    write_report(
        tmp_path / "report.html", questions, right, flags=[[]] * 72, problems=pd.DataFrame()
    )
    text = Tags((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "Not measured: no question was asked again" in text and "No row had a problem." in text


def test_bars_draw_the_interval(questions, tmp_path):
    right = np.eye(4)[[q.answer for q in questions]]
    facts = write_report(tmp_path / "r.html", questions, right, references={"other": 0.125})
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    low = facts["measures"]["accuracy"].low
    assert f"100.0%<small>{100 * low:.1f}–100.0%</small>" in html
    assert f"left:{low:.1%};width:{1 - low:.1%}" in html
    assert "<th>other<small>beaten</small></th><td>12.5%</td>" in html and "left:12.5%" in html


def test_a_value_that_a_template_lacks_is_an_error():
    with pytest.raises(jinja2.UndefinedError):
        page.render("comparison", title="t")


@pytest.mark.parametrize("mode, name", [("L", "a.png"), ("P", "a.png"), ("RGBA", "a.png"), ("CMYK", "a.jpg"),
                                        ("I;16", "a.png"), ("1", "a.bmp"), ("RGB", "a.webp")])  # fmt: skip
def test_thumbnails_are_small_and_of_any_kind(tmp_path, mode, name):
    Image.new(mode, (900, 300)).save(tmp_path / name)
    data = page.thumbnail(tmp_path / name)
    assert data.startswith("data:image/jpeg;base64,") and len(data) < 8_000
    with Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))) as small:
        assert small.size == (256, 85) and small.mode == "RGB"
        if mode == "RGBA":
            assert small.getpixel((9, 9)) == (255, 255, 255)  # transparency is laid on white


def test_pictures_that_cannot_be_read_have_no_thumbnail(tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    for path in (tmp_path / "text.jpg", tmp_path / "empty.png", tmp_path / "nowhere.png", tmp_path):
        assert page.thumbnail(path) is None
