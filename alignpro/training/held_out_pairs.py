"""How a saved reward model ranks held-out pairs; written beside its weights, and read where it is used as a reward."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from alignpro.errors import ModelError

_FILE = "held_out_pairs.json"


@dataclass(frozen=True)
class HeldOutPairs:
    """Accuracies on the held-out pairs of the model's own training. Ends of intervals are None if they cannot be estimated."""

    pairs: int
    accuracy: float
    accuracy_low: float | None
    accuracy_high: float | None
    above_length: float
    """The accuracy less that of a rule that knows the lengths of the responses alone."""
    above_length_low: float | None
    above_length_high: float | None

    def write(self, directory: Path) -> None:
        """Write it beside the weights of the model."""
        (directory / _FILE).write_text(json.dumps(asdict(self), indent=1) + "\n")


def require_better_than_length(model: str) -> None:
    """Refuse a reward model of which it is not shown that it knows more of a response than its length.

    Args:
        model: Path of the saved model.

    Raises:
        ModelError: The interval of its accuracy above that of length contains zero, or the model has no record of it.
    """
    try:
        found = HeldOutPairs(**json.loads((Path(model) / _FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"reward model {model}: must_beat_length needs the file {_FILE} beside its weights, which `alignpro reward` writes "
            f"if it has held-out pairs ({type(error).__name__})"
        ) from error
    if found.above_length_low is None or found.above_length_low <= 0:
        interval = (
            "no interval"
            if found.above_length_low is None
            else f"[{found.above_length_low:+.3f}, {found.above_length_high:+.3f}]"
        )
        raise ModelError(
            f"reward model {model}: ranks {found.pairs} held-out pairs with an accuracy of {found.accuracy:.3f}, which is "
            f"{found.above_length:+.3f} ({interval}) above that of the responses' lengths alone: what it rewards may be length. "
            "Train it longer or on more pairs, hold out more of them, or set must_beat_length: false"
        )
