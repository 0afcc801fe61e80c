import os
import shutil
import subprocess
import sys
import sysconfig
import unicodedata
import zipfile
from pathlib import Path
from types import SimpleNamespace

import packaging
import pytest
from conftest import ROOT

from bridgeblip import InputError
from bridgeblip.data.questions import read_questions
from bridgeblip.embedded.digits import write_competition
from bridgeblip.hosting import runtime
from bridgeblip.hosting.runtime import local_copy


@pytest.fixture
def drive(tmp_path, monkeypatch) -> Path:
    """A competition folder on what passes for Drive; the local disk is another folder."""
    monkeypatch.setattr(runtime, "DRIVE", tmp_path / "drive")
    monkeypatch.setenv("BRIDGEBLIP_CACHE", str(tmp_path / "local"))
    folder = tmp_path / "drive" / "MyDrive" / "competition"
    write_competition(folder, tmp_path / "answers.csv", {"train": 2, "test": 1})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def times(folder: Path) -> dict[Path, tuple[int, int]]:
    return {
        path: (path.stat().st_ino, path.stat().st_ctime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_nothing_is_copied_unless_it_lies_on_drive(tmp_path, monkeypatch):
    monkeypatch.setenv("BRIDGEBLIP_CACHE", str(tmp_path / "local"))
    write_competition(tmp_path / "competition", tmp_path / "answers.csv", {"train": 1, "test": 1})
    csv = tmp_path / "competition" / "train.csv"
    assert local_copy(csv) == csv and not (tmp_path / "local").exists()


def test_questions_and_their_pictures_are_copied_once(drive, tmp_path, capsys):
    (drive / "notes.txt").write_text("belongs to no question")
    local = local_copy(drive / "train.csv").parent
    assert local_copy(drive / "test.csv").parent == local and local.name.startswith("competition-")
    assert local.parent == tmp_path / "local" / "bridgeblip" / "data"
    (drive / "notes.txt").unlink()
    assert contents(local) == contents(drive)
    before = times(local)
    local_copy(drive / "train.csv")
    assert times(local) == before
    assert f"reading the copy of {drive} in {local}" in capsys.readouterr().out


def test_only_what_has_changed_or_is_not_whole_is_copied_again(drive):
    csv = local_copy(drive / "train.csv")
    before = times(csv.parent)
    torn, gone, *_ = sorted(csv.parent.glob("train_input_images/*"))
    torn.write_bytes(torn.read_bytes()[:100])
    gone.rename(gone.with_name(f".{gone.name}.partial"))  # what a killed copy leaves
    text = (drive / "train.csv").read_text(encoding="utf-8")
    (drive / "train.csv").write_text(text.replace("digit", "cipher"), encoding="utf-8")
    (drive / "sample_submission.csv").unlink()
    local_copy(drive / "train.csv")
    copied = contents(csv.parent)
    assert {name: copied[name] for name in contents(drive) if name in copied} == {
        name: content
        for name, content in contents(drive).items()
        if not name.startswith("test_input")
    }
    assert not (csv.parent / "sample_submission.csv").exists()
    assert {path.name for path, when in times(csv.parent).items() if before.get(path) != when} == {
        torn.name, gone.name, "train.csv"
    }  # fmt: skip


def test_absolute_paths_are_read_where_they_are(drive, capsys):
    text = (
        (drive / "train.csv")
        .read_text(encoding="utf-8")
        .replace("./train_input", f"{drive}/train_input")
    )
    (drive / "train.csv").write_text(text, encoding="utf-8")
    assert local_copy(drive / "train.csv") == drive / "train.csv"
    assert "absolute paths: reading from Drive" in capsys.readouterr().out


def test_what_the_check_up_should_name_stays_where_it_is(drive, tmp_path, capsys):
    assert local_copy(drive / "none.csv") == drive / "none.csv"
    (drive / "odd.csv").write_text("a,b\n1,2\n")
    assert local_copy(drive / "odd.csv") == drive / "odd.csv"
    first = next((drive / "train_input_images").iterdir())
    shutil.move(first, drive.parent)
    text = (drive / "train.csv").read_text(encoding="utf-8")
    (drive / "train.csv").write_text(
        text.replace(f"./train_input_images/{first.name}", f"../{first.name}")
    )
    assert local_copy(drive / "train.csv") == drive / "train.csv"
    assert "pictures outside its folder" in capsys.readouterr().out
    assert not (tmp_path / "local").exists()


def test_a_disk_too_small_is_said_before_anything_is_copied(drive, tmp_path):
    picture = next((drive / "train_input_images").iterdir())
    os.truncate(picture, 8 * 2**40)  # a hole: it takes no room
    with pytest.raises(
        InputError, match=r"needs 8796\.\d GB in .* can be used there: free some space"
    ):
        local_copy(drive / "train.csv")
    assert not contents(tmp_path / "local")


def test_a_place_that_can_not_be_read_is_explained(drive):
    csv = local_copy(drive / "train.csv")
    shutil.rmtree(csv.parent / "train_input_images")
    (csv.parent / "train_input_images").write_text("a file where a folder should be")
    with pytest.raises(
        InputError, match=r"copying .* stopped .*: remove that folder, then run this again"
    ):
        local_copy(drive / "train.csv")


def zipped(folder: Path, names: dict[str, bytes] | None = None) -> Path:
    """Move a competition folder's files into a zip in it, below ``open/``."""
    files = names or contents(folder)
    with zipfile.ZipFile(folder / "download.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(f"open/{name}", content)
        archive.writestr("__MACOSX/open/._train.csv", b"clutter")
    for path in folder.iterdir():
        if path.name != "download.zip":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder / "download.zip"


@pytest.mark.parametrize("place", ["Drive", "elsewhere"])
def test_of_the_organisers_zip_what_a_question_file_names_is_unpacked_once(
    drive, tmp_path, monkeypatch, place
):
    if place == "elsewhere":
        monkeypatch.setattr(runtime, "DRIVE", tmp_path / "no such place")
    (drive / "notes.txt").write_bytes(b"belongs to no question")
    expected = contents(drive)
    del expected["notes.txt"]
    zipped(drive)
    csv = local_copy(drive / "test.csv")
    data = tmp_path / "local" / "bridgeblip" / "data"
    assert csv.parent.parent.parent == data and csv.parent.parent.name.startswith("download-")
    assert contents(csv.parent).keys() == {n for n in expected if not n.startswith("train_")}
    assert local_copy(drive / "train.csv") == csv.with_name("train.csv")
    assert contents(csv.parent) == expected
    before = times(csv.parent)
    torn = next((csv.parent / "test_input_images").iterdir())
    torn.write_bytes(b"what a killed machine leaves")
    assert local_copy(drive / "test.csv") == csv and contents(csv.parent) == expected
    assert {path for path, when in times(csv.parent).items() if before[path] != when} == {torn}
    zipped(drive, {"test.csv": b"ID\nanother zip of that name"})
    assert local_copy(drive / "test.csv").read_bytes() == b"ID\nanother zip of that name"


def test_a_zip_that_can_not_be_used(drive, tmp_path):
    archive = zipped(drive)
    assert local_copy(drive / "other.csv") == drive / "other.csv"
    content = bytearray(archive.read_bytes())
    start = content.index(b"TRAIN_0000,")
    content[start : start + 5] = b"WRONG"
    archive.write_bytes(content)
    with pytest.raises(
        InputError, match=r"download\.zip can't be unpacked \(Bad CRC-32.*copy it again"
    ):
        local_copy(drive / "train.csv")
    archive.write_bytes(content[:1000])
    with pytest.raises(InputError, match=r"can't be unpacked \(File is not a zip file\)"):
        local_copy(drive / "train.csv")
    rows = b"ID,img_path,Question,A,B,C,D\nT0,../../../up.txt,What is it?,a,b,c,d\n"
    zipped(drive, {"train.csv": rows, "../../../up.txt": b""})
    assert local_copy(drive / "train.csv").is_file()
    assert not [path for path in tmp_path.parent.rglob("up.txt") if "local" not in path.parts]


def zip_with(folder: Path, csv: str, name: bytes, utf8: bool) -> None:
    """Write a zip with one picture, whose name is stored in these bytes."""
    table = f"ID,img_path,Question,A,B,C,D\nT0,{csv},What is it?,a,b,c,d\n"
    kept = "".join(chr(65 + i) for i in range(len(name)))  # of the same length, then replaced
    with zipfile.ZipFile(folder / "open.zip", "w") as archive:
        archive.writestr("test.csv", table)
        archive.writestr(zipfile.ZipInfo(kept), b"a picture")
        archive.writestr("huge.bin", b"nobody asks for it")
    content = (folder / "open.zip").read_bytes().replace(kept.encode(), name)
    if utf8:
        for mark in (b"PK\3\4", b"PK\1\2"):  # bit 11 of the flags
            at = content.rindex(
                mark, 0, content.rindex(name) if mark[2] == 1 else content.index(name)
            )
            flags = at + (6 if mark[2] == 3 else 8)
            content = content[: flags + 1] + b"\x08" + content[flags + 2 :]
    (folder / "open.zip").write_bytes(content)


@pytest.mark.parametrize(
    "written, stored, utf8",
    [
        ("이미지/사진.png", "이미지/사진.png".encode("cp949"), False),
        ("이미지/사진.png", "이미지/사진.png".encode(), False),
        ("이미지/사진.png", unicodedata.normalize("NFD", "이미지/사진.png").encode(), True),
        (unicodedata.normalize("NFD", "이미지/사진.png"), "이미지/사진.png".encode(), True),
        ("img/0.png", b"img\\0.png", False),
        ("img\\0.png", b"img/0.png", False),
        ("./img//0.png", b"img/0.png", False),
    ],
    ids=[
        "cp949",
        "unmarked UTF-8",
        "NFD",
        "NFD in the CSV",
        "backslash",
        "backslash in the CSV",
        "dots",
    ],
)
def test_names_that_look_the_same_are_the_same(tmp_path, monkeypatch, written, stored, utf8):
    monkeypatch.setenv("BRIDGEBLIP_CACHE", str(tmp_path / "local"))
    zip_with(tmp_path, written, stored, utf8)
    csv = local_copy(tmp_path / "test.csv")
    (row,) = read_questions(csv, strict=False)
    assert not row.problem and row.image.read_bytes() == b"a picture"
    assert len(contents(csv.parent)) == 2


def test_a_zip_of_odd_names_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setenv("BRIDGEBLIP_CACHE", str(tmp_path / "local"))
    names = ["a.png", "A.png", "at 3\u202fPM.png", "B.PNG"]
    written = ["a.png", "A.png", "at 3 PM.png", "b.png"]
    rows = [f"{n},{name},What is it?,a,b,c,d\n" for n, name in enumerate(written)]
    with zipfile.ZipFile(tmp_path / "OPEN.ZIP", "w") as archive:
        archive.writestr("open [v2]/test.csv", "ID,img_path,Question,A,B,C,D\n" + "".join(rows))
        archive.writestr("open [v2]/more/other.csv", "ID\n1\n")
        for name in names:
            archive.writestr(f"open [v2]/{name}", name)
    csv = local_copy(tmp_path / "test.csv")
    assert [row.image.read_text() for row in read_questions(csv, strict=False)] == names
    assert len(contents(csv.parent)) == 5


def test_a_zip_is_bounded_by_what_the_question_file_names(tmp_path, monkeypatch):
    monkeypatch.setenv("BRIDGEBLIP_CACHE", str(tmp_path / "local"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9 + 500))
    zip_with(tmp_path, "0.png", b"0.png", False)
    with zipfile.ZipFile(tmp_path / "open.zip", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("of-another-set.bin", bytes(10**6))
    assert local_copy(tmp_path / "test.csv").is_file()
    with zipfile.ZipFile(tmp_path / "open.zip", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", bytes(10**6))
    with pytest.raises(InputError, match=r"open\.zip needs 0\.0 GB in .* free some space"):
        local_copy(tmp_path / "test.csv")


def test_a_cache_that_can_not_be_written_names_the_variable(drive, tmp_path, monkeypatch):
    monkeypatch.setenv("BRIDGEBLIP_CACHE", str(drive / "train.csv"))
    with pytest.raises(InputError, match=r"copying .* stopped .*BRIDGEBLIP_CACHE") as caught:
        local_copy(drive / "train.csv")
    assert "\n" not in str(caught.value)


def test_the_repositorys_own_data_are_found_from_elsewhere(tmp_path, monkeypatch):
    """As on Kaggle, where the kernel works in one folder and the repository can only be read in
    another."""
    monkeypatch.setattr(runtime, "HOME", tmp_path / "input")
    monkeypatch.chdir(tmp_path)
    write_competition(
        tmp_path / "input" / "competition", tmp_path / "answers.csv", {"train": 1, "test": 1}
    )
    assert local_copy("competition/train.csv") == tmp_path / "input" / "competition" / "train.csv"
    assert local_copy("elsewhere/train.csv") == Path("elsewhere/train.csv")


def test_finish_elsewhere_than_in_colab_does_nothing(capsys):
    runtime.finish()
    assert not capsys.readouterr().out


# Installing, for real: in a virtual environment that sees the packages here, from wheels in a
# folder.


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("machine")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "outer.pth").write_text(sysconfig.get_path("purelib"))
    for name, version in (("needed", "1.0"), ("needed", "2.0"), ("torchao", "0.10.0")):
        make_wheel(folder / "wheels", name, version)
    return folder


def make_wheel(folder: Path, name: str, version: str) -> None:
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": f"number = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: "
        "py3-none-any\n",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)
        wheel.writestr(
            f"{info}/RECORD", "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
        )


def run(machine: Path, code: str, *options: str, colab: bool = False, **env: str) -> str:
    """Run Python on that machine, in a folder of its own; return what it prints, errors last."""
    start = (
        "import sys, types; sys.modules['google.colab'] = types.ModuleType('google.colab'); "
        if colab
        else ""
    )
    (machine / "work").mkdir(exist_ok=True)
    done = subprocess.run(
        [machine / "venv" / "bin" / "python", *options, "-c", start + code],
        cwd=machine / "work",
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(machine / "wheels"),
            **env,
        },
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


def install(*wanted: str) -> str:
    """Code that installs what is missing of these requirements."""
    code = (
        "from packaging.requirements import Requirement; from bridgeblip.hosting import runtime; "
    )
    return f"{code}runtime.install_missing(list(map(Requirement, {wanted})))"


def test_set_up_installs_what_is_missing_and_a_second_time_nothing(machine):
    code = install("torch>=2.6", "tqdm>=4.66", "needed==1.0")
    printed = run(machine, code + "; import needed; print(needed.number)")
    assert "installing needed==1.0 (now missing)\n1.0\n" in printed
    code += "; runtime.set_up()"
    first, second, third = run(machine, code, PIP_FIND_LINKS="", PATH="").splitlines()
    assert first == third == "all requirements are there"
    assert second.startswith("Jupyter, Python 3.") and second.endswith(f"working in {ROOT}")


def test_a_changed_package_asks_for_a_restart_only_if_it_was_imported(machine):
    def downgrade():
        run(machine, install("needed==1.0"))
        return install("needed>=2")

    asked = run(machine, "import needed; " + downgrade())
    assert "installing needed>=2 (now 1.0)" in asked
    assert "InputError: needed had to be changed after being imported: restart the session" in asked
    again = run(machine, "import needed; " + install("needed>=2"))
    assert again.splitlines()[-1] == "all requirements are there"
    assert (
        run(machine, downgrade() + "; import needed; print(needed.number)").splitlines()[-1]
        == "2.0"
    )


def test_torch_is_never_installed(machine):
    assert run(machine, install("torch>=99")).splitlines()[-1] == "all requirements are there"
    (machine / "bare").mkdir()
    (machine / "bare" / "packaging").symlink_to(Path(packaging.__file__).parent)
    code = f"import sys; sys.path.append({str(machine / 'bare')!r}); {install('torch>=2.6')}"
    printed = run(machine, code, "-S")  # without site-packages
    assert "InputError: torch is not installed: install the build for your machine" in printed


def test_what_pip_can_not_get_is_said_and_left_to_the_check_up(machine):
    printed = run(machine, install("needed-but-nowhere>=1") + "; print('went on')")
    assert (
        "pip could not do it: ERROR: No matching distribution found for "
        "needed-but-nowhere>=1\nwent on" in printed
    )


def test_an_old_torchao_goes_on_a_hosted_machine_only(machine):
    pip = [machine / "venv" / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-index"]
    subprocess.run([*pip, "--find-links", machine / "wheels", "torchao"], check=True)
    code = install("tqdm>=4.66")
    assert run(machine, code).splitlines()[-1] == "all requirements are there"
    assert "removing torchao 0.10.0: peft refuses to work beside" in run(machine, code, colab=True)
    assert run(machine, code, colab=True).splitlines()[-1] == "all requirements are there"


def test_set_up_imports_nothing_heavy(machine):
    heavy = "torch transformers peft numpy pandas PIL matplotlib tqdm"
    code = "from bridgeblip.hosting.runtime import set_up; set_up()"
    code += "; import sys; print(sorted(sys.modules.keys() & set(heavy)))"
    assert run(machine, f"heavy = {heavy.split()}; {code}").splitlines()[-1] == "[]"


def test_results_go_where_the_kernel_is_if_the_repository_can_not_be_written(machine):
    code = "from bridgeblip.hosting import runtime; runtime.HOME = Path('/no such folder'); runtime.set_up()"
    printed = run(machine, f"from pathlib import Path; {code}")
    assert printed.splitlines()[0].endswith(f"working in {(machine / 'work').resolve()}")


def test_on_colab_the_hub_looks_for_no_secret(machine):
    code = "from bridgeblip.hosting.runtime import set_up; set_up(); from huggingface_hub.utils import build_hf_headers; "
    printed = run(
        machine,
        code + "print(build_hf_headers().get('authorization'))",
        colab=True,
        HF_TOKEN="secret",
    )
    assert printed.splitlines()[-1] == "None"
