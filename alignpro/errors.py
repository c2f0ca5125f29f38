"""Errors that reach the user as one message: what was wrong, where, and what to do."""

from __future__ import annotations

import signal
from pathlib import Path


class AlignProError(Exception):
    """A problem that the user can fix; the command line prints its message without a traceback."""


class ConfigError(AlignProError):
    """An invalid configuration: an unknown key, an invalid value, a missing file."""


class DataError(AlignProError):
    """Invalid data; the message names the file and, if there is one, the line."""


class ModelError(AlignProError):
    """A model or tokenizer that cannot be used as requested."""


class RewardError(AlignProError):
    """A reward that raised an exception or returned something unusable; the message names the prompt."""


class EndpointError(AlignProError):
    """A server that cannot be used, or that has failed for good; the message names its URL and what it said."""


class BudgetError(AlignProError):
    """The next request could exceed the budget; the message says what was spent and what the next step would cost."""


class LedgerError(AlignProError):
    """A ledger that cannot be read or written: in use, damaged, of a newer version; the message names the file."""


class CheckpointError(AlignProError):
    """A checkpoint that cannot be written or read."""


class TrainingError(AlignProError):
    """A run that cannot continue: a loss that is not finite, a run directory in use."""


class PeerError(AlignProError):
    """Another rank failed and has reported why; this one exits without a message."""


class Interrupted(Exception):  # noqa: N818 - not an error: the run was asked to stop and its state is saved
    """A signal asked a run to stop; its state is saved.

    Args:
        signum: The signal.
        checkpoint: The directory that holds the state.
        what_next: How to go on.
    """

    def __init__(self, signum: int, checkpoint: Path, what_next: str = "continue with --resume") -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; state saved in {checkpoint}; {what_next}")
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """The exit status that a shell reports for a process killed by this signal."""
        return 128 + self.signum
