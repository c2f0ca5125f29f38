"""Read local files as rows: JSON, JSON Lines, CSV, TSV and Parquet, plain or gzipped.

A row that cannot be read is returned with a description of the problem. Only an unreadable file is an error.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignpro.data.columns import PROMPT_COLUMNS
from alignpro.errors import DataError

FORMATS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")

DELIMITERS = ",;\t|"
"""What may separate the cells of a `.csv` file; the header tells which."""

WRAPPERS = ("data", "rows", "examples", "instances", "records", "items", "samples", "prompts")
"""Keys of an object around the rows of a file, as in ``{"data": [...]}``."""


@dataclass(frozen=True)
class Row:
    """One row: its values, or the reason why it could not be read."""

    location: str
    """``file:line`` for line-based formats, otherwise ``file:row N``; both count from 1."""
    values: dict[str, Any] | None = None
    problem: str = ""


@dataclass(frozen=True)
class Table:
    """The rows of one file or data set."""

    name: str
    columns: tuple[str, ...]
    rows: list[Row]


def expand_paths(pattern: str) -> list[Path]:
    """The files matched by a path or a glob pattern, sorted.

    Raises:
        DataError: No file matches, or the path is a directory.
    """
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        raise DataError(f"data.source {pattern}: is a directory; name files, for example {path / '*.jsonl'}")
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())  # noqa: PTH207 (absolute patterns too)
    if not found:
        raise DataError(f"data.source {pattern}: no such file")
    return found


def read_table(path: Path) -> Table:
    """Read a file. Its suffix determines the format; an additional ``.gz`` means that it is compressed.

    Raises:
        DataError: The suffix is unknown, or the file cannot be read.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = suffixes[-1:] == [".gz"]
    kind = next(iter(suffixes[:-1][-1:] if compressed else suffixes[-1:]), "")
    if kind not in FORMATS:
        raise DataError(f"{path}: unknown kind of file; expected {', '.join(FORMATS)}, optionally with .gz")
    content = _read_bytes(path, compressed)
    if kind == ".parquet":
        return _read_parquet(path, content)
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}: is UTF-16; write it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
    content = content.removeprefix(b"\xef\xbb\xbf")
    if kind in (".csv", ".tsv"):
        return _read_csv(path, content, "\t" if kind == ".tsv" else None)
    # Arrays, objects and JSON Lines are told apart by content, since each of them occurs with each suffix.
    if content.lstrip()[:1] == b"[":
        rows = _json_array(path, content)
    elif (wrapped := _json_object(path, content)) is not None:
        rows = wrapped
    else:
        rows = list(_json_lines(path, content))
    columns = dict.fromkeys(key for row in rows for key in row.values or ())
    return Table(str(path), tuple(columns), rows)


def _read_bytes(path: Path, compressed: bool) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if compressed else content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged or not gzip: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _json_lines(path: Path, content: bytes) -> Iterator[Row]:
    # Split only at line feeds and carriage returns: U+2028 and similar line separators may occur in a JSON string.
    for number, line in enumerate(re.split(rb"\r\n|\n|\r", content), start=1):
        if line.strip():
            yield _json_row(f"{path}:{number}", line)


def _json_row(location: str, line: bytes) -> Row:
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Row(location, problem=f"not UTF-8 at byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        return Row(location, problem=f"not valid JSON: {_where(error)}")
    except (ValueError, RecursionError) as error:
        return Row(location, problem=f"not valid JSON: {error}")
    return _object_row(location, values)


def _where(error: json.JSONDecodeError) -> str:
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"  # two of its messages end with "at"


def _json_object(path: Path, content: bytes) -> list[Row] | None:
    """The rows of a file that is a single object: those in its list under one of `WRAPPERS`, or the object itself.

    None if it is no object, or if it is one line of JSON Lines.
    """
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        return None  # the lines are read one by one, and each that cannot be read is reported
    if not isinstance(value, dict):
        return None
    columns = {"chosen", *(column for _, column in PROMPT_COLUMNS)}
    for key in WRAPPERS if not columns & set(value) else ():
        items = value.get(key)
        if isinstance(items, list) and items and all(isinstance(item, dict) for item in items):
            return [Row(f"{path}:{key} row {number}", item) for number, item in enumerate(items, start=1)]
    return [Row(f"{path}:row 1", value)] if re.search(rb"[\r\n]", content.strip()) else None


def _json_array(path: Path, content: bytes) -> list[Row]:
    try:
        items = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {_where(error)}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from error
    return [_object_row(f"{path}:row {number}", item) for number, item in enumerate(items, start=1)]


def _object_row(location: str, values: Any) -> Row:
    if isinstance(values, dict):
        return Row(location, values)
    return Row(location, problem=f"expected a JSON object, got {type(values).__name__}")


def _read_csv(path: Path, content: bytes, delimiter: str | None) -> Table:
    # Invalid UTF-8 bytes become lone surrogates here, so that only the row that contains them is lost.
    text = io.StringIO(content.decode("utf-8", "surrogateescape"), newline="")
    default_limit = csv.field_size_limit(sys.maxsize)  # prompts may be longer than the module's 128 KiB
    try:
        return _parse_csv(path, text, _delimiter(text) if delimiter is None else delimiter)
    finally:
        csv.field_size_limit(default_limit)


def _delimiter(text: io.StringIO) -> str:
    """The delimiter that splits the header into most cells: a comma if none does."""

    def cells(delimiter: str) -> int:
        text.seek(0)
        try:
            return len(next(csv.reader(text, delimiter=delimiter, strict=True), []))
        except csv.Error:
            return 0

    found = max(DELIMITERS, key=cells)
    text.seek(0)
    return found


def _parse_csv(path: Path, text: io.StringIO, delimiter: str) -> Table:
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise DataError(f"{path}:1: not a valid CSV header: {error}") from error
    if not _is_utf8(header):
        raise DataError(f"{path}:1: the column names are not UTF-8; write the file as UTF-8 (iconv -t UTF-8)")
    repeated = {name for name in header if header.count(name) > 1}
    if repeated:
        raise DataError(f"{path}:1: two columns have the same name: {', '.join(sorted(repeated))}")
    rows: list[Row] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return Table(str(path), tuple(header), rows)
        except csv.Error as error:
            lost = reader.line_num - line
            rows.append(
                Row(f"{path}:{line}", problem=f"not valid CSV: {error}" + (f"; {lost} lines lost" if lost else ""))
            )
            continue
        if cells:
            rows.append(_csv_row(f"{path}:{line}", header, cells))


def _csv_row(location: str, header: list[str], cells: list[str]) -> Row:
    if len(cells) != len(header):
        return Row(location, problem=f"{len(cells)} cells, the header has {len(header)}")
    if not _is_utf8(cells):
        return Row(location, problem="not UTF-8")
    return Row(location, dict(zip(header, cells, strict=True)))


def _is_utf8(cells: list[str]) -> bool:
    """Whether the bytes that the cells were read from are UTF-8; others have become lone surrogates."""
    try:
        for cell in cells:
            cell.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(path: Path, content: bytes) -> Table:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error
    try:
        rows = [Row(f"{path}:row {number}", values) for number, values in enumerate(table.to_pylist(), start=1)]
    except (ArithmeticError, ValueError):  # such as a date outside Python's years, in some row
        rows = [_parquet_row(f"{path}:row {i + 1}", table.slice(i, 1)) for i in range(table.num_rows)]
    return Table(str(path), tuple(table.column_names), rows)


def _parquet_row(location: str, row: Any) -> Row:
    try:
        return Row(location, row.to_pylist()[0])
    except (ArithmeticError, ValueError) as error:
        return Row(location, problem=f"holds a value that Python cannot represent: {error}")
