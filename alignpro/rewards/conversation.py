"""A conversation as a reward model reads it, the same where it scores and where it is trained."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from alignpro.data.prompt import Prompt
from alignpro.errors import ModelError
from alignpro.rewards.component import describe_prompt


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: str, max_length: int
) -> tuple[list[int], bool]:
    """Tokens of the ORIGINAL prompt's messages followed by the assistant's response, in the tokenizer's chat template.

    A longer conversation loses its beginning (the response and what it answers are at the end); a BOS token in front
    stays.

    Args:
        tokenizer: Has a chat template, its own or one that `load_tokenizer` gave it.
        prompt: The user's prompt, context turns included.
        response: The assistant's turn.
        max_length: Tokens to keep, at least 1.

    Returns:
        (ids, truncated): at most ``max_length`` ids, and whether any were dropped.

    Raises:
        ModelError: The tokenizer has no chat template, or the template refuses this conversation.
    """
    if tokenizer.chat_template is None:
        raise ModelError(
            f"tokenizer {tokenizer.name_or_path}: it has no chat template, so it cannot encode a conversation; "
            "set chat_template of this model to `plain` or to a Jinja file"
        )
    messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
    messages.append({"role": "assistant", "content": response})
    try:
        ids: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    except TemplateError as error:
        raise ModelError(
            f"tokenizer {tokenizer.name_or_path}: its chat template refuses a conversation: {error}\n"
            f"  {describe_prompt(prompt)}"
        ) from error
    truncated = len(ids) > max_length
    if truncated:
        keep_bos = max_length > 1 and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
        ids = [ids[0], *ids[len(ids) - max_length + 1 :]] if keep_bos else ids[len(ids) - max_length :]
    return ids, truncated
