"""Bytes that a rank holds of frozen models at the stages that a job gives them, for `alignpro plan`."""

from __future__ import annotations

from torch import nn

from alignpro.config import DeepSpeedConfig
from alignpro.distributed.layer_passes import layers_of


def frozen_memory(
    stages: DeepSpeedConfig, ranks: int, target: nn.Module | None, itemsize: int, rewards: float
) -> tuple[float, float]:
    """What is held all the time, and what is gathered of the target for a rollout, in bytes.

    What is gathered of reward models is there when the rollout's memory has been given back, and not counted.

    Args:
        stages: Of target and reward models.
        ranks: Over how many their parts are spread.
        target: Without memory for its weights; None where it has none of its own.
        itemsize: Bytes of each of its weights.
        rewards: Bytes of the reward models.

    Raises:
        ModelError: The target is to be gathered layer by layer, and has no list of layers.
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
