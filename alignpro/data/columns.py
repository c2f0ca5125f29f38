"""The mapping from columns to fields of a `Prompt`: from the configuration, or detected from the column names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any

from alignpro.data.conversation_formats import (
    BadRow,
    read_answer,
    read_conversation,
    read_history,
    read_text,
    shared_opening,
)
from alignpro.data.prompt import Message, Prompt
from alignpro.errors import ConfigError, DataError

FIELDS = {
    "prompt": "the user's text, a transcript, or a list of messages",
    "context": "text that belongs to the prompt; it follows after a blank line",
    "history": "the turns before the prompt: pairs of the user's and the assistant's text, or messages",
    "system": "the system message",
    "messages": "the whole conversation, in place of prompt",
    "rewrite": "a reference rewrite x'",
    "response": "a reference response y",
    "chosen": "the preferred response, as text, message or whole conversation",
    "rejected": "the other response",
    "metadata": "an object whose keys a reward function reads; `metadata.KEY` maps a single one",
}

MISSING: Any = object()
"""Returned by `lookup` for a path that does not exist; a null value does exist."""

PROMPT_COLUMNS = (
    ("prompt", "prompt"),
    ("prompt", "instruction"),
    ("prompt", "question"),
    ("messages", "messages"),
    ("messages", "conversations"),
    ("messages", "conversation"),
    ("prompt", "query"),
    ("prompt", "text"),
    ("prompt", "input"),
)
_CONTEXT_COLUMNS = {"instruction": ("context", "input"), "question": ("context",)}
_HISTORY_COLUMNS = {"instruction": "history"}
"""Only beside Alpaca's column: elsewhere a history may be anything."""
_OTHER_COLUMNS = {
    "system": ("system", "system_prompt"),
    "rewrite": ("rewrite", "optimized_prompt"),
    "response": ("response", "output", "completion"),
    "chosen": ("chosen", "good_res"),
    "rejected": ("rejected", "bad_res"),
    "metadata": ("metadata",),
}


def available_fields() -> dict[str, str]:
    """The fields that ``data.columns`` may map, with their descriptions."""
    return dict(FIELDS)


def lookup(row: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path (``conversations.0.value``), or `MISSING`; a column with that exact name takes priority."""
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and re.fullmatch(r"-?\d+", part) and -len(value) <= int(part) < len(value):
            value = value[int(part)]
        else:
            return MISSING
    return value


def detect_columns(columns: Collection[str], where: str) -> dict[str, str]:
    """Detect common layouts from the column names. The result has the form of ``data.columns``.

    Columns that match no field of a `Prompt` become metadata.

    Raises:
        DataError: No column could hold a prompt.
    """
    mapping: dict[str, str] = {}
    for field, column in PROMPT_COLUMNS:
        if column in columns:
            mapping[field] = column
            for context in _CONTEXT_COLUMNS.get(column, ()):
                if context in columns:
                    mapping.setdefault("context", context)
            if (history := _HISTORY_COLUMNS.get(column)) in columns and history is not None:
                mapping["history"] = history
            break
    for field, names in _OTHER_COLUMNS.items():
        for name in names:
            if name in columns and name not in mapping.values():
                mapping.setdefault(field, name)
    if not {"prompt", "messages", "chosen"} & set(mapping):
        raise DataError(
            f"{where}: no column that holds a prompt (columns: {_listed(columns)}); name it, for example "
            f"data.columns.prompt={next(iter(columns), 'COLUMN')}"
        )
    used = set(mapping.values())
    mapping.update({f"metadata.{name}": name for name in columns if name and name not in used})
    return mapping


def check_columns(mapping: Mapping[str, str], columns: Collection[str], where: str) -> None:
    """Check a configured mapping against the existing columns.

    Raises:
        ConfigError: A key of the mapping is not a field, or no column is mapped to the prompt.
        DataError: A column does not exist.
    """
    for field, path in mapping.items():
        if field not in FIELDS and not (field.startswith("metadata.") and field != "metadata."):
            close = difflib.get_close_matches(field, FIELDS, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ConfigError(f"data.columns.{field}: unknown field{hint}; fields: {', '.join(FIELDS)}, metadata.KEY")
        if path not in columns and path.split(".")[0] not in columns:
            raise DataError(f"{where}: no column {path!r} for data.columns.{field} (columns: {_listed(columns)})")
    if {"prompt", "messages"} <= set(mapping):
        raise ConfigError(
            "data.columns maps both prompt and messages: messages is the whole conversation, map only one"
        )
    if "history" in mapping and "prompt" not in mapping:
        raise ConfigError("data.columns maps history without prompt: it is the turns before a prompt")
    if not {"prompt", "messages", "chosen"} & set(mapping):
        raise ConfigError("data.columns does not say where the prompt is: map prompt, messages, or chosen transcripts")


def may_provide(mapping: Mapping[str, str], field: str) -> bool:
    """Whether rows under this mapping can have the field (``rewrite``, ``metadata.answer``, …)."""
    if field == "response":  # the last turn of `messages` may be a response
        return "response" in mapping or ("messages" in mapping and "chosen" not in mapping)
    return field in mapping or (field.startswith("metadata.") and "metadata" in mapping)


def to_prompt(row: Mapping[str, Any], mapping: Mapping[str, str], source: str) -> Prompt:
    """Convert a row to a `Prompt`.

    If no column is mapped to a response and the conversation ends with an assistant turn, that turn is the response.

    Raises:
        BadRow: The row has no prompt, a value has the wrong type, or the conversation does not end with a user turn.
    """
    values = {field: lookup(row, path) for field, path in mapping.items()}
    values = {field: None if value is MISSING else value for field, value in values.items()}
    chosen = read_answer(values.get("chosen"), "chosen")
    rejected = read_answer(values.get("rejected"), "rejected")
    response = _response(values.get("response"))
    if "messages" in mapping:
        turns = read_conversation(values["messages"], "messages")
        if "response" not in mapping and "chosen" not in mapping and turns and turns[-1].role == "assistant":
            turns, response = turns[:-1], turns[-1].content if turns[-1].content.strip() else None
    elif "prompt" in mapping:
        turns = _with_context(
            read_conversation(values["prompt"], "prompt"), read_text(values.get("context"), "context")
        )
        if turns:
            turns = (*read_history(values.get("history"), "history"), *turns)
    else:
        turns = shared_opening([answer for answer in (chosen, rejected) if answer])
    return Prompt(
        _checked(turns, read_text(values.get("system"), "system")),
        rewrite=read_text(values.get("rewrite"), "rewrite"),
        response=response,
        chosen=chosen.text if chosen else None,
        rejected=rejected.text if rejected else None,
        metadata=_metadata(values),
        source=source,
    )


def _response(value: Any) -> str | None:
    """Read a response: a string as it is, even if it looks like a transcript, or the last turn of messages."""
    if isinstance(value, str):
        return read_text(value, "response")
    answer = read_answer(value, "response")
    return answer.text if answer else None


def _with_context(turns: tuple[Message, ...], context: str | None) -> tuple[Message, ...]:
    if context is None or not turns:
        return turns
    last = turns[-1]
    return (*turns[:-1], Message(last.role, f"{last.content}\n\n{context}"))


def _checked(turns: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    """Prepend the system message, drop blank ones, and check that the conversation ends with a non-blank user turn."""
    turns = tuple(turn for turn in turns if turn.role != "system" or turn.content.strip())
    if system is not None and not (turns and turns[0].role == "system"):
        turns = (Message("system", system), *turns)
    if not turns or (len(turns) == 1 and turns[0].role == "system"):
        raise BadRow("no prompt")
    if turns[-1].role != "user":
        raise BadRow(f"the conversation ends with a turn of the {turns[-1].role}, expected the user's")
    if not turns[-1].content.strip():
        raise BadRow("the user's last turn is empty")
    return turns


def _metadata(values: Mapping[str, Any]) -> dict[str, Any]:
    mapped = values.get("metadata")
    if mapped is not None and not isinstance(mapped, Mapping):
        mapped = {"metadata": mapped}
    single = {key.removeprefix("metadata."): value for key, value in values.items() if key.startswith("metadata.")}
    return {**(mapped or {}), **{key: value for key, value in single.items() if value is not None}}


def _listed(columns: Collection[str]) -> str:
    return ", ".join(columns) or "none"
