"""The runs that `alignpro mix` mixes: they must share tokenizer, inputs, ρ_sft and λ."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignpro.config import ModelConfig, TrainConfig
from alignpro.environments.run_mixture import run_mixture
from alignpro.environments.trained_prompter import read_run
from alignpro.errors import ConfigError, ModelError
from alignpro.models.loading import load_language_model
from alignpro.models.mixture_files import Mixture
from alignpro.policy.reference import fingerprint
from alignpro.prompting.tokenization import load_tokenizer


@dataclass(frozen=True)
class MixedRun:
    """A run of `alignpro train`."""

    directory: Path
    config: TrainConfig
    mixture: Mixture
    """Its prompter at weight 1, and its reference."""

    @property
    def model_config(self) -> ModelConfig:
        """How the trained prompter is loaded."""
        model = {
            key: value for key, value in self.config.policy.model_dump().items() if key in ModelConfig.model_fields
        }
        saved = {"path": self.mixture.prompters[0], "tokenizer": None, "chat_template": None}
        return ModelConfig.model_validate(model | saved)

    @property
    def reference_path(self) -> str:
        """Where training started from: ρ_sft, or what it has without the trained LoRA."""
        path = self.mixture.reference or self.config.policy.path
        return str(Path(path).absolute()) if Path(path).is_dir() else path


def read_runs(directories: Sequence[Path], *, trust_remote_code: bool = False) -> list[MixedRun]:
    """Read runs, and check that they may be mixed.

    Raises:
        ConfigError: There are fewer than two, or they differ in what they must share; the message names runs and key.
        ModelError: One is not a finished run of `alignpro train`, or needs ``trust_remote_code``.
    """
    if len(directories) < 2:
        raise ConfigError(f"mix: {len(directories)} run: give at least two run directories of `alignpro train`")
    runs = []
    for directory in directories:
        config = read_run(directory)
        mixture = run_mixture(directory, config)
        if not isinstance(config, TrainConfig) or len(mixture.prompters) > 1:
            raise ModelError(f"run directory {directory}: is a mixture already: mix the runs that it was made of")
        if config.memory is not None:
            raise ConfigError(
                f"run directory {directory}: its prompter was trained with a `memory` of its own: prompters that see different "
                "inputs cannot be mixed"
            )
        if config.policy.trust_remote_code and not trust_remote_code:
            raise ModelError(
                f"run directory {directory}: its config.yaml lets code run that comes with a model "
                "(policy.trust_remote_code); if you trust it, repeat that: --trust-remote-code"
            )
        runs.append(MixedRun(directory, config, mixture))
    _check_alike(runs)
    return runs


def check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Check the weights of the mixture, or make them equal.

    Raises:
        ConfigError: They are not as many as runs, or not on the simplex.
    """
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise ConfigError(f"mix: {len(weights)} weights for {count} runs: give one for each, in the order of the runs")
    if not all(math.isfinite(each) and each >= 0 for each in weights) or abs(sum(weights) - 1) > 1e-6:
        raise ConfigError(
            f"mix: weights {', '.join(f'{each:g}' for each in weights)}: expected numbers from 0, of sum 1"
        )
    return [each / sum(weights) for each in weights]


def _check_alike(runs: Sequence[MixedRun]) -> None:
    first = runs[0]
    for run in runs:
        kl = run.config.objective.kl
        if kl.target is not None or kl.coef == 0:
            key = f"coef={kl.coef:g}" if kl.coef == 0 else f"target={kl.target:g}"
            raise ConfigError(
                f"{run.directory}: objective.kl.{key}: prompters are mixed by their λ, which must be fixed and above 0"
            )
    for name, value in _SHARED.items():
        of_first = value(first)
        for run in runs[1:]:
            if (own := value(run)) != of_first:
                raise ConfigError(
                    f"{run.directory}: {name}={own}, but {first.directory} has {of_first}: a mixture needs runs that differ in "
                    "their rewards alone"
                )
    _check_tokenizers(runs)
    _check_references(runs)


_SHARED: dict[str, Callable[[MixedRun], Any]] = {
    "objective.kl.coef": lambda run: run.config.objective.kl.coef,
    "prompting.meta_prompt": lambda run: run.config.prompting.meta_prompt,
    "prompting.form": lambda run: run.config.prompting.form,
    "rollout.rewrite.temperature": lambda run: run.config.rollout.rewrite.temperature,
}
"""Key of the configuration → its value, which the log ratio log (ρ_k/ρ_sft)(x'|x) depends on."""


def _check_tokenizers(runs: Sequence[MixedRun]) -> None:
    first, *others = (load_tokenizer(run.model_config) for run in runs)
    for run, other in zip(runs[1:], others, strict=True):
        where = f"{run.directory}/model has another {{}} than {runs[0].directory}/model: prompters that are mixed need the same"
        if other.get_vocab() != first.get_vocab():
            raise ConfigError(where.format("tokenizer"))
        if other.chat_template != first.chat_template:
            raise ConfigError(where.format("chat template"))


def _check_references(runs: Sequence[MixedRun]) -> None:
    """Compare where the runs started from: by path, and by all weights if the paths differ."""
    first = runs[0]
    prints: dict[str, str] = {}

    def weights(run: MixedRun) -> str:
        path = run.reference_path
        if path not in prints:
            prints[path] = fingerprint(
                load_language_model(run.model_config.model_copy(update={"path": path})).named_parameters()
            )
        return prints[path]

    for run in runs[1:]:
        if (run.mixture.reference is None) != (first.mixture.reference is None):
            kinds = [
                "the model below its LoRA" if each.mixture.reference is None else each.reference_path
                for each in (run, first)
            ]
            raise ConfigError(
                f"{run.directory}: its reference is {kinds[0]}, that of {first.directory} is {kinds[1]}: mixed prompters need "
                "the same"
            )
        if run.reference_path != first.reference_path and weights(run) != weights(first):
            raise ConfigError(
                f"{run.directory}: its reference is {run.reference_path}, that of {first.directory} is {first.reference_path}, "
                "with other weights: mixed prompters need the same"
            )
