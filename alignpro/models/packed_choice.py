"""Which kernels compute the attention of packed sequences: padded ones, or variable-length calls of a library.

Padding to the longest prompt and the longest continuation runs anywhere and is used on a CPU. On a CUDA device, a timed
trial of forward and backward pass compares it with each library of `alignpro_kernels.varlen_kernels` that supports the
layer. The trial is run once for each geometry of a model, at its first pass; that is when the model is loaded.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from alignpro.models.attention_interface import AttentionSettings
from alignpro.models.packed_parts import Segments
from alignpro_kernels import varlen_kernels
from alignpro_kernels.merged_attention import Part, merged_attention
from alignpro_kernels.timed_trial import Choice, choose
from alignpro_kernels.varlen import ScoreOptions, VarlenKernels, unsupported

logger = logging.getLogger(__name__)

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, AttentionSettings], Tensor]
"""query (1, H, T, D), key and value (1, H', T, D), how the layer computes its attention → (1, T, H, D)."""
Padded: TypeAlias = Callable[[Segments, torch.device], Attend]
"""Makes the padded attention of packed sequences."""

PADDED = "padding"
_TRIAL = Segments(0, (192, 256, 160, 224), ((96, 128, 64, 112),) * 4)
"""The packed sequences of a trial."""


class Geometry(NamedTuple):
    """What the speed of attention depends on in a model."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    softcap: bool

    def __str__(self) -> str:
        """Say it in words."""
        capped = ", capped" if self.softcap else ""
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.heads} heads on {self.kv_heads} of {self.head_dim}, {name}{capped}"


def unpadded_kernels(
    query: Tensor, key: Tensor, settings: AttentionSettings, segments: Segments, padded: Padded
) -> VarlenKernels | None:
    """Return the library that computes a layer's attention, or None to pad the sequences.

    Args:
        query: (1, H, T, D).
        key: (1, H', T, D).
        settings: How the layer computes its attention.
        segments: The packed sequences.
        padded: What is used if no library is faster; it takes part in the trial.
    """
    if query.device.type != "cuda":
        return None
    libraries, reason = supporting(query, settings, segments)
    if not libraries:
        _log_padding(reason)
        return None
    geometry = Geometry(query.shape[1], key.shape[1], query.shape[3], query.dtype, settings.softcap is not None)
    name = measured(geometry, query.device, padded).name
    return next((each for each in libraries if each.name == name), None)


def supporting(query: Tensor, settings: AttentionSettings, segments: Segments) -> tuple[list[VarlenKernels], str]:
    """The libraries that can compute a layer's attention; if there are none, also the reason."""
    if settings.dropout > 0:
        return [], "variable-length attention has no dropout"
    if (window := settings.sliding_window) is not None and window < segments.longest and segments.are_shared:
        return [], f"a sliding window of {window} tokens ends within the prompts of some sequences"
    reasons: dict[str, None] = {}  # a set that keeps the order
    found = []
    for kernels in varlen_kernels.KERNELS:
        reason = varlen_kernels.why_unavailable(kernels) or unsupported(
            kernels, query[0].transpose(0, 1), settings.softcap
        )
        if reason is None:
            found.append(kernels)
        else:
            reasons[reason] = None
    return found, "; ".join(reasons)


def unpadded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parts: Sequence[Part],
    kernels: VarlenKernels,
    settings: AttentionSettings,
    segments: Segments,
) -> Tensor:
    """Compute the attention of T packed tokens to U keys by variable-length calls.

    Args:
        query: (1, H, T, D).
        key: (1, H', U, D), H a multiple of H'.
        value: As ``key``.
        parts: The calls.
        kernels: Compute them; they support the layer (`supporting`).
        settings: How the layer computes its attention.
        segments: The packed sequences.

    Returns:
        (1, T, H, D), differentiable.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T or U, heads, D)
    window = settings.sliding_window
    if window is not None and window >= segments.longest:
        window = None  # it hides nothing, and kernels without one are faster
    out = merged_attention(q, k, v, parts, kernels, ScoreOptions(settings.scale, settings.softcap, window))
    return out.unsqueeze(0)


@functools.cache
def measured(geometry: Geometry, device: torch.device, padded: Padded) -> Choice:
    """The result of the trial of a geometry on a CUDA device; logged once."""
    with torch.cuda.device(device):
        found = trials(geometry, device, padded, varlen_kernels.available())
        choice = choose(found, synchronize=torch.cuda.synchronize)
    logger.info("attention of packed sequences (%s) runs with %s", geometry, choice)
    return choice


def trials(
    geometry: Geometry, device: torch.device, padded: Padded, libraries: Sequence[VarlenKernels]
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Forward and backward pass of a few packed sequences by each candidate: output and gradients."""
    total = sum(_TRIAL.prompts) + sum(map(sum, _TRIAL.continuations))
    generator = torch.Generator(device).manual_seed(0)
    heads = (geometry.heads, geometry.kv_heads, geometry.kv_heads, geometry.heads)
    *inputs, gradient = (
        torch.randn(1, count, total, geometry.head_dim, generator=generator, device=device).to(geometry.dtype)
        for count in heads
    )
    settings = AttentionSettings(geometry.head_dim**-0.5, 50.0 if geometry.softcap else None)
    parts = _TRIAL.parts(device)

    def trial(attend: Attend) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            # The pass that this trial is part of may be checkpointed: that must not see the tensors saved here.
            with (
                torch.inference_mode(False),
                torch.enable_grad(),
                torch.autocast(device.type, enabled=False),
                torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is),
            ):
                q, k, v = (x.clone().requires_grad_() for x in inputs)
                out = attend(q, k, v, settings)
                gradients = torch.autograd.grad(out, (q, k, v), gradient.transpose(1, 2))
            return out.detach(), *gradients

        return run

    def by(kernels: VarlenKernels) -> Attend:
        return lambda q, k, v, settings: unpadded_attention(q, k, v, parts, kernels, settings, _TRIAL)

    found = {PADDED: trial(padded(_TRIAL, device))}
    for kernels in libraries:
        if unsupported(kernels, inputs[0][0].transpose(0, 1), settings.softcap) is None:
            found[kernels.name] = trial(by(kernels))
    return found


def _as_it_is(x: Tensor) -> Tensor:
    return x


@functools.cache
def _log_padding(reason: str) -> None:
    logger.info("attention of packed sequences pads them: %s", reason)
