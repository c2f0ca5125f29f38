"""Raise an exception at any instruction of some modules."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType, ModuleType
from typing import Any

Place = tuple[CodeType, int]
"""An instruction: its code and its offset there."""


@dataclass
class Tracer:
    """Sees each instruction of some modules; raises once at a chosen one."""

    modules: Sequence[ModuleType]
    error: type[BaseException] = Exception
    raise_at: Place | None = None
    passes: int = 0
    """How often the chosen instruction is let through first."""
    seen: dict[Place, int] = field(default_factory=dict)
    """Instruction → how often it was run."""

    def __post_init__(self) -> None:
        self._files = {module.__file__ for module in self.modules}

    def __call__(self, frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename not in self._files:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self.instruction

    def instruction(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "opcode":
            place = frame.f_code, frame.f_lasti
            self.seen[place] = self.seen.get(place, 0) + 1
            if place == self.raise_at and self.seen[place] > self.passes:
                self.raise_at = None
                raise self.error("a fault")
        return self.instruction


@contextmanager
def traced(tracer: Tracer) -> Iterator[None]:
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        yield
    finally:
        sys.settrace(before)
