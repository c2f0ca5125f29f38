"""Exact sums over all sequences of a tiny vocabulary, against which sampled estimates are tested.

A sequence ends with the end token or is truncated at the maximum length T. Its actions are its tokens, including the end
token. With V tokens there are Σ_{t≤T} (V−1)^t sequences. For V and T of 3 or 4, these are few enough to sum over all of
them, and over all pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignpro.theory.closed_form import objective
from alignpro.theory.divergences import kl_divergence


@dataclass(frozen=True)
class SequenceSpace:
    """All S sequences over a vocabulary of V tokens, of at most T actions."""

    tokens: Tensor
    """(S, T) int64, padded with the end token."""
    mask: Tensor
    """(S, T) bool, True at actions, left-aligned."""
    state: Tensor
    """(S, T) int64: the index of the prefix before each action, 0 for the empty prefix; 0 past the end."""
    prefixes: tuple[tuple[int, ...], ...]
    """The tokens of each state, by index: all prefixes from which an action is taken."""
    vocabulary: int
    end_token: int

    @property
    def sequences(self) -> list[list[int]]:
        """The sequences as lists of tokens, as a sampler would return them."""
        return [row[keep].tolist() for row, keep in zip(self.tokens, self.mask, strict=True)]

    def sequence_logprob(self, next_logprob: Tensor) -> Tensor:
        """log ρ(x'), (S,), from log ρ(.|s) of every state, (states, V); differentiable."""
        chosen = next_logprob[self.state, self.tokens]  # (S, T)
        return torch.where(self.mask, chosen, 0.0).sum(-1)


def enumerate_sequences(vocabulary: int, end_token: int, max_length: int) -> SequenceSpace:
    """Every sequence of at most ``max_length`` ≥ 1 actions.

    Raises:
        ValueError: The end token is outside the vocabulary, or there would be more than a million sequences.
    """
    if not 0 <= end_token < vocabulary or max_length < 1:
        raise ValueError(f"no sequences for vocabulary {vocabulary}, end token {end_token}, max_length {max_length}")
    if vocabulary**max_length > 1_000_000:
        raise ValueError(f"{vocabulary}^{max_length} sequences are too many to enumerate")
    words = [token for token in range(vocabulary) if token != end_token]
    prefixes = [p for length in range(max_length) for p in itertools.product(words, repeat=length)]
    sequences = [(*p, end_token) for p in prefixes] + list(itertools.product(words, repeat=max_length))
    number = {prefix: index for index, prefix in enumerate(prefixes)}
    tokens = torch.full((len(sequences), max_length), end_token, dtype=torch.int64)
    mask = torch.zeros(len(sequences), max_length, dtype=torch.bool)
    state = torch.zeros(len(sequences), max_length, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = True
        state[row, : len(sequence)] = torch.tensor([number[sequence[:t]] for t in range(len(sequence))])
    return SequenceSpace(tokens, mask, state, tuple(prefixes), vocabulary, end_token)


def exact_objective(sequence_logprob: Tensor, reference_logprob: Tensor, scores: Tensor, kl_coef: float) -> Tensor:
    """J = Σ ρ(x') R(x') − λ Σ ρ(x') log(ρ/ρ_sft)(x'), (), over all S sequences; autograd gives the exact ∇J.

    Args:
        sequence_logprob: (S,) log ρ(x'), differentiable.
        reference_logprob: (S,) log ρ_sft(x').
        scores: (S,) R.
        kl_coef: λ ≥ 0.

    Raises:
        ValueError: The probabilities do not sum to one, so these are not all the sequences (or float32 was used).
    """
    total = float(sequence_logprob.detach().exp().sum())
    if abs(total - 1.0) > 1e-6:
        raise ValueError(f"the sequences' probabilities sum to {total}, not 1: some are missing or counted twice")
    return objective(sequence_logprob, reference_logprob.detach(), scores, kl_coef)


def exact_gradient(value: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of a scalar for each parameter, zeros if it does not depend on one; keeps the graph."""
    gradients = torch.autograd.grad(value, list(parameters), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]


def state_kl(next_logprob: Tensor, reference_next_logprob: Tensor) -> Tensor:
    """KL_t at every state, (states,), from log-probabilities (states, V); its expected sum under ρ is the sequence KL."""
    return kl_divergence(next_logprob, reference_next_logprob)


def groups(sequence_logprob: Tensor, size: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """All S^size ordered groups of ``size`` independent samples, as indices, with their probabilities."""
    probability = sequence_logprob.detach().exp().tolist()
    for rows in itertools.product(range(len(probability)), repeat=size):
        weight = 1.0
        for row in rows:
            weight *= probability[row]
        yield rows, weight


def expected_gradient(
    sequence_logprob: Tensor, size: int, gradient: Callable[[Tensor], Sequence[Tensor]]
) -> list[Tensor]:
    """The exact expectation of a gradient estimate over all groups of samples.

    Args:
        sequence_logprob: (S,) log-probability of each sequence under the sampling policy.
        size: K, samples per group.
        gradient: Maps a group's sequences, (K,) int64 indices into the space, to one gradient per parameter.

    Returns:
        The expected gradient of each parameter.
    """
    total: list[Tensor] = []
    for rows, weight in groups(sequence_logprob, size):
        terms = [weight * g for g in gradient(torch.tensor(rows))]
        total = terms if not total else [a + b for a, b in zip(total, terms, strict=True)]
    return total
