"""Prompts whose few rewrites are enumerated, with a tabular policy: the exact objective, its optimum, and what lies between."""

from __future__ import annotations

import torch
from torch import Tensor

from alignpro.theory import enumerate_sequences

END = 0


class World:
    """P prompts with S sequences each, over V tokens and n states, in float64.

    The reference's logits are standard normal, and the rewards uniform in [0, 1].

    Args:
        prompts: P.
        kl_coef: λ.
        vocabulary: V.
        max_length: T, the most actions in a sequence.
        seed: Of reference and rewards.
    """

    def __init__(self, prompts: int, kl_coef: float, *, vocabulary: int, max_length: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.space = enumerate_sequences(vocabulary, END, max_length)
        self.kl_coef = kl_coef
        shape = prompts, len(self.space.prefixes), vocabulary
        self.reference = torch.randn(shape, generator=generator, dtype=torch.float64).log_softmax(-1)  # (P, n, V)
        self.rewards = torch.rand(prompts, len(self.space.tokens), generator=generator, dtype=torch.float64)  # (P, S)
        self.reference_logprob = self.sequence_logprob(self.reference)  # (P, S)

    def sequence_logprob(self, next_logprob: Tensor) -> Tensor:
        """log ρ(x'|x) of all sequences, (P, S), from the log-probabilities of the next token, (P, n, V)."""
        chosen = next_logprob[:, self.space.state, self.space.tokens]  # (P, S, T)
        return torch.where(self.space.mask, chosen, 0.0).sum(-1)

    def objective(self, next_logprob: Tensor) -> Tensor:
        """J of each prompt, (P,), differentiable."""
        logprob = self.sequence_logprob(next_logprob)
        return (logprob.exp() * (self.rewards - self.kl_coef * (logprob - self.reference_logprob))).sum(-1)

    def kl(self, next_logprob: Tensor) -> Tensor:
        """KL(ρ ‖ ρ_sft) of each prompt, (P,), in nats."""
        logprob = self.sequence_logprob(next_logprob)
        return (logprob.exp() * (logprob - self.reference_logprob)).sum(-1)

    def optimum(self) -> Tensor:
        """J of ρ*, λ log Z, (P,)."""
        return self.kl_coef * (self.reference_logprob + self.rewards / self.kl_coef).logsumexp(-1)

    def tilted(self, strength: float) -> Tensor:
        """The policy ∝ ρ_sft exp(strength · R/λ), (P, n, V): the reference at 0, ρ* at 1, over-optimised beyond."""
        weights = (self.reference_logprob + strength * self.rewards / self.kl_coef).softmax(-1)  # (P, S)
        passing = torch.zeros_like(self.reference)
        state, token = self.space.state[self.space.mask], self.space.tokens[self.space.mask]
        per_action = weights[:, :, None].expand(-1, *self.space.mask.shape)[:, self.space.mask]
        for prompt in range(len(passing)):
            passing[prompt].index_put_((state, token), per_action[prompt], accumulate=True)
        return (passing / passing.sum(-1, keepdim=True)).log()
