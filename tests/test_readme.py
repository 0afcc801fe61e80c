"""The pages name only what exists, show only commands that run, and quote only what the code
says."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_datasets import downloads, pictures  # noqa: F401  (fixtures)

from bridgeblip.__main__ import build_parser, main
from bridgeblip.bridge.base import REAL_BASE, REAL_REVISION, TINY_BASE
from bridgeblip.bridge.budget import BUDGET_LIMIT, certify_budget, held_memory
from bridgeblip.bridge.config import LAYER_SELECTIONS, BridgeBlipConfig, BridgeSettings
from bridgeblip.bundle.format import load_bundle
from bridgeblip.bundle.predict import predict
from bridgeblip.data.questions import read_questions
from bridgeblip.embedded.digits import write_competition
from bridgeblip.evidence.submission import write_submission

LANGUAGES = ("README.md", "README.ko.md")
PAGES = (*LANGUAGES, "CONTRIBUTING.md", "checkpoint/README.md", "competition/README.md")
WRITTEN_BY_USE = {"demo/competition/", "demo/notebooks/", "checkpoint/", "checkpoint/state/", "checkpoint/adapter/",
                  "competition/"}  # fmt: skip
COMMAND = re.compile(r"(\w+=\S+ )?(\.venv/bin/\w+|python3?|make|pip|hf|accelerate) ")
MARKED = re.compile(
    r"\*(Needs .+|.+필요합니다.*)\*"
)  # the line above a block that can't be run here
RUN_ELSEWHERE = {  # command of the README: the file that has the same run, and its words for it
    "make demo": ("tests/test_demo.py", "run_demo(out"),
    "make test": (".ci/run", "make test\n"),
    "python3 -m venv .venv && .venv/bin/pip install -r requirements-dev.txt -c constraints.txt": (
        "Makefile", "-m pip install --quiet -r requirements-dev.txt -c constraints.txt"),
    ".venv/bin/python -m bridgeblip demo": ("tests/test_demo.py", "run_demo(out"),
    ".venv/bin/python -m pytest": ("Makefile", "$(PY) -m pytest\n"),
}  # fmt: skip
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[bool, list[str]]]:
    """The commands of each code block, and whether the line above says that they can't be run
    here."""
    parts = re.split(r"(?m)^```\n", text_of(page))  # prose, code, prose, ...
    found = [
        (
            bool(MARKED.fullmatch(prose.rstrip().rpartition("\n")[2])),
            list(filter(COMMAND.match, code.splitlines())),
        )
        for prose, code in zip(parts[::2], parts[1::2], strict=False)
    ]
    return [(marked, lines) for marked, lines in found if lines]


def commands(marked: bool | None = None) -> list[str]:
    return [line for mark, lines in blocks("README.md") for line in lines if marked in (None, mark)]


def tables(page: str) -> list[list[list[str]]]:
    """Every table of a page: rows of cells, the header first."""
    found = re.findall(r"(?:^\|.*\n)+", text_of(page), flags=re.M)
    return [[[cell.strip(" *") for cell in line.strip("|").split("|")] for line in table.splitlines()
             if not re.match(r"\| ?---", line)] for table in found]  # fmt: skip


def table_with(page: str, first_cell: str) -> list[list[str]]:
    """The rows below the header of the one table in which a row begins with ``first_cell``."""
    (table,) = [table for table in tables(page) if first_cell in [row[0] for row in table]]
    return table[1:]


# ---------------------------------------------------------------- commands


def test_every_bridgeblip_command_parses():
    verbs = [
        shlex.split(line.split("-m bridgeblip ")[1])
        for line in commands()
        if "-m bridgeblip " in line
    ]
    assert {arguments[0] for arguments in verbs} >= {
        "demo", "doctor", "prepare", "train", "features", "export", "predict", "blend", "evaluate", "share", "ablate"
    }  # fmt: skip
    for arguments in verbs:
        build_parser().parse_args(arguments)


@pytest.mark.parametrize("page", [*LANGUAGES, "CONTRIBUTING.md"])
def test_every_make_target_and_tool_exists(page):
    lines = [line for _, lines in blocks(page) for line in lines]
    targets = [line.split()[1] for line in lines if line.startswith("make ")]
    assert "test" in targets
    subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, check=True, capture_output=True)
    for tool in re.findall(r"(?:tools|tests)/\w+\.py", "\n".join(lines)):
        assert (ROOT / tool).is_file(), tool


@pytest.mark.parametrize("page", LANGUAGES)
def test_commands_in_the_prose_stand_in_a_block_too(page):
    prose = re.sub(r"```.*?```", "", text_of(page), flags=re.S)
    shown = {line for _, lines in blocks(page) for line in lines}
    named = {code for code in re.findall(r"`([^`]+)`", prose) if COMMAND.match(code)}
    assert {code for code in named if "…" not in code} <= shown  # "…": a message


@pytest.mark.parametrize("page", PAGES)
def test_every_option_that_is_named_exists(page):
    verbs = next(
        action for action in build_parser()._actions if action.dest not in ("help",)
    ).choices.values()
    sources = [
        v
        for verb in verbs
        for a in verb._actions
        if isinstance(a.choices, dict)
        for v in a.choices.values()
    ]
    known = {
        option
        for verb in [*verbs, *sources]
        for action in verb._actions
        for option in action.option_strings
    }
    prose = re.sub(r"```.*?```", "", text_of(page), flags=re.S)
    named = {
        option
        for code in re.findall(r"`([^`]+)`", prose)
        for option in re.findall(r"(?<!\S)--[a-z-]+", code)
    }
    assert named <= known, named - known


def test_every_layer_selection_is_named_and_no_other():
    line = re.search(r"`--layers` takes a\s+name \(([^)]+)\)", text_of("README.md"))[1]
    assert re.findall(r"`([^`]+)`", line) == list(LAYER_SELECTIONS)


def test_commands_run_elsewhere_are_run_there():
    assert set(RUN_ELSEWHERE) <= set(commands(marked=False))
    for path, words in RUN_ELSEWHERE.values():
        assert words in text_of(path), f"{path} does not run {words!r}"


@pytest.fixture
def checkout(tmp_path, downloads, monkeypatch):  # noqa: F811
    """A folder as a reader of the README has it: questions, downloads, a copy of the base, the
    demo's files."""
    folder = tmp_path / "bridgeblip"
    folder.mkdir()
    for name in ("bridgeblip", "requirements.txt"):
        (folder / name).symlink_to(ROOT / name)
    write_competition(folder / "competition", tmp_path / "answers.csv", {"train": 12, "test": 5})
    write_competition(
        folder / "demo" / "competition", folder / "demo" / "answers.csv", {"train": 12, "test": 5}
    )
    write_competition(folder / "heldout", tmp_path / "heldout.csv", {"train": 5, "test": 1})
    (folder / "heldout" / "train.csv").rename(folder / "heldout" / "questions.csv")
    for source, name in (
        (downloads / "aokvqa" / "aokvqa_v1p0_train.json", "aokvqa_v1p0_train.json"),
        (downloads / "coco", "competition/coco"),
        (downloads / "v7w" / "dataset_v7w_telling.json", "dataset_v7w_telling.json"),
        (downloads / "v7w" / "images", "competition/visual7w"),
        (downloads / "scienceqa" / "problems.json", "problems.json"),
        (downloads / "scienceqa", "competition/scienceqa"),
        (TINY_BASE, "instructblip"),
    ):
        (folder / name).symlink_to(source)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("BRIDGEBLIP_CACHE", str(tmp_path / "cache"))
    return folder


def two_results(folder) -> None:
    """Answers to questions set apart by the bundle, looking and not: what runs/a and runs/b stand
    for."""
    bundle = load_bundle(folder / "rehearsal" / "torchscript.pt")
    questions = read_questions(folder / "heldout" / "questions.csv", need_answers=True)
    for name, blank in (("a", False), ("b", True)):
        answers = predict(bundle, questions, blank_images=blank)
        write_submission(questions, answers, None, folder / "runs" / name / "submission.csv")


def test_every_command_that_needs_nothing_special_runs(checkout, capfd):
    """In the order of the page, but what others read comes first."""
    shown = [line for line in commands(marked=False) if line not in RUN_ELSEWHERE]
    assert len(shown) == len(set(shown)) >= 15
    last = [
        line for line in shown if "runs/" in line or "HF_HUB_OFFLINE" in line or "--clear" in line
    ]
    for line in sorted(shown, key=lambda line: line in last):  # stable
        words = shlex.split(line)
        if line == last[0]:
            two_results(checkout)
        if words[0] == "HF_HUB_OFFLINE=1":  # the hub's client reads it once, when it is imported
            done = subprocess.run(
                [sys.executable, *words[2:]], env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False
            )
            code = done.returncode
        else:
            assert words[:3] == ["python", "-m", "bridgeblip"], (
                f"neither run here nor elsewhere, nor marked: {line}"
            )
            code = main(words[3:])
        assert code == 0, f"{line}\n{capfd.readouterr().err[-2000:]}"
    for name in ("rehearsal/submission.csv", "report.html", "comparison.html", "blend/submission.csv",
                 "competition/all.csv", "adapter/README.md", "rehearsal/torchscript.pt"):  # fmt: skip
        assert (checkout / name).is_file(), name


def test_the_hubs_command_is_well_formed_and_names_the_pinned_revision(tmp_path):
    (line,) = [line for line in commands(marked=True) if line.startswith("hf ")]
    assert REAL_BASE in line and REAL_REVISION in line
    hf = os.path.join(os.path.dirname(sys.executable), "hf")
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [hf, *shlex.split(line)[1:]], cwd=tmp_path, env=offline, capture_output=True, text=True
    )
    assert "offline mode is enabled" in done.stderr, done.stderr  # it has understood the rest


# ---------------------------------------------------------------- names and links


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_path_exists(page):
    text = text_of(page)
    for link in re.findall(r"\]\(([^):#]+)\)", text):
        assert (ROOT / page).parent.joinpath(link).exists(), link
    for path in re.findall(
        r"`((?:bridgeblip|tools|tests|checkpoint|competition|results|docs)/[\w./-]*)`", text
    ):
        written = path in WRITTEN_BY_USE or re.search(r"\.(csv|pt|html)$|best\.json$", path)
        assert written or (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES)
def test_every_link_within_a_page_has_its_heading(page):
    text = re.sub(r"```.*?```", "", text_of(page), flags=re.S)
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert len(slugs) == len(set(slugs))
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= set(slugs)


def test_pictures_are_small():
    sizes = {path.name: path.stat().st_size for path in (ROOT / "docs").glob("*.png")}
    assert sizes and max(sizes.values()) < 150_000 and sum(sizes.values()) < 500_000
    assert set(re.findall(r"\]\(docs/([^)]+)\)", text_of("README.md"))) == set(sizes)


def test_every_module_and_tool_has_its_line():
    names = " ".join(row[0] for row in table_with("README.md", "`bridgeblip/bridge/config.py`"))
    listed = set(re.findall(r"`([^`]+)`", names))
    paths = [
        path
        for folder in ("bridgeblip", "tools", "experiments")
        for path in (ROOT / folder).rglob("*.py")
    ]
    files = {path.relative_to(ROOT).as_posix() for path in paths if path.name != "__init__.py"}
    assert files <= listed


# ---------------------------------------------------------------- messages


def literals() -> str:
    """Every text in the code, a line each; "…" stands where a value is put in."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "bridgeblip").rglob("*.py")]
    for path in ROOT.glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        sources.append(re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", code))
    texts = set()
    for node in [node for source in sources for node in ast.walk(ast.parse(source))]:
        if isinstance(node, ast.JoinedStr):
            texts.add(
                "".join(
                    part.value if isinstance(part, ast.Constant) else "…" for part in node.values
                )
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.add(node.value)
    return "\n".join(text.replace("\n", " ") for text in texts)


def test_every_message_quoted_is_one_that_the_code_has():
    texts = literals()
    rows = table_with("README.md", "`pip could not do it: …`")
    assert len(rows) >= 15
    for message, cause, remedy in rows:
        quotes = re.findall(r"`([^`]+)`", message)
        assert quotes and cause and remedy
        for quote in quotes:
            fixed = [part for part in re.split("…", quote) if part.strip(" :;,()")]
            assert sum(map(len, fixed)) >= 10, quote
            assert re.search(".*".join(map(re.escape, fixed)), texts), f"no code says {quote!r}"


# ---------------------------------------------------------------- figures


@pytest.fixture(scope="module")
def real() -> BridgeBlipConfig:
    return BridgeBlipConfig.from_json_file(ROOT / "instructblip.config.json")


def gigabytes(count: float) -> float:
    return count / 1e9


def test_memory_by_part_is_what_the_code_computes(real):
    (table,) = [table for table in tables("README.md") if table[0][0] == "GB held"]
    names = table[0][1:]
    training = [held_memory(real, DTYPES[name], BridgeSettings()) for name in names]
    answering = [held_memory(real, DTYPES[name])["total"] for name in names]
    expected = [[part, *(held[part] for held in training)] for part in training[0]]
    expected[-1][0] = "training, in all"
    expected.append(["answering, in all", *answering])
    assert table[1:] == [
        [part, *(f"{gigabytes(count):.2f}" for count in counts)] for part, *counts in expected
    ]


def test_what_each_machine_has_left_is_what_the_code_computes(real):
    rows = table_with("README.md", "T4")
    assert {"A100", "L4, RTX 3090, RTX 4090", "any other CPU"} <= {row[0] for row in rows}
    held = {
        name: [held_memory(real, dtype, bridge)["total"] for bridge in (BridgeSettings(), None)]
        for name, dtype in DTYPES.items()
    }
    for machine, size, name, *left, _settings in rows:
        assert left == [f"{float(size) - gigabytes(count):.1f}" for count in held[name]], machine


def test_parameter_counts_are_the_codes(real):
    total = certify_budget(real)["total"]
    for page in LANGUAGES:
        (row,) = [row for table in tables(page) for row in table if f"{BUDGET_LIMIT:,}" in row[1]]
        assert f"{total:,}" in row[1]


def test_layer_selections_are_reported_as_they_were_measured():
    measured = {row[0]: row for row in table_with("results/ablation/ablation.md", "0,3,...,21")}
    rows = table_with("README.md", "0,3,...,21")
    assert {row[0] for row in rows} >= {"0,2,4,6", "0,2,...,14", "0-7", "0,3,...,21"}
    for name, first, mean, after in rows:
        line = measured["all 24 layers" if name == "all 24" else name]
        assert (first, mean, after) == (line[2], line[4], line[6]), name


def test_speed_is_reported_as_it_was_measured():
    measured = {row[0]: row for row in table_with("results/bench.md", "bundle")}
    names = {
        "the bundle": "bundle",
        "the bundle, unsure rows in four orders": "bundle, four orders where unsure",
    }
    rows = table_with("README.md", "the bundle")
    assert len(rows) == len(measured) == 4

    def median(cell: str) -> str:
        return cell.split(" (")[0]

    for answers_by, speed, efficiency, padding in rows:
        line = measured[names.get(answers_by, answers_by.strip("`").replace("`,", ","))]
        assert (speed, efficiency, padding) == (median(line[2]), median(line[4]), line[8]), (
            answers_by
        )
    times = re.search(
        r"are ([\d.]+ \([\d.]+ to [\d.]+\)) times as fast", text_of("results/bench.md")
    )[1]
    assert f"are {median(times)} times as fast" in text_of("README.md")


# ---------------------------------------------------------------- two languages


def skeleton(page: str) -> dict[str, object]:
    """What a translation must leave as it is."""
    prose = re.sub(r"```.*?```", "", text_of(page), flags=re.S)
    return {
        "heading levels": re.findall(r"(?m)^#+(?= )", prose),
        "code blocks": re.findall(r"```.*?```", text_of(page), flags=re.S),
        "blocks that can't be run here": [marked for marked, _ in blocks(page)],
        "code in the prose": set(re.findall(r"`([^`]+)`", prose)),
        "code by table row": [
            sorted(re.findall(r"`([^`]+)`", row)) for row in re.findall(r"(?m)^\|.*", prose)
        ],
        "links": [link for link in re.findall(r"\]\(([^)#]+)\)", prose) if link not in LANGUAGES],
        "links within the page": len(re.findall(r"\]\(#", prose)),
        "figures by table row": [
            re.findall(r"\d\.\d+", row) for row in re.findall(r"(?m)^\|.*", prose)
        ],
    }


def test_both_languages_are_the_same_page():
    english, korean = map(skeleton, LANGUAGES)
    assert (
        english["code blocks"]
        and english["links"]
        and any(english["blocks that can't be run here"])
    )
    for what in english:
        assert korean[what] == english[what], what
