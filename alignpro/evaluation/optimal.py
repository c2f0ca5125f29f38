"""`alignpro optimal`: the closed form without training. Draw N rewrites from ρ_sft and resample them by exp(R/λ)."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from alignpro.config import OptimalConfig, dump_config, target_endpoints
from alignpro.data import choose, cluster_labels, load_prompts
from alignpro.evaluation.arms import ArmSampler
from alignpro.evaluation.evaluate import prepare_directory
from alignpro.evaluation.gibbs import arm_estimates
from alignpro.evaluation.heldout_prompts import drop_prompts_too_long_for_prompter
from alignpro.evaluation.memories import memory_notes, shown_memory
from alignpro.models.loading import load_language_model
from alignpro.models.progress_bars import without_progress_bars
from alignpro.rewards import build_reward
from alignpro.targets.build import build_target
from alignpro.targets.servers import Servers, open_servers
from alignpro.theory.statistics import Clusters
from alignpro.training.durability import disk_errors, replace_text
from alignpro.versions import versions

logger = logging.getLogger(__name__)


@without_progress_bars()
def optimal(config: OptimalConfig) -> dict[str, Any]:
    """Write ``rewrites.jsonl`` (per prompt the best rewrite, a rewrite resampled from ρ*, all weights) and ``summary.json``.

    The target's log-probabilities are not used. The resampled rewrites are scored with fresh responses.

    Raises:
        TrainingError: The output directory already contains a result.
    """
    out = prepare_directory(config.out, "summary.json")
    with open_servers(config, target_endpoints(config.target), out, config.respond, config.reward.endpoints) as servers:
        return _optimal(config, out, servers)


def _optimal(config: OptimalConfig, out: Path, servers: Servers) -> dict[str, Any]:
    prompter = load_language_model(config.prompter)
    prompts = drop_prompts_too_long_for_prompter(load_prompts(config.data).prompts, prompter, config)
    adapted = (prompter, config.prompter)
    target = build_target(config.target, adapted, config.prompting, config.respond, connect=servers.connect)
    reward = build_reward(config.reward, session=servers)
    prompts = choose(reward.scorable(target.answerable(prompts)), config.prompts)
    sampler = ArmSampler(config, prompts, target, reward, shown_memory(config.prompter))
    with sampler.progress((config.candidates + 1) * config.responses_per_rewrite) as advance:
        sampler.advance = advance
        candidates = sampler.sample_rewrites("candidates", prompter, config.candidates)
        weighed = sampler.gibbs_weights(candidates, config.kl_coef)
        resampled = sampler.resample(candidates, prompter, weighed.weights, 1)
    clusters = Clusters(cluster_labels(prompts, config.data.cluster))
    estimates = arm_estimates(sampler, candidates, resampled, config.kl_coef, clusters)
    with (out / "rewrites.jsonl").open("w", encoding="utf-8", errors="surrogatepass") as file:
        for i, prompt in enumerate(prompts):
            best = int(candidates.scores.values[i].argmax())
            row = {
                "prompt": prompt.text,
                "rewrite": resampled.scores.samples[i][0],
                "response": resampled.scores.responses[i][0][0],
                "reward": resampled.scores.values[i, 0].item(),
                "best": candidates.scores.samples[i][best],
                "candidates": candidates.scores.samples[i],
                "values": candidates.scores.values[i].tolist(),
                "weights": weighed.weights[i].tolist(),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    summary = {
        "reference_reward": candidates.scores.values.mean().item(),
        "resampled_reward": resampled.scores.values.mean().item(),
        **estimates.as_dict(),
        "kl_coef": config.kl_coef,
        "prompts": len(prompts),
        "note": "log_partition is λ log Ẑ: N candidates make it too low, noise in R too high for the optimum λ log Z; "
        "lower_bound and split are on average not above it",
        "memory": memory_notes(sampler.memory, prompts),
        "seed": config.seed,
        "versions": versions(),
    }
    with disk_errors(str(out), "make room, then resample again"):
        (out / "config.yaml").write_text(dump_config(config))
        # Written last and atomically: this file marks the result as finished.
        replace_text(out / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False))
    logger.info(
        "reward of ρ_sft %.4f → resampled %.4f; J_λ(ρ*) ≥ %.4f (λ log Ẑ %.4f); effective sample size %.2f of %d",
        summary["reference_reward"],
        summary["resampled_reward"],
        estimates.lower_bound.value,
        estimates.log_partition,
        estimates.effective_sample_size,
        config.candidates,
    )
    logger.info("%s  %s", out / "rewrites.jsonl", out / "summary.json")
    return summary
