"""Shared fixtures."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from fast_backends import need


@pytest.fixture
def runnable(request: pytest.FixtureRequest) -> None:
    """Skip a test of a ``backend`` that cannot run here."""
    callspec = getattr(request.node, "callspec", None)
    backend = callspec.params.get("backend") if callspec else None
    if backend is not None:
        need(backend)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Return ``set_threads(count)``, which sets the number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
