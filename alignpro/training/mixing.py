"""`alignpro mix`: finished runs of `alignpro train` become one prompter, as a run directory that rewrites and is evaluated.

The runs must have been trained from one ρ_sft, on the same inputs, with the same λ: only then is their log-linear mixture
optimal for the weighted sum of their rewards (`alignpro.theory.mixtures`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from alignpro.config import dump_config
from alignpro.engine import Completion
from alignpro.environments.exact_mixture import group_logprobs
from alignpro.errors import ConfigError, TrainingError
from alignpro.models.garbage_collection import paused_collection
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import load_language_model
from alignpro.models.mixed_model import check_mixable, mix_models, share_equal_weights
from alignpro.models.mixture_files import Mixture
from alignpro.models.progress_bars import without_progress_bars
from alignpro.prompting.tokenization import load_tokenizer
from alignpro.training.durability import disk_errors, replace_directory, replace_text
from alignpro.training.joined_adapters import join_adapters, require_adapters
from alignpro.training.mixed_runs import MixedRun, check_weights, read_runs
from alignpro.training.mixture_weights import MixtureSamples, sample_rewrites
from alignpro.versions import versions

REMEDY = "free some space, or name another --out"
SUMMARY_FILE = "mixture.json"
"""In the run directory: the weights, how they were found and what was measured."""


@without_progress_bars()
@paused_collection()
def mix(
    directories: Sequence[Path],
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    max_min: bool = False,
    one_model: bool = False,
    prompts: int = 32,
    rewrites: int = 16,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Mix finished runs, and measure the mixture on some of their training prompts.

    Args:
        directories: At least two run directories of `alignpro train`.
        out: The directory to write: ``config.yaml``, ``model/`` and `SUMMARY_FILE`.
        weights: One for each run, of sum 1; by default equal.
        max_min: Whether to find the weights of the max-min mixture instead, by mirror descent on rewrites of ρ_sft.
        one_model: Whether to write a single LoRA in place of the mixture of logits, which it approximates.
        prompts: Number of training prompts, of all runs together, that ρ_sft and the mixture rewrite.
        rewrites: Rewrites of each.
        seed: Of all samples.
        trust_remote_code: Whether Python code that comes with the models may run, if the runs' configurations say so.

    Returns:
        The content of `SUMMARY_FILE`.

    Raises:
        ConfigError: The weights are none, or runs differ in what they must share; the message names runs and keys.
        ModelError: A run is not a finished one of `alignpro train`, or its model cannot be mixed.
        TrainingError: ``out`` holds something already, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrainingError(f"{out}: already exists; choose another --out, or remove it")
    if max_min and weights is not None:
        raise ConfigError("mix: --weights gives what --max-min finds: leave one of them out")
    runs = read_runs(directories, trust_remote_code=trust_remote_code)
    chosen = check_weights(weights, len(runs))
    if one_model:
        require_adapters([run.mixture.prompters[0] for run in runs])
    models, reference = load_mixed(runs)
    parts = [model for model, weight in zip(models, chosen, strict=True) if max_min or weight != 0]
    if len(parts) > 1:
        check_mixable(str(out), parts)
    samples = sample_rewrites([run.config for run in runs], models, reference, prompts, rewrites, seed)
    if max_min:
        chosen = samples.max_min_weights(seed)
    summary: dict[str, Any] = {
        "runs": [str(run.directory) for run in runs],
        "weights": chosen,
        "weights_by": "max_min" if max_min else "given" if weights is not None else "equal",
        "kl_coef": runs[0].config.objective.kl.coef,
        "seed": seed,
        **samples.estimates(chosen),
    }
    summary["gap_to_whole_rewrites"], drawn = samples.gap(mix_models(models, chosen, reference, str(out)))
    _write_model(runs, chosen, out / "model", one_model=one_model)
    if one_model:
        summary["gap_of_one_model"] = _gap_of_one_model(samples, drawn, runs[0], out / "model")
    summary["versions"] = versions()
    with disk_errors(str(out), REMEDY, TrainingError):
        replace_text(out / SUMMARY_FILE, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        replace_text(out / "config.yaml", _config_text(runs, chosen, out))  # last: it makes a run directory of it
    return summary


def load_mixed(runs: Sequence[MixedRun]) -> tuple[list[LanguageModel], LanguageModel]:
    """The prompters of runs and their ρ_sft, frozen; equal weights are held once.

    Raises:
        ModelError: A model cannot be loaded.
    """
    models = [load_language_model(run.model_config) for run in runs]
    path = runs[0].mixture.reference
    if path is None:
        share_equal_weights(models)
        return models, models[0].without_adapter()
    reference = load_language_model(runs[0].model_config.model_copy(update={"path": path}))
    share_equal_weights([reference, *models])
    return models, reference


def _write_model(runs: Sequence[MixedRun], weights: Sequence[float], model: Path, *, one_model: bool) -> None:
    first, final = runs[0], model.absolute()
    reference = None if first.mixture.reference is None else first.reference_path
    mixture = Mixture(tuple(run.mixture.prompters[0] for run in runs), tuple(weights), reference)

    def write(directory: Path) -> None:
        if one_model:
            join_adapters(mixture, first.model_config, directory, final)
        else:
            load_tokenizer(first.model_config).save_pretrained(directory)
            mixture.write(directory)

    with disk_errors(str(model), REMEDY, TrainingError):
        replace_directory(final, write)


def _gap_of_one_model(
    samples: MixtureSamples, drawn: Sequence[Sequence[Completion]], first: MixedRun, model: Path
) -> dict[str, float]:
    """KL of the token-wise mixture to the model that approximates it, in nats per rewrite, on the mixture's draws."""
    single = load_language_model(first.model_config.model_copy(update={"path": str(model)}))
    logprob = torch.tensor([[sum(each.logprobs) for each in group] for group in drawn], dtype=torch.float64)
    own = group_logprobs(single, samples.inputs, drawn, samples.params.temperature)
    return {"kl": (logprob - own).mean().item()}


def _config_text(runs: Sequence[MixedRun], weights: Sequence[float], out: Path) -> str:
    """The first run's configuration, from which templates and sampling are taken, with a word on what it is of."""
    config = runs[0].config
    own = config.model_copy(update={"run": config.run.model_copy(update={"out": out})})
    parts = ", ".join(f"{weight:.4g} × {run.directory}" for weight, run in zip(weights, runs, strict=True))
    return f"# The mixture {parts}.\n# All sections but run.out are those of {runs[0].directory}.\n{dump_config(own)}"
