"""`alignpro pareto`: mixtures of two prompters at several weights, and prompters trained for the weighted sum of both rewards.

All are sampled on the same held-out prompts with the same seeds, and each response is scored by both rewards. A mixture costs no
training: the two prompters at its ends serve every weight.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignpro.config import EvalConfig, TrainConfig, target_endpoints, validate_config
from alignpro.data import cluster_labels, load_prompts
from alignpro.errors import ConfigError, ModelError
from alignpro.evaluation.arms import ArmSampler
from alignpro.evaluation.evaluate import prepare_directory
from alignpro.evaluation.experiment_charts import ParetoPoint, plot_pareto
from alignpro.evaluation.heldout_prompts import evaluation_prompts
from alignpro.evaluation.logprobs import sequence_kl
from alignpro.evaluation.sampled_arms import Trained
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import load_language_model
from alignpro.models.mixed_model import check_mixable, mix_models, share_equal_weights
from alignpro.models.progress_bars import without_progress_bars
from alignpro.rewards import build_reward
from alignpro.targets.build import build_target
from alignpro.targets.servers import open_servers
from alignpro.theory.statistics import Clusters, FloatArray, mean_estimate, paired_estimate, prompt_means
from alignpro.training.durability import disk_errors, replace_text
from alignpro.training.mixed_runs import MixedRun, read_runs
from alignpro.training.mixing import SUMMARY_FILE, load_mixed
from alignpro.training.recorded_holdout import keep_holdout, trained_on_note
from alignpro.versions import versions

logger = logging.getLogger(__name__)

RESULT_FILE, FIGURE_FILE = "pareto.json", "pareto.png"
MIXTURE, ONE_MODEL, TRAINED = "mixture", "one model", "trained for the weighted sum"


@dataclass(frozen=True)
class _Made:
    """What `alignpro mix` has made of both runs."""

    run: Path
    weight: float
    """Of the second."""
    one_model: bool
    """Whether it is a single LoRA (``--one-model``), whose rewrites are not those of the mixture."""

    @property
    def series(self) -> str:
        return ONE_MODEL if self.one_model else MIXTURE


@dataclass(frozen=True)
class _Measured:
    """One prompter on all prompts."""

    series: str
    weight: float
    """Of the second reward."""
    rewards: tuple[FloatArray, FloatArray]
    """(P,) means of both, without penalties."""
    kl: FloatArray
    """(P,) to ρ_sft, nats per rewrite."""

    @property
    def weighted(self) -> FloatArray:
        """(P,) the weighted sum of both rewards."""
        return (1 - self.weight) * self.rewards[0] + self.weight * self.rewards[1]

    @property
    def least(self) -> FloatArray:
        """(P,) the reward whose mean is the lower one."""
        return min(self.rewards, key=lambda values: float(values.mean()))


@without_progress_bars()
def compare_mixtures(
    directories: Sequence[Path],
    out: Path,
    *,
    trained: Mapping[float, Path],
    mixed: Sequence[Path] = (),
    weights: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    prompts: int = 64,
    rewrites: int = 2,
    responses: int = 2,
    seed: int = 0,
    data: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Sample and compare; write `RESULT_FILE` and `FIGURE_FILE`.

    Args:
        directories: Two run directories of `alignpro train`, whose configurations have both rewards, the target and the data.
        out: The directory to write.
        trained: Weight of the second reward → run directory of a prompter that was trained for that weighted sum.
        mixed: Run directories that `alignpro mix` has made of the two, such as their max-min mixture, whose weights are added.
        weights: Of the second run, at which the two are mixed; those of ``trained`` are added.
        prompts: Held-out prompts, at most.
        rewrites: Of each prompt.
        responses: To each rewrite.
        seed: Of all samples.
        data: Files of prompts that no run was trained on, read as the first run reads its own; without them, the
            prompts that the first run holds out.
        trust_remote_code: Whether Python code that comes with the models may run, if the runs' configurations say so.

    Returns:
        The content of `RESULT_FILE`.

    Raises:
        ConfigError: There are not two runs, a weight is outside [0, 1], runs differ in what they must share, or the
            first holds no prompts out and ``data`` is empty.
        ModelError: A run is not a finished one of `alignpro train`, its model cannot be mixed, or one of ``mixed`` is no
            mixture of the two.
        DataError: There are fewer than two held-out prompts.
        TrainingError: ``out`` holds a result already, or cannot be written.
    """
    if len(directories) != 2:
        raise ConfigError(f"pareto: {len(directories)} runs: give two, one for each reward")
    if wrong := [each for each in (*weights, *trained) if not 0 <= each <= 1]:
        raise ConfigError(f"pareto: weight {wrong[0]:g}: expected one of the second reward from 0 to 1")
    made = [_made(each, directories) for each in mixed]
    runs = read_runs([*directories, *trained.values()], trust_remote_code=trust_remote_code)
    _check_targets(runs)
    prepare_directory(out, RESULT_FILE)
    sizes = {"prompts": prompts, "rewrites_per_prompt": rewrites, "responses_per_rewrite": responses, "seed": seed}
    config = _evaluation(runs, out, sizes, data)
    note = trained_on_note(config.data, [run.directory for run in runs])
    if note is not None:
        logger.warning("%s", note)
    at = {*weights, *trained, *(each.weight for each in made if not each.one_model), *((0.0, 1.0) if made else ())}
    measured, clusters = _measure(config, runs, sorted(at), [each for each in made if each.one_model], list(trained))
    result = _result(directories, measured, clusters, runs)
    result |= {"mixed": _least_rewards(made, measured, clusters)} | sizes
    result |= {"note": note, "versions": versions()}
    points = _points(measured, clusters)
    with disk_errors(str(out), "make room, then compare again"):
        plot_pareto(points, told_apart(runs[0].directory, runs[1].directory), out / FIGURE_FILE)
        replace_text(out / RESULT_FILE, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def told_apart(first: Path, second: Path) -> tuple[str, str]:
    """Names of two directories: their last parts that differ, since the runs of an experiment's cells are all called ``run``."""
    pairs = zip(first.parts[::-1], second.parts[::-1], strict=False)
    return next(((one, other) for one, other in pairs if one != other), (str(first), str(second)))


def _evaluation(runs: Sequence[MixedRun], out: Path, sizes: Mapping[str, int], data: Sequence[str]) -> EvalConfig:
    """How the first run's prompter would be evaluated."""
    first: TrainConfig = runs[0].config
    prompts = keep_holdout(first.data, [run.directory for run in runs]).model_dump(mode="json")
    if not data and first.data.holdout == 0:
        raise ConfigError(
            f"{runs[0].directory}: data.holdout=0: the run holds no prompts out: name a file of others with --data"
        )
    if data:
        prompts |= {"source": list(data), "holdout": 0.0, "validation": 0.0}
    target = "prompter" if first.target == "policy" else first.target.model_dump(mode="json")
    sections = {
        "out": str(out),
        "data": prompts,
        "target": target,
        "reward": first.reward.model_dump(mode="json"),
        "prompter": runs[0].model_config.model_dump(mode="json"),
        "prompting": first.prompting.model_dump(mode="json"),
        "rewrite": first.rollout.rewrite.model_dump(mode="json"),
        "respond": first.rollout.respond.model_dump(mode="json"),
        "engine": first.rollout.engine.model_dump(mode="json"),
        "prices": {name: each.model_dump(mode="json") for name, each in first.prices.items()},
        "budget": first.budget.model_dump(mode="json"),
    }
    return validate_config(EvalConfig, {**sections, **sizes})


def _check_targets(runs: Sequence[MixedRun]) -> None:
    for run in runs[1:]:
        if run.config.target != runs[0].config.target:
            raise ConfigError(
                f"{run.directory}: its target is not that of {runs[0].directory}: prompters are compared on one target"
            )


def _measure(
    config: EvalConfig,
    runs: Sequence[MixedRun],
    weights: Sequence[float],
    single: Sequence[_Made],
    trained: Sequence[float],
) -> tuple[list[_Measured], Clusters]:
    models, reference = load_mixed(runs)
    if any(0 < weight < 1 for weight in weights):
        check_mixable("the mixture", models[:2])
    of_one = [
        load_language_model(runs[0].model_config.model_copy(update={"path": str(each.run / "model")}))
        for each in single
    ]
    share_equal_weights([*models, *of_one])
    rewards = [run.config.reward for run in runs[:2]]
    endpoints = [endpoint for each in rewards for endpoint in each.endpoints]
    assert config.prompter is not None  # as `_evaluation` writes it
    with open_servers(config, target_endpoints(config.target), config.out, config.respond, endpoints) as servers:
        target = build_target(
            config.target, (models[0], config.prompter), config.prompting, config.respond, connect=servers.connect
        )
        stacks = [build_reward(each, session=servers) for each in rewards]
        known = Trained(models[0], reference, None)
        prompts = evaluation_prompts(config, load_prompts(config.data), target, known, stacks)
        samplers = [ArmSampler(config, prompts, target, each) for each in stacks]

        def measured(series: str, weight: float, model: LanguageModel) -> _Measured:
            samples = samplers[0].sample_rewrites(f"{series}, {weight:g}", model, config.rewrites_per_prompt)
            other = samplers[1].scored(samples, models[0])
            inputs = [samplers[0].environment(models[0]).encode(prompt) for prompt in prompts]
            kl = sequence_kl(model, reference, inputs, samples, config.rewrite.temperature or 1.0)
            means = (prompt_means(samples.raw), prompt_means(other.raw))
            return _Measured(series, weight, means, kl.numpy())

        found = [
            measured(MIXTURE, each, mix_models(models[:2], [1 - each, each], reference, f"the mixture at {each:g}"))
            for each in weights
        ]
        found += [measured(ONE_MODEL, each.weight, model) for each, model in zip(single, of_one, strict=True)]
        found += [measured(TRAINED, each, model) for each, model in zip(trained, models[2:], strict=True)]
    return found, Clusters(cluster_labels(prompts, config.data.cluster))


def _result(
    directories: Sequence[Path], measured: Sequence[_Measured], clusters: Clusters, runs: Sequence[MixedRun]
) -> dict[str, Any]:
    mixtures = {each.weight: each for each in measured if each.series == MIXTURE}
    return {
        "runs": [str(each) for each in directories],
        "kl_coef": runs[0].config.objective.kl.coef,
        "points": [
            {
                "series": each.series,
                "weight": each.weight,
                "rewards": [mean_estimate(values, clusters).as_dict() for values in each.rewards],
                "kl": mean_estimate(each.kl, clusters, rewards=False).as_dict(),
            }
            for each in measured
        ],
        "mixture_above_trained": [
            {
                "weight": each.weight,
                "weighted_reward": paired_estimate(mixtures[each.weight].weighted, each.weighted, clusters).as_dict(),
                "kl": mean_estimate(mixtures[each.weight].kl - each.kl, clusters, rewards=False).as_dict(),
            }
            for each in measured
            if each.series == TRAINED
        ],
    }


def _made(mixed: Path, directories: Sequence[Path]) -> _Made:
    """Read what `alignpro mix` says of a directory that it has made of both runs."""
    try:
        summary = json.loads((mixed / SUMMARY_FILE).read_text())
        of, (_, weight) = [Path(each).absolute() for each in summary["runs"]], summary["weights"]
        made = _Made(mixed, float(weight), "gap_of_one_model" in summary)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{mixed}: not a run directory that `alignpro mix` has made of two runs: {error}") from error
    if of != [each.absolute() for each in directories]:
        raise ModelError(f"{mixed}: is a mixture of {' and '.join(map(str, of))}: give these runs, in this order")
    return made


def _least_rewards(made: Sequence[_Made], measured: Sequence[_Measured], clusters: Clusters) -> list[dict[str, Any]]:
    """Of each mixture, how far the lower of its two mean rewards is above that of either prompter alone."""
    at = {(each.series, each.weight): each for each in measured}
    return [
        {
            "run": str(each.run),
            "series": each.series,
            "weight": each.weight,
            "least_reward_above": [
                paired_estimate(at[each.series, each.weight].least, at[MIXTURE, end].least, clusters).as_dict()
                for end in (0.0, 1.0)
            ],
        }
        for each in made
    ]


def _points(measured: Sequence[_Measured], clusters: Clusters) -> dict[str, list[ParetoPoint]]:
    """Series → its points by weight."""
    series: dict[str, list[ParetoPoint]] = {}
    for each in sorted(measured, key=lambda one: one.weight):
        first, second = (mean_estimate(values, clusters) for values in each.rewards)
        series.setdefault(each.series, []).append(ParetoPoint(each.weight, first, second))
    return series
