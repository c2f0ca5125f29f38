"""Fixtures for all tests: a single thread, and tiny models in memory and on disk."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tiny_models import ARCHITECTURES, save_tiny, tiny_language_model

from alignpro.models.language_model import LanguageModel

settings.register_profile("shared machine", deadline=None)  # its load makes the time of an example meaningless
settings.load_profile("shared machine")


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
