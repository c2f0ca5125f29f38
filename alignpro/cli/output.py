"""What the command line writes to standard error, and what libraries do not."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TextIO

from alignpro.distributed.launcher import launched, launched_rank


class StandardErrorHandler(logging.StreamHandler[TextIO]):
    """Writes to the current ``sys.stderr``: a progress bar replaces it in order to stay below the messages."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def show_warnings_only() -> None:
    """Show no more than warnings on standard error from here on."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, StandardErrorHandler):
            handler.setLevel(logging.WARNING)


def quiet_libraries() -> None:
    """Log this package's messages to standard error, and only errors of the libraries."""
    level = logging.INFO if launched_rank() == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", handlers=[StandardErrorHandler()])
    for name in (
        "httpx",
        "transformers",
        "gguf",
        "datasets",
        "filelock",
        "fsspec",
        "matplotlib",
        "urllib3",
        "DeepSpeed",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not launched():
        # Libraries import DeepSpeed where it is installed, and unless told otherwise it prints the device that it detects
        # to standard output. Without a launcher DeepSpeed is not used.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning)
