"""Importance weights turn expectations over an earlier policy's samples into those over the current one's, by enumeration."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alignpro.objectives import effective_sample_share, importance_weights
from alignpro.theory import enumerate_sequences

SPACE = enumerate_sequences(3, end_token=0, max_length=3)


def table(seed: int) -> Tensor:
    """Return log ρ(.|s) of every state, (states, V), of a random policy."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(SPACE.prefixes), 3, generator=generator, dtype=torch.float64).log_softmax(-1)


OLD, NEW = table(1), table(2)
VALUES = torch.randn(len(SPACE.tokens), generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def actions(next_logprob: Tensor) -> Tensor:
    """Return the log-probability of every action of every sequence, (S, T), and what must not be read past the end."""
    return torch.where(SPACE.mask, next_logprob[SPACE.state, SPACE.tokens], torch.nan)


def mean(next_logprob: Tensor, values: Tensor) -> float:
    return float(SPACE.sequence_logprob(next_logprob).exp() @ values)


def test_weighted_samples_of_an_earlier_policy_have_the_expectations_of_the_current_one() -> None:
    weights, excess = importance_weights(actions(NEW), actions(OLD), SPACE.mask)
    assert mean(OLD, weights) == pytest.approx(1, abs=1e-12)
    assert mean(OLD, weights * VALUES) == pytest.approx(mean(NEW, VALUES), abs=1e-12)
    assert abs(mean(OLD, VALUES) - mean(NEW, VALUES)) > 0.05
    assert not excess.any()


@pytest.mark.parametrize("limit", [1.0, 2.0, 100.0])
def test_a_limit_biases_by_the_excess_that_it_takes(limit: float) -> None:
    weights, excess = importance_weights(actions(NEW), actions(OLD), SPACE.mask, limit)
    assert weights.max() <= limit
    bias = mean(OLD, weights * VALUES) - mean(NEW, VALUES)
    assert bias == pytest.approx(-mean(OLD, excess * VALUES), abs=1e-12)
    assert abs(bias) <= mean(OLD, excess) * float(VALUES.abs().max()) + 1e-12
    assert bool(excess.any()) == (limit < 100)


def test_the_effective_share_falls_as_weights_differ() -> None:
    assert effective_sample_share(torch.full((5,), 0.3)) == pytest.approx(1)
    assert effective_sample_share(torch.tensor([1.0, 0, 0, 0])) == pytest.approx(1 / 4)
    assert effective_sample_share(torch.zeros(3)) == 0


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"sampled_logprob \(2, 2\)"):
        importance_weights(torch.zeros(2, 3), torch.zeros(2, 2), torch.ones(2, 3, dtype=torch.bool))
