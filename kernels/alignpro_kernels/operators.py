"""The public operators: check the arguments, choose a backend, run it.

N tokens, D hidden, V vocabulary; any leading dimensions (...) stand for the tokens. Statistics are float32 (float64 for
float64 inputs). Products are taken as given, not under autocast: rounding the logits to 16 bits would put errors of
0.06 into log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alignpro_kernels import checks, reference
from alignpro_kernels.backends import choose_backend
from alignpro_kernels.types import Coefficients, PolicyLossOutput, SampleOutput, TokenStats


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    entropy: bool = False,
    backend: str = "auto",
) -> TokenStats:
    """Log-probability, entropy and exact KL of every token, from hidden states, differentiable.

    Args:
        hidden: (..., D) float64, float32, bfloat16 or float16.
        weight: (V, D), the head; same dtype and device.
        target: (...,) int64.
        bias: (V,) of the head.
        temperature: τ > 0, or one a row, (...,). A constant. It applies to the policy and to the reference.
        softcap: Logits become softcap · tanh(logits / softcap) before the temperature (Gemma 2); for both likewise.
        ref_hidden: (..., D') hidden states of the reference; asks for the KL. A constant: no gradient flows through the
            reference, also not through a shared ``weight``.
        ref_weight: (V, D') head of the reference; None when both share ``weight`` (and ``bias``, unless ``ref_bias`` is
            given).
        ref_bias: (V,) bias of the reference's head.
        entropy: Whether to compute the entropy.
        backend: ``auto``, or a name of `backends`.

    Returns:
        logprob, entropy or None, kl or None; each (...,).

    Raises:
        ValueError, TypeError: An argument has the wrong shape, device, value or dtype; the message names it.
        BackendError: The backend cannot run.
    """
    checks.check_head(hidden, weight, bias, softcap)
    checks.check_target(target, hidden, weight.shape[0])
    checks.check_temperature(temperature, hidden)
    checks.check_reference(hidden, weight, ref_hidden, ref_weight, ref_bias)
    choose_backend("linear_logprob", backend)
    with torch.autocast(hidden.device.type, enabled=False):
        return reference.linear_logprob(
            hidden,
            weight,
            target,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            entropy=entropy,
        )


def policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    coefficients: Coefficients,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    entropy: bool = False,
    backend: str = "auto",
) -> PolicyLossOutput:
    """Any loss of (logprob, entropy, KL) a token, with its gradient formed in the forward pass.

    Args:
        hidden: As the others, see `linear_logprob`. No gradient is computed for an input that requires none (a frozen
            head).
        weight: See `linear_logprob`.
        target: See `linear_logprob`.
        coefficients: ``(logprob, entropy, kl, rows) -> (loss_terms, alpha, eta, kappa)``, see `Coefficients`; it is
            called without gradients, a chunk of rows at a time, each row once, and not at all when there are none.
        bias: See `linear_logprob`.
        temperature: See `linear_logprob`.
        softcap: See `linear_logprob`.
        ref_hidden: See `linear_logprob`.
        ref_weight: See `linear_logprob`.
        ref_bias: See `linear_logprob`.
        entropy: Whether ``coefficients`` gets the entropy; needed for ``eta``.
        backend: See `linear_logprob`.

    Returns:
        The loss, Σ loss_terms, whose backward only scales; and logprob, entropy, kl as constants.

    Raises:
        ValueError, TypeError: As `linear_logprob`; or ``coefficients`` returned a wrong shape, ``eta`` without entropy,
            or ``kappa`` without a reference.
        BackendError: The backend cannot run.
    """
    checks.check_head(hidden, weight, bias, softcap)
    checks.check_target(target, hidden, weight.shape[0])
    checks.check_temperature(temperature, hidden)
    checks.check_reference(hidden, weight, ref_hidden, ref_weight, ref_bias)
    choose_backend("policy_loss", backend)
    with torch.autocast(hidden.device.type, enabled=False):
        return reference.policy_loss(
            hidden,
            weight,
            target,
            coefficients,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            entropy=entropy,
        )


def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    *,
    seeds: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
) -> SampleOutput:
    """An exact categorical sample a row, by Gumbel-max with noise hashed from (seed, vocabulary index).

    Args:
        hidden: (..., D), see `linear_logprob`.
        weight: (V, D).
        seeds: (...,) int64. A row's token depends on its seed and its logits alone, not on the batch.
        bias: (V,).
        temperature: τ ≥ 0, or one a row, (...,); a row with 0 is greedy (the lowest index among equals).
        softcap: See `linear_logprob`.
        backend: See `linear_logprob`.

    Returns:
        token (...,) int64; its logprob and the entropy under the temperature-scaled distribution (both 0 for greedy
        rows).

    Raises:
        ValueError, TypeError: An argument has the wrong shape, device, value or dtype; the message names it.
        BackendError: The backend cannot run.
    """
    checks.check_head(hidden, weight, bias, softcap)
    checks.check_seeds(seeds, hidden)
    checks.check_temperature(temperature, hidden, greedy=True)
    choose_backend("linear_sample", backend)
    with torch.autocast(hidden.device.type, enabled=False):
        return reference.linear_sample(hidden, weight, seeds=seeds, bias=bias, temperature=temperature, softcap=softcap)


def merge_states(outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> Tensor:
    """Attention over several sets of keys from the attention over each: Σ softmax(lse) · out, in float32.

    Args:
        outs: S tensors (..., D), or one (S, ..., D): each set's attention output.
        lses: S tensors (...,), or one (S, ...): each set's log-sum-exp of scores; −inf for an empty set, whose output
            is ignored.

    Returns:
        (..., D) in the dtype of ``outs``; zero where every set is empty.

    Raises:
        ValueError: The parts do not match.
    """
    checks.check_states(outs, lses)
    return reference.merge_states(outs, lses)
