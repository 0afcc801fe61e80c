"""The badge script on a made-up name: in copies of all notebooks and READMEs."""

import shutil
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT

NAME = "somebody/a-bridge"


@pytest.fixture
def copies(tmp_path):
    for path in [*ROOT.glob("*.ipynb"), *ROOT.glob("README*.md")]:
        shutil.copy(path, tmp_path)
    return tmp_path


def write(folder, name):
    command = [sys.executable, ROOT / "tools" / "badges.py", name, "--root", folder]
    return subprocess.run(command, capture_output=True, text=True)


def test_links_and_set_up_are_right_everywhere_and_twice_changes_nothing(copies):
    before = {path.name: path.read_text(encoding="utf-8") for path in copies.iterdir()}
    assert write(copies, "another/name").returncode == 0
    assert write(copies, NAME).returncode == 0
    written = {path.name: path.read_text(encoding="utf-8") for path in copies.iterdir()}
    assert len(written) >= 5
    colab = f"https://colab.research.google.com/github/{NAME}/blob/main"
    for name, text in written.items():
        notebook = name if name.endswith(".ipynb") else "train.ipynb"
        assert f"colab-badge.svg)]({colab}/{notebook})" in text and "another/name" not in text
        assert text.count("[![Open in Colab]") == 1
        assert abs(text.count("\n") - before[name].count("\n")) <= 3
        if name.endswith(".ipynb"):
            nbformat.validate(nbformat.reads(text, as_version=4))
            assert text.count(f"git clone -q --depth 1 https://github.com/{NAME} ") == 1
            assert "On Colab: upload" not in text
    assert write(copies, NAME).returncode == 0
    assert written == {path.name: path.read_text(encoding="utf-8") for path in copies.iterdir()}


def test_what_is_no_name_is_refused(copies):
    done = write(copies, "https://github.com/x")
    assert done.returncode == 2 and "is no OWNER/NAME" in done.stderr
