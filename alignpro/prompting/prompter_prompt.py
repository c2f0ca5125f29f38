"""The prompter's prompt: x → the prompter's tokens, and its sampled tokens → the rewrite x'."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from alignpro.config import PromptingConfig
from alignpro.data import Message, Prompt
from alignpro.errors import DataError
from alignpro.prompting.chat_template import ChatTemplate
from alignpro.prompting.memory_context import MemoryContext
from alignpro.prompting.meta_prompt import MetaPrompt
from alignpro.prompting.rewrite_form import rewrite_from, written_part


class PrompterTemplate:
    """The prompter's side: x → ids, sampled ids → x'.

    A rewrite is the text that the prompter wrote before the end of its turn, without surrounding whitespace, or with
    ``form="addition"`` the prompt with that text below it. One that reached its token limit first is *truncated*: it is used
    as it is, and `PromptingConfig.truncation_penalty` is subtracted from its reward.

    Args:
        tokenizer: The prompter's tokenizer, with its chat template set (`load_tokenizer`).
        config: Names the meta-prompt, and the form of a rewrite.
        stop_token_ids: As for `ChatTemplate`.
        memory: Past rewrites that the prompter sees; None for none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PromptingConfig,
        *,
        stop_token_ids: Sequence[int] = (),
        memory: MemoryContext | None = None,
    ) -> None:
        self.chat = ChatTemplate(tokenizer, stop_token_ids=stop_token_ids)
        self.meta_prompt = MetaPrompt(config.meta_prompt)
        self.form = config.form
        self.memory = memory

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end a rewrite."""
        return self.chat.stop_token_ids

    def encode(self, prompt: Prompt) -> list[int]:
        """Encode the prompter's input: meta-prompt, memory and chat template around x.

        Raises:
            DataError: The chat template refuses the conversation.
        """
        *before, turn = self.meta_prompt.messages(prompt)
        if self.memory is None:
            return self.chat.encode([*before, turn])
        return self.memory.encode(
            prompt, turn.content, lambda text: self.chat.encode([*before, Message(turn.role, text)])
        )

    def completion(self, prompt: Prompt, rewrite: str) -> list[int]:
        """Encode what has to be written for a given rewrite, with the end-of-turn token, for SFT.

        Raises:
            DataError: The form is ``addition``, and the rewrite does not begin with the prompt.
        """
        written = written_part(self.form, prompt.text, rewrite)
        if written is None:
            raise DataError(
                f"prompt {prompt.source or prompt.id}: its rewrite does not begin with the prompt, so no addition gives it: set "
                "prompting.form=whole, or leave the pair out"
            )
        return self.chat.completion(written)

    def decode(self, prompt: Prompt, tokens: Sequence[int]) -> str:
        """Decode sampled ids to the rewrite x'; the prompter's own text is stripped."""
        return rewrite_from(self.form, prompt.text, self.chat.decode(tokens))
