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
    """Number of whole tokens before the stop text that ended it; None if no stop text did."""
    rest_tokens: tuple[int, ...] = ()
    """The ids of the text between those tokens and the stop text, which begins inside a token."""


def find_end(output_ids: list[int], params: SamplingParams, tokenizer: PreTrainedTokenizerBase) -> End | None:
    """Whether a sequence ends with the token just sampled; None if it goes on.

    Raises:
        ValueError: A stop text begins inside a token, and no ids of the tokenizer decode to the text before it.
    """
    if output_ids[-1] in params.stop_token_ids:
        return End("stop")
    if params.stop and (text := _text_before_stop(output_ids, params.stop, tokenizer)) is not None:
        return End("stop", *_tokens_of_beginning(output_ids, text, tokenizer))
    return End("length") if len(output_ids) == params.max_tokens else None


def _text_before_stop(output_ids: list[int], stops: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The text before a stop text; None if the last tokens do not contain one."""
    # Each token decodes to at least one byte, except for a few that decode to nothing; hence the margin of 4.
    start = max(0, len(output_ids) - max(len(stop.encode()) for stop in stops) - 4)
    tail = _decode(output_ids[start:], tokenizer)
    if not any(stop in tail for stop in stops):
        return None
    text = _decode(output_ids, tokenizer)
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else None


def _tokens_of_beginning(
    output_ids: list[int], text: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, tuple[int, ...]]:
    """Ids that decode to ``text``, which the decoded sequence begins with: as many sampled tokens as possible, and a rest.

    The rest is encoded by itself. Where that does not give the text, since the tokenizer writes a space before it, or a
    sampled token ends within a character, the rest begins one token earlier.
    """
    for count in range(len(output_ids) - 1, -1, -1):
        beginning = _decode(output_ids[:count], tokenizer)
        if not text.startswith(beginning):
            continue
        if beginning == text:
            return count, ()
        rest = tokenizer.encode(text[len(beginning) :], add_special_tokens=False)
        if _decode([*output_ids[:count], *rest], tokenizer) == text:
            return count, tuple(rest)
    raise ValueError(f"a stop text begins inside a token, and no tokens decode to the text before it ({text[-40:]!r})")


def _decode(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))
