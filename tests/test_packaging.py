"""The installed package has all files of the source tree: pyproject.toml's list of packages is complete."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
INSTALLED_AS = {"alignpro": "alignpro", "kernels/alignpro_kernels": "alignpro_kernels", "csrc": "alignpro_kernels/csrc"}
INSTALLED_AS["launch/zero"] = "alignpro/distributed/deepspeed/zero"
"""Folders of the source tree → their places in the wheel."""


def files(folder: str) -> list[PurePosixPath]:
    """Return the files under a folder, relative to it."""
    paths = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return [PurePosixPath(path.relative_to(ROOT / folder)) for path in paths]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """Build a wheel and a source archive from a copy of the tree; return the names of their files."""
    copy = tmp_path_factory.mktemp("packaging") / "alignpro"
    for folder in INSTALLED_AS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    code = "from setuptools import build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    wheel, archive = next((copy / "dist").glob("*.whl")), next((copy / "dist").glob("*.tar.gz"))
    with zipfile.ZipFile(wheel) as opened_wheel, tarfile.open(archive) as opened_archive:
        return set(opened_wheel.namelist()), {name.partition("/")[2] for name in opened_archive.getnames()}


@pytest.mark.parametrize("folder", INSTALLED_AS)
def test_every_file_is_in_the_wheel_and_in_the_source_archive(folder: str, built: tuple[set[str], set[str]]) -> None:
    wheel, archive = built
    assert files(folder)
    assert [path for path in files(folder) if f"{INSTALLED_AS[folder]}/{path}" not in wheel] == []
    assert [path for path in files(folder) if f"{folder}/{path}" not in archive] == []


def test_the_wheel_has_no_other_top_level_package(built: tuple[set[str], set[str]]) -> None:
    tops = {name.split("/")[0] for name in built[0]}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"alignpro", "alignpro_kernels"}
