"""Where `alignpro model` reads and writes: checks of its arguments, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from alignpro.errors import ModelError
from alignpro.models.mixture_files import MIXTURE_FILE

DTYPES = ("float32", "bfloat16", "float16")
"""Of the weights of a converted model."""


def check_dtype(name: str) -> None:
    """Check the dtype of the weights to be written.

    Raises:
        ModelError: It is none of `DTYPES`.
    """
    if name not in DTYPES:
        raise ModelError(f"dtype {name!r}: use one of {', '.join(DTYPES)}")


def check_new_directory(out: Path, *, force: bool) -> None:
    """Check that a model's directory can be written without removing anything but a model.

    Raises:
        ModelError: There is a file, a directory that holds something else than a model, or a model without ``force``.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "config.json").is_file():
        raise ModelError(f"{out}: holds something else than a model; name another --out")
    if not force:
        raise ModelError(f"{out}: holds a model already; --force replaces it, or name another --out")


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
