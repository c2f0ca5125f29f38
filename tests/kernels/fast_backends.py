"""The fast backends of the head's operators that can run on this machine."""

from __future__ import annotations

import pytest

from alignpro_kernels import backends

FAST = ["torch", "cpp"]
OPERATORS = ["policy_loss", "linear_logprob"]


def need(backend: str) -> None:
    """Skip if there is no compiler. A library that fails to build or load is a failure, not a reason to skip."""
    if (reason := backends()[backend]) is None:
        return
    if "no C++ compiler found" in reason:
        pytest.skip(f"backend {backend}: {reason}")
    pytest.fail(f"backend {backend}: {reason}")
