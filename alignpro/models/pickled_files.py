"""What a pickle written by `torch.save` would import when it is read: a pickle is a program, and may run any code."""

from __future__ import annotations

import pickle
from collections.abc import Collection
from pathlib import Path

import torch


def foreign_globals(file: Path, allowed: Collection[str] = ()) -> list[str]:
    """The classes and functions that a pickle names beyond those of tensors and plain Python data, sorted.

    The pickle is disassembled, not run.

    Args:
        file: The file.
        allowed: Further names that may occur, as ``module.name``.

    Raises:
        ValueError: It has another form than `torch.save` gives it, so nothing can be said about it.
    """
    try:
        return sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(str(file))) - set(allowed))
    except (ValueError, RuntimeError, pickle.UnpicklingError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"it is not a file of torch.save: {error}") from error


def describe_refusal(directory: str, error: Exception) -> str:
    """Why the pickled weights of a model have been refused: the file that is to blame, and what to do.

    Args:
        directory: The model's directory, or its name on the hub.
        error: What torch raised.
    """
    remedy = "only weights in safetensors, or pickles of plain tensors, are read: convert it where it is trusted"
    for file in sorted(each for kind in ("*.bin", "*.pt", "*.pth") for each in Path(directory).glob(kind)):
        try:
            if names := foreign_globals(file):
                return f"{file} could run code when it is read (it names {', '.join(names[:3])}); {remedy}"
        except ValueError as problem:
            return f"{file} cannot be read: {problem}; {remedy}"
    return f"its pickled weights cannot be read ({next(iter(str(error).splitlines()), '')}); {remedy}"
