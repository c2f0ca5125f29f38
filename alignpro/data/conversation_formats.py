"""Convert the formats in which data sets store conversations to messages.

Lists of ``{role, content}`` (OpenAI, TRL) or ``{from, value}`` (ShareGPT), single messages of either form, plain
strings, and transcripts of the form ``"\\n\\nHuman: …\\n\\nAssistant: …"`` (HH-RLHF, Bai et al. 2022).
"""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import dataclass
from typing import Any

from alignpro.data.prompt import Message, replace_lone_surrogates


class BadRow(ValueError):  # noqa: N818 (it is caught by the loader and never reaches the user as an exception)
    """A row that cannot be used, with the reason; the loader adds the location."""


ROLES = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
}

_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


@dataclass(frozen=True)
class Answer:
    """A response, with the conversation before it if the data set repeats that."""

    opening: tuple[Message, ...]
    text: str


def read_text(value: Any, field: str) -> str | None:
    """A string, or None for the ways in which data sets denote a missing value: null, NaN, only white space.

    Raises:
        BadRow: The value has another type.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str):
        raise BadRow(f"{field} is {_type_name(value)}, expected text")
    text = replace_lone_surrogates(value)
    return text if text.strip() else None


def read_conversation(value: Any, field: str) -> tuple[Message, ...]:
    """Read a conversation in any of the formats; a plain string is a single user turn, a missing value has no turns.

    Raises:
        BadRow: The value has none of these formats.
    """
    if isinstance(value, (list, dict)):
        return _read_messages(value, field)
    text = read_text(value, field)
    if text is None:
        return ()
    if text.lstrip().startswith("[{"):  # maybe a list of messages in a CSV cell, or just a prompt that looks like one
        parsed = _parse_json(text)
        if isinstance(parsed, list) and all(isinstance(turn, dict) and _role_key(turn) for turn in parsed):
            return _read_messages(parsed, field)
    return read_transcript(text) or (Message("user", text),)


def read_history(value: Any, field: str) -> tuple[Message, ...]:
    """Read the turns before a prompt: pairs of the user's and the assistant's text (Alpaca), or messages.

    Raises:
        BadRow: The value has neither form.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):  # in a CSV cell
        value = _parse_json(value)
    elif not isinstance(value, list):
        if read_text(value, field) is not None:
            raise BadRow(f"{field} is text, expected turns; to keep it as it is, map data.columns.metadata.{field}")
        return ()
    if not isinstance(value, list):
        raise BadRow(f"{field} is not a list of turns")
    if all(isinstance(turn, dict) for turn in value):
        return _read_messages(value, field)
    for i, turn in enumerate(value):
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise BadRow(f"{field}[{i}] is not a pair of the user's and the assistant's text")
    roles = ("user", "assistant")
    return tuple(Message(roles[k], replace_lone_surrogates(turn[k])) for turn in value for k in range(2))


def read_transcript(text: str) -> tuple[Message, ...] | None:
    """The turns of a ``Human:``/``Assistant:`` transcript, stripped; None if the text is not a transcript.

    A text is a transcript if it begins with a blank line and ``Human:``, or begins with ``Human:`` and has an
    ``Assistant:`` turn. An empty ``Assistant:`` at the end, which asks for an answer, is dropped. Consecutive turns of the
    same role, which are transcription errors that many chat templates reject, are merged.
    """
    body = text.lstrip()
    if not body.startswith("Human:") or not (text.startswith("\n\n") or "\n\nAssistant:" in text):
        return None
    parts = _TURN.split(body)
    turns = [(ROLES[role.lower()], text.strip()) for role, text in zip(parts[1::2], parts[2::2], strict=True)]
    if turns[-1] == ("assistant", ""):
        turns.pop()
    grouped = (
        (role, [text for _, text in group]) for role, group in itertools.groupby(turns, key=lambda turn: turn[0])
    )
    return tuple(Message(role, "\n\n".join(texts)) for role, texts in grouped)


def read_answer(value: Any, field: str) -> Answer | None:
    """Read a response from a string, a message, or a conversation that ends with it; None if there is no response.

    Raises:
        BadRow: The value has another format, or is a conversation that does not end with an assistant turn.
    """
    if isinstance(value, str):
        text = read_text(value, field)
        if text is None:
            return None
        turns = read_transcript(text)
        if turns is None:
            return Answer((), text)
        if turns[-1].role == "user" and text.rstrip().endswith("Assistant:"):
            return None  # HH-RLHF has a few empty answers: the transcript stops where the answer should be
    elif isinstance(value, (list, dict)):
        turns = _read_messages(value, field)
        if not turns:
            return None
    else:
        read_text(value, field)
        return None
    if turns[-1].role != "assistant":
        raise BadRow(f"{field} ends with a turn of the {turns[-1].role}, expected the assistant's")
    return Answer(turns[:-1], turns[-1].content) if turns[-1].content.strip() else None


def shared_opening(answers: list[Answer]) -> tuple[Message, ...]:
    """The conversation that all answers continue.

    Raises:
        BadRow: The answers continue different conversations.
    """
    if not answers:
        return ()
    if any(answer.opening != answers[0].opening for answer in answers):
        raise BadRow("chosen and rejected differ before their last turn")
    return answers[0].opening


def _read_messages(value: list[Any] | dict[str, Any], field: str) -> tuple[Message, ...]:
    turns = value if isinstance(value, list) else [value]
    return tuple(_read_message(turn, f"{field}[{i}]" if value is turns else field) for i, turn in enumerate(turns))


def _read_message(turn: Any, where: str) -> Message:
    key = _role_key(turn) if isinstance(turn, dict) else None
    if key is None:
        raise BadRow(f"{where} is {_type_name(turn)}, expected a message with role and content, or from and value")
    role, content = turn[key], turn.get("content" if key == "role" else "value")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise BadRow(f"{where} has the role {role!r}, expected one of {', '.join(ROLES)}")
    if isinstance(content, list):
        content = "".join(_read_part(part, where) for part in content)
    if content is not None and not isinstance(content, str):
        raise BadRow(f"{where} has {_type_name(content)} as its content, expected text")
    return Message(ROLES[role.lower()], replace_lone_surrogates(content or ""))


def _read_part(part: Any, where: str) -> str:
    """Read one part of a multimodal message; only text parts are supported."""
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return part["text"]
    raise BadRow(f"{where} has a part that is not text")


def _role_key(turn: dict[str, Any]) -> str | None:
    return next((key for key in ("role", "from") if key in turn), None)


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "nothing"}
    return names.get(type(value), f"a number ({value!r})" if isinstance(value, (int, float)) else type(value).__name__)
