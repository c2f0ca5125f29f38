"""Split prompts into training and held-out sets by a hash of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from alignpro.data.prompt import Prompt
from alignpro.errors import DataError


def is_held_out(prompt: Prompt, holdout: float) -> bool:
    """Whether this prompt belongs to the held-out set.

    This depends only on the conversation (`Prompt.id`) and ``holdout``. It does not change when the data set grows or is
    reordered, the same prompt from two data sets is in the same set, and a larger ``holdout`` only adds prompts to the
    held-out set.
    """
    digest = hashlib.sha256(b"alignpro/split/" + prompt.id.encode()).digest()
    return int.from_bytes(digest[:8], "big") < holdout * 2**64


def split(prompts: Sequence[Prompt], holdout: float) -> tuple[list[Prompt], list[Prompt]]:
    """Split into (training, held out), each in the given order.

    Args:
        prompts: The data set.
        holdout: Expected share of held-out prompts, in [0, 1). A small data set may deviate from it by a few prompts, and
            its held-out set may be empty.

    Raises:
        DataError: There are prompts, but none is left to train on.
        ValueError: ``holdout`` is outside [0, 1).
    """
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout={holdout}: expected a share in [0, 1)")
    sides: tuple[list[Prompt], list[Prompt]] = ([], [])
    for prompt in prompts:
        sides[is_held_out(prompt, holdout)].append(prompt)
    if prompts and not sides[0]:
        raise DataError(
            f"data.holdout={holdout} leaves none of {len(prompts)} prompts to train on: lower it, or give more prompts"
        )
    return sides
