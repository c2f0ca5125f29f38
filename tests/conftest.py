"""What every test may use: one thread, and tiny models in memory and on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tiny_models import ARCHITECTURES, save_tiny, tiny_language_model

from alignpro.language_model import LanguageModel

settings.register_profile("shared machine", deadline=None)  # how long an example takes says nothing here
settings.load_profile("shared machine")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products are slower on several threads, and parallel test processes share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", params=ARCHITECTURES)
def any_model(request: pytest.FixtureRequest) -> LanguageModel:
    """A frozen tiny model of each architecture in turn, shared by all tests: not to be changed."""
    return tiny_language_model(request.param)


@pytest.fixture(scope="session")
def llama() -> LanguageModel:
    """A frozen tiny Llama, shared by all tests: not to be changed."""
    return tiny_language_model("llama")


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Architecture → a directory with its model and tokenizer, written once and not to be changed."""
    written: dict[str, Path] = {}

    def directory(architecture: str) -> Path:
        if architecture not in written:
            written[architecture] = save_tiny(architecture, tmp_path_factory.mktemp(architecture))
        return written[architecture]

    return directory
