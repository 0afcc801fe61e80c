"""Write the badges that open the notebooks in Colab, and a set-up that clones the repository, into
notebooks and READMEs, once it has a home on GitHub:

    python tools/badges.py OWNER/NAME

Run again, with the same name or another, it puts the same lines in the same places.
"""

import argparse
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
COLAB = "https://colab.research.google.com"
PLACE = re.compile(r"(?m)^(On Colab: upload the repository's|\[!\[Open in Colab\])[^\n]*$")
CLONE = re.compile(r"(?m)^ *!git clone [^\n]*\n")
LOOK = "found = [path for place in places"
TITLE = re.compile(r"(?m)^(# bridgeblip\n)(\n\[!\[Open in Colab\][^\n]*\n)?")


def badge(repository: str, notebook: str) -> str:
    link = f"{COLAB}/github/{repository}/blob/main/{notebook}"
    return f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({link})"


def write_notebook(path: Path, repository: str) -> None:
    """Give a notebook its badge, and its set-up a clone where Drive holds no repository."""
    notebook = nbformat.read(path, as_version=4)
    clone = (
        "    !git clone -q --depth 1 "
        f"https://github.com/{repository} /content/drive/MyDrive/bridgeblip || true\n"
    )
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = PLACE.sub(badge(repository, path.name), cell.source)
        elif LOOK in cell.source:
            cell.source = CLONE.sub("", cell.source).replace(LOOK, clone + LOOK, 1)
    nbformat.write(notebook, path)


def write_readme(path: Path, repository: str) -> None:
    """Put the first notebook's badge below a README's title."""
    line = f"\\1\n{badge(repository, 'train.ipynb')}\n"
    text = TITLE.sub(line, path.read_text(encoding="utf-8"), count=1)
    path.write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("repository", metavar="OWNER/NAME", help="on GitHub")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository's folder")
    args = parser.parse_args(arguments)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repository):
        parser.error(f"{args.repository!r} is no OWNER/NAME, such as somebody/bridgeblip")
    for path in sorted(args.root.glob("*.ipynb")):
        write_notebook(path, args.repository)
    for path in sorted(args.root.glob("README*.md")):
        write_readme(path, args.repository)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
