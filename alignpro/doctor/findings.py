"""What a probe finds, and how the output of programs becomes a line."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

Status: TypeAlias = Literal["ok", "off", "problem"]


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    section: str
    """The heading under which it is printed: ``Machine``, ``Packages``, ``Devices``, …"""
    name: str
    status: Status
    """``ok``: works. ``off``: optional and not available. ``problem``: required but missing, or present but broken."""
    detail: str
    """Version, size or reason."""
    remedy: str = ""
    """What to do about it: a command if there is one."""


def program_output(program: str, *arguments: str) -> str | None:
    """Return what a program prints, or None if it fails, hangs or cannot be started."""
    try:
        done = subprocess.run(
            [program, *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout


def first_error(reason: str) -> str:
    """Shorten a reason to one line: for a failed command, the first error of its output, else the last line."""
    command, *rest = [line.strip() for line in reason.splitlines() if line.strip()]
    if not rest:
        return command
    output = [line for line in rest if line != "failed with"]
    error = next((line for line in output if re.search(r"\berror\b", line, re.IGNORECASE)), None)
    return f"{Path(command.split()[0]).name} failed: {error or (output or ['no output'])[-1]}"
