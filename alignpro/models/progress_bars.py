"""Progress bars of transformers ("Loading weights", "Writing model shards"), which are kept out of this package's output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hide the progress bars of transformers and its hub client inside; also a decorator. Afterwards they are as before."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging

    shown, hub_hidden = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
            if hub_hidden:
                disable_progress_bars()
