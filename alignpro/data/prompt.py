"""The one record that passes through the project: a user's prompt, with what a data set knows about it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any


def replace_lone_surrogates(text: str) -> str:
    """The text with U+FFFD for every lone half of a surrogate pair: JSON can write one, UTF-8 and tokenizers cannot."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; ``role`` is ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """A user's prompt x: a conversation that ends with the user's turn, and what the data set adds to it.

    The last turn is what the prompter rewrites; the turns before it are context that both models see unchanged.
    """

    messages: tuple[Message, ...]
    rewrite: str | None = None
    """A reference rewrite x', for the prompter's SFT."""
    response: str | None = None
    """A reference response y, for SFT on responses."""
    chosen: str | None = None
    """The preferred response, for the reward model."""
    rejected: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Whatever a reward function needs, such as the right ``answer``."""
    source: str = ""
    """Where the record comes from: ``file:line``, ``file:row N`` or ``dataset/split:row N``; both count from 1."""

    @classmethod
    def from_text(cls, text: str, *, system: str | None = None, **fields: Any) -> Prompt:
        """A single-turn prompt."""
        turns = (Message("user", text),)
        return cls(((Message("system", system), *turns) if system else turns), **fields)

    @property
    def text(self) -> str:
        """The user's last turn: what is rewritten."""
        return self.messages[-1].content

    @property
    def context(self) -> tuple[Message, ...]:
        """The turns before the last one, a system message included."""
        return self.messages[:-1]

    def with_text(self, text: str) -> Prompt:
        """The same conversation with the last turn replaced."""
        return replace(self, messages=(*self.context, Message("user", text)))

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits that depend on the conversation alone: equal prompts have equal ids everywhere."""
        turns = [[message.role, message.content] for message in self.messages]
        return hashlib.sha256(json.dumps(turns, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:16]
