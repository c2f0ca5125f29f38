"""Fixtures of the proxy's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from proxies import Proxy, proxied
from upstream import Upstream


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    """Return a target."""
    with Upstream() as server:
        yield server


@pytest.fixture
def proxy(upstream: Upstream) -> Iterator[Proxy]:
    """Return a proxy without prompters in front of it."""
    with proxied(upstream.url) as served:
        yield served
