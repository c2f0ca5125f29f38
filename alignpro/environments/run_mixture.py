"""What a run directory holds as a mixture: its prompters, and the ρ_sft that they were trained from."""

from __future__ import annotations

from pathlib import Path

from alignpro.config import SFTConfig, TrainConfig
from alignpro.errors import ModelError
from alignpro.models.loading import is_activated_lora, is_adapter
from alignpro.models.mixture_files import Mixture, read_mixture


def run_mixture(run: Path, config: TrainConfig | SFTConfig) -> Mixture:
    """Return the mixture that `alignpro mix` wrote, or a run's prompter at weight 1, with its reference.

    Args:
        run: The run directory.
        config: Its configuration.

    Raises:
        ModelError: The run has no reference of its own: it is of `alignpro sft`, or it started from random weights.
    """
    model = run / "model"
    mixture = read_mixture(model)
    if mixture is not None:
        return mixture
    if not isinstance(config, TrainConfig):
        raise ModelError(
            f"run directory {run}: is a run of `alignpro sft`, whose prompter is a reference and has none: a strength and a "
            "mixture need runs of `alignpro train`"
        )
    return Mixture((str(model.absolute()),), (1.0,), _reference(run, config))


def _reference(run: Path, config: TrainConfig) -> str | None:
    """The path of ρ_sft; None if it is the trained model without its LoRA."""
    policy, model = config.policy, str(run / "model")
    if policy.reference not in (None, policy.path):
        return policy.reference
    if is_adapter(model) and not _was_continued(config):
        return None
    if policy.from_scratch:
        raise ModelError(
            f"run directory {run}: its prompter started from random weights, which were not kept: it has no reference to mix "
            "with"
        )
    return policy.path


def _was_continued(config: TrainConfig) -> bool:
    """Whether training went on with an adapter that was there before, which then is part of the reference."""
    policy = config.policy
    if not is_adapter(policy.path):
        return False
    return policy.adapter.kind in (None, "soft_prompt") or is_activated_lora(policy.path)
