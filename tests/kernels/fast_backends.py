"""The fast backends of the head's operators, as far as they run here."""

from __future__ import annotations

import pytest

from alignpro_kernels import backends

FAST = ["torch", "cpp"]
OPERATORS = ["policy_loss", "linear_logprob"]


def need(backend: str) -> None:
    """Skip where there is no compiler; a library that does not build or load is a failure, and no reason to skip."""
    if (reason := backends()[backend]) is None:
        return
    if "no C++ compiler found" in reason:
        pytest.skip(f"backend {backend}: {reason}")
    pytest.fail(f"backend {backend}: {reason}")
