"""Leave out prompts that do not fit in a model's context, or that its chat template refuses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from alignpro.data import Prompt
from alignpro.errors import DataError

logger = logging.getLogger(__name__)


def filter_overlong_prompts(
    prompts: Iterable[Prompt],
    encode: Callable[[Prompt], Sequence[int]],
    max_tokens: int,
    *,
    input_name: str = "the policy's input",
) -> list[Prompt]:
    """Keep prompts whose input has at most ``max_tokens`` ids; log how many were dropped, and the first of them.

    A prompt that the chat template refuses is also dropped and counted.

    Args:
        prompts: The data set.
        encode: Prompt → input ids: `PrompterTemplate.encode`, `TargetTemplate.encode_context`, ….
        max_tokens: Maximum length of the input.
        input_name: The name of the input in messages.

    Raises:
        DataError: All prompts were dropped.
    """
    fitting: list[Prompt] = []
    dropped: list[str] = []
    for prompt in prompts:
        try:
            length = len(encode(prompt))
        except DataError as error:
            dropped.append(f"{prompt.source or prompt.id}: {error}")
            continue
        if length <= max_tokens:
            fitting.append(prompt)
        else:
            dropped.append(f"{prompt.source or prompt.id}: {length} tokens")
    if not dropped:
        return fitting
    count = (
        f"{len(dropped)} of {len(dropped) + len(fitting)} prompts do not fit in the {max_tokens} tokens of {input_name}"
    )
    if not fitting:
        raise DataError(
            f"{count} (the first: {dropped[0]}); raise max_prompt_tokens, sample fewer tokens, or use shorter prompts"
        )
    logger.warning("%s and were dropped (the first: %s)", count, dropped[0])
    return fitting
