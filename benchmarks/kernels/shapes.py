"""The shapes of the heads: those of released models, or any D×V."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A language model's head."""

    name: str
    hidden: int
    """D"""
    vocabulary: int
    """V"""
    softcap: float | None = None


SHAPES = (
    Shape("qwen2.5-0.5b", 896, 151936),
    Shape("qwen2.5-1.5b", 1536, 151936),
    Shape("phi-3.5-mini", 3072, 32064),
    Shape("llama-3.1-8b", 4096, 128256),
    Shape("gemma-2-2b", 2304, 256000, softcap=30.0),
)
QUICK = Shape("64x1000", 64, 1000)

# On a CPU, the number of rows is chosen for about this many multiply-adds per product: under a second on two cores.
CPU_PRODUCT = 3.5e10
GPU_ROWS = (1024, 4096, 16384)


def parse_shape(text: str) -> tuple[Shape, ...]:
    """Parse a name, ``all``, or ``DxV`` with an optional soft-cap, such as ``2304x256000:30``.

    Raises:
        ValueError: The text is none of these.
    """
    if text == "all":
        return SHAPES
    if named := [shape for shape in SHAPES if shape.name == text.lower()]:
        return tuple(named)
    if match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?::(\d+(?:\.\d+)?))?", text):
        hidden, vocabulary, softcap = match.groups()
        return (Shape(text, int(hidden), int(vocabulary), float(softcap) if softcap else None),)
    raise ValueError(
        f"shape {text!r}: use DxV, such as 896x151936, 'all' or one of {', '.join(s.name for s in SHAPES)}"
    )


def default_rows(shape: Shape, device: str) -> tuple[int, ...]:
    """Return the default numbers of tokens: several on a GPU; on a CPU one power of two between 32 and 1024."""
    if device != "cpu":
        return GPU_ROWS
    limit = CPU_PRODUCT / (shape.hidden * shape.vocabulary)
    rows = 32
    while rows * 2 <= min(limit, 1024):
        rows *= 2
    return (rows,)
