"""Load prompts from a data configuration: read, convert, check and deduplicate them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignpro.config import DataConfig
from alignpro.data.columns import MISSING, check_columns, detect_columns, lookup, may_provide, to_prompt
from alignpro.data.conversation_formats import BadRow
from alignpro.data.file_formats import Table, expand_paths, read_table
from alignpro.data.presets import presets, read_preset
from alignpro.data.prompt import Prompt
from alignpro.errors import DataError

logger = logging.getLogger(__name__)

TEXT_FIELDS = ("rewrite", "response", "chosen", "rejected")
_MAX_QUOTED = 5
"""Maximum number of bad rows quoted in a message."""


@dataclass(frozen=True)
class LoadReport:
    """Statistics of the rows that were read."""

    rows: int
    """Rows read, including bad ones; reading stops early at ``data.limit``."""
    kept: int
    duplicates: int
    bad: list[str]
    """One message per bad row: file, line (or row number) and the problem."""

    def __str__(self) -> str:
        return f"{self.kept} prompts from {self.rows} rows ({self.duplicates} duplicates, {len(self.bad)} bad rows)"


@dataclass(frozen=True)
class DataSet:
    """Prompts in the order of their source, and the report of loading them."""

    prompts: list[Prompt]
    report: LoadReport


@dataclass(frozen=True)
class _Source:
    """A table and its column mapping."""

    table: Table
    mapping: Mapping[str, str]
    known_bad: int = 0
    """Number of expected bad rows, allowed in addition to the configured limit."""


def load_prompts(config: DataConfig, *, require: Sequence[str] = (), distinct_by: Sequence[str] = ()) -> DataSet:
    """Load the prompts specified by ``config``.

    The number of rows kept and the first bad rows are logged.

    Two rows are duplicates if their conversations and all fields of ``require`` and ``distinct_by`` are equal. So with
    ``require=("rewrite",)`` a prompt may occur with several rewrites, with ``("chosen", "rejected")`` in several pairs, and
    with neither only once.

    Args:
        config: Preset or files, column mapping, limit.
        require: Fields that every prompt must have: ``rewrite``, ``response``, ``chosen``, ``rejected`` or
            ``metadata.KEY``. A row without one is a bad row.
        distinct_by: Further fields, which a row may lack, by which rows of a prompt differ.

    Raises:
        ConfigError: The column mapping has an unknown field or lacks the prompt.
        DataError: A file is missing or unreadable, a column does not exist, no row can have a required field, there
            are more than ``config.max_bad_rows`` bad rows, or no prompt is left.
    """
    unknown = [field for field in require if field not in TEXT_FIELDS and not field.startswith("metadata.")]
    if unknown:
        raise ValueError(f"require={unknown}: expected {', '.join(TEXT_FIELDS)} or metadata.KEY")
    data = _load(config, require, distinct_by)
    if data.report.bad:
        logger.warning("%s: %s; skipped:\n%s", _names(config), data.report, _quoted(data.report.bad))
    else:
        logger.info("%s: %s", _names(config), data.report)
    return data


def check_source(config: DataConfig, require: Sequence[str] = (), *, whole: bool = False) -> list[Prompt]:
    """Check that there is data, and that its columns fit, without a log. Presets are not read.

    Args:
        config: As for `load_prompts`.
        require: Likewise.
        whole: Whether to read all rows, rather than those up to the first prompt.

    Returns:
        The prompts that were read.

    Raises:
        ConfigError: As `load_prompts`.
        DataError: Likewise.
    """
    names = [config.source] if isinstance(config.source, str) else config.source
    if not (files := [name for name in names if name not in presets()]):
        return []
    limit = config.limit if whole else 1
    return _load(config.model_copy(update={"source": files, "limit": limit}), require).prompts


def check_files(config: DataConfig) -> None:
    """Check that each name of ``data.source`` is a preset or matches files, without reading any.

    Raises:
        DataError: One is neither.
    """
    for name in [config.source] if isinstance(config.source, str) else config.source:
        if name not in presets():
            _paths(name)


def _load(config: DataConfig, require: Sequence[str], distinct_by: Sequence[str] = ()) -> DataSet:
    key_fields = (*require, *distinct_by)
    prompts: list[Prompt] = []
    seen: set[tuple[str, ...]] = set()
    bad: list[str] = []
    rows = 0
    max_bad_rows = config.max_bad_rows
    for source in _sources(config):
        max_bad_rows += source.known_bad
        _check_fields(source, require)
        for location, prompt in _prompts(source, require):
            rows += 1
            if isinstance(prompt, BadRow):
                bad.append(f"{location}: {prompt}")
                if len(bad) > max_bad_rows:
                    raise DataError(_too_many(bad, max_bad_rows))
                continue
            key = (prompt.id, *(repr(read_field(prompt, field)) for field in key_fields))
            if key not in seen:
                seen.add(key)
                prompts.append(prompt)
            if len(prompts) == config.limit:
                return DataSet(prompts, LoadReport(rows, len(prompts), rows - len(prompts) - len(bad), bad))
        _check_paths(source)
    if not prompts:
        reason = f"all of its {rows} rows are bad:\n{_quoted(bad)}" if bad else "it has no rows"
        raise DataError(f"data.source {_names(config)}: no prompts: {reason}")
    return DataSet(prompts, LoadReport(rows, len(prompts), rows - len(prompts) - len(bad), bad))


def read_field(prompt: Prompt, field: str) -> Any:
    """A field of a prompt, named as in ``require``; None if the prompt does not have it."""
    if field.startswith("metadata."):
        return prompt.metadata.get(field.removeprefix("metadata."))
    return getattr(prompt, field)


def _names(config: DataConfig) -> str:
    return config.source if isinstance(config.source, str) else ", ".join(config.source)


def _sources(config: DataConfig) -> Iterator[_Source]:
    known = presets()
    for name in [config.source] if isinstance(config.source, str) else config.source:
        if name in known:
            preset = known[name]
            table = read_preset(name, preset, config.split)
            yield _mapped(table, config.columns or preset.columns, preset.known_bad)
            continue
        paths = _paths(name)
        if config.split is not None:
            raise DataError(f"data.split={config.split}: only presets have splits, but {name} is a file; leave it out")
        for path in paths:
            table = read_table(path)
            if table.rows:
                yield _mapped(table, config.columns)


def _paths(name: str) -> list[Path]:
    """The files of a name that is no preset."""
    try:
        return expand_paths(name)
    except DataError as error:
        start = "" if Path(name).is_absolute() else f"; looked for it in {Path.cwd()}"
        raise DataError(f"{error}, and no preset (presets: {', '.join(presets())}){start}") from error


def _mapped(table: Table, columns: Mapping[str, str], known_bad: int = 0) -> _Source:
    """A table with the configured mapping, or with one detected from its columns."""
    if not table.columns:  # no row could be read: there are no columns to detect, and each row has its own problem
        return _Source(table, {"prompt": "prompt"}, known_bad)
    if columns:
        check_columns(columns, table.columns, table.name)
    return _Source(table, columns or detect_columns(table.columns, table.name), known_bad)


def _prompts(source: _Source, require: Sequence[str]) -> Iterator[tuple[str, Prompt | BadRow]]:
    for row in source.table.rows:
        if row.values is None:
            yield row.location, BadRow(row.problem)
            continue
        try:
            prompt = to_prompt(row.values, source.mapping, row.location)
            for field in require:
                if read_field(prompt, field) is None:
                    raise BadRow(f"no {field}")
        except BadRow as problem:
            yield row.location, problem
        else:
            yield row.location, prompt


def _check_fields(source: _Source, require: Sequence[str]) -> None:
    absent = [field for field in require if not may_provide(source.mapping, field)]
    if absent and source.table.columns:
        raise DataError(
            f"{source.table.name}: no column for {', '.join(absent)}, which this command needs "
            f"(columns: {', '.join(source.table.columns)}); name it, for example data.columns.{absent[0]}=COLUMN"
        )


def _check_paths(source: _Source) -> None:
    """Reject a path whose column exists but which resolves in no row: that is a typo, not an empty field."""
    values = [row.values for row in source.table.rows if row.values is not None]
    for field, path in source.mapping.items():
        if "." in path and values and all(lookup(row, path) is MISSING for row in values):
            raise DataError(
                f"{source.table.name}: data.columns.{field}={path} does not exist in any of {len(values)} rows"
            )


def _too_many(bad: Sequence[str], limit: int) -> str:
    return (
        f"more than {limit} bad rows:\n{_quoted(bad)}\n"
        "fix the data, map its columns with data.columns, or raise data.max_bad_rows"
    )


def _quoted(bad: Sequence[str]) -> str:
    more = [f"  … and {len(bad) - _MAX_QUOTED} more"] if len(bad) > _MAX_QUOTED else []
    return "\n".join([*(f"  {message}" for message in bad[:_MAX_QUOTED]), *more])
