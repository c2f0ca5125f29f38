"""Other implementations. If one is not installed or cannot run, the results contain the reason.

Written against torch 2.13, Liger 0.8.5, TRL 1.16.0 and cut-cross-entropy 25.1.1. Each is called with its own defaults
unless noted; those of cut-cross-entropy include skipping small gradients.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks.kernels.cases import Case
from benchmarks.kernels.entrant import Entrant, Outcome, Run, Setting
from benchmarks.kernels.problem import Problem
from benchmarks.measure import SkippedError, import_peer

TRL_VOCABULARY_CHUNK = 32768  # the value that TRL's trainers pass
# Rows per chunk of torch's operator. Its default, at most N·D/V, is meant for much larger N: here it would be one or two.
TORCH_ROWS = {"cpu": 256, "cuda": 1024}


def entrants() -> list[Entrant]:
    """Return every peer, including those that are not installed."""
    return [
        Entrant("torch-lce", "torch linear_cross_entropy", _torch_lce),
        Entrant("liger-grpo", "Liger fused linear GRPO", _liger_grpo),
        Entrant("liger-ce", "Liger fused linear CE", functools.partial(_liger_ce, None)),
        Entrant("liger-ce-fp32", "Liger fused linear CE, fp32 sums", functools.partial(_liger_ce, torch.float32)),
        Entrant("trl", "TRL chunked", _trl),
        Entrant("cce", "cut-cross-entropy", functools.partial(_cce, "cce")),
        Entrant("cce-compile", "cut-cross-entropy, torch_compile", functools.partial(_cce, "torch_compile")),
    ]


def _torch_lce(case: Case, setting: Setting) -> Run:
    function = getattr(F, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise SkippedError(f"torch {torch.__version__} has no chunked linear_cross_entropy (2.13 does)")
    if setting.shape.softcap is not None:
        raise SkippedError("has no soft-cap")
    rows = TORCH_ROWS[setting.device.type]
    chosen = options(batch_chunk_size=rows)

    def losses(problem: Problem, reduction: str) -> Tensor:
        loss: Tensor = function(problem.hidden, problem.weight, problem.target, reduction=reduction, options=chosen)
        return loss

    run = _from_cross_entropy(case, losses)
    return run._replace(quantity=f"{run.quantity}; chunks of {rows}")


def _cce(implementation: str, case: Case, setting: Setting) -> Run:
    module: Any = import_peer("cut_cross_entropy")
    if implementation == "cce" and setting.device.type == "cpu":
        raise SkippedError("its Triton kernels need a GPU")

    def losses(problem: Problem, reduction: str) -> Tensor:
        loss: Tensor = module.linear_cross_entropy(
            problem.hidden,
            problem.weight,
            problem.target,
            softcap=problem.softcap,
            reduction=reduction,
            impl=implementation,
        )
        return loss

    return _from_cross_entropy(case, losses)


def _from_cross_entropy(case: Case, losses: Any) -> Run:
    """Prepare a cross-entropy; with per-token losses it serves a policy loss too, whose coefficients autograd applies."""
    if case.operator == "linear_sample":
        raise SkippedError("does not sample")
    if case.kl:
        raise SkippedError("has no KL")
    if case.operator == "linear_logprob":
        return Run(lambda problem: Outcome(-losses(problem, "none")), "log-probability; reduction='none'")
    if case.cross_entropy:
        return Run(lambda problem: Outcome(losses(problem, "mean")), "CE only; reduction='mean'")
    return Run(lambda problem: Outcome(-(problem.alpha * losses(problem, "none")).sum()), "loss; reduction='none'")


def _liger_ce(sums: torch.dtype | None, case: Case, setting: Setting) -> Run:
    if not case.cross_entropy:
        raise SkippedError("CE only: takes no per-token coefficients")
    if setting.device.type == "cpu":
        raise SkippedError("its Triton kernels need a GPU")
    if sums is not None and setting.dtype == sums:
        raise SkippedError("the same as liger-ce in float32")
    module: Any = import_peer("liger_kernel.transformers.fused_linear_cross_entropy")
    # Without accum_dtype the head's gradient is summed over the chunks in the head's dtype.
    loss = module.LigerFusedLinearCrossEntropyLoss(
        softcap=setting.shape.softcap, **({} if sums is None else {"accum_dtype": sums})
    )
    return Run(
        lambda problem: Outcome(loss(problem.weight, problem.hidden, problem.target)),
        "CE only" + ("" if sums is None else "; accum_dtype=float32"),
    )


def _liger_grpo(case: Case, setting: Setting) -> Run:
    if case.operator != "policy_loss":
        raise SkippedError("returns only the loss, no log-probabilities")
    if case.kl:
        raise SkippedError("has no exact KL: its KL is the k3 estimate from the sampled token")
    if setting.shape.softcap is not None:
        raise SkippedError("has no soft-cap")
    module: Any = import_peer("liger_kernel.chunked_loss")

    def forward(problem: Problem) -> Outcome:
        rows = problem.rows
        # CISPO with a ratio of one is exactly −Σ A log p / N. Every row is a sequence of one token, so that each can have
        # its own advantage. All rows are one chunk, whose inner tiles are 2048 rows by 4096 vocabulary entries.
        loss = module.LigerFusedLinearGRPOLoss(
            beta=0.0,
            use_ref_model=False,
            loss_type="cispo",
            epsilon_high=5.0,
            chunk_size=rows,
            compiled=problem.hidden.is_cuda,
        )
        value, _ = loss(
            problem.hidden.unsqueeze(1),
            problem.weight,
            problem.target.unsqueeze(1),
            torch.ones_like(problem.target).unsqueeze(1),
            -rows * problem.alpha,
        )
        return Outcome(value)

    return Run(forward, "loss; CISPO, one chunk")


def _trl(case: Case, setting: Setting) -> Run:
    if case.operator == "linear_sample":
        raise SkippedError("does not sample")
    module: Any = import_peer("trl.kernels.chunked_logprob")
    divergence: Any = import_peer("trl.kernels.chunked_divergence") if case.kl else None

    def logprob(problem: Problem) -> Tensor:
        outputs = module.ChunkedLogProbFunction.apply(
            problem.hidden, problem.weight, None, problem.target, 1.0, TRL_VOCABULARY_CHUNK, problem.softcap, 1.0, ()
        )
        values: Tensor = outputs[0]
        return values

    def kl(problem: Problem) -> Tensor:
        ref_weight = problem.weight.detach() if problem.ref_weight is None else problem.ref_weight
        policy, reference = (problem.hidden, problem.weight, None), (problem.ref_hidden, ref_weight, None)
        reverse, temperature = 1.0, 1.0
        scale_and_cap = (1.0, problem.softcap)
        values, _ = divergence.ChunkedDivergenceFunction.apply(
            *policy, *reference, reverse, temperature, *scale_and_cap, *scale_and_cap
        )
        result: Tensor = values
        return result

    def policy(problem: Problem) -> Outcome:
        loss = (problem.alpha * logprob(problem)).sum()
        return Outcome(loss if problem.kappa is None else loss + (problem.kappa * kl(problem)).sum())

    if case.operator == "linear_logprob":
        return Run(lambda problem: Outcome(logprob(problem)), "log-probability")
    return Run(policy, "loss" + (", exact KL by a second function" if case.kl else ""))
