"""Sequences for tests of the policy."""

from __future__ import annotations

import pytest
from tiny_models import ragged

from alignpro.models.sequences import SequenceBatch

PROMPTS = ragged(6, 100, longest=12, seed=1)
COMPLETIONS = ragged(6, 100, longest=9, seed=2)


@pytest.fixture(scope="module")
def batch() -> SequenceBatch:
    """Return sequences of unequal lengths."""
    return SequenceBatch.build(PROMPTS, COMPLETIONS)
