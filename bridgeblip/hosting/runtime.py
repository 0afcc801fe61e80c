"""Where a notebook runs, and what it needs there: the packages, the data on a quick disk, the
results on Drive.

This comes before anything is installed: at the top it imports the standard library and packaging,
which every Jupyter kernel brings.
"""

import errno
import hashlib
import importlib
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import tomllib
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import copy
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from bridgeblip import HOME, IN_REPOSITORY, InputError, __version__
from bridgeblip.data.names import by_look, pick
from bridgeblip.files import cache_folder, copy_verified
from bridgeblip.messages import LANGUAGE_VARIABLE, LANGUAGES, say

DRIVE = Path("/content/drive")
OLD_TORCHAO = Requirement("torchao<0.16")  # peft makes no adapters beside it
SPARE_DISK = 10**9  # bytes that a copy leaves free
COPIERS = 16  # threads; on Drive most of the time is waiting
REMEDIES = {
    errno.ENOSPC: "free some space there, then run this again",
    errno.EEXIST: "remove that folder, then run this again",
    errno.ENOTDIR: "set $BRIDGEBLIP_CACHE to a folder",
    errno.EACCES: "set $BRIDGEBLIP_CACHE to a folder that you can write",
    errno.EROFS: "set $BRIDGEBLIP_CACHE to a folder that you can write",
}  # where it helps to do something before running again


def place() -> str:
    """Return "Colab", "Kaggle" or "Jupyter"."""
    if "google.colab" in sys.modules:
        return "Colab"
    return "Kaggle" if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else "Jupyter"


def requirements(*extras: str) -> list[Requirement]:
    """What the package needs with these extras, as pyproject.toml says, or the installed one.

    Raises:
        InputError: if neither is there.
    """
    if not IN_REPOSITORY:
        if not installed("bridgeblip"):
            raise InputError(
                f"the folder bridgeblip lies in {HOME} without its repository: copy all of it, or "
                f"pip install it"
            )
        wanted = map(Requirement, requires("bridgeblip") or [])
        asked = [{"extra": extra} for extra in ("", *extras)]
        return [one for one in wanted if not one.marker or any(map(one.marker.evaluate, asked))]
    project = tomllib.loads((HOME / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return list(map(Requirement, dict.fromkeys(lines)))


def installed(package: str) -> str | None:
    """Return the version of a package, None if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def fits(wanted: Requirement) -> bool:
    """Whether a package is there in a version that will do."""
    have = installed(wanted.name)
    return have is not None and wanted.specifier.contains(have, prereleases=True)


def other_copies() -> list[str]:
    """Name, a line each, what else answers to the package's name."""
    lines = []
    for place in dict.fromkeys(Path(entry).resolve() for entry in ["", *sys.path]):
        if place != HOME and (place / "bridgeblip" / "__init__.py").is_file():
            lines.append(f"a second copy of bridgeblip lies in {place}")
    have = installed("bridgeblip")
    if have not in (None, __version__):
        lines.append(f"bridgeblip {have} is installed (pip uninstall bridgeblip)")
    return [f"{line}; this is {__version__} in {HOME}" for line in lines]


def set_up(*extras: str, language: str = "auto") -> None:
    """Say where this runs, go to the repository's folder, and install what is missing; a second
    call does nothing.

    Where that folder can't be written, as on Kaggle, the kernel stays where it is, and results go
    there. torch is never installed or changed. On Colab the hub is asked without a token, so that
    no dialogue about a secret waits for an answer; set ``HF_HUB_DISABLE_IMPLICIT_TOKEN`` to 0
    before if you need one.

    Args:
        extras: of pyproject.toml, what the notebook needs; by default "train" and "notebooks".
        language: of what is printed most: auto (the locale's), en or ko.

    Raises:
        InputError: if there is no torch, or if the session must be restarted, because a package
            that was imported already had to be changed.
    """
    if language not in LANGUAGES:
        raise InputError(f"LANGUAGE is {language!r}: expected one of {', '.join(LANGUAGES)}")
    if language != "auto":
        os.environ[LANGUAGE_VARIABLE] = language
    if os.access(HOME, os.W_OK):
        os.chdir(HOME)
    print(say("where", place=place(), python=sys.version.split()[0], folder=Path.cwd()))
    for line in other_copies():
        print(line)
    # Progress bars are plain text without ipywidgets.
    warnings.filterwarnings("ignore", "IProgress not found")
    if place() == "Colab":
        os.environ.setdefault("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    install_missing(requirements(*(extras or ("train", "notebooks"))))


def install_missing(wanted: list[Requirement]) -> None:
    """Install those of the wanted packages that do not fit; torch stays as it is."""
    torch = installed("torch")
    if torch is None:
        raise InputError(
            "torch is not installed: install the build for your machine (pytorch.org), then run "
            "this again"
        )
    unfit = [one for one in wanted if one.name != "torch" and not fits(one)]
    in_the_way = place() != "Jupyter" and fits(OLD_TORCHAO)
    if not unfit and not in_the_way:
        print(say("ready"))
        return
    before = _imported_versions()
    if in_the_way:
        print(f"removing torchao {installed('torchao')}: peft refuses to work beside {OLD_TORCHAO}")
        _pip("uninstall", "--yes", "torchao")
    if unfit:
        named = [f"{one} (now {installed(one.name) or 'missing'})" for one in unfit]
        print(say("installing", packages=", ".join(named)))
        with tempfile.TemporaryDirectory() as folder:
            pinned = Path(folder) / "torch.txt"
            pinned.write_text(f"torch=={torch}\n", encoding="utf-8")
            _pip("install", "--constraint", str(pinned), *map(str, unfit))
    importlib.invalidate_caches()
    changed = sorted(name for name, had in before.items() if installed(name) != had)
    if changed:
        raise InputError(
            f"{', '.join(changed)} had to be changed after being imported: restart the session (in "
            f"Colab, Runtime > Restart session), then choose Run all again"
        )


def _imported_versions() -> dict[str, str | None]:
    """The versions of the packages that this process has imported something of."""
    owners = packages_distributions()
    modules = owners.keys() & sys.modules.keys()
    return {name: installed(name) for module in modules for name in owners[module] if name}


def _pip(*arguments: str) -> None:
    """Run pip; where it fails, say why and go on: the check-up knows whether the notebook at hand
    needs the package."""
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in reasons if line.startswith("ERROR")]
        print(f"pip could not do it: {(errors or reasons or ['it does not say why'])[-1]}")


def local_copy(csv: str | Path) -> Path:
    """Return where a question file and its pictures can be read quickly: ``csv`` itself, unless it
    lies on Drive.

    Drive is slow with many small files: from there the CSVs beside it and its pictures are copied
    to the local disk, each verified, and found there by the next call, which copies only what has
    changed. Where ``csv`` is not there but in a zip of the organiser's in its folder, it is
    unpacked on the local disk, with the CSVs beside it and the pictures that it names. Either way
    the copy lies beside the cache of image features. A path that does not exist is looked for in
    the repository's folder, too, and else returned as it is: the check-up has the message.

    Raises:
        InputError: if the local disk is too small, or the zip damaged.
    """
    csv = Path(csv)
    if not csv.parent.is_dir() and (HOME / csv.parent).is_dir():
        csv = HOME / csv
    if csv.is_file():
        return _copied(csv) if csv.resolve().is_relative_to(DRIVE.resolve()) else csv
    for archive in sorted(csv.parent.glob("*.[zZ][iI][pP]")):
        if found := _unpacked(archive, csv.name):
            return found
    return csv


def _copied(csv: Path) -> Path:
    """Copy a question file, the CSVs beside it and its pictures to the local disk; return the copy,
    or ``csv`` itself if that can't be."""
    folder, target = csv.parent, _local_folder(csv.parent)
    pictures = _pictures(csv, folder)
    if pictures is None:
        return csv  # the check-up says what is wrong with it
    if any(name.split(os.sep)[0] in ("", os.pardir) for name in pictures):
        print(
            f"{csv} has pictures outside its folder, or absolute paths: reading from Drive, which "
            f"is slow"
        )
        return csv

    def changed(name: str) -> int | None:
        there = _stat(folder / name)
        return there[0] if there and there != _stat(target / name) else None

    def copy(name: str) -> None:
        copy_verified(folder / name, target / name)
        shutil.copystat(folder / name, target / name)

    tables = [path.name for path in folder.glob("*.csv")]
    with _explained(folder, target):
        for path in target.glob("*.csv"):
            if path.name not in tables:
                path.unlink()
        _fetch(tables + pictures, changed, copy, folder, target)
    print(say("copied", source=folder, target=target))
    return target / csv.name


def _unpacked(archive: Path, csv_name: str) -> Path | None:
    """Unpack ``csv_name``, the CSVs beside it and its pictures, if a zip holds it; return that
    file."""
    target, one_at_a_time = _local_folder(archive, *_stat(archive)), threading.Lock()
    try:
        with _explained(archive, target), _open_zip(archive) as opened:
            members = {_plain(member.filename): member for member in opened.infolist()}
            alike = by_look(members)
            found = [name for name in members if posixpath.basename(name) == csv_name]
            if not found:
                return None
            csv = min(found, key=lambda name: name.count("/"))

            def member_of(name: str) -> zipfile.ZipInfo | None:
                return members.get(pick(_plain(name), alike))

            def missing(name: str) -> int | None:
                member, here = member_of(name), _stat(target / name)
                there = member is None or (here and here[0] == member.file_size)
                return None if there else member.file_size

            def unpack(name: str) -> None:
                member = copy(member_of(name))  # of two spellings each gets its own
                member.filename = name
                with one_at_a_time:  # zipfile minds a folder that another thread has just made
                    opened.extract(member, target)  # never outside the folder

            any_csv = re.compile(re.escape(csv[: -len(csv_name)]) + r"[^/]+\.csv", re.IGNORECASE)
            tables = list(filter(any_csv.fullmatch, members))
            _fetch(tables, missing, unpack, archive, target)
            _fetch(_pictures(target / csv, target) or [], missing, unpack, archive, target)
    # RuntimeError: a password, a strange method.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise InputError(
            f"{archive} can't be unpacked ({error}): copy it again, or unpack it yourself"
        ) from error
    print(say("unpacked", source=archive, target=target))
    return target / csv


def _fetch(
    names: list[str],
    lacking: Callable[[str], int | None],
    fetch: Callable[[str], None],
    source: Path,
    target: Path,
) -> None:
    """Fetch, in threads, the files of which ``lacking`` tells a size, if there is room for them."""
    from tqdm.auto import tqdm

    target.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(COPIERS) as pool:
        sizes = dict(zip(names, pool.map(lacking, names), strict=True))
        wanted = [name for name in names if sizes[name] is not None]
        need = sum(sizes[name] for name in wanted)
        room = max(0, shutil.disk_usage(target).free - SPARE_DISK)
        if need > room:
            raise InputError(
                f"{source} needs {need / 1e9:.1f} GB in {target}, {room / 1e9:.1f} GB can be used "
                f"there: free some space, or set $BRIDGEBLIP_CACHE to a folder on a larger disk"
            )
        list(tqdm(pool.map(fetch, wanted), "copying", len(wanted), disable=not wanted))


def _pictures(csv: Path, root: Path) -> list[str] | None:
    """Return the names of a question file's pictures, seen from ``root`` or absolute as they are
    written; None if the file can't be read."""
    from bridgeblip.data.questions import read_rows

    try:
        rows = read_rows(Path(os.path.relpath(csv)), need_answers=False)
    except InputError:
        return None
    images = dict.fromkeys(row.image for row in rows if row.image)
    return [str(i) if i.is_absolute() else os.path.relpath(i, root) for i in images]


def _open_zip(archive: Path) -> zipfile.ZipFile:
    """Open a zip; names without the mark of UTF-8 are UTF-8 all the same, or Korean Windows'."""
    for encoding in ("utf-8", "cp949"):
        with suppress(UnicodeDecodeError):
            return zipfile.ZipFile(archive, metadata_encoding=encoding)
    return zipfile.ZipFile(archive)


def _plain(name: str) -> str:
    """One form of names that look the same: composed letters, slashes, nothing superfluous."""
    return posixpath.normpath(unicodedata.normalize("NFC", name).replace("\\", "/"))


def _stat(path: Path) -> tuple[int, int] | None:
    """Size and time of change of a file; None if there is none."""
    if not os.path.isfile(path):
        return None
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


@contextmanager
def _explained(source: Path, target: Path) -> Iterator[None]:
    """Turn what the system says of a copy into one line with a remedy."""
    try:
        yield
    except OSError as error:
        remedy = REMEDIES.get(error.errno, "run this again: it goes on")
        raise InputError(f"copying {source} to {target} stopped ({error}): {remedy}") from error


def _local_folder(source: Path, *version: int) -> Path:
    """Where the copy of a folder or zip lies: each has its own, whatever its name."""
    digest = hashlib.sha256(repr((str(source.resolve()), *version)).encode())
    return cache_folder() / "data" / f"{source.stem}-{digest.hexdigest()[:8]}"


def finish() -> None:
    """On Colab, wait until all that was written is stored on Drive, and let go of it; elsewhere do
    nothing.

    What a mounted Drive shows may still be on its way, and is lost if the machine goes before.
    """
    if place() != "Colab" or not DRIVE.is_dir():
        return
    from google.colab import drive

    print(say("storing"))
    os.chdir(DRIVE.parent)  # a folder that somebody stands in can't be unmounted
    drive.flush_and_unmount()
    print(say("stored"))
