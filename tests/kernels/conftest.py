"""Shared fixtures."""

from __future__ import annotations

import pytest
from fast_backends import need


@pytest.fixture
def runnable(request: pytest.FixtureRequest) -> None:
    """Skip a test of a ``backend`` that cannot run here."""
    callspec = getattr(request.node, "callspec", None)
    backend = callspec.params.get("backend") if callspec else None
    if backend is not None:
        need(backend)
