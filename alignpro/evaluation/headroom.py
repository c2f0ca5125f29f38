"""`alignpro headroom`: what a prompter could gain on each of some tasks, measured before it is trained."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignpro.config import ConfigSource, HeadroomConfig, TaskConfig, dump_config, resolve_config, target_endpoints
from alignpro.data import Prompt, cluster_labels, load_prompts
from alignpro.evaluation.arms import ArmSampler, ArmSamples
from alignpro.evaluation.as_trained import as_trained
from alignpro.evaluation.evaluate import prepare_directory, sample_rows
from alignpro.evaluation.gibbs import arm_estimates
from alignpro.evaluation.headroom_verdict import Verdict, judge_headroom
from alignpro.evaluation.heldout_prompts import evaluation_prompts
from alignpro.evaluation.labels import method_label
from alignpro.evaluation.memories import shown_memory
from alignpro.evaluation.results import ArmSummary, GibbsEstimates, adjusted, summarize_arm
from alignpro.evaluation.sampled_arms import Trained, instruction_templates
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import load_language_model
from alignpro.models.progress_bars import without_progress_bars
from alignpro.prompting.moves import MoveBank, MoveUse, load_moves
from alignpro.rewards import build_reward
from alignpro.targets.build import build_target
from alignpro.targets.servers import Servers, open_servers
from alignpro.theory.statistics import Clusters
from alignpro.training.durability import disk_errors, replace_text
from alignpro.versions import versions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskHeadroom:
    """The arms of a task, and what they say."""

    arms: list[ArmSummary]
    """No fine-tuning, the instructions, the prompter as it is, and Gibbs resampling."""
    gibbs: Mapping[str, GibbsEstimates]
    """Key of each arm of Gibbs resampling → the estimates from its candidates."""
    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        """The content for summary.json."""
        return {
            "worth_training": self.verdict.worth_training,
            "verdict": self.verdict.sentence,
            "arms": {arm.name: arm.as_dict() for arm in self.arms},
            "gibbs_estimates": {name: each.as_dict() for name, each in self.gibbs.items()},
        }


@dataclass(frozen=True)
class Headroom:
    """The headroom of each task, and what the prompter writes."""

    tasks: Mapping[str, TaskHeadroom]
    moves: MoveUse
    """Which moves the candidates make."""
    seconds: float

    def table(self) -> str:
        """All tasks as text: a line for an arm, with 95 % intervals, and the verdict below each task."""
        lines = [
            f"the prompter makes {self.moves.as_dict()['moves']:.1f} moves (entropy {self.moves.entropy:.2f} nats), copies "
            f"{self.moves.shares.get('copy', 0.0):.0%}, and writes something else in {self.moves.shares.get('other', 0.0):.0%}"
        ]
        for name, task in self.tasks.items():
            lines += ["", f"{name:<32}  reward                     over no fine-tuning"]
            for arm in task.arms:
                gain = (
                    ""
                    if arm.difference is None
                    else _shown(arm.difference.value, arm.difference.low, arm.difference.high)
                )
                lines.append(f"  {arm.label:<30}  {_shown(arm.mean, *arm.ci95):<25}  {gain}".rstrip())
            lines.append(f"  {task.verdict.sentence}.")
        return "\n".join(lines)


@without_progress_bars()
def headroom(config: ConfigSource[HeadroomConfig]) -> Headroom:
    """Measure the headroom of each task and write ``summary.json``, ``samples.jsonl`` and ``config.yaml``.

    The candidates, rewrites of ρ_sft, and the target's responses to them and to the unchanged prompts are drawn once, and
    scored by the reward of every task; instructions and resampled rewrites get responses of their own.

    Args:
        config: As a `HeadroomConfig`, a mapping, the path of a YAML file, or a list of files and overrides.

    Raises:
        TrainingError: The output directory already contains a result.
        AlignProError: The configuration, a model, the data or a reward cannot be used.
    """
    started = time.perf_counter()
    config = resolve_config(HeadroomConfig, config)
    moves = load_moves(config.moves)
    for task in config.tasks.values():
        instruction_templates(task.instructions)  # an error in one comes before any work
    out = prepare_directory(config.out, "summary.json")
    config = as_trained(config, [config.prompter], [config.prompter])
    with open_servers(config, target_endpoints(config.target), out, config.respond, config.reward_endpoints) as servers:
        return _headroom(config, moves, servers, started)


def _headroom(config: HeadroomConfig, moves: MoveBank, servers: Servers, started: float) -> Headroom:
    prompter = load_language_model(config.prompter)
    target = build_target(
        config.target, (prompter, config.prompter), config.prompting, config.respond, connect=servers.connect
    )
    rewards = {name: build_reward(task.reward, session=servers) for name, task in config.tasks.items()}
    trained = Trained(None, prompter, None)
    prompts = evaluation_prompts(config, load_prompts(config.data), target, trained, list(rewards.values()))
    clusters = Clusters(cluster_labels(prompts, config.data.cluster))
    memory = shown_memory(config.prompter)
    samplers = {name: ArmSampler(config, prompts, target, reward, memory) for name, reward in rewards.items()}
    first = next(iter(samplers.values()))
    arms = 1 + sum(len(task.instructions) + len(config.gibbs_arms) for task in config.tasks.values())
    rewrites = arms * config.rewrites_per_prompt + max(config.gibbs_candidates)
    with first.progress(rewrites * config.responses_per_rewrite) as advance:
        for sampler in samplers.values():
            sampler.advance = advance
        unchanged = first.sample_unchanged(config.rewrites_per_prompt * config.responses_per_rewrite)
        candidates = first.sample_rewrites("candidates", prompter, max(config.gibbs_candidates))
        sampled = {
            name: _sample_task(config, task, samplers[name], unchanged, candidates, prompter)
            for name, task in config.tasks.items()
        }
    tasks = {name: _judge_task(config, samplers[name], arms_of, clusters) for name, arms_of in sampled.items()}
    use = moves.use([prompt.text for prompt in prompts], candidates.scores.samples)
    result = Headroom(tasks, use, time.perf_counter() - started)
    with disk_errors(str(config.out), "make room, then measure again"):
        _write(config, result, prompts, sampled)
    return result


def _sample_task(
    config: HeadroomConfig,
    task: TaskConfig,
    sampler: ArmSampler,
    unchanged: ArmSamples,
    candidates: ArmSamples,
    prompter: LanguageModel,
) -> dict[str, ArmSamples]:
    """The arms of a task, in the order of the table, and last the candidates, of which ρ_sft as it is has the first."""
    K, M = config.rewrites_per_prompt, config.responses_per_rewrite
    arms = {"no_finetuning": sampler.scored(unchanged, None)}
    for name, template in instruction_templates(task.instructions).items():
        arms[name] = sampler.sample_instruction(name, template, K * M)
    own = sampler.scored(candidates, prompter)
    arms["sft_prompter"] = own.first(K)
    for name, count in config.gibbs_arms.items():
        first = own.first(count)
        weights = sampler.gibbs_weights(first, config.kl_coef).weights  # (P, N)
        arms[name] = sampler.resample(first, prompter, weights, K, name)
    return arms | {"candidates": own}


def _judge_task(
    config: HeadroomConfig,
    sampler: ArmSampler,
    arms: Mapping[str, ArmSamples],
    clusters: Clusters,
) -> TaskHeadroom:
    baseline = arms["no_finetuning"].raw
    summaries = adjusted(
        [
            summarize_arm(
                name,
                method_label(name),
                samples.raw,
                penalised=samples.penalised,
                baseline=None if name == "no_finetuning" else baseline,
                clusters=clusters,
            )
            for name, samples in arms.items()
            if name != "candidates"
        ]
    )
    gibbs = {
        name: arm_estimates(sampler, arms["candidates"].first(count), arms[name], config.kl_coef, clusters)
        for name, count in config.gibbs_arms.items()
    }
    return TaskHeadroom(summaries, gibbs, judge_headroom(summaries, config.worthwhile))


def _write(
    config: HeadroomConfig,
    result: Headroom,
    prompts: Sequence[Prompt],
    sampled: Mapping[str, Mapping[str, ArmSamples]],
) -> None:
    with (config.out / "samples.jsonl").open("w", encoding="utf-8", errors="surrogatepass") as file:
        for task, arms in sampled.items():
            rows = sample_rows([name for name in arms if name != "candidates"], prompts, arms)
            file.writelines(json.dumps({"task": task, **row}, ensure_ascii=False) + "\n" for row in rows)
    summary = {
        "tasks": {name: task.as_dict() for name, task in result.tasks.items()},
        "moves": result.moves.as_dict(),
        "prompts": len(prompts),
        "kl_coef": config.kl_coef,
        "worthwhile": config.worthwhile,
        "seconds": result.seconds,
        "seed": config.seed,
        "versions": versions(),
    }
    (config.out / "config.yaml").write_text(dump_config(config))
    # Written last and atomically: this file marks the result as finished.
    replace_text(config.out / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False))
    logger.info("%s  %s", config.out / "summary.json", config.out / "samples.jsonl")


def _shown(value: float, low: float, high: float) -> str:
    interval = f"[{low:.3f}, {high:.3f}]" if low == low and high == high else "[not estimable]"
    return f"{value:.3f}  {interval}"
