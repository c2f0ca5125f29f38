"""Early warning of a policy that runs away: its KL to the reference rises, or its entropy falls, faster than training should.

What is compared is a few steps apart, because KL and entropy may end anywhere: an optimum of a small λ is far from the
reference, and almost deterministic. A policy that grows certain while its reward rises is one that learns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

STEPS = 5
"""Steps over which a change is measured."""
KL_RISE = 3.0
"""Nats per sequence by which the KL must have risen, and it must have doubled."""
ENTROPY_FALL = 0.1
"""Nats per token by which the entropy must have fallen, and to a fifth of what it was, while the reward did not rise."""
_REWARD = "reward/mean"
_REMEDY = (
    "read samples.jsonl; if the rewrites are no longer what they should be, stop, and start a new run with a lower "
    "optimizer.learning_rate, a lower objective.step_kl or a higher objective.kl.coef"
)


class RunawayWatch:
    """Watches the metrics of steps; what has been warned of once is not repeated until it has ended."""

    def __init__(self) -> None:
        self._kl: deque[float] = deque(maxlen=STEPS + 1)
        self._entropy: deque[float] = deque(maxlen=STEPS + 1)
        self._reward: deque[float] = deque(maxlen=STEPS + 1)
        self.notes: tuple[str, ...] = ()
        """What is happening now, in a few words, for the progress line."""

    def __call__(self, metrics: Mapping[str, float]) -> list[str]:
        """Return the warnings that a step gives rise to, a line each.

        Args:
            metrics: Of the step; without ``kl`` and ``entropy`` there is nothing to watch.
        """
        before, self.notes, warnings = self.notes, (), list[str]()
        if "entropy" in metrics:
            self._reward.append(metrics.get(_REWARD, 0.0))
        for name, window in (("kl", self._kl), ("entropy", self._entropy)):
            if name not in metrics:
                continue
            window.append(metrics[name])
            since = _rises(window) if name == "kl" else _falls(window, self._reward)
            if since is None:
                continue
            note = f"{name} {'RISES' if name == 'kl' else 'COLLAPSES'}"
            self.notes += (note,)
            if note not in before:
                unit = "nats per sequence" if name == "kl" else "nats per token"
                steps = len(window) - 1
                warnings.append(f"{name} went from {since:.2g} to {window[-1]:.2g} {unit} in {steps} steps: {_REMEDY}")
        return warnings


def _rises(kl: deque[float]) -> float | None:
    """The lowest KL of the window if the last one is too far above it."""
    least = min(kl)
    return least if kl[-1] > max(2 * least, least + KL_RISE) else None


def _falls(entropy: deque[float], reward: deque[float]) -> float | None:
    """The highest entropy of the window if the last one is too far below it, and the reward is no higher than it was there."""
    most = max(entropy)
    fell = entropy[-1] < min(most / 5, most - ENTROPY_FALL)
    return most if fell and reward[-1] <= reward[entropy.index(most)] else None
