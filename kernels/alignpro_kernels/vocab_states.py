"""Merging the distributions over the slices of a vocabulary that is split over ranks; see `vocab_parallel`.

A backend computes a row's statistics over its slice as if it were the whole vocabulary. With π_k the probability of slice
k, and ρ_k that under the reference,

    log π_k = lse_k − log Σ_j exp lse_j                     H = Σ_k π_k (H_k − log π_k)
    log p_y = log p_{y|k} + log π_k, k the slice of y       KL = Σ_k π_k (KL_k + log π_k − log ρ_k)

are those of the whole vocabulary (the chain rules of entropy and relative entropy: Cover and Thomas, Elements of
Information Theory, theorems 2.2.1 and 2.5.3). A row's state is thus at most seven numbers: log p_{y|k}, H_k, KL_k, and a
maximum and a logarithm each for lse_k and that of the reference. They are all-gathered, and every rank merges them in the
order of the ranks. This takes one collective, where a maximum and a sum would take two, and gives the same bits on all
ranks whatever algorithm the collective uses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignpro_kernels.head import LOWEST, Head, Rows, RowStats, wide
from alignpro_kernels.noise import advance, gumbel_noise
from alignpro_kernels.types import SampleOutput
from alignpro_kernels.vocab_parallel import VocabShard, gather


def merge_statistics(shard: VocabShard, stats: RowStats, target: Tensor) -> RowStats:
    """Merge the statistics over this rank's slice into those over the whole vocabulary; a collective.

    Args:
        shard: The split of the call.
        stats: Statistics of C rows over the slice.
        target: (C,) int64, relative to the slice's start.

    Returns:
        Statistics, and the norms from which a backend's `backward` computes the slice's gradient; the same on all ranks.
    """
    mine = {"logprob": stats.logprob, "top": stats.norms[0], "log_sum": stats.norms[1]}
    if stats.entropy is not None:
        mine["entropy"] = stats.entropy
    if stats.kl is not None:
        mine |= {"kl": stats.kl, "ref_top": stats.norms[2], "ref_log_sum": stats.norms[3]}
    gathered = gather(torch.stack(list(mine.values())), shard.group)  # (K, 3…7, C)
    each = dict(zip(mine, gathered.unbind(1), strict=True))  # (K, C)
    log_share, *norms = _shares(each["top"], each["log_sum"])
    entropy = kl = None
    if stats.entropy is not None:
        entropy = _expected(log_share, each["entropy"] - log_share)
    if stats.kl is not None:
        log_ref_share, *ref_norms = _shares(each["ref_top"], each["ref_log_sum"])
        norms += ref_norms
        within = each["kl"].masked_fill(log_ref_share == -torch.inf, 0.0)  # without mass there is no distribution
        kl = _expected(log_share, within + log_share - log_ref_share.clamp_min(LOWEST))
    ends = torch.tensor(shard.sizes, device=target.device).cumsum(0)
    owner = torch.searchsorted(ends, target + shard.start, right=True)  # (C,): the rank that has the target
    logprob = (each["logprob"] + log_share).gather(0, owner.unsqueeze(0)).squeeze(0)
    return RowStats(logprob, entropy, kl, torch.stack(norms))


def seeds_of_slice(shard: VocabShard, seeds: Tensor) -> Tensor:
    """Return seeds that give the slice's noise in a backend whose token indices are relative to the slice's start."""
    return advance(seeds, shard.start)


def merge_samples(shard: VocabShard, head: Head, rows: Rows, seeds: Tensor, sampled: SampleOutput) -> SampleOutput:
    """Merge the samples from the slices into one over the whole vocabulary, the same on all ranks; a collective.

    The result is the one of the slices' tokens with the largest noisy logit. A backend does not return that value, but a
    token's noise is a hash and its logit needs one row of W: both are recomputed, with N·D operations.

    Args:
        shard: The split of the call.
        head: This rank's slice.
        rows: All N rows.
        seeds: (N,), as given by the caller.
        sampled: The slice's sample with the seeds of `seeds_of_slice`; tokens are relative to the slice's start.
    """
    dtype = sampled.logprob.dtype
    tau = torch.as_tensor(rows.temperature, dtype=dtype, device=seeds.device).expand(len(seeds))
    greedy = tau == 0
    z = _logit(head, rows, sampled.token) / tau.masked_fill(greedy, 1.0)  # (N,)
    token = sampled.token + shard.start
    noise = gumbel_noise(advance(seeds, token), 1, dtype).squeeze(1)
    lse = torch.where(z == -torch.inf, z, z - sampled.logprob)  # z is −∞ if all logits of the slice are
    mine = [token.to(dtype), z + noise.masked_fill(greedy, 0.0), z, lse, sampled.entropy]  # exact for up to 2²⁴ tokens
    tokens, noisy, logits, lses, entropies = gather(torch.stack(mine), shard.group).unbind(1)  # (K, N)
    best = noisy.masked_fill(noisy.isnan(), torch.inf).max(0, keepdim=True).indices  # NaN wins; ties: the lowest rank
    log_share, top, log_sum = _shares(lses, torch.zeros_like(lses))
    logprob = logits.gather(0, best).squeeze(0) - top - log_sum
    return SampleOutput(
        tokens.gather(0, best).squeeze(0).to(torch.int64),
        logprob.masked_fill(greedy, 0.0),
        _expected(log_share, entropies - log_share).masked_fill(greedy, 0.0),
    )


def _shares(top: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log π_k (K, C), and m and log Σ e^{z−m} (C,) of the whole vocabulary, given those of the slices, (K, C)."""
    top = top.masked_fill(log_sum == -torch.inf, -torch.inf)  # m is arbitrary if all logits of a slice are −∞
    highest = top.amax(0)
    highest = highest.masked_fill(highest == -torch.inf, 0.0)
    relative = top - highest + log_sum
    total = relative.logsumexp(0)
    return relative - total, highest, total


def _expected(log_share: Tensor, x: Tensor) -> Tensor:
    """Return Σ_k π_k x_k, (C,). A slice of probability 0 is ignored, whatever its x_k; otherwise NaN propagates."""
    share = log_share.exp()
    return torch.where(share == 0, 0.0, share * x).sum(0)


def _logit(head: Head, rows: Rows, token: Tensor) -> Tensor:
    """Return the logit of one token of the slice per row, (N,), before the temperature."""
    u = (wide(rows.hidden) * wide(head.weight[token])).sum(1)
    if head.low_rank is not None and rows.low_rank is not None:
        u = u + (wide(rows.low_rank) * wide(head.low_rank[token])).sum(1)
    if head.bias is not None:
        u = u + wide(head.bias[token])
    return u if head.softcap is None else head.softcap * torch.tanh(u / head.softcap)
