"""Where a notebook runs, and what it needs there: the packages, the data on a quick disk, the
results on Drive.

This comes before anything is installed: at the top it imports the standard library and packaging,
which every Jupyter kernel brings.
"""

import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, distributions, packages_distributions, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from bridgeblip import InputError

HOME = Path(__file__).resolve().parent.parent.parent
REQUIREMENTS = HOME / "requirements.txt"
DRIVE = Path("/content/drive")
TORCHAO_MINIMUM = Version("0.16.0")  # peft makes no adapters beside an older one
SPARE_DISK = 10**9  # bytes that a copy leaves free
COPIERS = 16  # threads; on Drive most of the time is waiting


def place() -> str:
    """Return "Colab", "Kaggle" or "Jupyter"."""
    if "google.colab" in sys.modules:
        return "Colab"
    return "Kaggle" if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else "Jupyter"


def set_up(requirements: Path = REQUIREMENTS) -> None:
    """Say where this runs, go to the repository's folder, and install what is missing; a second
    call does nothing.

    Where that folder can't be written, as on Kaggle, the kernel stays where it is, and results go
    there. torch is never installed or changed. On Colab the hub is asked without a token, so that
    no dialogue about a secret waits for an answer; set ``HF_HUB_DISABLE_IMPLICIT_TOKEN`` to 0
    before if you need one.

    Raises:
        InputError: if there is no torch, or if the session must be restarted, because a package
            that was imported already had to be changed.
    """
    if os.access(HOME, os.W_OK):
        os.chdir(HOME)
    print(f"{place()}, Python {sys.version.split()[0]}; working in {Path.cwd()}")
    warnings.filterwarnings(
        "ignore", "IProgress not found"
    )  # progress bars are plain text without ipywidgets
    if place() == "Colab":
        os.environ.setdefault("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    _install_missing(requirements)


def _install_missing(requirements: Path) -> None:
    torch = _version("torch")
    if torch is None:
        raise InputError(
            "torch is not installed: install the build for your machine (pytorch.org), then run "
            "this again"
        )
    lines = [
        line.partition("#")[0].strip()
        for line in requirements.read_text(encoding="utf-8").splitlines()
    ]
    unfit = [
        wanted
        for wanted in map(Requirement, filter(None, lines))
        if wanted.name != "torch" and not _fits(wanted)
    ]
    torchao = _version("torchao")
    in_the_way = place() != "Jupyter" and torchao and Version(torchao) < TORCHAO_MINIMUM
    if not unfit and not in_the_way:
        print("all requirements are there")
        return
    before = _versions()
    owners = packages_distributions()
    loaded = {
        canonicalize_name(name)
        for module in owners.keys() & sys.modules.keys()
        for name in owners[module]
        if name
    }
    if in_the_way:
        print(
            f"removing torchao {torchao}: peft refuses to work beside one below {TORCHAO_MINIMUM}, "
            f"nothing needs it"
        )
        _pip("uninstall", "--yes", "torchao")
    if unfit:
        print(
            "installing",
            ", ".join(f"{wanted} (now {_version(wanted.name) or 'missing'})" for wanted in unfit),
        )
        with tempfile.TemporaryDirectory() as folder:
            pinned = Path(folder) / "torch.txt"
            pinned.write_text(f"torch=={torch}\n", encoding="utf-8")
            _pip("install", "--constraint", str(pinned), *map(str, unfit))
    importlib.invalidate_caches()
    after = _versions()
    changed = sorted(name for name in loaded if before.get(name) != after.get(name))
    if changed:
        raise InputError(
            f"{', '.join(changed)} had to be changed after being imported: restart the session (in "
            f"Colab, Runtime > "
            "Restart session), then choose Run all again"
        )


def _pip(*arguments: str) -> None:
    """Run pip; where it fails, say why and go on: the check-up knows whether the notebook at hand
    needs the package."""
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in reasons if line.startswith("ERROR")]
        print(f"pip could not do it: {(errors or reasons or ['it does not say why'])[-1]}")


def _fits(wanted: Requirement) -> bool:
    have = _version(wanted.name)
    return have is not None and wanted.specifier.contains(have, prereleases=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _versions() -> dict[str, str]:
    return {canonicalize_name(found.name): found.version for found in distributions() if found.name}


def local_copy(csv: str | Path) -> Path:
    """Return where a question file and its pictures can be read quickly: ``csv`` itself, unless it
    lies on Drive.

    Drive is slow with many small files: from there the CSVs beside it and its pictures are copied
    to the local disk, each verified, and found there by the next call, which copies only what has
    changed. Where ``csv`` is not there but in a zip of the organiser's in its folder, that is
    unpacked on the local disk. Either way the copy lies beside the cache of image features. A path
    that does not exist is looked for in the repository's folder, too, and else returned as it is:
    the check-up has the message.

    Raises:
        InputError: if the local disk is too small, or the zip damaged.
    """
    csv = Path(csv)
    if not csv.parent.is_dir():
        csv = HOME / csv if (HOME / csv.parent).is_dir() else csv
    if csv.is_file():
        return _copied(csv) if csv.resolve().is_relative_to(DRIVE.resolve()) else csv
    for archive in sorted(csv.parent.glob("*.zip")):
        if found := _unpacked(archive, csv.name):
            return found
    return csv


@dataclass(frozen=True)
class Item:
    """A file to be had on the local disk."""

    size: int
    changed: int
    """Nanoseconds since 1970."""
    fetch: Callable[[Path], None]
    """Writes it to a path, verified."""


def _copied(csv: Path) -> Path:
    from bridgeblip.data import questions
    from bridgeblip.files import copy_verified

    folder = csv.parent
    try:
        pictures = {question.image for question in questions.read_rows(csv, need_answers=False)}
        written = questions.with_known_names(questions.read_table(csv))["img_path"]
    except InputError:
        return csv  # the check-up says what is wrong with it
    names = {os.path.relpath(path, folder): path for path in {*folder.glob("*.csv"), *pictures}}
    with ThreadPoolExecutor(COPIERS) as pool:
        stats = dict(zip(names, pool.map(_stat, names.values()), strict=True))
    items = {
        name: Item(stat.st_size, stat.st_mtime_ns, partial(copy_verified, names[name]))
        for name, stat in stats.items()
        if stat  # the check-up names the pictures that are not there
    }
    if any(name.split(os.sep)[0] == os.pardir for name in items) or any(
        map(os.path.isabs, written)
    ):
        print(
            f"{csv} has pictures outside its folder, or absolute paths: reading from Drive, which "
            f"is slow"
        )
        return csv
    target = _local_folder(folder)
    _fetch(items, target, folder)
    print(f"reading the copy of {folder} in {target}; to change something, change it in {folder}")
    return target / csv.name


def _unpacked(archive: Path, csv_name: str) -> Path | None:
    """Unpack a zip if it holds ``csv_name``; return that file."""
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [
                m for m in opened.infolist() if not m.is_dir() and not _is_clutter(m.filename)
            ]
            names = [m.filename for m in members if Path(m.filename).name == csv_name]
            if not names:
                return None
            items = {
                m.filename: Item(m.file_size, _time_of(m), partial(_extract, opened, m))
                for m in members
            }
            target = _local_folder(archive)
            _fetch(items, target, archive)
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        RuntimeError,
    ) as error:  # the last: a password, a strange method
        raise InputError(
            f"{archive} can't be unpacked ({error}): copy it again, or unpack it yourself"
        ) from error
    print(f"reading {archive} as unpacked in {target}")
    return target / min(names, key=lambda name: name.count("/"))


def _is_clutter(name: str) -> bool:
    """Whether it is a file that a system has added to the zip, or one that leads out of it."""
    return any(part.startswith((".", "/")) or part == "__MACOSX" for part in Path(name).parts)


def _time_of(member: zipfile.ZipInfo) -> int:
    return int(time.mktime((*member.date_time, 0, 0, -1))) * 10**9


def _extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    from bridgeblip.files import write_atomically

    def write(partial: Path):
        with archive.open(member) as source, open(partial, "wb") as file:
            shutil.copyfileobj(source, file)  # at its end zipfile compares the checksum

    def verify(partial: Path):
        if partial.stat().st_size != member.file_size:
            raise OSError(f"{path} was not stored as written: is the disk full?")

    write_atomically(path, write, verify)


def _fetch(items: dict[str, Item], target: Path, source: Path) -> None:
    """Have each item at its name below ``target``; those that are there with their size and time
    are left alone."""
    from tqdm.auto import tqdm

    missing = {name: item for name, item in items.items() if not _is_there(target / name, item)}
    for stale in [
        path for path in target.rglob("*.csv") if str(path.relative_to(target)) not in items
    ]:
        stale.unlink()
    target.mkdir(parents=True, exist_ok=True)
    need, free = (
        sum(item.size for item in missing.values()),
        shutil.disk_usage(target).free - SPARE_DISK,
    )
    if need > free:
        raise InputError(
            f"{source} needs {need / 1e9:.1f} GB in {target}, {max(free, 0) / 1e9:.1f} GB can be "
            f"used there: free some "
            "space, or set $BRIDGEBLIP_CACHE to a folder on a larger disk"
        )

    def fetch(name: str):
        items[name].fetch(target / name)
        os.utime(target / name, ns=(items[name].changed,) * 2)

    try:
        if missing:
            with (
                ThreadPoolExecutor(COPIERS) as pool,
                tqdm(total=len(missing), desc="copying", unit="file") as bar,
            ):
                for _ in pool.map(fetch, missing):
                    bar.update()
    except OSError as error:
        raise InputError(
            f"copying {source} to {target} stopped ({error}): run this again: it goes on"
        ) from error


def _is_there(path: Path, item: Item) -> bool:
    stat = _stat(path)
    return stat is not None and (stat.st_size, stat.st_mtime_ns) == (item.size, item.changed)


def _stat(path: Path) -> os.stat_result | None:
    return path.stat() if os.path.isfile(path) else None


def _local_folder(source: Path) -> Path:
    """Where the copy of a folder or zip lies: each has its own, whatever its name."""
    from bridgeblip.bridge.features import default_folder

    source = source.resolve()
    return (
        default_folder()
        / "data"
        / f"{source.stem}-{hashlib.sha256(str(source).encode()).hexdigest()[:8]}"
    )


def finish() -> None:
    """On Colab, wait until all that was written is stored on Drive, and let go of it; elsewhere do
    nothing.

    What a mounted Drive shows may still be on its way, and is lost if the machine goes before.
    """
    if place() != "Colab" or not DRIVE.is_dir():
        return
    from google.colab import drive

    print("waiting until Drive has stored every file; keep this page open")
    os.chdir(DRIVE.parent)  # a folder that somebody stands in can't be unmounted
    drive.flush_and_unmount()
    print(
        "all is on Drive, and Drive is no longer mounted: to go on in this notebook, choose Run "
        "all again"
    )
