from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import Workshop


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
