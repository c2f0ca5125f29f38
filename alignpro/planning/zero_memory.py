"""Memory of a rank in training under a DeepSpeed configuration, by formula.

Weights, gradients and optimizer states follow Rajbhandari et al. (2020, "ZeRO", section 3). To these come the buffers of
DeepSpeed 0.19: gradient buckets, prefetched weights, and the copies that an optimizer step makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

_MOMENTS = 8
"""Bytes per element for the two moments of AdamW."""
_MASTER = 4
"""Bytes per element of the float32 master copy, and of a gradient summed in float32."""
_DEFAULT_BUCKET = 500_000_000
"""Elements that DeepSpeed reduces or gathers at once by default."""


@dataclass(frozen=True)
class TrainingMemory:
    """Memory of one rank, in bytes."""

    weights: float
    """Weights of the trained model and of its reference."""
    optimizer: float
    gradients: float
    """Gradients, summed over micro-batches."""
    gradient_allocation: Literal["permanent", "first_backward", "gradual"] = "gradual"
    """When the memory of the gradients is allocated: for good, all at once with the first gradient of a step, or gradually,
    while activations are freed."""
    buffers: float = 0.0
    """Permanent buffers of DeepSpeed."""
    backward: float = 0.0
    """Additional memory of a backward pass: buckets, and weights that are gathered for it."""
    step: float = 0.0
    """Additional memory of the optimizer step, when activations have been freed."""
    host: float = 0.0
    """Host memory of offloaded state."""

    def combined_with(self, other: TrainingMemory) -> TrainingMemory:
        """Memory of two models trained in the same set-up, whose passes and steps do not overlap."""
        return replace(
            self,
            weights=self.weights + other.weights,
            optimizer=self.optimizer + other.optimizer,
            gradients=self.gradients + other.gradients,
            buffers=self.buffers + other.buffers,
            backward=max(self.backward, other.backward),
            step=max(self.step, other.step),
            host=self.host + other.host,
        )


def torch_memory(trained: Sequence[int], held: int, weight_bytes: int) -> TrainingMemory:
    """Memory of training with plain PyTorch.

    Args:
        trained: Number of elements of each weight with a gradient.
        held: Bytes of all weights, including those of the reference and of adapters.
        weight_bytes: Bytes per element of the policy's weights.
    """
    count, half = sum(trained), weight_bytes == 2
    return TrainingMemory(
        weights=held,
        optimizer=count * (_MOMENTS + (_MASTER if half else 0)),
        gradients=count * _MASTER,
        backward=count * weight_bytes if half else 0.0,  # gradients of a micro-batch, before they are summed in float32
    )


def zero_memory(
    zero: dict[str, Any],
    trained: Sequence[int],
    policy: Sequence[int],
    reference: Sequence[int],
    weight_bytes: int,
    ranks: int,
) -> TrainingMemory:
    """Memory of training under DeepSpeed.

    Args:
        zero: The section ``zero_optimization`` of DeepSpeed's configuration.
        trained: Number of elements of each weight with a gradient.
        policy: Number of elements of each weight of the policy, including its adapter.
        reference: Likewise for the reference; empty if it is the policy without its adapter.
        weight_bytes: Bytes per element.
        ranks: Number of ranks.
    """
    if zero["stage"] == 3:
        return _stage_3(zero, trained, policy, reference, weight_bytes, ranks)
    held = (sum(policy) + sum(reference)) * weight_bytes
    count, stage = sum(trained), zero["stage"]
    bucket = int(zero.get("reduce_bucket_size", _DEFAULT_BUCKET))
    if stage == 0:
        return TrainingMemory(
            weights=held,
            optimizer=count * _MOMENTS,
            gradients=count * _MASTER,
            step=min(count, _DEFAULT_BUCKET) * _MASTER,  # flattened gradients, which are reduced at once
        )
    half, offloads = weight_bytes == 2, _offloads(zero, "optimizer")
    # Stage 1 reduces the float32 sum; stage 2 reduces each micro-batch's gradient in the dtype of the weights.
    staged = _MASTER if stage == 1 else weight_bytes
    copies = 2 if zero.get("overlap_comm") else 1
    buckets = copies * bucket * staged if zero.get("contiguous_gradients", True) else 0
    gradients = count * _MASTER / (ranks if stage == 2 else 1)
    optimizer = count * (_MOMENTS + _MASTER) / ranks
    own = count * _MASTER / ranks
    return TrainingMemory(
        weights=held,
        optimizer=0.0 if offloads else optimizer,
        gradients=0.0 if offloads and stage == 2 else gradients,
        buffers=2 * max(trained, default=0) * weight_bytes if offloads else 0.0,
        backward=buckets + max(trained, default=0) * weight_bytes,
        step=0.0 if offloads or (half and stage == 2) else own,  # flattened gradients for the optimizer
        gradient_allocation="first_backward" if stage == 2 else "gradual",
        # A second copy of the gradients, and the new weights before they are copied back.
        host=optimizer + 2 * own + own * weight_bytes / _MASTER if offloads else 0.0,
    )


def _stage_3(
    zero: dict[str, Any],
    trained: Sequence[int],
    policy: Sequence[int],
    reference: Sequence[int],
    weight_bytes: int,
    ranks: int,
) -> TrainingMemory:
    count, everything = sum(trained), sum(policy) + sum(reference)
    held = everything * weight_bytes
    bucket = int(zero.get("reduce_bucket_size", _DEFAULT_BUCKET))
    threshold = int(zero.get("stage3_param_persistence_threshold", 100_000))
    small = [sum(each for each in of if each <= threshold) for of in (policy, reference)]  # stay gathered
    live = min(sum(policy), int(zero.get("stage3_max_live_parameters", 1_000_000_000)))
    ahead = min(everything, int(zero.get("stage3_prefetch_bucket_size", 50_000_000)))
    own = count / ranks
    group = min(own, float(zero.get("sub_group_size", 1_000_000_000)))
    optimizer, offloads, waits = own * (_MOMENTS + _MASTER), _offloads(zero, "optimizer"), _offloads(zero, "param")
    return TrainingMemory(
        weights=sum(small) * weight_bytes + (0.0 if waits else held / ranks),
        optimizer=0.0 if offloads else optimizer,
        gradients=0.0 if offloads else own * _MASTER,
        buffers=bucket * weight_bytes,
        # Gathered weights, the pieces from which the last of them are assembled, and the gradients reduced at once.
        backward=(max(0, live - small[0]) + ahead + min(bucket, count) + max(trained, default=0)) * weight_bytes,
        step=group * _MASTER,
        gradient_allocation="permanent",
        host=(optimizer + own * _MASTER if offloads else 0.0) + (held / ranks if waits else 0.0),
    )


def _offloads(zero: dict[str, Any], what: str) -> bool:
    return bool(zero.get(f"offload_{what}", {}).get("device", "none") != "none")
