"""What is asked of a user's packages, held against both sets of versions that the tests run on."""

import tomllib

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CONSTRAINTS = ("constraints.txt", "constraints-colab.txt")  # the newest; a stock Colab's
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def lines(file: str) -> list[str]:
    stripped = (
        line.partition("#")[0].strip()
        for line in (ROOT / file).read_text(encoding="utf-8").splitlines()
    )
    return [line for line in stripped if line and not line.startswith("-r ")]


def requirements(file: str) -> list[Requirement]:
    return [Requirement(line) for line in lines(file)]


def test_the_file_lists_the_light_core_and_the_extras_but_bits():
    extras = PROJECT["optional-dependencies"]
    assert set(extras) == {"train", "notebooks", "demo", "bits"}
    listed = [*PROJECT["dependencies"], *extras["train"], *extras["notebooks"], *extras["demo"]]
    assert lines("requirements.txt") == list(dict.fromkeys(listed))


@pytest.mark.parametrize("constraints", CONSTRAINTS)
def test_constraints_pin_every_requirement_within_its_range(constraints):
    pinned = {}
    for line in lines(constraints):
        name, version = line.split("==")
        assert canonicalize_name(name) not in pinned, f"{name} twice"
        pinned[canonicalize_name(name)] = version
    for wanted in [*requirements("requirements.txt"), *requirements("requirements-dev.txt")]:
        version = pinned.get(canonicalize_name(wanted.name))
        assert version is not None, f"{wanted.name} is not pinned"
        assert wanted.specifier.contains(version), f"{wanted} does not allow {version}"


def test_requirements_have_a_lower_end_and_no_upper_one():
    for wanted in requirements("requirements.txt"):
        assert [specifier.operator for specifier in wanted.specifier] == [">="], wanted


def test_the_two_sets_differ_where_a_stock_colab_is_older():
    newest, colab = ({line.split("==")[0]: line for line in lines(file)} for file in CONSTRAINTS)
    assert all(
        newest[name] != colab[name]
        for name in ("transformers", "peft", "accelerate", "numpy", "pandas")
    )
