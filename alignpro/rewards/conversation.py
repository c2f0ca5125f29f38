"""A conversation as a reward model reads it, the same where it scores and where it is trained."""

from __future__ import annotations

from alignpro.chat_template import ChatTemplate
from alignpro.data.prompt import Message, Prompt
from alignpro.errors import DataError, RewardError
from alignpro.rewards.component import describe_prompt


def encode_conversation(
    template: ChatTemplate, prompt: Prompt, response: str, max_length: int
) -> tuple[list[int], bool]:
    """Tokens of the ORIGINAL prompt's messages followed by the assistant's response, in the reward model's template.

    A longer conversation loses its beginning (the response and what it answers are at the end); a BOS token in front
    stays. Nothing that a text says becomes a structural token: a policy could otherwise write the turn that flatters it.

    Args:
        template: Of the reward model's tokenizer.
        prompt: The user's prompt, context turns included.
        response: The assistant's turn.
        max_length: Tokens to keep, at least 1.

    Returns:
        (ids, truncated): at most ``max_length`` ids, and whether any were dropped.

    Raises:
        RewardError: The template refuses this conversation.
    """
    try:
        ids = template.encode([*prompt.messages, Message("assistant", response)], add_generation_prompt=False)
    except DataError as error:
        raise RewardError(f"reward model {error}\n  {describe_prompt(prompt)}") from error
    truncated = len(ids) > max_length
    if truncated:
        bos = template.tokenizer.bos_token_id
        keep_bos = max_length > 1 and bos is not None and ids[0] == bos
        ids = [ids[0], *ids[len(ids) - max_length + 1 :]] if keep_bos else ids[len(ids) - max_length :]
    return ids, truncated
