"""What a resumed run checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignpro.distributed.ranks import Ranks
from alignpro.errors import CheckpointError
from alignpro.policy.policy import Policy
from alignpro.training.stream import PromptStream


class RunInputs:
    """The reference and the data of a run, which a resumed run must find unchanged; its methods are collectives.

    Args:
        ranks: All ranks.
        policy: The policy, with its reference.
        stream: The prompts.
    """

    def __init__(self, ranks: Ranks, policy: Policy, stream: PromptStream) -> None:
        self._ranks, self._policy, self._stream = ranks, policy, stream

    def fingerprints(self) -> dict[str, str]:
        """Return what is saved with a checkpoint."""
        reference = self._ranks.on_rank_zero(self._policy.reference_id)
        return {"reference": reference, "data": self._stream.fingerprint}

    def check(self, directory: Path, state: dict[str, Any]) -> None:
        """Compare with what a checkpoint saved.

        Raises:
            CheckpointError: The reference or the data is not that with which the run started.
        """
        reference = self._ranks.on_rank_zero(self._policy.reference_id)
        with self._ranks.raise_together():
            self._stream.check(state["data"])
            if state["reference"] != reference:
                raise CheckpointError(
                    f"checkpoint {directory}: the reference model has changed since this run started; its KL would be to "
                    "another model: restore it, or start a new run"
                )
