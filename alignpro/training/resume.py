"""What `--resume` checks: a run continues only if nothing that its results depend on has changed.

Before any model is loaded: the configuration, the step to continue from, and how the run was started. Once data and models
are loaded: the training data, the reference, and the names and shapes of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from alignpro.config import RunConfig, RunSection, load_config
from alignpro.config.endpoints import changes_no_answer
from alignpro.distributed.ranks import Ranks
from alignpro.errors import CheckpointError, ConfigError, TrainingError
from alignpro.models.loading import is_adapter
from alignpro.policy.policy import Policy
from alignpro.training.checkpoint import CheckpointStore
from alignpro.training.recorded_holdout import keep_holdout
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

    def check_ranks(self) -> None:
        """Check that all ranks have loaded the same data and reference, before these are sharded.

        Raises:
            DataError: A rank has other prompts.
            ModelError: A rank has another policy or reference.
        """
        if self._ranks.group is not None:
            self._stream.check_ranks(self._ranks)
            self._policy.check_ranks(self._ranks)

    def fingerprints(self) -> dict[str, str]:
        """Return what is saved with a checkpoint."""
        reference = self._ranks.on_rank_zero(self._policy.reference_id)
        return {"reference": reference, "data": self._stream.fingerprint}

    def check(self, checkpoint: Path, saved: Mapping[str, Any]) -> None:
        """Compare with what a checkpoint saved.

        Raises:
            CheckpointError: The reference or the data is not that with which the run started.
        """
        reference = self._ranks.on_rank_zero(self._policy.reference_id)
        with self._ranks.raise_together():
            check_data(saved["data"], self._stream.fingerprint)
            check_reference(checkpoint, saved["reference"], reference)


def _may_change(key: str, before: Any) -> bool:
    """Whether a run may continue with another value of a key, because its results so far do not depend on it."""
    section, _, name = key.partition(".")
    if section == "run":
        return name != "seed"
    if key == "deepspeed.timeout_seconds" or changes_no_answer(key):
        return True
    if section == "target" and name.rpartition(".")[2] in ("filtered_reward", "overflow_reward"):
        return before is None  # without the value such an answer ended the run
    return False


def check_configuration(saved: Path, config: RunSection) -> None:
    """Check that the configuration is that of the run; see `_may_change` for what may be another.

    Args:
        saved: The run's ``config.yaml``.
        config: The configuration to continue with.

    Raises:
        TrainingError: It differs, or the run was made by another command.
    """
    directory = saved.parent
    try:
        recorded = load_config(type(config), [str(saved)])
        data = keep_holdout(recorded.data, [directory])
        before = _as_configured(recorded.model_copy(update={"data": data}))
    except ConfigError as error:
        raise TrainingError(
            f"run directory {directory}: the run in it is not one of this command: {error}; name another run.out"
        ) from error
    changed = [
        f"{key} (was {old!r}, is {new!r})"
        for key, old, new in differences(before, _as_configured(config))
        if not _may_change(key, old)
    ]
    if changed:
        raise TrainingError(
            f"run directory {directory}: the configuration differs from that of the run to resume: "
            f"{', '.join(changed)}; use the values in {saved}, or name another run.out"
        )


def find_start(
    config: RunConfig, checkpoints: CheckpointStore, exported_step: int | None, from_step: int | None
) -> int | None:
    """Find the step to continue from; None if the run has finished.

    Args:
        config: The run's directory and its number of steps.
        checkpoints: The run's checkpoints.
        exported_step: The step of the model in ``model/``; None if there is none.
        from_step: The step that the user names; by default that of the newest intact checkpoint.

    Raises:
        CheckpointError: There is no intact checkpoint to continue from.
        TrainingError: The run is beyond its last step.
    """
    if from_step is not None:
        checkpoints.require(from_step)
    elif exported_step == config.steps:
        return None
    step = checkpoints.latest() if from_step is None else from_step
    if step is None and exported_step is not None:
        raise CheckpointError(f"{checkpoints.directory}: no checkpoint, although the run has made its model/")
    if step is not None and step > config.steps:
        raise TrainingError(
            f"run directory {config.out}: is at step {step}, beyond run.steps={config.steps}; raise run.steps, or "
            "go back with --at"
        )
    return step or 0


def check_launcher(checkpoint: Path, saved: int | None, ranks: int | None) -> None:
    """Check that a run started by the launcher continues under it, on any number of ranks, and another without it.

    Args:
        checkpoint: The checkpoint's directory.
        saved: Number of ranks that wrote it; None without a launcher.
        ranks: Number of ranks that continue; None without a launcher.

    Raises:
        CheckpointError: One was started by the launcher and the other was not.
    """
    if (saved is None) != (ranks is None):
        how = "without a launcher" if saved is None else "under the deepspeed launcher"
        raise CheckpointError(f"checkpoint {checkpoint}: was made {how}: resume it the same way")


def check_data(saved: str, fingerprint: str) -> None:
    """Check that the training data is that of the run, by its fingerprint.

    Raises:
        CheckpointError: It is not.
    """
    if saved != fingerprint:
        raise CheckpointError(
            "the training data is not what this run started with: restore data.source, or start a new run in another "
            "run.out"
        )


def check_reference(checkpoint: Path, saved: str, reference: str) -> None:
    """Check that the reference model is that of the run, by a hash of its weights.

    Raises:
        CheckpointError: It is not.
    """
    if saved != reference:
        raise CheckpointError(
            f"checkpoint {checkpoint}: the reference model has changed since this run started; its KL would be to "
            "another model: restore it, or start a new run"
        )


def check_weights(checkpoint: Path, saved: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Check that the weights of a checkpoint have the names and shapes of the model's.

    Raises:
        CheckpointError: The checkpoint belongs to another model.
    """
    if {name: weight.shape for name, weight in saved.items()} != {name: w.shape for name, w in weights.items()}:
        raise CheckpointError(
            f"checkpoint {checkpoint}: its weights are not those of this model: the model's files have changed since "
            "the run started; restore them, or start a new run in another run.out"
        )


def _as_configured(config: RunSection) -> dict[str, Any]:
    """The values of a configuration, with the kind of training that an unset ``policy.adapter.kind`` stands for."""
    values = config.model_dump(mode="json")
    if (policy := values.get("policy")) and policy["adapter"]["kind"] is None and not is_adapter(policy["path"]):
        policy["adapter"]["kind"] = "full"
    return values


def differences(before: Any, after: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """List (dotted key, before, after) of the leaves in which two nested mappings differ, in key order."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            difference
            for key in sorted(before.keys() | after.keys())
            for difference in differences(before.get(key), after.get(key), f"{prefix}{key}.")
        ]
    return [(prefix.rstrip("."), before, after)] if before != after else []
