"""Samples of a mixture over whole sequences: drawn token by token, then resampled.

A product of conditional distributions is not the conditional of the product: token by token,
q(x') = Π_t [Π_k ρ_k(x'_t|·)^{w_k}] / Z_t, whose normalisers Z_t depend on the tokens before, while
ρ_w(x') = Π_k ρ_k(x')^{w_k} / Z. So draws of q are weighed by Π_k ρ_k^{w_k} / q, and some are kept by these weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alignpro.engine import Completion
from alignpro.models.language_model import LanguageModel
from alignpro.models.mixed_model import MixedModel
from alignpro.models.sequences import SequenceBatch
from alignpro.policy.reference_logprobs import sequence_logprob
from alignpro.theory import Correction, correction

_ROWS = 64
"""Sequences whose log-probabilities are computed together."""


@torch.no_grad()
def group_logprobs(
    model: LanguageModel, prompts: Sequence[Sequence[int]], groups: Sequence[Sequence[Completion]], temperature: float
) -> Tensor:
    """log p(x'|x) of the N completions of each prompt at a temperature, (P, N) float64 on the CPU.

    Args:
        model: p.
        prompts: P prompts, as token ids.
        groups: [P][N].
        temperature: Above 0.
    """
    places: dict[tuple[int, ...], int] = {}  # equal completions of a prompt are computed once
    index = [[places.setdefault((i, *each.tokens), len(places)) for each in group] for i, group in enumerate(groups)]
    rows = [(prompts[i], tokens) for i, *tokens in places]
    parts = []
    for start in range(0, len(rows), _ROWS):
        inputs, completions = zip(*rows[start : start + _ROWS], strict=True)
        batch = SequenceBatch.build(inputs, completions, model.device)
        parts.append(sequence_logprob(model, batch, temperature).double().cpu())
    return torch.cat(parts)[torch.tensor(index)]


def correct_draws(
    model: MixedModel, prompts: Sequence[Sequence[int]], groups: Sequence[Sequence[Completion]], temperature: float
) -> Correction:
    """Weigh draws of a token-wise mixture so that resampled draws are those of ρ_w; both distances are the gap between them.

    Args:
        model: The mixture.
        prompts: P prompts, as token ids.
        groups: [P][N] completions, drawn from it at ``temperature`` without filters.
        temperature: Above 0; every ρ_k is the distribution at this temperature.
    """
    proposal = torch.tensor([[sum(completion.logprobs) for completion in group] for group in groups]).double()
    density = torch.zeros_like(proposal)
    for weight, part in zip(model.weights, model.parts, strict=True):
        density += weight * group_logprobs(part, prompts, groups, temperature)
    return correction(density, proposal)


def resample(found: Correction, count: int, seeds: Sequence[int]) -> list[list[int]]:
    """Draw ``count`` of each prompt's N draws by their weights, with replacement: [P][count] places.

    Args:
        found: The weights, (P, N).
        count: Number to keep of each prompt.
        seeds: [P] of the prompts.
    """
    chosen = []
    for weights, seed in zip(found.weights, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        chosen.append(torch.multinomial(weights, count, replacement=True, generator=generator).tolist())
    return chosen


def describe_correction(found: Correction) -> str:
    """Say in one line how far the token-wise mixture is from that over whole sequences, on the mean over prompts."""
    count = found.weights.shape[-1]
    return (
        f"token-wise mixture against whole sequences: TV {found.total_variation.mean():.3f}, KL {found.kl.mean():.3f} nats; "
        f"{found.effective_sample_size.mean():.1f} of {count} candidates count"
    )
