"""Which prompts are held out, and which are taken if only some are: decided by hashes of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

from alignpro.config import DataConfig
from alignpro.data.prompt import Prompt
from alignpro.errors import DataError

HoldoutBy = Literal["first_turn", "conversation"]


def first_turn(prompt: Prompt) -> str:
    """The id of the conversation's first user turn: that of all its continuations, with any system message."""
    return Prompt.from_text(next(message.content for message in prompt.messages if message.role == "user")).id


def is_held_out(prompt: Prompt, holdout: float, by: HoldoutBy = "first_turn") -> bool:
    """Whether this prompt belongs to the held-out set.

    This depends only on the first user turn and ``holdout``: all prefixes and continuations of a conversation are in the
    same set, in which no other begins alike. It does not change when the data set grows or is reordered, the same prompt
    from two data sets is in the same set, and a larger ``holdout`` only adds prompts to the held-out set.

    Args:
        prompt: The prompt.
        holdout: Share of held-out prompts.
        by: ``conversation`` hashes the whole conversation, as earlier versions did; the two agree on single turns without
            a system message.
    """
    key = first_turn(prompt) if by == "first_turn" else prompt.id
    digest = hashlib.sha256(b"alignpro/split/" + key.encode()).digest()
    return int.from_bytes(digest[:8], "big") < holdout * 2**64


def split(prompts: Sequence[Prompt], holdout: float, by: HoldoutBy = "first_turn") -> tuple[list[Prompt], list[Prompt]]:
    """Split into (training, held out), each in the given order.

    Args:
        prompts: The data set.
        holdout: Expected share of held-out prompts, in [0, 1). A small data set may deviate from it by a few prompts, and
            its held-out set may be empty.
        by: What is hashed; see `is_held_out`.

    Raises:
        DataError: There are prompts, but none is left to train on.
        ValueError: ``holdout`` is outside [0, 1).
    """
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout={holdout}: expected a share in [0, 1)")
    sides: tuple[list[Prompt], list[Prompt]] = ([], [])
    for prompt in prompts:
        sides[is_held_out(prompt, holdout, by)].append(prompt)
    if prompts and not sides[0]:
        raise DataError(
            f"data.holdout={holdout} leaves none of {len(prompts)} prompts to train on: lower it, or give more prompts"
        )
    return sides


def split_for_training(prompts: Sequence[Prompt], config: DataConfig, count: int) -> tuple[list[Prompt], list[Prompt]]:
    """Split into those to train on and at most ``count`` on which a run evaluates itself, each in the given order.

    The latter are validation prompts if ``data.validation`` is positive, else held-out ones. The held-out prompts are those
    of `split`, whatever the share of validation prompts is.

    Args:
        prompts: The data set.
        config: The shares.
        count: See `choose`.

    Raises:
        DataError: There are prompts, but none is left to train on.
    """
    training, others = split(prompts, config.holdout + config.validation, config.holdout_by)
    if config.validation > 0:
        others = [prompt for prompt in others if not is_held_out(prompt, config.holdout, config.holdout_by)]
    return training, choose(others, count, config.holdout_by)


def choose(prompts: Sequence[Prompt], count: int, by: HoldoutBy = "first_turn") -> list[Prompt]:
    """Choose at most ``count`` prompts by a hash of their content, in the given order.

    The first prompts in the order of a file are often those of one source or one kind. The choice depends only on the
    prompts, not on their order, and a larger ``count`` only adds prompts. Runs that hold out by ``conversation`` took the
    first ones, and keep them.
    """
    if by == "conversation":
        return list(prompts[:count])
    if count >= len(prompts):
        return list(prompts)
    digests = [hashlib.sha256(b"alignpro/choose/" + prompt.id.encode()).digest() for prompt in prompts]
    chosen = sorted(range(len(prompts)), key=digests.__getitem__)[:count]
    return [prompts[i] for i in sorted(chosen)]


def cluster_labels(prompts: Sequence[Prompt], cluster: str | None) -> list[str]:
    """The cluster of each prompt: prompts of one cluster are alike, so that only clusters are independent draws.

    Args:
        prompts: The prompts.
        cluster: A key of their metadata; ``source`` is the file or data set if it is no such key. By default,
            conversations that begin with the same user turn are a cluster.

    Raises:
        DataError: A prompt lacks the key.
    """
    if cluster is None:
        return [first_turn(prompt) for prompt in prompts]
    if cluster == "source" and not any(cluster in prompt.metadata for prompt in prompts):
        return [prompt.source.rpartition(":")[0] for prompt in prompts]
    for prompt in prompts:
        if prompt.metadata.get(cluster) is None:
            raise DataError(
                f"{prompt.source or repr(prompt.text[:60])}: data.cluster={cluster}: it has no such key in its metadata "
                f"(keys: {', '.join(prompt.metadata) or 'none'}); map a column to it with "
                f"data.columns.metadata.{cluster}=COLUMN"
            )
    return [repr(prompt.metadata[cluster]) for prompt in prompts]
