"""The record that is passed through the project: a user's prompt with the annotations of its data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any


def replace_lone_surrogates(text: str) -> str:
    """Replace lone surrogates by U+FFFD: JSON can contain them, but UTF-8 and tokenizers cannot encode them."""
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
    """A user's prompt x: a conversation that ends with a user turn, and the annotations of its data set.

    The prompter rewrites the last turn; the turns before it are context that both models see unchanged.
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
    """Data for a reward function, such as the correct ``answer``."""
    source: str = ""
    """Origin of the record: ``file:line``, ``file:row N`` or ``dataset/split:row N``; both count from 1."""

    @classmethod
    def from_text(cls, text: str, *, system: str | None = None, **fields: Any) -> Prompt:
        """Create a single-turn prompt."""
        turns = (Message("user", text),)
        return cls(((Message("system", system), *turns) if system else turns), **fields)

    @property
    def text(self) -> str:
        """The text of the user's last turn, which is rewritten."""
        return self.messages[-1].content

    @property
    def context(self) -> tuple[Message, ...]:
        """The turns before the last one, including a system message."""
        return self.messages[:-1]

    def with_text(self, text: str) -> Prompt:
        """The same conversation with the last turn replaced."""
        return replace(self, messages=(*self.context, Message("user", text)))

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits that depend only on the conversation: equal prompts have equal ids on every machine."""
        turns = [[message.role, message.content] for message in self.messages]
        return hashlib.sha256(json.dumps(turns, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:16]
