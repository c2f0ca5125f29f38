"""Which text of a request may be rewritten, and how it is replaced in the request's bytes.

Of a chat it is the text of the last message, if that is a user's: never a tool's result or an assistant's prefill. Parts that
are not text stay, and so does their order. A text of several parts that follow each other is rewritten as one, which takes the
place of the first; if another part is between them, their order matters and nothing is rewritten. Of a completion it is
the prompt, if it is one string.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from alignpro.data import Message, Prompt, replace_lone_surrogates
from alignpro.serving.contract import Api, Asked
from alignpro.serving.json_spans import Edit, Span, edited, elements, members, root

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles of the API → those of a `Message`; turns of other roles are not shown to the prompter."""


@dataclass(frozen=True)
class Turn:
    """A user's turn that holds text.

    Its `digest` identifies the conversation up to it, by the words that the client sent.
    """

    text: str
    digest: str
    index: int | None
    """Its place among the messages; None for the prompt of a completion."""
    parts: tuple[int, ...] | None
    """The places of its text parts, which follow each other; None if the content is a string."""


@dataclass(frozen=True)
class Conversation:
    """What a request says, as far as it concerns rewriting."""

    earlier: tuple[Turn, ...]
    """The user's turns before the last message, whose text is in one piece."""
    last: Turn | None
    """The turn to be rewritten; None if there is none."""
    reason: str
    """Why there is none: ``no_user_text`` or ``several_texts``."""
    prompt: Prompt | None
    """What the prompter is shown: the last turn after the texts of the earlier ones; None without a last turn."""


def read_conversation(asked: Asked) -> Conversation:
    """Find what may be rewritten in a parsed request. It may have any form: what is not understood is not rewritten."""
    if asked.api == "completions":
        return _read_completion(asked.body)
    messages = asked.body.get("messages")
    if not isinstance(messages, list) or not messages:
        return Conversation((), None, "no_user_text", None)
    turns: list[Turn | None] = []
    reason, state = "", sha256()
    for index, message in enumerate(messages):
        state.update(_canonical(message))
        turn, reason = _read_turn(message, index, state.hexdigest())
        turns.append(turn)
    last = turns[-1]
    earlier = tuple(turn for turn in turns[:-1] if turn is not None)
    prompt = None if last is None else Prompt((*_context(messages[:-1]), Message("user", _valid(last.text))))
    return Conversation(earlier, last, reason, prompt)


def replaced(raw: bytes, api: Api, texts: Sequence[tuple[Turn, str]]) -> bytes:
    """The bytes of a request with the texts of turns replaced, and nothing else changed.

    Raises:
        ValueError: The text is not where the parsed request has it: the bytes are not in UTF-8, or are another document.
    """
    document = members(raw, root(raw))
    if api == "completions":
        return edited(raw, [_new_text(raw, document["prompt"], turn.text, text) for turn, text in texts])
    messages = elements(raw, document["messages"])
    edits: list[Edit] = []
    for turn, text in texts:
        assert turn.index is not None
        content = members(raw, messages[turn.index])["content"]
        if turn.parts is None:
            edits.append(_new_text(raw, content, turn.text, text))
        else:
            edits += _new_parts(raw, elements(raw, content), turn, text)
    return edited(raw, edits)


def text_of(content: Any) -> str:
    """The text of a message's content: a string, or its text parts, joined by line feeds."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    return "\n".join(part["text"] for part in content if _is_text(part))


def _read_completion(body: Mapping[str, Any]) -> Conversation:
    text = body.get("prompt")
    if not isinstance(text, str) or not text.strip():
        return Conversation((), None, "no_user_text", None)
    digest = sha256(_canonical(text)).hexdigest()
    return Conversation((), Turn(text, digest, None, None), "", Prompt.from_text(_valid(text)))


def _read_turn(message: Any, index: int, digest: str) -> tuple[Turn | None, str]:
    """The user's turn in a message, or why it is none."""
    if not isinstance(message, dict) or message.get("role") != "user":
        return None, "no_user_text"
    content = message.get("content")
    if isinstance(content, str):
        return (Turn(content, digest, index, None), "") if content.strip() else (None, "no_user_text")
    parts = content if isinstance(content, list) else []
    places = tuple(i for i, part in enumerate(parts) if _is_text(part) and part["text"].strip())
    if not places:
        return None, "no_user_text"
    if places[-1] - places[0] + 1 != len(places):
        return None, "several_texts"
    return Turn("\n".join(parts[i]["text"] for i in places), digest, index, places), ""


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _context(messages: Sequence[Any]) -> list[Message]:
    """The texts of earlier turns, for the prompter."""
    turns = [each for each in messages if isinstance(each, dict) and isinstance(each.get("role"), str)]
    texts = [(ROLES.get(each["role"]), text_of(each.get("content"))) for each in turns]
    return [Message(role, _valid(text)) for role, text in texts if role is not None and text.strip()]


def _canonical(message: Any) -> bytes:
    """What identifies a message: role and content, since clients send an answer back without some of its fields."""
    kept = {name: message.get(name) for name in ("role", "content")} if isinstance(message, dict) else message
    return json.dumps(kept, sort_keys=True).encode() + b"\n"


def _valid(text: str) -> str:
    return replace_lone_surrogates(text)


def _new_text(raw: bytes, span: Span, old: str, new: str) -> Edit:
    if json.loads(span.of(raw)) != old:
        raise ValueError("the text to be replaced is not in the body")
    return Edit(span, json.dumps(replace_lone_surrogates(new), ensure_ascii=False).encode())


def _new_parts(raw: bytes, parts: Sequence[Span], turn: Turn, new: str) -> list[Edit]:
    """The first text part gets the new text, and the others go: a server may refuse an empty one."""
    assert turn.parts is not None
    texts = [members(raw, parts[i])["text"] for i in turn.parts]
    if "\n".join(json.loads(span.of(raw)) for span in texts) != turn.text:
        raise ValueError("the text to be replaced is not in the body")
    first = _new_text(raw, texts[0], json.loads(texts[0].of(raw)), new)
    return [first, *(Edit(Span(parts[i - 1].end, parts[i].end), b"") for i in turn.parts[1:])]
