"""Which compiler builds the library of operators."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from alignpro_kernels.build import BuildError, _compiler, library

needs_openmp = pytest.mark.skipif(sys.platform == "darwin", reason="torch has no OpenMP of its own there")


def program(path: Path, version: str) -> Path:
    path.write_text(f"#!/bin/sh\necho '{version}'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only directory on the PATH, where `c++` is clang."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    program(tmp_path / "c++", "Ubuntu clang version 18.1.3")
    return tmp_path


@needs_openmp
def test_the_library_with_openmp_is_not_built_by_clang(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _compiler() == str(programs / "c++")  # as the host compiler of CUDA code
    with pytest.raises(BuildError, match=r"c\+\+ is clang, which on Linux .*: install g\+\+"):
        library()
    monkeypatch.setenv("CXX", "c++")
    with pytest.raises(BuildError, match=r"CXX is 'c\+\+', clang, .*: set it to g\+\+"):
        library()


def test_another_compiler_is_taken_where_the_first_is_clang(programs: Path) -> None:
    program(programs / "clang++", "Ubuntu clang version 18.1.3")
    other = program(programs / "g++", "g++ (Debian 12.2.0-14) 12.2.0")
    assert _compiler(openmp=True) == str(other)
