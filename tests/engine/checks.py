"""What the tests of the engine compare: completions, chains, and the pages that are held."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from alignpro.engine import Chain, Completion, Engine, Request

TOKEN = 2 * 2 * 2 * 8 * 4
"""Bytes per token of the tiny Llama: two layers, keys and values, two heads of eight, float32."""
PAGE = 16 * TOKEN
"""Bytes per page of the tiny Llama."""


def assert_nothing_is_held(engine: Engine) -> None:
    """Check that every page is free or cached, and that no cached prompt is locked."""
    for worker in engine.workers.values():
        assert worker.tree.num_locked == 0
        assert worker.pool.num_free + worker.tree.num_cached == worker.pool.total


def assert_same(one: Completion, other: Completion, tolerance: float = 2e-5) -> None:
    """Check that tokens are equal, and log-probabilities up to rounding, which depends on the batch's shape."""
    assert (one.tokens, one.finish_reason, one.error) == (other.tokens, other.finish_reason, other.error)
    assert one.logprobs == pytest.approx(other.logprobs, abs=tolerance)


def assert_same_groups(
    left: Sequence[Sequence[Completion]], right: Sequence[Sequence[Completion]], tolerance: float = 2e-5
) -> None:
    for group, others in zip(left, right, strict=True):
        for one, other in zip(group, others, strict=True):
            assert_same(one, other, tolerance)


def assert_same_chains(
    left: Sequence[Sequence[Chain]], right: Sequence[Sequence[Chain]], tolerance: float = 2e-5
) -> None:
    for group, others in zip(left, right, strict=True):
        assert [chain.target_tokens for chain in group] == [chain.target_tokens for chain in others]
        completions = ([[chain.sample, *chain.responses] for chain in chains] for chains in (group, others))
        assert_same_groups(*completions, tolerance)


def assert_completions(requests: Sequence[Request], expected: Sequence[Sequence[Completion]]) -> None:
    assert_same_groups([request.completions for request in requests], expected)


def finish(engine: Engine) -> list[Request]:
    """Step until no request is left; return those that have finished."""
    finished = []
    while engine.num_unfinished_requests:
        finished += engine.step()
    assert engine.step() == []
    assert_nothing_is_held(engine)
    return finished
