"""The README names only what exists, and shows only commands that parse."""

import re
import shlex
import subprocess

import pytest
from conftest import ROOT

from bridgeblip.__main__ import build_parser

LANGUAGES = ("README.md", "README.ko.md")
PAGES = (*LANGUAGES, "CONTRIBUTING.md", "checkpoint/README.md", "competition/README.md")
WRITTEN_BY_USE = {"demo/competition/", "demo/notebooks/", "checkpoint/", "checkpoint/state/", "competition/"}


def commands() -> list[str]:
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    return [line for block in blocks for line in block.splitlines() if re.match(r"(\.venv|python|make)", line)]


def test_every_bridgeblip_command_parses():
    verbs = [shlex.split(line.split("-m bridgeblip ")[1]) for line in commands() if "-m bridgeblip " in line]
    assert {arguments[0] for arguments in verbs} >= {"demo", "doctor", "train", "export", "predict"}
    for arguments in verbs:
        build_parser().parse_args(arguments)


def test_every_make_target_exists():
    targets = [line.split()[1] for line in commands() if line.startswith("make ")]
    assert set(targets) == {"demo", "test"}
    subprocess.run(["make", "--dry-run", *targets, "verify"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_path_exists(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / page).parent.joinpath(link).exists(), link
    for path in re.findall(r"`((?:bridgeblip|tools|tests|checkpoint|competition)/[\w./-]*)`", text):
        written = path in WRITTEN_BY_USE or re.search(r"\.(csv|pt|html)$|best\.json$", path)
        assert written or (ROOT / path).exists(), path


def skeleton(page: str) -> dict[str, object]:
    """What a translation must leave as it is."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```.*?```", text, flags=re.S)
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    return {
        "heading levels": re.findall(r"(?m)^#+(?= )", prose),
        "code blocks": blocks,
        "code in the prose": set(re.findall(r"`([^`]+)`", prose)),
        "relative links": {link for link in re.findall(r"\]\(([^):#]+)\)", prose) if link not in LANGUAGES},
        "figures by table row": [re.findall(r"\d\.\d+", row) for row in re.findall(r"(?m)^\|.*", prose)],
    }


def test_both_languages_are_the_same_page():
    english, korean = map(skeleton, LANGUAGES)
    assert english["code blocks"] and english["relative links"]
    assert korean == english
