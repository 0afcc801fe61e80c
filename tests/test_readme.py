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

from bridgeblip.__main__ import VERBS, build_parser, main
from bridgeblip.bridge.base import REAL_BASE, REAL_REVISION, TINY_BASE, BridgeBlipConfig
from bridgeblip.bridge.budget import BUDGET_LIMIT, certify_budget, held_memory
from bridgeblip.bridge.settings import BridgeSettings
from bridgeblip.bundle.format import load_bundle
from bridgeblip.bundle.predict import predict
from bridgeblip.data.questions import read_questions
from bridgeblip.embedded.digits import write_competition
from bridgeblip.evidence.submission import write_submission
from bridgeblip.training.settings import LAYER_SELECTIONS

TOPICS = sorted(p.stem for p in (ROOT / "docs").glob("*.md") if not p.stem.endswith(".ko"))
ENGLISH = ["README.md", *(f"docs/{name}.md" for name in TOPICS)]
KOREAN = ["README.ko.md", *(f"docs/{name}.ko.md" for name in TOPICS)]
PAGES = [*ENGLISH, *KOREAN, "CONTRIBUTING.md", "checkpoint/README.md", "competition/README.md"]
LARGEST = {"README.md": 51_500, "README.ko.md": 61_000}  # bytes of a language's pages together
WRITTEN_BY_USE = {"demo/competition/", "demo/notebooks/", "checkpoint/", "checkpoint/state/", "checkpoint/adapter/",
                  "competition/"}  # fmt: skip
COMMAND = re.compile(
    r"(\w+=\S+ )?(\.venv/bin/\w+|python3?|make|pip|hf|accelerate|torchrun|bridgeblip) "
)
MARKED = re.compile(
    r"\*(Needs .+|.+필요합니다.*)\*"
)  # the line above a block that can't be run here
RUN_ELSEWHERE = {  # command of a page: the file that has the same run, and its words for it
    "make demo": ("tests/test_demo.py", "run_demo(out"),
    "make test": (".ci/run", "make test\n"),
    "python3 -m venv .venv && .venv/bin/pip install -r requirements-dev.txt -c constraints.txt": (
        "Makefile", "-m pip install --quiet -r requirements-dev.txt -c constraints.txt"),
    ".venv/bin/python -m bridgeblip demo": ("tests/test_demo.py", "run_demo(out"),
    ".venv/bin/python -m pytest": ("Makefile", "$(PY) -m pytest\n"),
}  # fmt: skip
BARE = {
    "python -m bridgeblip",
    "bridgeblip --version",
    "pip install .",
    'pip install ".[train]"',
    "accelerate launch",
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[bool, list[str]]]:
    """The commands of each code block, and whether the line above says that they can't be run
    here."""
    found = []
    for match in re.finditer(r"(?ms)^```\w*\n(.*?)^```\n", text_of(page)):
        above = text_of(page)[: match.start()].rstrip().rpartition("\n")[2]
        lines = list(filter(COMMAND.match, match[1].splitlines()))
        if lines:
            found.append((bool(MARKED.fullmatch(above)), lines))
    return found


def prose_of(page: str) -> str:
    return re.sub(r"```.*?```", "", text_of(page), flags=re.S)


def commands(marked: bool | None = None) -> list[str]:
    found = [block for page in ENGLISH for block in blocks(page)]
    return [line for mark, lines in found for line in lines if marked in (None, mark)]


def arguments_of(line: str) -> list[str] | None:
    """What a command gives to this package; None if it runs something else."""
    match = re.match(r"(?:.*-m )?bridgeblip (.*)", line)
    return shlex.split(match[1]) if match else None


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
    verbs = [arguments for line in commands() if (arguments := arguments_of(line))]
    assert {arguments[0] for arguments in verbs} >= {
        "demo", "doctor", "prepare", "train", "export", "predict", "blend", "evaluate", "share"
    }  # fmt: skip
    for arguments in verbs:
        build_parser().parse_args(arguments)


@pytest.mark.parametrize("verb", VERBS)
def test_the_example_of_its_help_stands_on_a_page(verb):
    """And is run with the page's, or in the verb's own test if it needs a base, a model or more."""
    example = f"bridgeblip {verb} {VERBS[verb][1]}".strip()
    assert example in {line[line.find("bridgeblip") :] for line in commands()}


def options_of_script(path: str) -> set[str]:
    return set(re.findall(r'"(--[a-z-]+)"', text_of(path)))


def test_every_script_exists_and_has_the_options_given():
    lines = [line for page in [*ENGLISH, "CONTRIBUTING.md"] for _, b in blocks(page) for line in b]
    scripts = {}
    for line in lines:
        for script in re.findall(r"(?:tools|tests|experiments)/\w+\.py", line):
            given = set(re.findall(r"(?<=\s)--[a-z-]+", line.split(script)[1]))
            scripts.setdefault(script, set()).update(given)
    assert {"experiments/ablation.py", "experiments/bench.py", "tools/verify_gpu.py"} <= set(
        scripts
    )
    for script, given in scripts.items():
        assert given <= options_of_script(script), script


@pytest.mark.parametrize(
    "page", ["README.md", "README.ko.md", "docs/results.md", "CONTRIBUTING.md"]
)
def test_every_make_target_exists(page):
    lines = [line for _, lines in blocks(page) for line in lines]
    targets = [line.split()[1] for line in lines if line.startswith("make ")]
    assert {"test", "verify-real"} & set(targets)
    subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("pages", [ENGLISH, KOREAN], ids=["English", "Korean"])
def test_commands_in_the_prose_stand_in_a_block_too(pages):
    having = [*pages, "CONTRIBUTING.md"]
    shown = {line for page in having for _, lines in blocks(page) for line in lines}
    for page in pages:
        named = {code for code in re.findall(r"`([^`]+)`", prose_of(page)) if COMMAND.match(code)}
        left = {code for code in named if "…" not in code} - shown  # "…": a message
        assert left <= BARE, page


@pytest.mark.parametrize("page", PAGES)
def test_every_option_that_is_named_exists(page):
    known = set().union(*map(options_of_script, scripts()))
    parsers = [build_parser()]
    for parser in parsers:  # grows on the way
        for action in parser._actions:
            known |= set(action.option_strings)
            if isinstance(action.choices, dict):
                parsers += action.choices.values()
    named = set()
    for code in re.findall(r"`([^`]+)`", prose_of(page)):
        named |= set(re.findall(r"(?<!\S)--[a-z-]+", code))
    assert named <= known, named - known


def test_every_layer_selection_is_named_and_no_other():
    line = re.search(r"`--layers` takes a\s+name \(([^)]+)\)", text_of("docs/commands.md"))[1]
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
    for name in ("bridgeblip", "experiments", "pyproject.toml", "requirements.txt"):
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


def run_python(folder, capfd) -> None:
    """Run the code of the page for those who call it from their own, in its language too."""
    (folder / "checkpoint").mkdir(exist_ok=True)
    (folder / "checkpoint" / "torchscript.pt").symlink_to(folder / "rehearsal" / "torchscript.pt")
    picture = read_questions(folder / "competition" / "train.csv")[0].image
    (folder / "photo.jpg").symlink_to(picture)
    (code,) = re.findall(r"(?ms)^```python\n(.*?)^```\n", text_of("docs/from-python.md"))
    capfd.readouterr()
    exec(code, {})
    printed = capfd.readouterr().out
    assert re.match(r"\[(0\.\d+ *){4}\] \[.*\]", printed) and "can't be read" not in printed, (
        printed
    )


def test_every_command_that_needs_nothing_special_runs(checkout, capfd):
    """In the order of the pages, but what others read comes first."""
    shown = [line for line in commands(marked=False) if line not in RUN_ELSEWHERE]
    assert len(shown) == len(set(shown)) >= 13
    last = [line for line in shown if "runs/" in line or "HF_HUB_OFFLINE" in line]
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
            arguments = arguments_of(line)
            assert arguments, f"neither run here nor elsewhere, nor marked: {line}"
            code = main(arguments)
        assert code == 0, f"{line}\n{capfd.readouterr().err[-2000:]}"
    for name in ("rehearsal/submission.csv", "report.html", "comparison.html", "blend/submission.csv",
                 "competition/all.csv", "adapter/README.md", "rehearsal/torchscript.pt"):  # fmt: skip
        assert (checkout / name).is_file(), name
    run_python(checkout, capfd)


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


def headings(page: str) -> list[str]:
    """The names by which a page's headings are linked to."""
    found = re.findall(r"(?m)^#+ (.+)$", prose_of(page))
    slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found]
    assert len(slugs) == len(set(slugs)), page
    return slugs


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_path_exists(page):
    for path, heading in re.findall(r"\]\(([^):#]*)(?:#([^)]+))?\)", text_of(page)):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        assert not heading or heading in headings(target.relative_to(ROOT).as_posix()), heading
    for path in re.findall(
        r"`((?:bridgeblip|experiments|tools|tests|checkpoint|competition|results|docs)/[\w./-]*)`",
        text_of(page),
    ):
        written = path in WRITTEN_BY_USE or re.search(r"\.(csv|pt|html)$|best\.json$", path)
        assert written or (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES)
def test_no_badge_leads_nowhere(page):
    assert not re.search(r"colab\.research\.google\.com/?\)", text_of(page))


def test_pictures_are_small():
    sizes = {path.name: path.stat().st_size for path in (ROOT / "docs").glob("*.png")}
    assert sizes and max(sizes.values()) < 150_000 and sum(sizes.values()) < 500_000
    for pages in (ENGLISH, KOREAN):
        text = "".join(map(text_of, pages))
        assert set(re.findall(r"!\[[^]]*\]\((?:docs/)?([\w-]+\.png)\)", text)) == set(sizes)


@pytest.mark.parametrize("pages", [ENGLISH, KOREAN], ids=["English", "Korean"])
def test_every_page_is_reached_from_the_readme(pages):
    first, *others = pages
    assert text_of(first).count("\n") <= 180
    for page in others:
        assert f"]({page})" in text_of(first), page
    assert sum((ROOT / page).stat().st_size for page in pages) <= LARGEST[first]


def scripts() -> list[str]:
    return [
        path.relative_to(ROOT).as_posix()
        for folder in ("experiments", "tools")
        for path in sorted((ROOT / folder).glob("*.py"))
    ]


def test_every_folder_and_script_has_its_line():
    names = {row[0].strip("`") for row in table_with("CONTRIBUTING.md", "`bridgeblip/bridge/`")}
    for module in (ROOT / "bridgeblip").rglob("*.py"):
        folder = module.parent.relative_to(ROOT).parts
        assert "/".join(folder[:2]) + "/" in names, module
    listed = " ".join(row[0] for row in table_with("CONTRIBUTING.md", "`tools/verify_gpu.py`"))
    assert set(re.findall(r"`([^`]+)`", listed)) == set(scripts())


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
            texts.add(re.sub(r"\{[\w:,.%]*\}", "…", node.value))
    return "\n".join(text.replace("\n", " ") for text in texts)


def test_every_message_quoted_is_one_that_the_code_has():
    texts = literals()
    rows = table_with("docs/troubleshooting.md", "`pip could not do it: …`")
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
    (table,) = [table for table in tables("docs/machines.md") if table[0][0] == "GB held"]
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
    rows = table_with("docs/machines.md", "T4")
    assert {"A100", "L4, RTX 3090, RTX 4090", "any other CPU, slower"} <= {row[0] for row in rows}
    held = {
        name: [held_memory(real, dtype, bridge)["total"] for bridge in (BridgeSettings(), None)]
        for name, dtype in DTYPES.items()
    }
    for machine, size, name, *left in rows:
        assert left == [f"{float(size) - gigabytes(count):.1f}" for count in held[name]], machine


def test_memory_of_other_models_is_what_its_formula_gives():
    for page in ("docs/other-models.md", "docs/other-models.ko.md"):
        for _, stored, bits, learning, held, *left in table_with(page, "BLIP base, full"):
            total = 2 * float(stored) + 0.516 * float(bits) + 20 * float(learning)
            assert held == f"{total:.1f}"
            rest = [f"{size - total:.1f}" if size > total else "none" for size in (24, 40, 80)]
            assert left == rest


SOURCES_BATCH = {"docs/other-models.md", "docs/other-models.ko.md"}  # theirs, not for want of room


@pytest.mark.parametrize("page", [*sorted({*PAGES} - SOURCES_BATCH), "train.ipynb"])
def test_nobody_is_sent_to_a_smaller_batch_than_fits(page):
    assert not re.search(r"(--batch-size|BATCH_SIZE) ?=? ?\d", text_of(page))


def test_parameter_counts_are_the_codes(real):
    total = certify_budget(real)["total"]
    for page in ("docs/hand-in.md", "docs/hand-in.ko.md"):
        (row,) = [row for table in tables(page) for row in table if f"{BUDGET_LIMIT:,}" in row[1]]
        assert f"{total:,}" in row[1]


def test_layer_selections_are_reported_as_they_were_measured():
    measured = {row[0]: row for row in table_with("results/ablation/ablation.md", "0,3,...,21")}
    rows = table_with("docs/results.md", "0,3,...,21")
    assert {row[0] for row in rows} >= {"0,2,4,6", "0,2,...,14", "0-7", "0,3,...,21"}
    for name, first, mean, after in rows:
        line = measured["all 24 layers" if name == "all 24" else name]
        assert (first, mean, after) == (line[2], line[4], line[6]), name


@pytest.mark.parametrize("page, even", [("README.md", "spread evenly"), ("README.ko.md", "고르게")])
def test_cuts_are_reported_as_they_were_measured(page, even):
    measured = {}
    for base, layers, _, rank, questions, _, accuracy, *_ in table_with(
        "results/cut/cut.md", "tiny"
    ):
        if questions == "all":
            measured[base, layers, rank] = accuracy.split()[0]
    (table,) = [table for table in tables(page) if table[0][2:] == ["20", "16", "12", "8", "4"]]
    for name, *cells in table[1:]:
        base, kind = name.split(", ")
        for kept, cell in zip(("24", "20", "16", "12", "8", "4"), cells, strict=True):
            layers = f"{'even' if kind == even or kept == '24' else 'block'}-{kept}"
            bridged, not_bridged = (
                measured[base.strip("`"), layers, r] for r in ("96", "unbridged")
            )
            assert cell == f"{bridged} ({not_bridged})", (name, kept)


@pytest.mark.parametrize("page", ["docs/results.md", "docs/results.ko.md"])
def test_what_is_said_of_cuts_was_measured(page):
    (section,) = [part for part in text_of(page).split("\n## ") if "cut.py" in part]
    points = set(re.findall(r"\d+\.\d", section))
    assert len(points) > 7 and points <= set(
        re.findall(r"-(\d+\.\d) \(", text_of("results/cut/cut.md"))
    )


def test_speed_is_reported_as_it_was_measured():
    measured = {row[0]: row for row in table_with("results/bench.md", "bundle")}
    names = {
        "the bundle": "bundle",
        "the bundle, unsure rows in four orders": "bundle, four orders where unsure",
    }
    rows = table_with("docs/results.md", "the bundle")
    assert len(rows) == len(measured) == 4

    def median(cell: str) -> str:
        return cell.split(" (")[0]

    for answers_by, speed, efficiency in rows:
        line = measured[names.get(answers_by, answers_by.strip("`").replace("`,", ","))]
        assert (speed, efficiency) == (median(line[2]), median(line[4])), answers_by
    times = re.search(
        r"are ([\d.]+ \([\d.]+ to [\d.]+\)) times as fast", text_of("results/bench.md")
    )[1]
    assert f"are {median(times)} times as fast" in text_of("docs/results.md").replace("\n", " ")


# ---------------------------------------------------------------- two languages


def skeleton(page: str) -> dict[str, object]:
    """What a translation must leave as it is."""
    prose = prose_of(page)
    rows = re.findall(r"(?m)^\|.*", prose)
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]+)?\)", prose)
    return {
        "heading levels": re.findall(r"(?m)^#+(?= )", prose),
        "code blocks": re.findall(r"```.*?```", text_of(page), flags=re.S),
        "blocks that can't be run here": [marked for marked, _ in blocks(page)],
        "code in the prose": set(re.findall(r"`([^`]+)`", prose)),
        "code by table row": [sorted(re.findall(r"`([^`]+)`", row)) for row in rows],
        "links": sorted(link.replace(".ko.md", ".md") for link in links),
        "links within the page": len(re.findall(r"\]\(#", prose)),
        "figures by table row": [re.findall(r"\d\.\d+", row) for row in rows],
    }


@pytest.mark.parametrize("pages", zip(ENGLISH, KOREAN, strict=True), ids=ENGLISH)
def test_both_languages_are_the_same_page(pages):
    english, korean = map(skeleton, pages)
    assert english["links"]
    for what in english:
        assert korean[what] == english[what], what
