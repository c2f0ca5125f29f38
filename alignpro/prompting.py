"""Prompts as the two models see them: x to the prompter's tokens, its tokens to x', x' to the target's tokens.

The two models may have different tokenizers and templates, so the rewrite passes between them as text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from alignpro.chat_template import ChatTemplate
from alignpro.config import PromptingConfig
from alignpro.data.prompt import Message, Prompt
from alignpro.errors import ConfigError, DataError

__all__ = [
    "ChatTemplate",
    "MetaPrompt",
    "PrompterTemplate",
    "TargetInput",
    "TargetTemplate",
    "available_meta_prompts",
    "drop_long_prompts",
]

logger = logging.getLogger(__name__)

_BUILT_IN = Path(__file__).with_name("meta_prompts")
_VARIABLES = {"prompt", "history"}


class MetaPrompt:
    """The instruction around x for the prompter: a Jinja template that renders the text of one user turn.

    Its variables are ``prompt``, the user's last turn x, and ``history``, the turns before it, each with ``role`` and
    ``content``. A template that uses ``history`` renders the whole input. If it does not, those turns precede the text as
    turns of the prompter's conversation. The content of x is never interpreted as Jinja.

    Args:
        name: A built-in meta-prompt (`available_meta_prompts`), or a file.

    Raises:
        ConfigError: The meta-prompt does not exist, is not a Jinja template, uses other variables, or lacks ``prompt``.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        source = _read_meta_prompt(name)
        environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False)
        try:
            variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"prompting.meta_prompt {name}:{error.lineno}: {error.message}") from error
        if variables - _VARIABLES:
            unknown = ", ".join(sorted(variables - _VARIABLES))
            raise ConfigError(f"prompting.meta_prompt {name}: unknown variable {unknown}; expected prompt or history")
        if "prompt" not in variables:
            raise ConfigError(f"prompting.meta_prompt {name}: never uses {{{{ prompt }}}}, the text to be rewritten")
        self.uses_history = "history" in variables
        self.doc = _leading_comment(environment, source)

    def messages(self, prompt: Prompt) -> tuple[Message, ...]:
        """Return the prompter's conversation for this prompt.

        Raises:
            ConfigError: The template fails on this prompt.
        """
        try:
            text = self._template.render(prompt=prompt.text, history=prompt.context)
        except jinja2.TemplateError as error:
            raise ConfigError(f"prompting.meta_prompt {self.name}: {error} (prompt {prompt.source})") from error
        return (*(() if self.uses_history else prompt.context), Message("user", text))


def available_meta_prompts() -> dict[str, str]:
    """Return the names of the built-in meta-prompts, each with its description."""
    names = sorted(path.stem for path in _BUILT_IN.glob("*.jinja"))
    return {name: MetaPrompt(name).doc for name in names}


class PrompterTemplate:
    """The prompter's side: x → ids, sampled ids → x'.

    A rewrite is the text that the prompter wrote before the end of its turn, without surrounding whitespace. One that
    reached its token limit first is *truncated*: it is used as it is, and `PromptingConfig.truncation_penalty` is
    subtracted from its reward.

    Args:
        tokenizer: The prompter's tokenizer, with its chat template set (`load_tokenizer`).
        config: Names the meta-prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PromptingConfig) -> None:
        self.chat = ChatTemplate(tokenizer)
        self.meta_prompt = MetaPrompt(config.meta_prompt)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end a rewrite."""
        return self.chat.stop_token_ids

    def encode(self, prompt: Prompt) -> list[int]:
        """Encode the prompter's input: meta-prompt and chat template around x.

        Raises:
            DataError: The chat template refuses the conversation.
        """
        return self.chat.encode(self.meta_prompt.messages(prompt))

    def completion(self, rewrite: str) -> list[int]:
        """Encode a given rewrite with its end-of-turn token, for SFT."""
        return self.chat.completion(rewrite)

    def decode(self, tokens: Sequence[int]) -> str:
        """Decode sampled ids to the rewrite x', stripped."""
        return self.chat.decode(tokens)


@dataclass(frozen=True)
class TargetInput:
    """A rewrite as the target receives it."""

    tokens: list[int]
    """The target's prompt: its template around the conversation with x' as the last turn."""
    text: str
    """The last turn as it was sent."""
    empty: bool
    """Whether the rewrite was empty; ``on_empty`` determines what was sent."""
    dropped: int
    """Characters dropped from the end of an over-long rewrite."""


class TargetTemplate:
    """The target's side: x' → ids, sampled ids → y.

    The target sees the conversation of the prompt with x' in place of its last turn. Special cases:

    - *empty* (only whitespace): with ``on_empty="send"`` the target gets an empty user turn, and its response is scored
      as usual; with ``"original"`` it gets x.
    - *truncated* (no end token): sent as it is.
    - *over-long* (the input has more than ``max_tokens`` ids): the longest prefix of x' that fits is sent.

    Args:
        tokenizer: The target's tokenizer.
        template: As for `ChatTemplate`.
        max_tokens: Maximum length of the input in the target's ids: its context minus the budget of the response.
        on_empty: What to send for an empty rewrite.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        *,
        max_tokens: int,
        on_empty: Literal["send", "original"] = "send",
    ) -> None:
        self.chat = ChatTemplate(tokenizer, template)
        self.max_tokens = max_tokens
        self.on_empty = on_empty

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end a response."""
        return self.chat.stop_token_ids

    def encode(self, prompt: Prompt, rewrite: str) -> TargetInput:
        """Encode the target's input for a rewrite of ``prompt``; pass ``prompt.text`` for the prompt itself.

        Raises:
            DataError: The turns before the last one leave no room (see `encode_context`), or the template refuses
                the conversation.
        """
        empty = not rewrite.strip()
        text = prompt.text if empty and self.on_empty == "original" else "" if empty else rewrite
        tokens = self._tokens(prompt, text)
        if len(tokens) <= self.max_tokens:
            return TargetInput(tokens, text, empty, dropped=0)
        kept = self._longest_beginning(prompt, text)
        return TargetInput(self._tokens(prompt, kept), kept, empty, dropped=len(text) - len(kept))

    def encode_context(self, prompt: Prompt) -> list[int]:
        """Encode the target's input without the last turn's text; a prompt for which this is too long cannot be used."""
        return self._tokens(prompt, "")

    def decode(self, tokens: Sequence[int]) -> str:
        """Decode sampled ids to the response y, stripped."""
        return self.chat.decode(tokens)

    def _tokens(self, prompt: Prompt, text: str) -> list[int]:
        return self.chat.encode((*prompt.context, Message("user", text)))

    def _longest_beginning(self, prompt: Prompt, text: str) -> str:
        """Bisect over characters, since a cut between ids may change how the tokenizer merges the text."""
        fits, too_long = 0, len(text)
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if len(self._tokens(prompt, text[:middle])) <= self.max_tokens:
                fits = middle
            else:
                too_long = middle
        if fits == 0 and len(self.encode_context(prompt)) > self.max_tokens:
            raise DataError(
                f"prompt {prompt.source or prompt.id}: the turns before the last one do not fit in the {self.max_tokens} "
                "tokens that the target has for its input; lower respond.max_tokens, or leave the prompt out"
            )
        return text[:fits]


def drop_long_prompts(
    prompts: Iterable[Prompt],
    encode: Callable[[Prompt], Sequence[int]],
    max_tokens: int,
    *,
    what: str = "the policy's input",
) -> list[Prompt]:
    """Keep prompts whose input has at most ``max_tokens`` ids; log how many were dropped, and the first of them.

    A prompt that the chat template refuses is also dropped and counted.

    Args:
        prompts: The data set.
        encode: Prompt → input ids: `PrompterTemplate.encode`, `TargetTemplate.encode_context`, ….
        max_tokens: Maximum length of the input.
        what: The name of the input in messages.

    Raises:
        DataError: All prompts were dropped.
    """
    kept: list[Prompt] = []
    dropped: list[str] = []
    for prompt in prompts:
        try:
            length = len(encode(prompt))
        except DataError as error:
            dropped.append(f"{prompt.source or prompt.id}: {error}")
            continue
        if length <= max_tokens:
            kept.append(prompt)
        else:
            dropped.append(f"{prompt.source or prompt.id}: {length} tokens")
    if not dropped:
        return kept
    count = f"{len(dropped)} of {len(dropped) + len(kept)} prompts do not fit in the {max_tokens} tokens of {what}"
    if not kept:
        raise DataError(
            f"{count} (the first: {dropped[0]}); raise max_prompt_tokens, sample fewer tokens, or use shorter prompts"
        )
    logger.warning("%s and were dropped (the first: %s)", count, dropped[0])
    return kept


def _read_meta_prompt(name: str) -> str:
    built_in = _BUILT_IN / f"{name}.jinja"
    path = built_in if Path(name).name == name and built_in.is_file() else Path(name).expanduser()
    if not path.is_file():
        names = ", ".join(sorted(path.stem for path in _BUILT_IN.glob("*.jinja")))
        raise ConfigError(f"prompting.meta_prompt {name}: no such meta-prompt; expected {names}, or a Jinja file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompting.meta_prompt {name}: not UTF-8") from error


def _leading_comment(environment: jinja2.Environment, source: str) -> str:
    """Return the text of the ``{# … #}`` that opens a template, on one line."""
    for _, kind, text in environment.lex(source):
        if kind == "comment":
            return " ".join(text.split())
        if kind == "data" and text.strip():
            break
    return ""
