"""Errors that reach the user as one message: what was wrong, where, and what to do."""

from __future__ import annotations


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
