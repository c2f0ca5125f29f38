"""The keys of a configuration with their defaults, as the tables of the documents write them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import BaseModel


def settings(kind: type[BaseModel], elsewhere: Sequence[str], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted keys with their defaults.

    Args:
        kind: The configuration.
        elsewhere: Beginnings of keys to leave out.
        prefix: Of the keys.
    """
    for name, field in kind.model_fields.items():
        key, default = prefix + name, field.get_default(call_default_factory=True)
        if elsewhere and key.startswith(tuple(elsewhere)):
            continue
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from settings(annotation, elsewhere, f"{key}.")
        elif isinstance(default, bool):
            yield key, str(default).lower()
        elif isinstance(default, tuple):
            yield key, ", ".join(map(str, default))
        else:
            yield key, "" if default is None or field.is_required() else str(default)
