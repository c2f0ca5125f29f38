"""Rewards as arrays: checks, and means of prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

FloatArray = npt.NDArray[np.float64]
Values = npt.ArrayLike | torch.Tensor


def finite(values: Values) -> FloatArray:
    """Rewards as a float64 array whose first axis is prompts.

    Raises:
        ValueError: There are no values, or one is not finite.
    """
    array = (
        values.detach().cpu().double().numpy() if isinstance(values, torch.Tensor) else np.asarray(values, np.float64)
    )
    if array.ndim == 0 or array.size == 0:
        raise ValueError(f"expected rewards with prompts as the first axis, got an array of shape {array.shape}")
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        raise ValueError(f"reward {tuple(int(i) for i in bad[0])} is not finite: {array[tuple(bad[0])]}")
    return array


def rewards_of_prompts(values: Values) -> FloatArray:
    """The rewards of each prompt: (P, ...) to (P, n) float64; raises as `finite`."""
    array = finite(values)
    return array.reshape(len(array), -1)


def prompt_means(values: Values) -> FloatArray:
    """The mean of each prompt: (P, ...) to (P,) float64.

    Raises:
        ValueError: There are no values, or one is not finite.
    """
    mean: FloatArray = rewards_of_prompts(values).mean(axis=1)
    return mean


def paired(*arms: Values) -> list[FloatArray]:
    """The rewards of each prompt in several arms, (P, n) each.

    Raises:
        ValueError: The arms hold a different number of prompts, none, or a value that is not finite.
    """
    rewards = [rewards_of_prompts(arm) for arm in arms]
    sizes = [len(each) for each in rewards]
    if len(set(sizes)) > 1:
        raise ValueError(f"paired arms must hold the same prompts, got {sizes} prompts")
    return rewards


def are_binary(arrays: Sequence[FloatArray]) -> bool:
    """Whether all values are 0 or 1."""
    return all(bool(np.isin(array, (0.0, 1.0)).all()) for array in arrays)
