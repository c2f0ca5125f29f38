"""The last update of AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101), at another learning rate.

The moments after an update say what it was, so that it can be shortened without a copy of the weights before it:

    w = w_old (1 − a λ) − a u        u = m̂ / (√v̂ + ε), a the learning rate, λ the weight decay
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def rescale_update(optimizer: Optimizer, updated: Iterable[Tensor], before: float, after: float) -> None:
    """Replace the last update, made at one learning rate, by that at another.

    Args:
        optimizer: AdamW, or an optimizer with its state and settings.
        updated: The weights of the optimizer that had a gradient: it did not change the others.
        before: The learning rate at which they were updated.
        after: The learning rate at which they should have been; 0 restores them.
    """
    groups = {id(weight): group for group in optimizer.param_groups for weight in group["params"]}
    for weight in updated:
        rescale_weight(weight, optimizer.state[weight], groups[id(weight)], before, after)


@torch.no_grad()
def rescale_weight(
    weight: Tensor, state: Mapping[str, Any], settings: Mapping[str, Any], before: float, after: float
) -> None:
    """Do that for one weight.

    Args:
        weight: It is changed in place.
        state: The optimizer's state of it after the update: ``step``, ``exp_avg``, ``exp_avg_sq``.
        settings: ``betas``, ``eps`` and ``weight_decay`` of its group.
        before: See `rescale_update`.
        after: Likewise.
    """
    (beta1, beta2), decay, count = settings["betas"], settings["weight_decay"], float(state["step"])
    size = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt_().add_(settings["eps"])
    direction = (state["exp_avg"] / (1 - beta1**count)).div_(size)  # u
    if decay:
        weight.add_(direction, alpha=before).mul_((1 - after * decay) / (1 - before * decay))
        weight.sub_(direction, alpha=after)
    else:
        weight.add_(direction, alpha=before - after)
