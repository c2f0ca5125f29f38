"""Leave out prompts that do not fit in a model's context, or that its chat template refuses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from alignpro.data import Prompt
from alignpro.errors import DataError, RewardError

logger = logging.getLogger(__name__)


def filter_overlong_prompts(
    prompts: Iterable[Prompt],
    encode: Callable[[Prompt], Sequence[int]],
    max_tokens: int,
    *,
    input_name: str = "the policy's input",
) -> list[Prompt]:
    """Keep prompts whose input has at most ``max_tokens`` ids; log how many were dropped, why, and the first of them.

    A prompt that the chat template refuses is also dropped and counted, with its reason.

    Args:
        prompts: The data set.
        encode: Prompt → input ids: `PrompterTemplate.encode`, `TargetTemplate.encode_context`, ….
        max_tokens: Maximum length of the input.
        input_name: The name of the input in messages.

    Raises:
        DataError: All prompts were dropped.
    """
    fitting: list[Prompt] = []
    refused: list[str] = []
    overlong: list[str] = []
    for prompt in prompts:
        try:
            length = len(encode(prompt))
        except (DataError, RewardError) as error:
            refused.append(f"{prompt.source or prompt.id}: {error}")
            continue
        if length <= max_tokens:
            fitting.append(prompt)
        else:
            overlong.append(f"{prompt.source or prompt.id}: {length} tokens")
    total = len(fitting) + len(refused) + len(overlong)
    reasons = [
        *_reason(refused, total, f"cannot be {input_name}", "use another chat_template, or leave such turns out"),
        *_reason(
            overlong,
            total,
            f"do not fit in the {max_tokens} tokens of {input_name}",
            "raise max_prompt_tokens, sample fewer tokens, or use shorter prompts",
        ),
    ]
    if reasons and not fitting:
        raise DataError("no prompt is left: " + "; ".join(f"{count}; {remedy}" for count, remedy in reasons))
    for count, _ in reasons:
        logger.warning("%s; they were dropped", count)
    return fitting


def filter_refused_prompts(
    prompts: Iterable[Prompt], check: Callable[[Prompt], object], *, input_name: str
) -> list[Prompt]:
    """Keep prompts on which ``check`` raises no `DataError` or `RewardError`; otherwise as `filter_overlong_prompts`."""

    def encode(prompt: Prompt) -> tuple[int, ...]:
        check(prompt)
        return ()

    return filter_overlong_prompts(prompts, encode, 0, input_name=input_name)


def _reason(dropped: Sequence[str], total: int, why: str, remedy: str) -> list[tuple[str, str]]:
    """How many prompts were dropped for a reason, and what to do; empty if none were."""
    return [(f"{len(dropped)} of {total} prompts {why} (the first: {dropped[0]})", remedy)] if dropped else []
