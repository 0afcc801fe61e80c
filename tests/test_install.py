"""The package as pip installs it: built, and answering where nothing but its light core is."""

import os
import re
import shlex
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import bridgeblip
from bridgeblip.__main__ import main
from bridgeblip.hosting.runtime import requirements


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--no-build-isolation", "-w", folder, ROOT], check=True)
    return next(folder.glob("*.whl"))


def with_dependencies(wanted: list[Requirement]) -> dict[str, metadata.Distribution]:
    """The distributions here that pip would install for these requirements, by name."""
    found, to_do = {}, list(wanted)
    while to_do:
        one = to_do.pop()
        name = canonicalize_name(one.name)
        asked = [{"extra": extra} for extra in ("", *one.extras)]
        if name in found or (one.marker and not any(map(one.marker.evaluate, asked))):
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # what a CPU's build leaves out
        to_do += map(Requirement, found[name].requires or [])
    return found


def make_environment(folder: Path, wheel: Path, *extras: str) -> Path:
    """A virtual environment with the package and what pip would bring with it, nothing else: links
    to the files here, for the network's sake."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for distribution in with_dependencies(requirements(*extras)).values():
        for file in distribution.files:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    return folder / "bin"


@pytest.fixture(scope="module")
def light(tmp_path_factory, wheel) -> Path:
    return make_environment(tmp_path_factory.mktemp("light") / "venv", wheel)


def run(command: list, folder: Path) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture
def bundle(checkpoint) -> Path:
    return checkpoint / "torchscript.pt"


def test_the_wheel_holds_every_file_of_the_package(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    paths = [p for p in (ROOT / "bridgeblip").rglob("*") if p.is_file()]
    ours = {str(p.relative_to(ROOT)) for p in paths if "__pycache__" not in p.parts}
    assert ours == {name for name in held if name.startswith("bridgeblip/")}
    assert wheel.name.split("-")[1] == bridgeblip.__version__


def test_the_light_core_answers_as_the_repository_does(light, bundle, competition, tmp_path):
    arguments = ["predict", "--model", str(bundle), "--csv", str(competition / "test.csv")]
    done = run([light / "bridgeblip", *arguments], tmp_path)
    assert done.returncode == 0, done.stderr
    assert main([*arguments, "--out", str(tmp_path / "here" / "submission.csv")]) == 0
    for name in ("submission.csv", "probabilities.csv"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    done = run([light / "bridgeblip", "--version"], tmp_path)
    assert done.stdout == f"bridgeblip {bridgeblip.__version__}\n"


def test_one_file_and_one_colleague_with_the_light_core(light, bundle, competition, tmp_path):
    (tmp_path / "torchscript.pt").symlink_to(bundle)
    (tmp_path / "questions").symlink_to(competition)
    (tmp_path / "photo.jpg").symlink_to(next(competition.glob("test_input_images/*")))
    for readme in ("README.md", "README.ko.md"):
        text = (ROOT / readme).read_text(encoding="utf-8")
        (code,) = re.findall(r"(?ms)^```python\n(.*?)^```\n", text)
        assert len(list(filter(None, code.splitlines()))) == 5
        done = run([light / "python", "-c", code], tmp_path)
        assert done.returncode == 0 and done.stdout.count("[") == 21, done.stderr  # 20 questions
        for verb in ("inspect", "ask"):
            (line,) = re.findall(rf"(?m)^bridgeblip ({verb} .*)$", text)
            done = run([light / "bridgeblip", *shlex.split(line)], tmp_path)
            assert done.returncode == 0, done.stderr
            assert ("D. fork" if verb == "ask" else "decoder layers") in done.stdout


@pytest.mark.parametrize(
    "verb, extras",
    [
        ("train", "train"),
        ("export", "train"),
        ("share", "train"),
        ("evaluate --csv x", "notebooks"),
    ],
)
def test_a_verb_names_the_extra_that_it_needs(light, tmp_path, verb, extras):
    done = run([light / "bridgeblip", *verb.split()], tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.endswith(f"pip install 'bridgeblip[{extras}]'\n")
    assert "matplotlib" in done.stderr and ("peft" in done.stderr) == (extras == "train")


def test_the_doctor_needs_the_light_core_alone(light, bundle, competition, tmp_path):
    arguments = ["--checkpoint-dir", bundle.parent, "--csv", competition / "test.csv"]
    done = run([light / "bridgeblip", "doctor", "--stage", "predict", *arguments], tmp_path)
    assert done.returncode == 0 and "this stage can start" in done.stdout, done.stdout + done.stderr
    done = run([light / "bridgeblip", "doctor", "--stage", "train"], tmp_path)
    assert done.returncode == 1 and "peft is not installed; expected peft>=" in done.stdout


def test_notebook_3_needs_the_extra_notebooks_alone(tmp_path, wheel):
    python = make_environment(tmp_path / "venv", wheel, "notebooks") / "python"
    imports = "from bridgeblip.evidence import figures; from bridgeblip.bundle import predict; "
    done = run([python, "-c", f"{imports}from bridgeblip.hosting import doctor"], tmp_path)
    assert done.returncode == 0, done.stderr


def test_another_copy_or_version_is_named(light, tmp_path):
    (tmp_path / "bridgeblip").mkdir()
    (tmp_path / "bridgeblip" / "__init__.py").touch()
    code = "from bridgeblip.hosting.runtime import other_copies; print(*other_copies(), sep='\\n')"
    python = [light / "python", "-P", "-c"]
    assert run([*python, code], tmp_path / "bridgeblip").stdout == "\n"
    named = run([*python, code], tmp_path).stdout
    assert f"a second copy of bridgeblip lies in {tmp_path}; this is" in named
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import bridgeblip; "
    code += "bridgeblip.__version__ = '9'; from bridgeblip.hosting import runtime; "
    named = run([*python, code + "print(*runtime.other_copies())"], ROOT.parent).stdout
    assert f"bridgeblip {bridgeblip.__version__} is installed" in named and "this is 9 in" in named
