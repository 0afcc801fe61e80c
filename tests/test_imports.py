"""Who may import whom: the folders are the architecture, and imports inside functions count."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "bridgeblip"
SHARED = {"files", "machine", "messages"}  # and what the package itself defines
ITS_OWN = {"InputError", "HOME", "IN_REPOSITORY", "__version__"}
MAY_IMPORT = {
    "files": set(),
    "machine": set(),
    "messages": set(),
    "data": SHARED,
    "evidence": SHARED | {"data"},
    "training": SHARED | {"data", "evidence"},
    "bundle": SHARED | {"data", "evidence"},
    "bridge": SHARED | {"data", "evidence", "training", "bundle"},
    "vlm": SHARED | {"data", "evidence", "training", "bundle"},
    "embedded": SHARED | {"data", "evidence", "training", "bundle", "bridge", "vlm"},
    "hosting": SHARED | {"data", "evidence", "training", "bundle", "bridge", "vlm", "embedded"},
    "commands": SHARED
    | {"data", "evidence", "training", "bundle", "bridge", "vlm", "embedded", "hosting"},
    "__main__": SHARED | {"commands", "hosting"},
}


def forbidden(source: str, part: str) -> list[str]:
    """What a module in ``part`` of the package imports though it may not."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are written out"
            names = [node.module]
            if node.module == "bridgeblip":
                names = [f"bridgeblip.{a.name}" for a in node.names if a.name not in ITS_OWN]
        for name in names:
            top, _, rest = name.partition(".")
            other = rest.split(".")[0]
            allowed = other in {"", part} | MAY_IMPORT[part]
            if top in ("experiments", "tools", "tests") or (top == "bridgeblip" and not allowed):
                found.append(name)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=str)
def test_only_what_stands_below_is_imported(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert part == "__init__" or not forbidden(path.read_text(encoding="utf-8"), part)


def test_a_forbidden_import_is_found():
    planted = "def late():\n    from bridgeblip.bridge.model import load_sliced"
    assert forbidden(planted, "training") == ["bridgeblip.bridge.model"]
    assert forbidden("import experiments.bench", "hosting") == ["experiments.bench"]
    assert not forbidden(planted, "embedded")
