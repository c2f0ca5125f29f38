"""The public operators: check the arguments, choose a backend, run it.

N is the number of tokens, D the hidden size, V the vocabulary size; the tokens may have any leading dimensions (...).
Statistics are float32 (float64 for float64 inputs). Matrix products ignore autocast: rounding the logits to 16 bits would
cause errors of 0.06 in log-probabilities. Under `torch.compile` an operator is a graph break and runs eagerly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignpro_kernels import checks, fused, reference
from alignpro_kernels.autograd import lora_rows, without_autocast
from alignpro_kernels.backends import backend_module, choose_backend, merges_with_triton
from alignpro_kernels.head import Head, Rows, stats_dtype
from alignpro_kernels.types import Coefficients, LoRA, PolicyLossOutput, SampleOutput, TokenStats


@torch.compiler.disable
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    entropy: bool = False,
    backend: str = "auto",
) -> TokenStats:
    """Compute the log-probability, entropy and exact KL of every token from hidden states, differentiably.

    Args:
        hidden: (..., D) float64, float32, bfloat16 or float16.
        weight: (V, D), the head; same dtype and device. On a CPU, it may be bfloat16 or float16 with float32 states.
        target: (...,) int64.
        mask: (...,) bool, True for the rows that count. The others take part in no matrix product: their statistics and
            gradients are 0, and their targets may be anything. On a GPU, a mask costs one synchronisation.
        bias: (V,) bias of the head.
        lora: A LoRA on the head, in the dtype of ``hidden``; the policy's logits are those of W + scale · B A, which is
            never materialised. It does not apply to a reference that shares ``weight``.
        temperature: τ > 0, or one per row, (...,). A constant. It applies to the policy and to the reference.
        softcap: Logits become softcap · tanh(logits / softcap) before the temperature (Gemma 2), for the policy and for
            the reference.
        ref_hidden: (..., D') hidden states of the reference; if given, the KL is computed. A constant: no gradient flows
            through the reference, not even through a shared ``weight``.
        ref_weight: (V, D') head of the reference; None if both share ``weight`` (and ``bias``, unless ``ref_bias`` is
            given).
        ref_bias: (V,) bias of the reference's head.
        entropy: Whether to compute the entropy.
        backend: ``auto``, or a name from `backends`.

    Returns:
        logprob, entropy or None, kl or None; each (...,).

    Raises:
        ValueError, TypeError: An argument has the wrong shape, device, value or dtype; the message names it.
        BackendError: The backend cannot run.
    """
    head = {"bias": bias, "lora": lora, "softcap": softcap, "ref_weight": ref_weight, "ref_bias": ref_bias}
    chosen, arguments, positions = _prepare(
        "linear_logprob", backend, hidden, weight, target, mask, temperature=temperature, ref_hidden=ref_hidden, **head
    )
    with without_autocast(hidden.device.type):
        if chosen == "reference":
            stats = reference.linear_logprob(**arguments, entropy=entropy)
        else:
            stats = fused.linear_logprob(backend_module(chosen), _call(chosen, **arguments), entropy=entropy)
        return TokenStats(*(_unflatten(x, positions, target.shape) for x in stats))  # type: ignore[arg-type]


@torch.compiler.disable
def policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    coefficients: Coefficients,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    entropy: bool = False,
    backend: str = "auto",
) -> PolicyLossOutput:
    """Compute any loss of each token's (logprob, entropy, KL), with its gradient computed in the forward pass.

    Args:
        hidden: See `linear_logprob`. No gradient is computed for an input that requires none (e.g. a frozen head).
        weight: See `linear_logprob`.
        target: See `linear_logprob`.
        coefficients: ``(logprob, entropy, kl, rows) -> (loss_terms, alpha, eta, kappa)``, see `Coefficients`. It is
            called under ``no_grad``, with one chunk of rows at a time, once for each row; it is not called if there are
            no rows. Its ``rows`` are positions in the flattened input, also with a mask.
        mask: See `linear_logprob`.
        bias: See `linear_logprob`.
        lora: See `linear_logprob`.
        temperature: See `linear_logprob`.
        softcap: See `linear_logprob`.
        ref_hidden: See `linear_logprob`.
        ref_weight: See `linear_logprob`.
        ref_bias: See `linear_logprob`.
        entropy: Whether ``coefficients`` gets the entropy; needed for ``eta``.
        backend: See `linear_logprob`.

    Returns:
        The loss, Σ loss_terms, whose backward pass only scales the gradients; and logprob, entropy, kl as constants.

    Raises:
        ValueError, TypeError: As for `linear_logprob`; or ``coefficients`` returned a wrong shape, ``eta`` without
            entropy, or ``kappa`` without a reference.
        BackendError: The backend cannot run.
    """
    head = {"bias": bias, "lora": lora, "softcap": softcap, "ref_weight": ref_weight, "ref_bias": ref_bias}
    chosen, arguments, positions = _prepare(
        "policy_loss", backend, hidden, weight, target, mask, temperature=temperature, ref_hidden=ref_hidden, **head
    )
    options: dict[str, Any] = {"coefficients": coefficients, "positions": positions, "entropy": entropy}
    with without_autocast(hidden.device.type):
        if chosen == "reference":
            out = reference.policy_loss(**arguments, **options)
        else:
            out = fused.policy_loss(backend_module(chosen), _call(chosen, **arguments), **options)
        stats = (_unflatten(x, positions, target.shape) for x in out[1:])
        return PolicyLossOutput(out.loss, *stats)  # type: ignore[arg-type]


@torch.compiler.disable
def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    *,
    seeds: Tensor,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
) -> SampleOutput:
    """Draw an exact categorical sample per row, by Gumbel-max with noise hashed from (seed, vocabulary index).

    Args:
        hidden: (..., D), see `linear_logprob`.
        weight: (V, D).
        seeds: (...,) int64. A row's token depends only on its seed and its logits, not on the batch.
        bias: (V,).
        lora: See `linear_logprob`.
        temperature: τ ≥ 0, or one per row, (...,); with 0 the row is decoded greedily (ties: the lowest index).
        softcap: See `linear_logprob`.
        backend: See `linear_logprob`.

    Returns:
        token (...,) int64; its logprob and the entropy under the temperature-scaled distribution (both 0 for greedy
        rows). Both are NaN for a row of which a logit is NaN, at any temperature, and its token has no meaning.

    Raises:
        ValueError, TypeError: An argument has the wrong shape, device, value or dtype; the message names it.
        BackendError: The backend cannot run.
    """
    checks.check_head(hidden, weight, bias, softcap)
    checks.check_lora(lora, hidden, weight)
    checks.check_seeds(seeds, hidden)
    checks.check_temperature(temperature, hidden, greedy=True)
    chosen = choose_backend("linear_sample", backend, hidden)
    with torch.no_grad(), without_autocast(hidden.device.type):
        rows, _ = _flatten(hidden, None, temperature=temperature)
        arguments = {"weight": weight, "bias": bias, "lora": lora, "softcap": softcap, **rows}
        if chosen == "reference":
            out = reference.linear_sample(seeds=seeds.flatten(), **arguments)
        else:
            out = fused.linear_sample(backend_module(chosen), _call(chosen, **arguments), seeds.flatten())
        return out if seeds.ndim == 1 else SampleOutput(*(x.view(seeds.shape) for x in out))


def merge_states(outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> Tensor:
    """Merge the attention over several sets of keys into the attention over their union: Σ softmax(lse) · out, in float32.

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
    if not merges_with_triton(outs[0]):
        return reference.merge_states(outs, lses)
    merged: Tensor = backend_module("triton").merge_states(outs, lses)
    return merged


def _prepare(
    operator: str,
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    mask: Tensor | None,
    *,
    temperature: float | Tensor,
    ref_hidden: Tensor | None,
    **head: Any,
) -> tuple[str, dict[str, Any], Tensor | None]:
    """Check the arguments; return the backend, the arguments for N rows, and the positions of the rows, as `_flatten`."""
    checks.check_head(hidden, weight, head["bias"], head["softcap"])
    checks.check_lora(head["lora"], hidden, weight)
    checks.check_mask(mask, hidden)
    checks.check_target(target, hidden, len(weight), mask)
    checks.check_temperature(temperature, hidden)
    checks.check_reference(hidden, weight, ref_hidden, head["ref_weight"], head["ref_bias"])
    chosen = choose_backend(operator, backend, hidden)
    rows, positions = _flatten(hidden, mask, target=target, temperature=temperature, ref_hidden=ref_hidden)
    return chosen, {"weight": weight, **head, **rows}, positions


def _flatten(hidden: Tensor, mask: Tensor | None, **per_row: Any) -> tuple[dict[str, Any], Tensor | None]:
    """Return the per-row arguments as (N, ...) without masked rows, and the positions of the rows kept, None for all.

    The selection is differentiable, so masked rows get a zero gradient.
    """
    flat = {"hidden": hidden if hidden.ndim == 2 else hidden.reshape(-1, hidden.shape[-1])}
    for name, value in per_row.items():
        if isinstance(value, Tensor):
            value = value.reshape(-1, value.shape[-1]) if name == "ref_hidden" else value.reshape(-1)
            if name == "temperature" and not per_row["temperature"].ndim:
                value = value.expand(len(flat["hidden"]))
        flat[name] = value
    if mask is None:
        return flat, None
    positions = mask.flatten().nonzero().squeeze(1)
    if len(positions) == mask.numel():
        return flat, None
    return {
        name: value.index_select(0, positions) if isinstance(value, Tensor) else value for name, value in flat.items()
    }, positions


def _unflatten(x: Tensor | None, positions: Tensor | None, shape: torch.Size) -> Tensor | None:
    """(N,) → (...), zero at masked rows."""
    if x is None:
        return None
    if positions is not None:
        x = x.new_zeros(shape.numel()).index_copy(0, positions, x)
    return x.view(shape)


def _call(
    chosen: str,
    weight: Tensor,
    hidden: Tensor,
    temperature: float | Tensor,
    *,
    bias: Tensor | None,
    lora: LoRA | None,
    softcap: float | None,
    target: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
) -> fused.Call:
    if ref_hidden is not None and ref_weight is None:
        ref_weight, ref_bias = weight, (bias if ref_bias is None else ref_bias)
    lora_hidden = None
    if lora is not None:  # through these rows, autograd computes the gradient of A and its part of the hidden states'
        # Rounded to 16 bits, they would shift log-probabilities by up to 0.01. On a GPU only such products are fast.
        wide = hidden.is_cpu and chosen != "triton"
        lora_hidden = lora_rows(hidden, lora.a, lora.scale, stats_dtype(hidden.dtype) if wide else hidden.dtype)
    return fused.Call(
        Head(weight, bias, softcap, None if lora is None else lora.b, ref_weight, ref_bias),
        Rows(hidden, target, temperature, lora_hidden, ref_hidden),
    )
