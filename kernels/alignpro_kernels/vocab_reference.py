"""The specification of the operators over a vocabulary that is split over ranks, in plain PyTorch; see `reference`.

Two operators, as in Megatron, make autograd correct across ranks that all compute the same loss: inputs of the slices are
`copied` (their gradient is the sum over the ranks), outputs are `summed` (each rank's part has the gradient of the sum).
With M the largest logit over all slices, d = z − M, and d_r = z_r − M_r of the reference,

    s = Σ e^d     a = Σ e^d d     b = Σ e^d (d − d_r)     s_r = Σ e^{d_r}
    log p_y = d_y − log s         H = log s − a/s         KL = b/s − log s + log s_r
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from alignpro_kernels import reference
from alignpro_kernels.head import LOWEST
from alignpro_kernels.types import Coefficients, LoRA, PolicyLossOutput, TokenStats
from alignpro_kernels.vocab_parallel import Fact, VocabShard, agree, agree_on_rows, checksum


def linear_logprob(
    shard: VocabShard,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    entropy: bool = False,
) -> TokenStats:
    """See `alignpro_kernels.linear_logprob`; rows are (N,), and targets index the whole vocabulary."""
    facts: dict[str, Fact] = {
        "target": target,
        "whether there is a reference": ref_hidden is not None,
        "entropy": entropy,
    }
    agree_on_rows(shard, "linear_logprob", hidden, temperature, softcap, facts)
    hidden = copied(hidden, shard)
    if lora is not None:
        lora = lora._replace(a=copied(lora.a, shard))
    d = _relative(reference.head_logits(hidden, weight, bias, temperature, softcap, lora), shard)  # (N, V_k)
    exp_d, bounded = d.exp(), d.clamp_min(LOWEST)  # makes e^d d 0 where e^d is 0
    index = target - shard.start
    here = (index >= 0) & (index < shard.size)
    chosen = d.gather(1, index.clamp(0, shard.size - 1).unsqueeze(1)).squeeze(1)
    sums = [torch.where(here, chosen, 0.0), exp_d.sum(1), (exp_d * bounded).sum(1)]
    if ref_hidden is not None:
        with torch.no_grad():
            if ref_weight is None:  # a shared head: the reference uses its bias too, but not a LoRA
                ref_weight, ref_bias = weight, (bias if ref_bias is None else ref_bias)
            d_r = _relative(reference.head_logits(ref_hidden, ref_weight, ref_bias, temperature, softcap), shard)
        sums += [(exp_d * (bounded - d_r.clamp_min(LOWEST))).sum(1), d_r.exp().sum(1)]
    d_y, s, a, *rest = summed(torch.stack(sums), shard)
    return TokenStats(
        logprob=d_y - s.log(),
        entropy=s.log() - a / s if entropy else None,
        kl=rest[0] / s - s.log() + rest[1].log() if rest else None,
    )


def policy_loss(
    shard: VocabShard,
    *,
    coefficients: Coefficients,
    positions: Tensor | None,
    **arguments: Any,
) -> PolicyLossOutput:
    """See `alignpro_kernels.policy_loss` and `reference.policy_loss`; ``arguments`` are those of `linear_logprob`."""

    def agreed(
        logprob: Tensor, entropy: Tensor | None, kl: Tensor | None, rows: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        result = coefficients(logprob, entropy, kl, rows)
        returned = torch.stack([checksum(x) for x in result if x is not None])
        agree(shard, "policy_loss", logprob.device, {"what coefficients returned": returned})
        return result

    return reference.loss_of(linear_logprob(shard, **arguments), agreed, positions)


def copied(x: Tensor, shard: VocabShard) -> Tensor:
    """Identity in the forward pass; the gradient is summed over the ranks."""
    result: Tensor = _Copied.apply(x, shard)
    return result


def summed(x: Tensor, shard: VocabShard) -> Tensor:
    """Sum over the ranks in the forward pass; identity in the backward pass."""
    result: Tensor = _Summed.apply(x, shard)
    return result


def _relative(z: Tensor, shard: VocabShard) -> Tensor:
    """Subtract the largest logit over all slices, (N, V_k); it is a constant, since statistics do not depend on it."""
    top = z.detach().amax(1, keepdim=True)
    dist.all_reduce(top, dist.ReduceOp.MAX, shard.group)
    return z - top.masked_fill(top == -torch.inf, 0.0)


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: VocabShard) -> Tensor:
        ctx.shard = shard
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.shard.group)
        return gradient, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: VocabShard) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=shard.group)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
