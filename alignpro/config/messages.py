"""Error messages for invalid configurations: the key as the user would write it, the problem, and what to do.

pydantic reports the problem and its location in its own terms: the location includes the branch of a union
(``components.0.function.weight``), and there is no suggestion for an unknown key. This module fixes both.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_LONGEST_VALUE = 80


def explain(kind: type[BaseModel], error: ValidationError) -> list[str]:
    """One line per problem in ``error``, the validation error of a ``kind``; each names its key."""
    return [_explain(kind, problem) for problem in error.errors(include_url=False)]


def _explain(kind: type[BaseModel], problem: ErrorDetails) -> str:
    unknown = problem["type"] == "extra_forbidden"
    key, siblings = _dotted_key(kind, problem["loc"], unknown)
    if unknown:
        suggestion = _suggest(kind, str(problem["loc"][-1]), siblings)
        return f"{key}: unknown key" + (f" (did you mean {suggestion!r}?)" if suggestion else "")
    if problem["type"] == "missing":
        return f"{key}: missing"
    if problem["type"] == "value_error":
        message = problem["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    value = repr(problem["input"])
    shown = value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]}…"
    return f"{key or 'configuration'}: {problem['msg']} (got {shown})"


def _dotted_key(kind: type[BaseModel], location: tuple[int | str, ...], unknown: bool) -> tuple[str, list[str]]:
    """The key without the branches of unions, and the names of the fields at the level of its last part."""
    annotations: list[Any] = [kind]
    parts: list[str] = []
    siblings: list[str] = []
    for depth, part in enumerate(location):
        sections = [each for each in annotations if _is_section(each)]
        siblings = [name for section in sections for name in section.model_fields]
        if len(sections) > 1:  # a union branch selected by ``kind: …``, or by a tag that is the name of its class
            annotations = [each for each in sections if _is_branch(each, part)]
            continue
        if isinstance(part, str) and part in siblings:
            annotations = _alternatives(sections[0].model_fields[part].annotation)
        elif isinstance(part, int) or any(get_origin(each) is dict for each in annotations):
            annotations = [
                option for each in annotations if get_args(each) for option in _alternatives(get_args(each)[-1])
            ]
        elif not (unknown and depth == len(location) - 1):  # a branch of a union of plain types, such as ``str``
            continue
        parts.append(str(part))
    return ".".join(parts), siblings


def _suggest(kind: type[BaseModel], name: str, siblings: list[str]) -> str | None:
    """A field at the same level with a similar name, else a field of exactly that name anywhere."""
    close = difflib.get_close_matches(name, siblings, n=1)
    if close:
        return close[0]
    return next((path for path in _paths(kind) if path.rpartition(".")[2] == name), None)


def _paths(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted paths of all fields that an override can name, outermost first."""
    yield from (prefix + name for name in kind.model_fields)
    for name, field in kind.model_fields.items():
        for section in filter(_is_section, _alternatives(field.annotation)):
            yield from _paths(section, f"{prefix}{name}.")


def _alternatives(annotation: Any) -> list[Any]:
    """The possible types of a value: the branches of a union, without ``Annotated``."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [each for branch in get_args(annotation) for each in _alternatives(branch)]
    return [annotation]


def _is_branch(section: type[BaseModel], tag: int | str) -> bool:
    kind = section.model_fields.get("kind")
    return tag == section.__name__ if kind is None else tag in get_args(kind.annotation)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, BaseModel)
