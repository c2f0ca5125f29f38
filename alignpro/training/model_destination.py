"""Where `alignpro model` reads and writes: checks of its arguments, before anything is loaded."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path

from alignpro.errors import ModelError
from alignpro.models.mixture_files import MIXTURE_FILE

DTYPES = ("float32", "bfloat16", "float16")
"""Of the weights of a converted model."""

_FILES_OF_MODELS = (
    "*config.json",
    "*.safetensors",
    "*.index.json",
    "pytorch_model*.bin",
    "tokenizer.*",
    "*.tiktoken",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "additional_chat_templates",
    "README.md",
    "LICEN[SC]E*",
    ".gitattributes",
)
"""Names in the directory of a model as it is published, or as these commands write it."""


def check_dtype(name: str) -> None:
    """Check the dtype of the weights to be written.

    Raises:
        ModelError: It is none of `DTYPES`.
    """
    if name not in DTYPES:
        raise ModelError(f"dtype {name!r}: use one of {', '.join(DTYPES)}")


def check_new_directory(out: Path, *, force: bool) -> Path:
    """Check that a model's directory can be written without removing anything but a model.

    Returns:
        The directory itself, if ``out`` is a link to it.

    Raises:
        ModelError: There is a file, the working directory, a directory that holds something else than a model, or a model
            without ``force``.
    """
    directory = out.resolve()
    if directory == Path.cwd():
        raise ModelError(f"{out}: is the working directory, which would be replaced; name another --out")
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return directory
    if not _is_model(directory / "config.json"):
        raise ModelError(f"{out}: holds something else than a model; name another --out")
    if not force:
        raise ModelError(f"{out}: holds a model already; --force replaces it, or name another --out")
    entries = sorted(each.name for each in directory.iterdir())
    if others := [name for name in entries if not any(fnmatchcase(name, pattern) for pattern in _FILES_OF_MODELS)]:
        raise ModelError(
            f"{out}: holds more than a model ({', '.join(others[:5])}), which --force would remove; move that away, or name "
            "another --out"
        )
    return directory


def _is_model(config: Path) -> bool:
    """Whether a file is the configuration of a model of transformers."""
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and bool({"model_type", "architectures"} & content.keys())


def check_new_file(path: Path, *, force: bool) -> None:
    """Check that a file can be written.

    Raises:
        ModelError: Its directory does not exist, it is a directory, or it exists already and ``force`` is not given.
    """
    if path.is_dir():
        raise ModelError(f"{path}: is a directory; name a file, such as {path / 'model.gguf'}")
    if not path.parent.is_dir():
        raise ModelError(f"{path}: its directory {path.parent} does not exist; create it first")
    if path.exists() and not force:
        raise ModelError(f"{path}: exists already; --force replaces it, or name another file")


def model_of(run: Path) -> Path:
    """Return the directory of the model of a run, or a directory that is a model itself.

    Raises:
        ModelError: There is no model.
    """
    for directory in (run / "model", run):
        if any((directory / name).is_file() for name in ("config.json", "adapter_config.json", MIXTURE_FILE)):
            return directory
    reason = "has no model yet" if run.is_dir() else "does not exist"
    raise ModelError(f"{run}: {reason}; name the directory of a finished run (with model/ in it) or of a model")
