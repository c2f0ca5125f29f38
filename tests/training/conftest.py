from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_runs import Workshop


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices: a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Models, data and configurations that no test changes."""
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="session")
def finished(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``finished(command, *overrides)``: the directory of such a run that nothing disturbed; not to be changed."""
    made: dict[tuple[str, ...], Path] = {}

    def run(command: str, *overrides: str) -> Path:
        key = (command, *overrides)
        if key not in made:
            out = tmp_path_factory.mktemp("finished") / "run"
            assert workshop.run(command, out, *overrides) == 0
            made[key] = out
        return made[key]

    return run
