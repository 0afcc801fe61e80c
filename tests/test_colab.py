"""The three notebooks as Colab runs them: its modules stood in for, a Drive with the repository's
zip, fresh machines.

What is simulated is Colab, not the project: kernels, files, training and export are the real thing.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from bridgeblip.bridge.train import train
from bridgeblip.embedded.demo import NOTEBOOKS, PARAMETERS_TAG
from bridgeblip.embedded.digits import write_competition
from bridgeblip.training.settings import TrainSettings
from bridgeblip.training.weights import load_weights

TRAIN, EXPORT, ANSWER = NOTEBOOKS
CONTENT = Path("/content")  # the notebooks know Drive's place below it, as all of Colab does
SETTINGS = {"BASE": "tiny", "BATCH_SIZE": 8, "LEARNING_RATE": 3e-3, "SAVE_MINUTES": 0.0}
MODULES = {
    "google/colab/__init__.py": "",
    "google/colab/drive.py": """
import os

def mount(mountpoint):
    if os.path.lexists(mountpoint):
        print(f"Drive already mounted at {mountpoint}")
        return
    os.symlink(os.environ["COLAB_STAND_IN_DRIVE"], mountpoint)
    print(f"Mounted at {mountpoint}")

def flush_and_unmount():
    os.unlink("/content/drive")
""",
    "pip/__main__.py": """
import os, sys

open(os.environ["COLAB_STAND_IN_PIP"], "a").write(" ".join(sys.argv))
sys.exit("pip was not expected to be asked for anything")
""",
}


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """``/content``, for one test run at a time, and the stand-ins' folder."""
    try:
        made = not CONTENT.exists()
        CONTENT.mkdir(exist_ok=True)
        lock = open(CONTENT / ".bridgeblip-tests", "w")  # noqa: SIM115
    except OSError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"a simulated Colab needs {CONTENT} ({error}): run as root in a container")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stand_ins = tmp_path_factory.mktemp("colab")
        for name, text in MODULES.items():
            (stand_ins / name).parent.mkdir(parents=True, exist_ok=True)
            (stand_ins / name).write_text(text)
        yield stand_ins
        (CONTENT / "drive").unlink(missing_ok=True)
    if made:
        shutil.rmtree(CONTENT)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "open"
    write_competition(folder, folder.parent / "answers.csv", {"train": 12, "test": 5})
    return folder


def upload(drive: Path, name: str = "bridgeblip") -> Path:
    """Put what a zip of the repository holds into a Drive, as a folder of this name."""
    if not (ROOT / ".git").exists():
        pytest.skip("git tells what a zip of the repository holds, and this is no git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    for file in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / file).exists():
            target = drive / "MyDrive" / name / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, target)
    return drive / "MyDrive" / name


def run_all(notebook, drive: Path, stand_ins: Path, machine: Path, kill_when=None) -> str:
    """Run a notebook on a fresh machine with this Drive; return what it printed.

    Args:
        machine: a new folder for all that the machine has on its own disk.
        kill_when: asked again and again; once it says yes, the kernel is killed.
    """
    startup = machine / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "colab.py").write_text("import google.colab")
    (machine / "content").mkdir()
    (CONTENT / "drive").unlink(missing_ok=True)
    env = os.environ | {
        "IPYTHONDIR": str(machine / "ipython"),
        "PYTHONPATH": str(stand_ins),
        "BRIDGEBLIP_CACHE": str(machine / "cache"),
        "COLAB_STAND_IN_DRIVE": str(drive),
        "COLAB_STAND_IN_PIP": str(machine / "pip.log"),
        "HF_HUB_OFFLINE": "1",
        "JUPYTER_PREFER_ENV_PATH": "1",
    }
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        resources={"metadata": {"path": str(machine / "content")}},
    )

    def killer():
        while not kill_when():
            time.sleep(0.01)
        os.kill(client.km.provisioner.pid, signal.SIGKILL)

    if kill_when:
        threading.Thread(target=killer, daemon=True).start()
    client.execute(env=env)
    assert not (machine / "pip.log").exists()
    assert not list((machine / "content").iterdir())
    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    return "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")


def read(home: Path, name: str, settings: dict | None = None):
    """Read a notebook from Drive and set its form's fields."""
    notebook = nbformat.read(home / name, as_version=4)
    (form,) = [
        i
        for i, cell in enumerate(notebook.cells)
        if PARAMETERS_TAG in cell.metadata.get("tags", [])
    ]
    lines = "\n".join(f"{key} = {value!r}" for key, value in (settings or {}).items())
    notebook.cells.insert(form + 1, nbformat.v4.new_code_cell(lines))
    return notebook


@pytest.fixture(scope="module")
def road(colab, data, tmp_path_factory):
    """The folder on Drive after all three notebooks, each on a machine of its own, the first killed
    in mid training and run again; and what they printed."""
    machines = tmp_path_factory.mktemp("machines")
    home = upload(machines / "drive")
    shutil.make_archive(home / "competition" / "open", "zip", data.parent, data.name)
    state, training = home / "checkpoint" / "state", read(home, TRAIN, SETTINGS)
    with pytest.raises(DeadKernelError):
        run_all(
            training,
            machines / "drive",
            colab,
            machines / "killed",
            lambda: (state / "step-2").exists(),
        )
    assert not (home / "checkpoint" / "weights-0.pt").exists()
    printed = {}
    for name in NOTEBOOKS:
        notebook = read(home, name, SETTINGS if name == TRAIN else None)
        printed[name] = run_all(notebook, machines / "drive", colab, machines / Path(name).stem)
    return home, printed


def test_the_three_notebooks_on_fresh_machines(road):
    home, printed = road
    for text in printed.values():
        assert "Colab, Python 3." in text and f"working in {home}" in text
        assert "all requirements are there" in text and "all is on Drive" in text
    assert "open.zip as unpacked in" in printed[TRAIN]
    assert "going on from checkpoint/state/step-" in printed[TRAIN]
    assert {
        "weights-0.pt",
        "best.json",
        "report.html",
        "torchscript.pt",
        "torchscript.pt.sha256",
    } <= {path.name for path in (home / "checkpoint").iterdir()}
    assert (home / "submission.csv").read_text().splitlines()[0] == "ID,answer"
    assert len((home / "submission.csv").read_text().splitlines()) == 21


def test_killed_in_mid_training_it_ends_as_undisturbed(data, road, tmp_path):
    home, _ = road
    ended = load_weights(home / "checkpoint" / "weights-0.pt")
    settings = TrainSettings(**ended.manifest["train"])
    assert (settings.batch_size, settings.learning_rate) == (8, 3e-3)
    train(data / "train.csv", "tiny", tmp_path, settings)
    expected = load_weights(tmp_path / "weights-0.pt").tensors
    assert ended.tensors.keys() == expected.keys()
    assert all(torch.equal(ended.tensors[name], expected[name]) for name in expected)
    exported = {"torchscript.pt", "torchscript.pt.sha256"}
    assert {*os.listdir(home / "checkpoint")} - exported - {"README.md"} == {*os.listdir(tmp_path)}


def test_the_inference_notebook_alone_with_a_bundle_dropped_in(colab, data, road, tmp_path):
    expected, _ = road
    home = upload(tmp_path / "drive")
    shutil.copytree(data, home / "competition", dirs_exist_ok=True)
    (home / "competition" / "train.csv").unlink()
    shutil.copy(expected / "checkpoint" / "torchscript.pt", home / "checkpoint")
    notebook = read(home, ANSWER)
    for cell in notebook.cells:
        cell.source = cell.source.replace('LANGUAGE = "auto"', 'LANGUAGE = "ko"')
    printed = run_all(notebook, tmp_path / "drive", colab, tmp_path / "machine")
    for words in ("작업 폴더", "시작할 수 있습니다", "답 20개", "제출하십시오", "  D. fork"):
        assert words in printed
    assert (home / "submission.csv").read_bytes() == (expected / "submission.csv").read_bytes()


def test_a_folder_of_another_name_is_explained_in_one_line(colab, tmp_path):
    drive = tmp_path / "drive"
    upload(drive, "bridgeblip-main")
    with pytest.raises(CellExecutionError) as stopped:
        run_all(nbformat.read(ROOT / TRAIN, as_version=4), drive, colab, tmp_path / "machine")
    assert stopped.value.ename == "FileNotFoundError"
    assert (
        "rename the unzipped folder to bridgeblip and upload it to My Drive" in stopped.value.evalue
    )


def test_the_outer_folder_does_not_shadow_the_package(tmp_path):
    home = upload(tmp_path)
    notebook = nbformat.read(home / TRAIN, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"][:1]
    code += [nbformat.v4.new_code_cell("import bridgeblip; print(bridgeblip.__file__)")]
    notebook.cells = code
    NotebookClient(notebook, resources={"metadata": {"path": str(home.parent)}}).execute()
    printed = "".join(output.text for cell in code for output in cell.outputs)
    assert "Jupyter, Python" in printed and printed.splitlines()[-1] == str(
        home / "bridgeblip" / "__init__.py"
    )


def test_on_kaggle_the_repository_is_found_among_the_inputs(tmp_path):
    home = upload(tmp_path / "input" / "somebody" / "a-data-set")
    (tmp_path / "working").mkdir()
    cell = next(
        cell for cell in nbformat.read(home / TRAIN, as_version=4).cells if cell.cell_type == "code"
    )
    code = cell.source.replace("/kaggle/input", str(tmp_path / "input")).replace(
        "%matplotlib inline", ""
    )
    env = os.environ | {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}
    code += "\nimport bridgeblip; print(bridgeblip.__file__)"
    command = [sys.executable, "-c", code]
    printed = subprocess.run(
        command, cwd=tmp_path / "working", env=env, capture_output=True, text=True, check=True
    )
    lines = printed.stdout.splitlines()
    assert lines[0].startswith("Kaggle, Python") and lines[-1] == str(
        home / "bridgeblip" / "__init__.py"
    )
