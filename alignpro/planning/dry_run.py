"""Summarises how much work a configuration would run, for ``--dry-run``, without loading anything."""

from __future__ import annotations

from pathlib import Path

from alignpro.config import (
    EvalConfig,
    HeadroomConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimalConfig,
    PolicyConfig,
    RemoteTargetConfig,
    RewardModelConfig,
    RivalConfig,
    RLHFConfig,
    RunConfig,
    Section,
    SFTConfig,
    TargetEndpointConfig,
    TrainConfig,
    target_parts,
)
from alignpro.planning.spending import describe_spending


def describe_work(config: Section) -> list[str]:
    """Return lines that describe a job's amount of work: steps, samples, totals, what is written, what servers are asked."""
    return [*_describe_samples(config), *describe_spending(config)]


def _describe_samples(config: Section) -> list[str]:
    match config:
        case TrainConfig():
            rollout, steps = config.rollout, config.run.steps
            P, K, M = rollout.prompts_per_step, rollout.rewrites_per_prompt, rollout.responses_per_rewrite
            chains = P * K
            samples = (
                f"{steps:,} steps × {_count(P, 'prompt')} × {_count(K, 'rewrite')} × {_count(M, 'response')}: "
                f"{_count(chains, 'chain')} per step, {_count(chains * steps, 'rewrite')} and "
                f"{_count(chains * M * steps, 'response')} in total"
            )
            if config.self_reward is not None:
                asked = config.self_reward.answered * M
                samples = (
                    f"{steps:,} steps × {_count(P, 'prompt')} × {_count(K, 'rewrite')}, chosen among those that grow from at "
                    f"most {_count(config.self_reward.grown, 'sentence')} with {_count(asked, 'response')}: at most "
                    f"{_count(P * asked * steps, 'response')} in total"
                )
            return [
                f"train {config.policy.path} ({_trained(config.policy)}) against the frozen {_target(config)}",
                samples,
                *_updates(config.objective, steps),
                *_writes(config.run),
            ]
        case RLHFConfig():
            P, K, steps = config.rollout.prompts_per_step, config.rollout.responses_per_prompt, config.run.steps
            return [
                f"RLHF of {config.policy.path} ({_trained(config.policy)})",
                f"{steps:,} steps × {_count(P, 'prompt')} × {_count(K, 'response')}: "
                f"{_count(P * K, 'response')} per step, {_count(P * K * steps, 'response')} in total",
                *_updates(config.objective, steps),
                *_writes(config.run),
            ]
        case SFTConfig():
            return [
                f"fine-tune {config.policy.path} ({_trained(config.policy)}) on (prompt, {config.task}) pairs",
                *_batches(config.run, config.batch_size),
            ]
        case RewardModelConfig():
            return [f"train a reward model from {config.model.path}", *_batches(config.run, config.batch_size)]
        case EvalConfig():
            shown = {"no_finetuning": "no fine-tuning", "sft_prompter": "reference", "align_pro": "prompter"}
            return [
                f"compare {', '.join(shown.get(name, name) for name in config.sampled_arms)} "
                f"on at most {_count(config.prompts, 'held-out prompt')}",
                f"{_count(config.rewrites_per_prompt, 'rewrite')} per prompt × "
                f"{_count(config.responses_per_rewrite, 'response')} each",
                *(
                    [f"judged by {' and '.join(each.label for each in config.judge.judges)}, pairs in both orders"]
                    if config.judge is not None
                    else []
                ),
                *(["refusals counted"] if config.refusals is not None else []),
                f"write to {config.out}",
            ]
        case HeadroomConfig():
            return [
                f"headroom on {', '.join(config.tasks)}: {config.prompter.path} against the frozen {_target(config)}",
                f"{_count(max(config.gibbs_candidates), 'candidate rewrite')} for each of at most "
                f"{_count(config.prompts, 'held-out prompt')} × {_count(config.responses_per_rewrite, 'response')} each, and "
                f"{_count(sum(len(task.instructions) for task in config.tasks.values()), 'instruction')}",
                f"write to {config.out}",
            ]
        case RivalConfig():
            return [
                f"{config.kind} against the frozen {_source(config.target)}: at most "
                f"{_count(config.target_calls, 'response')} on {_count(config.search.validation, 'validation prompt')} and "
                f"{_count(config.search.training, 'training prompt')}",
                f"write to {config.out}",
            ]
        case OptimalConfig():
            return [
                f"{_count(config.candidates, 'candidate rewrite')} for each of at most {_count(config.prompts, 'prompt')} × "
                f"{_count(config.responses_per_rewrite, 'response')} each",
                f"write to {config.out}",
            ]
        case _:
            raise TypeError(f"{type(config).__name__} is not the configuration of a job")


def _target(config: TrainConfig | HeadroomConfig) -> str:
    """The target's path, its model and server, or those of all targets of a mixture."""
    own = config.policy if isinstance(config, TrainConfig) else config.prompter
    return " and ".join(_source(own if isinstance(p.source, str) else p.source) for p in target_parts(config.target))


def _source(source: ModelConfig | RemoteTargetConfig | TargetEndpointConfig) -> str:
    if isinstance(source, ModelConfig):
        return source.path
    server = source.endpoint if isinstance(source, RemoteTargetConfig) else source
    return f"{server.model} at {server.base_url}"


def _trained(policy: PolicyConfig) -> str:
    """What is trained of a policy; an adapter is recognized by its file, as on loading, if it is in a directory here."""
    if policy.adapter.kind is None and (Path(policy.path) / "adapter_config.json").is_file():
        return "its adapter"
    return policy.adapter.kind or "full"


def _updates(objective: ObjectiveConfig, steps: int) -> list[str]:
    per_step = objective.epochs * objective.minibatches
    return [f"{_count(per_step * steps, 'optimizer update')} ({per_step} per step), loss {objective.loss}"]


def _batches(run: RunConfig, size: int) -> list[str]:
    return [f"{run.steps:,} steps × {_count(size, 'pair')}: {_count(run.steps * size, 'pair')} in total", *_writes(run)]


def _writes(run: RunConfig) -> list[str]:
    evaluation = f"every {run.eval_every:,} steps" if run.eval_every else "never"
    return [
        f"write to {run.out}: a checkpoint every {run.checkpoint_every:,} steps and at the end "
        f"({run.keep_checkpoints} kept); evaluation {evaluation}"
    ]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
