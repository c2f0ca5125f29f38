"""What every measurement of several entrants needs: their turns, and the reasons why some have no figures."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, TypeVar

import torch

from alignpro_kernels import BackendError

T = TypeVar("T")


class SkippedError(Exception):
    """Raised by an entrant that does not take part, with the reason."""


@dataclass
class Result:
    """The result of an entrant; every benchmark adds its figures."""

    entrant: str
    status: Literal["measured", "wrong", "failed", "skipped"] = "measured"
    reason: str | None = None
    """Why it was not measured."""

    @contextmanager
    def record_failure(self) -> Iterator[None]:
        """Record an error in the result instead of raising it: a peer may fail in any way."""
        try:
            yield
        except (SkippedError, BackendError) as error:  # a backend may run here, but not on this device or dtype
            self.status, self.reason = "skipped", str(error)
        except torch.OutOfMemoryError:
            self.status, self.reason = "failed", "out of memory"
        except Exception as error:
            first_line = (str(error).strip().splitlines() or [""])[0][:300]
            self.status, self.reason = "failed", f"{type(error).__name__}: {first_line}"


def rotated(entrants: Sequence[T], turn: int) -> list[T]:
    """Return the order of a round: each starts with another entrant, so that none always follows the same one."""
    start = turn % max(len(entrants), 1)
    return [*entrants[start:], *entrants[:start]]


def import_peer(name: str, requirement: str = "'alignpro[benchmarks]'") -> ModuleType:
    """Import a peer's module.

    Args:
        name: Of the module.
        requirement: What `pip` installs it by.

    Raises:
        SkippedError: It is not installed, or its import fails.
    """
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except Exception as error:  # a peer's import may fail in any way; the reason goes into the results
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise SkippedError(f"{package} is not installed: pip install {requirement}") from None
        raise SkippedError(f"import of {name} failed: {type(error).__name__}: {error}") from error
