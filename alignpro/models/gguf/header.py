"""The header of a GGUF file: its metadata and its table of tensors, read with the standard library alone.

The format is described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; versions 2 and 3 are read. Nothing is
trusted: every length is compared with the size of the file before anything is allocated.
"""

from __future__ import annotations

import importlib.util
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from alignpro.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
"""Of the tensors in the file, in bytes, unless its metadata has another."""

QUANTIZATIONS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""How matrices can be written; many more can be read."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Value type → format of `struct`."""
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_DEEPEST_ARRAY = 4
"""How many arrays may be within each other; no file of llama.cpp has more than one."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of the file, as the table describes it."""

    name: str
    shape: tuple[int, ...]
    """In the order of torch: the last dimension is contiguous."""
    quantization: int
    """The number of its data type in ggml."""
    offset: int
    """Of its first byte, from the start of the file."""


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about its model."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[TensorEntry, ...]
    size: int
    """Of the file, in bytes."""

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, the prefix of its keys."""
        return str(self.metadata["general.architecture"])

    def value(self, key: str, default: Any = None) -> Any:
        """Return an entry of the metadata whose key begins with the architecture, such as ``attention.key_length``."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def has_tensor(self, ending: str) -> bool:
        """Whether the name of a tensor ends so."""
        return any(tensor.name.endswith(ending) for tensor in self.tensors)


def require_gguf() -> None:
    """Check that the optional package is installed.

    Raises:
        ModelError: It is not.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("the package gguf is not installed: pip install 'alignpro[gguf]', or pip install gguf")


def check_quantization(name: str) -> None:
    """Check that matrices can be written so.

    Raises:
        ModelError: They cannot.
    """
    if name not in QUANTIZATIONS:
        raise ModelError(f"quantization {name!r}: use one of {', '.join(QUANTIZATIONS)}")


def read_header(path: Path) -> Header:
    """Read the header of a file and check that its tensors lie within the file and can be read.

    Raises:
        ModelError: There is no such file, it is no GGUF file or a damaged one, it is a part of a model, a tensor has a
            quantization that cannot be read, or the package ``gguf`` is not installed.
    """
    require_gguf()
    try:
        with path.open("rb") as file:
            header = _Parser(file, path).header()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    parts = header.metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise ModelError(f"{path}: is one of {parts} parts of a model; join them with llama-gguf-split --merge first")
    _check_tensors(header)
    return header


class _Parser:
    """Reads the values of a header in their order."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        self._size = path.stat().st_size

    def header(self) -> Header:
        if self._file.read(len(MAGIC)) != MAGIC:
            raise ModelError(f"{self._path}: is not a GGUF file: it does not begin with the letters GGUF")
        (version,) = self._numbers("I")
        if version not in VERSIONS:
            raise ModelError(f"{self._path}: is a GGUF file of version {version}; versions 2 and 3 can be read")
        tensors, entries = self._numbers("QQ")
        metadata = {}
        for _ in range(entries):
            key = self._string()
            metadata[key] = self._value(*self._numbers("I"))
        if not isinstance(metadata.get("general.architecture"), str):
            raise ModelError(f"{self._path}: does not name its architecture (general.architecture)")
        table = [self._entry() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise self._damaged(f"its alignment is {alignment!r}")
        start = -(-self._file.tell() // alignment) * alignment
        found = tuple(TensorEntry(name, shape, kind, start + offset) for name, shape, kind, offset in table)
        return Header(self._path, metadata, found, self._size)

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (dimensions,) = self._numbers("I")
        if dimensions > _MOST_DIMENSIONS:
            raise self._damaged(f"tensor {name} has {dimensions} dimensions")
        shape = self._numbers(f"{dimensions}Q")
        quantization, offset = self._numbers("IQ")
        return name, shape[::-1], quantization, offset

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self._numbers(_SCALARS[kind])[0]
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._damaged(f"a value has the unknown type {kind}")
        element, count = self._numbers("IQ")
        if element in _SCALARS:
            self._expect(count * struct.calcsize(f"<{_SCALARS[element]}"))
            return list(self._numbers(f"{count}{_SCALARS[element]}"))
        self._expect(count)  # an element takes more than a byte
        if depth == _DEEPEST_ARRAY:
            raise self._damaged(f"it has arrays within arrays, more than {_DEEPEST_ARRAY} deep")
        return [self._value(element, depth + 1) for _ in range(count)]

    def _string(self) -> str:
        (length,) = self._numbers("Q")
        try:
            return self._bytes(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged("a text is not UTF-8") from error

    def _numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self._bytes(struct.calcsize(f"<{form}")))

    def _bytes(self, count: int) -> bytes:
        self._expect(count)
        return self._file.read(count)

    def _expect(self, count: int) -> None:
        if count > self._size - self._file.tell():
            raise self._damaged(f"its header goes on after the end of the file, at byte {self._size:,}")

    def _damaged(self, reason: str) -> ModelError:
        return ModelError(f"{self._path}: is damaged or truncated: {reason}; download it again")


def _check_tensors(header: Header) -> None:
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    readable: dict[int, tuple[int, int]] = {}  # quantization → elements and bytes of a block
    for tensor in header.tensors:
        if tensor.quantization not in readable:
            if tensor.quantization not in [int(known) for known in GGMLQuantizationType]:
                raise ModelError(
                    f"{header.path}: tensor {tensor.name} has the quantization number {tensor.quantization}, which the "
                    "installed gguf does not know; try pip install --upgrade gguf"
                )
            kind = GGMLQuantizationType(tensor.quantization)
            block, size = readable[tensor.quantization] = GGML_QUANT_SIZES[kind]
            try:
                dequantize(np.zeros((1, size), np.uint8), kind)
            except NotImplementedError as error:
                raise ModelError(
                    f"{header.path}: tensor {tensor.name} is quantized as {kind.name}, which cannot be read; "
                    "take a file with another quantization"
                ) from error
        block, size = readable[tensor.quantization]
        end = tensor.offset + math.prod(tensor.shape) // block * size
        if end > header.size:
            raise ModelError(
                f"{header.path}: is damaged or truncated: tensor {tensor.name} ends at byte {end:,}, and the file has "
                f"{header.size:,}; download it again"
            )
