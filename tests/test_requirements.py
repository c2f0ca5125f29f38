"""The requirement files of `make setup` agree with pyproject.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = PROJECT["optional-dependencies"]
DEV = [Requirement(line) for line in EXTRAS["dev"]]
NEEDED += [Requirement(line) for name in ("deepspeed", "serve") for line in EXTRAS[name]]  # `make setup` installs them


def listed(name: str) -> dict[str, Requirement]:
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {
        key(each): each for each in parsed if each.marker is None or each.marker.evaluate({"sys_platform": "linux"})
    }


def key(requirement: Requirement) -> str:
    return requirement.name.lower().replace("_", "-")


@pytest.mark.parametrize(("file", "needed"), [("cpu.txt", NEEDED), ("dev.txt", DEV)])
def test_every_pin_is_exact_and_within_the_range(file: str, needed: list[Requirement]) -> None:
    pins = listed(file)
    for pin in pins.values():
        assert [each.operator for each in pin.specifier] == ["=="], pin
    for requirement in needed:
        version = next(iter(pins[key(requirement)].specifier)).version
        assert requirement.specifier.contains(version), f"{file}: {requirement.name}=={version} is not {requirement}"


def test_the_gpu_requirements_equal_those_of_the_package() -> None:
    ranges = {name: str(each.specifier) for name, each in listed("gpu.txt").items()}
    del ranges["setuptools"]  # builds the package itself
    # torch depends on its matching Triton, which has another name under ROCm.
    assert ranges == {key(each): str(each.specifier) for each in NEEDED if each.name != "triton"}


def test_the_oldest_versions_are_the_lower_ends_of_the_ranges() -> None:
    pins = listed("oldest.txt")
    for pin in pins.values():
        assert [each.operator for each in pin.specifier] == ["=="], pin
    for name in ("torch", "triton", "transformers"):
        (needed,) = (each for each in NEEDED if each.name == name)
        pinned = next(iter(pins[name].specifier)).version
        assert str(needed.specifier) == f">={pinned.removesuffix('.0')}"
    newest = {name: each.name for name, each in listed("cpu.txt").items()}
    for name, pin in pins.items():
        assert newest.get(name, pin.name) == pin.name  # install.sh compares names as they are spelled


def test_no_package_is_pinned_twice() -> None:
    assert not listed("cpu.txt").keys() & listed("dev.txt").keys()
