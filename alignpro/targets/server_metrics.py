"""What asking a server took, as metrics of a step; and whether the model behind it stayed the same."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from alignpro.endpoints.types import Answer
from alignpro.targets.connection import Connection

logger = logging.getLogger(__name__)

AWAITED = "seconds/target"
"""A part of the rollout's seconds."""
CONCURRENCY = "endpoint/concurrency"
SHOWN = ("endpoint/usd", "endpoint/throttled", CONCURRENCY)
"""The metrics that the progress bar shows."""


OF_REWARDS = "reward"
"""The name of all servers that rewards ask, as in ``endpoint/usd/reward``."""


def added(*metrics: Mapping[str, float]) -> dict[str, float]:
    """The sums of metrics by name."""
    return {
        name: sum(each.get(name, 0.0) for each in metrics) for name in {key: None for each in metrics for key in each}
    }


def reward_metrics(asked: Mapping[str, float]) -> dict[str, float]:
    """What the servers of rewards were asked, as metrics of a step: in the sums over all servers, and by themselves."""
    total = {f"endpoint/{name}": value for name, value in asked.items()}
    return total | {f"{name}/{OF_REWARDS}": value for name, value in total.items()}


class ServerMetrics:
    """Counts for one target.

    Args:
        connection: The server.
        name: Of model and server, in messages.
    """

    def __init__(self, connection: Connection, name: str) -> None:
        self._connection, self._name = connection, name
        self._before = connection.asked()
        self._origin: list[str] | None = None
        self._resumed = False
        self._answers = {"changed": 0, "filtered": 0, "overflow": 0, "all": 0}
        self.seconds = 0.0
        """How long answers were awaited since the last metrics, without the time in which rewrites were sampled."""
        self.change: str | None = None
        """Which other model began to answer, if one did."""

    def add(self, answers: Sequence[Answer]) -> None:
        """Count answers, and note which model gave them."""
        for answer in answers:
            self._answers["all"] += 1
            if answer.finish_reason in ("filtered", "overflow"):
                self._answers[answer.finish_reason] += 1
            origin = [answer.model, answer.fingerprint]
            if origin == ["", ""]:
                continue
            if self._origin is None:
                self._origin = origin
            elif origin != self._origin:
                self._answers["changed"] += 1
                if self.change is None:
                    self.change = f"{self._name} is now {_describe(origin)}, and was {_describe(self._origin)}"
                    if self._resumed:  # otherwise the endpoint has said so
                        logger.warning("%s: the reward is not the same before and after", self.change)

    def __call__(self) -> dict[str, float]:
        """Return the metrics since the last call.

        ``target/…`` are shares of the responses; ``endpoint/…`` says what was asked of the server.
        """
        now, before = self._connection.asked(), self._before
        count = max(1, self._answers["all"])
        metrics = {
            AWAITED: self.seconds,
            "target/filtered": self._answers["filtered"] / count,
            "target/overflow": self._answers["overflow"] / count,
            "target/changed": self._answers["changed"] / count,
            **{f"endpoint/{name}": value for name, value in now.since(before).items()},
        }
        self._before, self.seconds = now, 0.0
        self._answers = dict.fromkeys(self._answers, 0)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return which model has answered."""
        return {"answered_by": self._origin}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore which model has answered."""
        self._origin = state.get("answered_by")
        self._resumed = self._origin is not None


def _describe(origin: Sequence[str]) -> str:
    return " with fingerprint ".join(filter(None, origin))
