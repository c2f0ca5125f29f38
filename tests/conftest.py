"""Fixtures for all tests: a single thread, tiny models in memory and on disk, runs of them, and a disk that fills up."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tiny_models import ARCHITECTURES, save_tiny, tiny_language_model
from tiny_runs import Workshop

from alignpro.models.garbage_collection import paused_collection
from alignpro.models.language_model import LanguageModel

settings.register_profile("shared machine", deadline=None)  # its load makes the time of an example meaningless
settings.load_profile("shared machine")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the garbage collector from searching the modules and the tests again and again."""
    with paused_collection():
        collected = yield
    gc.freeze()
    return collected


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name an argument of raw bytes by its length: every worker must collect the same names, and people read them."""
    return f"{argname} of {len(val)} bytes" if isinstance(val, bytes) and not val.isascii() else None


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: tiny products are slower on several, and parallel test processes share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", params=ARCHITECTURES)
def any_model(request: pytest.FixtureRequest) -> LanguageModel:
    """Return a frozen tiny model of each architecture in turn. All tests share it; do not modify it."""
    return tiny_language_model(request.param)


@pytest.fixture(scope="session")
def llama() -> LanguageModel:
    """Return a frozen tiny Llama. All tests share it; do not modify it."""
    return tiny_language_model("llama")


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from architecture to a directory with its model and tokenizer. Do not modify the directories."""
    written: dict[str, Path] = {}

    def directory(architecture: str) -> Path:
        if architecture not in written:
            written[architecture] = save_tiny(architecture, tmp_path_factory.mktemp(architecture))
        return written[architecture]

    return directory


@pytest.fixture
def old_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a copy of what tests/old_runs/README.md describes the working directory, since its paths are relative."""
    with tarfile.open(Path(__file__).with_name("old_runs") / "old_runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Create models, data and configurations; do not modify them."""
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="session")
def finished(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return ``finished(command, *overrides)``, which gives the directory of an uninterrupted run; do not modify it."""
    made: dict[tuple[str, ...], Path] = {}

    def run(command: str, *overrides: str) -> Path:
        key = (command, *overrides)
        if key not in made:
            out = tmp_path_factory.mktemp("finished") / "run"
            assert workshop.run(command, out, *overrides) == 0
            made[key] = out
        return made[key]

    return run


@pytest.fixture
def mount_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Return ``mount_disk(size)``, which mounts an empty file system of that size, such as ``64k``."""
    place = tmp_path / "disk"

    def mount(size: str) -> Path:
        place.mkdir()
        if os.geteuid() != 0 or shutil.which("mount") is None:
            pytest.skip("mounting a file system needs root")
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], capture_output=True
        ).returncode:
            pytest.skip("no file system can be mounted here")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", place], check=True)
