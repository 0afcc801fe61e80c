"""One self-contained HTML page: no network, no script, for phone and desktop, light and dark.

The parts of a page take plain text, escape it, and return HTML.
"""

import base64
import io
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from bridgeblip.data.questions import Question, letter, letters
from bridgeblip.evidence.metrics import Estimate

THUMBNAIL_SIDE = 256  # pixels
THUMBNAIL_QUALITY = 70
ROWS_SHOWN = 50  # of a long table

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { --ink: #1f2328; --soft: #59636e; --paper: #fff; --sheet: #f6f8fa; --line: #d1d9e0; --blue: #0969da;
  --good: #1a7f37; --doubt: #9a6700; --bad: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --ink: #f0f6fc; --soft: #9198a1; --paper: #0d1117; --sheet: #151b23;
  --line: #3d444d; --blue: #4493f8; --good: #3fb950; --doubt: #d29922; --bad: #f85149; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, "Noto Sans", "Noto Sans CJK KR", "Malgun Gothic", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; padding-top: .8rem; border-top: 1px solid var(--line); }
p { margin: .4rem 0; max-width: 46rem; }
small, .missing, .id { color: var(--soft); }
small { display: block; font-size: .8rem; font-weight: normal; }
.headline { font-size: 3rem; line-height: 1.1; font-weight: 700; }
.good, .doubt, .bad { padding: .6rem .9rem; border-left: .35rem solid; background: var(--sheet); }
.good { border-color: var(--good); } .doubt { border-color: var(--doubt); } .bad { border-color: var(--bad); }
.missing { font-style: italic; }
.scroll { overflow-x: auto; } .scroll th, .scroll td { overflow-wrap: break-word; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
table.bars { width: 100%; table-layout: fixed; }
.bars th { width: 36%; font-weight: normal; } .bars td { width: 24%; } .bars td small { white-space: nowrap; }
.bars td:last-child { width: 40%; padding: 0; }
.scale { display: flex; justify-content: space-between; }
.track { position: relative; height: 1.1rem; margin-top: .4rem; background: linear-gradient(90deg, var(--line) 1px,
  transparent 1px) 0 0 / 25% 100%, var(--sheet); border-right: 1px solid var(--line); }
.track i { position: absolute; top: .3rem; height: .5rem; background: var(--blue); opacity: .45; border-radius: 2px; }
.track b { position: absolute; top: 0; width: 3px; margin-left: -1px; height: 100%; background: var(--ink); }
figure { display: inline-block; margin: .6rem .6rem 0 0; max-width: 100%; }
figure img { display: block; width: 26rem; max-width: 100%; height: auto; background: #fff; padding: .5rem;
  border: 1px solid var(--line); border-radius: .5rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .8rem; margin: .8rem 0; }
article { border: 1px solid var(--line); border-radius: .5rem; background: var(--sheet); padding: .7rem; }
article img, .blank { display: block; width: 100%; height: 9rem; object-fit: contain; }
.blank { display: grid; place-items: center; color: var(--soft); }
article ol { list-style: none; margin: .4rem 0 0; padding: 0; }
article li { display: flex; gap: .5rem; padding: .1rem .3rem; margin: .2rem 0; border-radius: .25rem; }
article li span { flex: 1; }
article li strong { color: var(--good); } article li.wrong strong { color: var(--bad); }
li.right, li.wrong { outline: 1px solid var(--good); } li.wrong { outline-color: var(--bad); }
pre { overflow-x: auto; font-size: .8rem; background: var(--sheet); padding: .7rem; border-radius: .5rem; }
summary { cursor: pointer; color: var(--blue); }
</style>
</head>
<body>
$body
</body>
</html>
""")


def page(title: str, blocks: Iterable[str]) -> str:
    """The whole page."""
    return PAGE.substitute(title=escape(title), body="\n".join(blocks))


def section(heading: str, *blocks: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n" + "\n".join(blocks) + "\n</section>"


def title(text: str) -> str:
    return f"<h1>{escape(text)}</h1>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph; ``kind`` is a class of the page's style: headline, good, doubt, bad."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def missing(text: str) -> str:
    """What a section says for want of its input."""
    return paragraph(f"Not measured: {text}", "missing")


def table(frame: pd.DataFrame) -> str:
    with pd.option_context("display.max_colwidth", None):
        return f'<div class="scroll">{frame.to_html(index=False, escape=True, border=0)}</div>'


def details(summary: str, text: str) -> str:
    """Long text, folded away."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def percent(value: float) -> str:
    return f"{value:.1%}"


def points(value: float) -> str:
    """A difference of shares, signed."""
    return f"{100 * value:+.1f}"


def bars(rows: Iterable[tuple[str, Estimate | float, str]]) -> str:
    """A table of shares, each a name, a value with or without its interval, and a note; drawn from
    0% to 100%."""
    scale = '<tr><th></th><td></td><td><small class="scale"><span>0%</span><span>100%</span></small></td></tr>'
    return f'<table class="bars">{scale}' + "".join(_bar(*row) for row in rows) + "</table>"


def _bar(name: str, value: Estimate | float, note: str) -> str:
    interval, span = "", ""
    if isinstance(value, Estimate):
        interval = f"<small>{100 * value.low:.1f}–{value.high:.1%}</small>"
        span = f'<i style="left:{value.low:.1%};width:{value.high - value.low:.1%}"></i>'
        value = value.value
    note = f"<small>{escape(note)}</small>" if note else ""
    track = f'<div class="track">{span}<b style="left:{value:.1%}"></b></div>'
    return f"<tr><th>{escape(name)}{note}</th><td>{percent(value)}{interval}</td><td>{track}</td></tr>\n"


def figure(drawing: Figure, description: str) -> str:
    """A figure as SVG on a white card, legible on any page."""
    file = io.BytesIO()
    drawing.savefig(file, format="svg", metadata={"Date": None})
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img alt="{escape(description)}" src="data:image/svg+xml;base64,{data}"></figure>'
    )


def cards(questions: Sequence[Question], probabilities: np.ndarray, notes: Sequence[str]) -> str:
    """Questions with picture, choices and probabilities (N, 4); each has a note of its own."""
    shown = [_card(*row) for row in zip(questions, probabilities, notes, strict=True)]
    return '<div class="cards">' + "\n".join(shown) + "</div>"


def _card(question: Question, probabilities: np.ndarray, note: str) -> str:
    given, choices = int(probabilities.argmax()), []
    for i, choice in enumerate(question.choices):
        if not choice:
            continue
        kind = "right" if i == question.answer else "wrong" if i == given else ""
        marks = [
            word for word, place in (("right", question.answer), ("given", given)) if i == place
        ]
        mark = f"<strong>{', '.join(marks)}</strong>" if marks else ""
        text = f"<span>{letter(i)}. {escape(choice)}</span>{mark}<em>{probabilities[i]:.0%}</em>"
        choices.append(f'<li class="{kind}">{text}</li>' if kind else f"<li>{text}</li>")
    picture = thumbnail(question.image) if question.image else None
    shown = '<div class="blank">no readable picture</div>'
    if picture:
        shown = f'<img alt="picture of {escape(question.id)}" src="{picture}">'
    head = f'<div class="id">{escape(question.id)}</div><div>{escape(question.question)}</div>'
    return (
        f"<article>{shown}{head}<ol>{''.join(choices)}</ol><small>{escape(note)}</small></article>"
    )


def thumbnail(path: Path) -> str | None:
    """Return a picture as a small JPEG in a data URI; None if it can't be read."""
    file = io.BytesIO()
    try:
        with Image.open(path) as picture:
            small = ImageOps.exif_transpose(picture).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    paper = Image.new("RGBA", small.size, "white")
    Image.alpha_composite(paper, small).convert("RGB").save(file, "JPEG", quality=THUMBNAIL_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def report_page(
    facts: dict[str, Any],
    questions: Sequence[Question],
    probabilities: np.ndarray,
    confusion: Figure,
    reliability: Figure,
) -> str:
    """Return the page of one run.

    Args:
        facts: as ``report.write_report`` gathers them.
        questions: all of them.
        probabilities: (N, 4).
    """
    measures, place = facts["measures"], {q.id: i for i, q in enumerate(questions)}
    ordered = np.sort(probabilities, axis=1)

    def shown(ids: list[str], note) -> str:
        rows = [place[i] for i in ids]
        return cards(
            [questions[i] for i in rows], probabilities[rows], [note(ordered[i]) for i in rows]
        )

    blocks = [
        title("How good are these answers?"),
        paragraph(percent(measures.accuracy.value), "headline"),
        paragraph(
            f"{measures.right:,} of {measures.questions:,} questions on {measures.pictures:,} "
            f"different pictures are "
            f"answered right. On other pictures of the same kind expect "
            f"{measures.accuracy.low:.1%} to "
            f"{measures.accuracy.high:.1%} (95% interval; questions on one picture count as one "
            f"draw)."
        ),
        paragraph(facts["verdict"]["sentence"], facts["verdict"]["kind"]),
        section("Against simpler ways to answer", *_against(facts)),
        section(
            "Which letters are mixed up",
            paragraph("An even diagonal is good; a dark column is a "
                      "letter that is given too often."),
            figure(confusion, f"right letter against letter given: {measures.confusion}"),
            paragraph(f"Nearly all answers are "
                      f"{measures.collapse}.", "bad") if measures.collapse else "",
        ),
        section(
            "By right letter",
            paragraph("Of the questions whose answer is this letter, the share that got it. Equal "
                      "bars: no letter is"
                      " favoured for its place."),
            bars((part.name, part.accuracy, f"right {part.rows} times, given {given} times")
                 for part, given in _given(measures)),
        ),
        section("Does the order of the choices matter?", *_orders(facts["orders"])),
        section(
            "Is it as often right as it is sure?",
            paragraph(f"On average the answer given has a probability of "
                      f"{measures.confidence:.1%}, and "
                      f"{measures.accuracy.value:.1%} are right: {_sureness(measures)}. Expected "
                      f"calibration error: "
                      f"{measures.calibration_error:.3f} (0 is perfect). Dots below the dotted "
                      f"line: too sure."),
            figure(reliability, "share right by probability of the answer given"),
        ),
        section(
            "By how the question begins",
            paragraph("The first two words, the most frequent first. Compare only where the bands "
                      "are apart."),
            bars(_by_size(facts["openers"])),
        ),
        section("By length of the longest choice", bars(_by_size(facts["choice_lengths"]))),
        section(
            "Most confident mistakes",
            paragraph("Surest first. Look for wrong answer keys and for questions of one kind."),
            shown(facts["mistakes"], lambda p: f"wrong, and sure to {p[-1]:.1%}")
            if facts["mistakes"] else paragraph("There are none: every answer is right."),
        ),
        section(
            "Least certain answers",
            paragraph("Here the two best choices lie closest together."),
            shown(facts["least_certain"], lambda p: f"the two best are {100 * (p[-1] - p[-2]):.1f} "
                                                    f"points apart"),
        ),
        section("Data", *_data(facts)),
        section("Cost", _pairs(facts["cost"]) if facts["cost"] else missing("no times and sizes "
                                                                            "were given.")),
        section(
            "Where the model comes from",
            details("manifest", json.dumps(facts["manifest"], ensure_ascii=False, indent=1, default=str))
            if facts["manifest"] else missing("no manifest was given."),
        ),
    ]  # fmt: skip
    return page("How good are these answers?", blocks)


def _against(facts: dict[str, Any]) -> list[str]:
    measures, blank = facts["measures"], facts["blank"]
    rows = [("this run", measures.accuracy, "")]
    if measures.weighted:
        rows.append(("this run, weighted", measures.weighted, "as the weights given ask"))
    others = facts["chance"] | (facts["references"] or {})
    rows += [
        (name, share, _against_other(measures.accuracy, share)) for name, share in others.items()
    ]
    if blank:
        rows.append(("without looking: blank pictures", blank.first, ""))
    legend = "The line is the share of right answers, the blue band its 95% interval: what lies in it may be chance."
    blocks = [paragraph(legend), bars(rows)]
    if blank:
        change = blank.difference
        blocks.append(
            paragraph(
                f"Looking at the pictures is worth {points(change.value)} points (95% interval "
                f"{points(change.low)} to "
                f"{points(change.high)}); the rest comes from the words alone."
            )
        )
    else:
        blocks.append(
            missing(
                "the score without looking; without it nobody knows whether the pictures matter."
            )
        )
    if not facts["references"]:
        blocks.append(
            missing(
                "other models on these questions, such as the slice without bridge, or the head "
                "alone."
            )
        )
    if not measures.weighted:
        blocks.append(
            missing("weighted accuracy; no weights were given, every question counts the same.")
        )
    return blocks


def _against_other(score: Estimate, share: float) -> str:
    if share < score.low:
        return "beaten"
    return "not reached" if share > score.high else "no difference shown"


def _given(measures) -> Iterable[tuple]:
    given = dict(
        zip(letters(len(measures.confusion)), np.sum(measures.confusion, axis=0), strict=True)
    )
    return [(part, given[part.name]) for part in measures.recall]


def _orders(orders: dict[str, Any] | None) -> list[str]:
    if orders is None:
        return [
            missing(
                "no flags came with the probabilities; predict with permutations of the choices."
            )
        ]
    if not orders["asked_again"]:
        return [missing("no question was asked again with its choices in another order.")]
    asked = f"{orders['asked_again']:,} questions, the least certain, were asked again with their choices in other orders"
    return [
        paragraph(f"{asked}; the same answer came every time in {orders['consistent']}."),
        bars((part.name, part.accuracy, _count(part.rows)) for part in orders["accuracy"]),
    ]


def _sureness(measures) -> str:
    excess = measures.confidence - measures.accuracy.value
    if measures.accuracy.low <= measures.confidence <= measures.accuracy.high:
        return "as sure as it should be"
    return f"too {'sure' if excess > 0 else 'careful'} by {100 * abs(excess):.1f} points"


def _count(questions: int) -> str:
    return f"{questions:,} question{'s' * (questions != 1)}"


def _by_size(parts) -> list[tuple]:
    return [
        (part.name, part.accuracy, _count(part.rows))
        for part in sorted(parts, key=lambda part: -part.rows)
    ]


def _data(facts: dict[str, Any]) -> list[str]:
    blocks, problems = [_pairs(facts["data"])], facts["problems"]
    if problems is None:
        return [*blocks, missing("problems; no list of them was given.")]
    if not problems:
        return [*blocks, paragraph("No row had a problem.")]
    more = f"; the first {ROWS_SHOWN}" if len(problems) > ROWS_SHOWN else ""
    return [
        *blocks,
        paragraph(f"{len(problems)} problems{more}:"),
        table(pd.DataFrame(problems[:ROWS_SHOWN])),
    ]


def _pairs(values: dict[str, Any]) -> str:
    shown = [
        f"{v:,}" if isinstance(v, int) else f"{v:,.4g}" if isinstance(v, float) else str(v)
        for v in values.values()
    ]
    return table(pd.DataFrame({"what": list(values), "how much": shown}))


def comparison_page(
    facts: dict[str, Any], questions: Sequence[Question], second: np.ndarray, count: int
) -> str:
    """Return the page of two runs.

    Args:
        facts: as ``report.write_comparison`` gathers them.
        questions: all of them.
        second: probabilities (N, 4) of the second run.
        count: at most so many questions with pictures a kind.
    """
    comparison, names, place = (
        facts["comparison"],
        facts["names"],
        {q.id: i for i, q in enumerate(questions)},
    )

    def shown(what: str) -> str:
        rows = [row for row in facts["changed"] if row["what"] == what][:count]
        if not rows:
            return paragraph("There are none.")
        at = [place[row["ID"]] for row in rows]
        notes = [
            f"{row['first']} in the first run, {row['second']} in the second; right is "
            f"{row['right']}"
            for row in rows
        ]
        return cards([questions[i] for i in at], second[at], notes)

    change = comparison.difference
    numbers = (
        f"At most {count} are shown, with the second run's probabilities; the table below has all."
    )
    blocks = [
        title("Is this gain noise?"),
        paragraph(f"{points(change.value)} points", "headline"),
        paragraph(facts["verdict"]["sentence"], facts["verdict"]["kind"]),
        paragraph(
            f"{comparison.questions:,} questions on {comparison.pictures:,} different pictures, "
            f"{'weighted' if facts['weighted'] else 'counting the same'}; {comparison.changed:,} "
            f"changed their answer. "
            "The interval pairs the runs question by question; questions on one picture count as "
            "one draw."
        ),
        bars(
            [
                ("first run", comparison.first, names["first"]),
                ("second run", comparison.second, names["second"]),
            ]
        ),
        section(
            "Mended: wrong in the first run, right in the second",
            paragraph(numbers),
            shown("mended"),
        ),
        section(
            "Spoiled: right in the first run, wrong in the second",
            paragraph(numbers),
            shown("spoiled"),
        ),
        section(
            "All answers that changed",
            table(pd.DataFrame(facts["changed"]))
            if facts["changed"]
            else paragraph("There are none."),
        ),
    ]
    return page("Is this gain noise?", blocks)
