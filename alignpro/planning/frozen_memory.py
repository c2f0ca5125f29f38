"""Memory that a rank needs for frozen models at their configured stages, for `alignpro plan`."""

from __future__ import annotations

from torch import nn

from alignpro.config import DeepSpeedConfig
from alignpro.distributed.sharding.layer_passes import layers_of


def frozen_memory(
    stages: DeepSpeedConfig, ranks: int, target: nn.Module | None, itemsize: int, rewards: float
) -> tuple[float, float]:
    """Compute the bytes that are held permanently, and the bytes of the target that are gathered for a rollout.

    Gathered weights of reward models are not counted: they are gathered after the rollout's memory has been freed.

    Args:
        stages: The stages of target and reward models.
        ranks: Number of ranks over which the models are sharded.
        target: The target without allocated weights; None if it has no weights of its own.
        itemsize: Bytes per element of the target's weights.
        rewards: Bytes of the reward models.

    Raises:
        ModelError: The target's layers are to be gathered in each pass, but it has no list of layers.
    """
    held = rewards / (ranks if stages.reward_stage == 3 else 1)
    whole = 0.0 if target is None else _bytes(target, itemsize)
    if target is None or stages.target_stage == 0:
        return held + whole, 0.0
    held += whole / ranks
    if stages.gathered_bytes is None or whole <= stages.gathered_bytes:
        return held, whole
    layers = [_bytes(layer, itemsize) for layer in layers_of(target)]
    return held, whole - sum(layers) + max(stages.gathered_bytes, 2 * max(layers))


def _bytes(module: nn.Module, itemsize: int) -> float:
    return float(sum(weight.numel() for weight in module.parameters()) * itemsize)
