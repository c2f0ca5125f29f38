"""The encoding of a conversation for a reward model, shared by scoring and training."""

from __future__ import annotations

from alignpro.data import Message, Prompt
from alignpro.errors import DataError, RewardError
from alignpro.prompting.chat_template import ChatTemplate
from alignpro.rewards.component import describe_prompt


def encode_conversation(
    template: ChatTemplate, prompt: Prompt, response: str, max_length: int
) -> tuple[list[int], bool]:
    """Tokens of the ORIGINAL prompt's messages followed by the assistant's response, in the reward model's template.

    A longer conversation is truncated on the left, because the response and the turn it answers are at the end; a leading
    BOS token is kept. Texts are never parsed for special tokens: otherwise a policy could inject turns that raise its
    score.

    Args:
        template: Chat template of the reward model's tokenizer.
        prompt: The user's prompt, including context turns.
        response: The assistant's turn.
        max_length: Maximum number of tokens, at least 1.

    Returns:
        (ids, truncated): at most ``max_length`` ids, and whether any were dropped.

    Raises:
        RewardError: The template rejects this conversation.
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
