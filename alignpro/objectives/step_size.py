"""The length of an update, limited by the KL between the policy after it and the policy before.

AdamW divides a gradient by its size, so that the length of its step is the learning rate whatever the gradient is: neither a
small gradient nor clipping makes it shorter, and one that is too long by a small factor ends the training of a language
model. What a step does to the policy is KL(ρ_new ‖ ρ_old), which grows with the square of the step's length as long as that
is small. The rate is therefore multiplied by a factor f in (0, 1]:

    an update with KL > 2 T is shortened to f √(T / KL), and measured again, until its KL is at most 2 T
    the next step begins with f √(T / KL), but at most 1.25 f and at most 1

A rollout may be used for several updates, whose KL adds up: once one of them has been shortened, the step makes no more. If it
made i of n, all of them would have gone about n/i times as far, so the next step begins with f (i/n) √(T / KL), of the KL that
the i-th had before it was shortened.

Here T is the limit, times the square of the schedule's share of the learning rate, so that a decay shortens the steps of a
run whose rate is too high, too. A limit on the KL of a step is that of trust regions (Schulman et al., 2015, arXiv
1502.05477, section 6), which is reached by a line search there as well; adapting a rate by KL is that of PPO's penalty
(Schulman et al., 2017, arXiv 1707.06347, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

OVERSHOOT = 2.0
"""A step is shortened at once if its KL is more than this times what it should be; it is measured on a sample."""
GROWTH = 1.25
"""The factor grows by at most this from one step to the next."""
_SHORTEST = 0.1
"""The factor shrinks by at most this from one measurement to the next: far from the old policy, KL is not quadratic."""
_ROUNDING = 1e-4
"""Nats per sequence below which a measured KL says nothing."""


class StepSize:
    """The factor on the learning rate. Its state is part of checkpoints.

    Args:
        limit: What KL(ρ_new ‖ ρ_old) of a step at the full learning rate should be at most, in nats per sequence.
    """

    def __init__(self, limit: float) -> None:
        self.limit, self.factor = limit, 1.0

    def too_far(self, kl: float, share: float) -> bool:
        """Whether a step has gone too far.

        Args:
            kl: KL(ρ_new ‖ ρ_old) in nats per sequence; NaN or infinite if the policy is no distribution any more.
            share: The schedule's share of the learning rate, in [0, 1].
        """
        return not kl <= OVERSHOOT * self._target(share)

    def shortened(self, factor: float, kl: float, share: float) -> float:
        """A lower factor for an update that went too far with ``factor``; the others are those of `too_far`."""
        return factor * self._ratio(kl, share)

    def adapt(self, factor: float, kl: float, share: float, made: float = 1.0) -> None:
        """Set the factor for the next step from the KL of this one.

        Args:
            factor: With which the updates were made.
            kl: See `too_far`.
            share: Likewise.
            made: Share of the step's updates that this KL is of.
        """
        self.factor = min(1.0, factor * min(GROWTH, self._ratio(kl, share, made)))

    def _target(self, share: float) -> float:
        return max(self.limit * share**2, _ROUNDING)

    def _ratio(self, kl: float, share: float, made: float = 1.0) -> float:
        """√(T / KL), the factor on a step's length that would make its KL the intended one."""
        if not math.isfinite(kl):
            return _SHORTEST
        return max(_SHORTEST, made * math.sqrt(self._target(share) / max(kl, _ROUNDING)))

    def state_dict(self) -> dict[str, float]:
        """Return the state to checkpoint."""
        return {"factor": self.factor}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore a saved state."""
        self.factor = float(state["factor"])
