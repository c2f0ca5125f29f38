"""Errors that reach the user as one message: what was wrong, where, and what to do."""

from __future__ import annotations

import signal
from pathlib import Path


class AlignProError(Exception):
    """A problem that the user can mend; the command line prints its message without a traceback."""


class ConfigError(AlignProError):
    """A bad configuration: an unknown key, a bad value, a missing file."""


class DataError(AlignProError):
    """Bad data: names the file and, where there is one, the line."""


class ModelError(AlignProError):
    """A model or tokenizer that cannot be used as asked."""


class RewardError(AlignProError):
    """A reward that raised, or returned something unusable; names the prompt."""


class CheckpointError(AlignProError):
    """A checkpoint that cannot be written or read."""


class TrainingError(AlignProError):
    """A run that cannot go on: a loss that is not finite, a run directory in use."""


class PeerError(AlignProError):
    """Another rank failed and has told why: this one ends in silence."""


class Interrupted(Exception):  # noqa: N818 - no error: the run was told to stop and its state is saved
    """A signal asked a run to stop; its state is saved.

    Args:
        signum: The signal.
        checkpoint: Where the state is.
    """

    def __init__(self, signum: int, checkpoint: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name}; state saved in {checkpoint}; continue with --resume"
        )
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """What a shell reports of a process that this signal ended."""
        return 128 + self.signum
