"""Which backend runs an operator."""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger("alignpro_kernels")


class BackendError(RuntimeError):
    """A backend that was asked for by name and cannot run; the message says why."""


def backends() -> dict[str, str | None]:
    """Every backend by name, with None where it runs here, else the reason why it does not."""
    return {"reference": None}


def choose_backend(operator: str, backend: str) -> str:
    """The backend that will run: the one asked for, or for ``auto`` the best of those that can; logged once each.

    Raises:
        BackendError: The backend is unknown, or cannot run here.
    """
    known = backends()
    chosen = next(name for name, reason in known.items() if reason is None) if backend == "auto" else backend
    if chosen not in known:
        raise BackendError(
            f"{operator}: backend {backend!r} is not in this build: take 'auto' or one of {', '.join(known)}"
        )
    if (reason := known[chosen]) is not None:
        raise BackendError(f"{operator}: backend {backend!r} cannot run here: {reason}")
    _announce(operator, chosen)
    return chosen


@functools.cache
def _announce(operator: str, backend: str) -> None:
    logger.info("%s runs on backend %s", operator, backend)
