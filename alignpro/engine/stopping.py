"""Where a sequence ends: at a stop token, after a stop text, or at its maximum length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from alignpro.engine.types import SamplingParams


class End(NamedTuple):
    """Why a sequence ends with its last token."""

    reason: Literal["stop", "length"]
    num_text_tokens: int | None = None
    """Number of tokens before the stop text that ended it; None if no stop text did."""


def find_end(output_ids: list[int], params: SamplingParams, tokenizer: PreTrainedTokenizerBase) -> End | None:
    """Whether a sequence ends with the token just sampled; None if it goes on."""
    if output_ids[-1] in params.stop_token_ids:
        return End("stop")
    if params.stop and (num_text_tokens := _before_stop_text(output_ids, params.stop, tokenizer)) is not None:
        return End("stop", num_text_tokens)
    return End("length") if len(output_ids) == params.max_tokens else None


def _before_stop_text(output_ids: list[int], stops: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The number of tokens before a stop text; None if the last tokens do not contain one."""

    def text(start: int, end: int) -> str:
        return str(tokenizer.decode(output_ids[start:end]))

    # Each token decodes to at least one byte, except for a few that decode to nothing; hence the margin of 4.
    start = max(0, len(output_ids) - max(len(stop.encode()) for stop in stops) - 4)
    tail = text(start, len(output_ids))
    places = [place for stop in stops if (place := tail.find(stop)) >= 0]
    if not places:
        return None
    return next(end for end in range(len(output_ids), start - 1, -1) if len(text(start, end)) <= min(places))
