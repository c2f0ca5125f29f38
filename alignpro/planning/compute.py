"""The arithmetic of a training run, by formula: floating-point operations of the matrix products, at the greatest lengths.

A token costs 2 FLOP for each weight of the linear layers, and as many for the output layer where its logits are needed; a
backward pass costs twice the forward pass where all weights are trained, and once where an adapter is (Kaplan et al., 2020,
arXiv 2001.08361, section 2.1). The scores of attention are left out: at these lengths they add a few percent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from alignpro.config import RLHFConfig, TrainConfig
from alignpro.planning.memory import JobModels
from alignpro.planning.model_size import ModelSize, trains_all

_DEVICE, _PEAK, _SHARE = "H100 SXM", 989e12, 0.4
"""A device, its FLOP/s in bfloat16 without sparsity (NVIDIA's data sheet), and the share of it that training reaches."""


@dataclass(frozen=True)
class StepCompute:
    """FLOP of a step, by part."""

    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """Their sum."""
        return sum(self.parts.values())


def step_compute(config: TrainConfig | RLHFConfig, models: JobModels | None = None) -> StepCompute:
    """FLOP of a step in which every sequence has its greatest length; each prompt is computed once for all its samples.

    Args:
        config: The job. What servers compute is not counted; of several targets, the mean is.
        models: Their sizes, if they are known.

    Raises:
        ModelError: A model's configuration cannot be read.
    """
    models = models or JobModels.of(config)
    rollout, policy = config.rollout, models.policy
    P = rollout.prompts_per_step
    if isinstance(config, TrainConfig):
        K, M = config.rollout.rewrites_per_prompt, config.rollout.responses_per_rewrite
        prompt, sample = config.prompting.max_prompt_tokens, config.rollout.rewrite.max_tokens
        name, answered, grown = "rewrites", K, config.self_reward
        before = prompt if config.prompting.form == "addition" else 0  # what the rewrites of a prompt share
    else:
        K, M = config.rollout.responses_per_prompt, 0
        prompt, sample = config.max_prompt_tokens, config.rollout.respond.max_tokens
        name, answered, grown, before = "responses", 0, None, 0
    drawn = P * K * sample
    forward = _flop(policy, P * prompt + drawn, drawn)
    parts = {name: forward}
    if grown is not None:  # what is trained on is chosen among more
        sentences = P * grown.grown * (sample // grown.sentences)
        parts, answered = {name: _flop(policy, P * prompt + sentences, sentences)}, grown.answered
    targets = models.targets or ((policy,) if isinstance(config, TrainConfig) and config.target == "policy" else ())
    if targets:
        read, answers = P * (before + answered * sample), P * answered * M * rollout.respond.max_tokens
        parts["responses"] = sum(_flop(each, read + answers, answers) for each in targets) / len(targets)
    parts["credit"] = 2 * forward  # policy and reference
    objective = config.objective
    learned = P * min(K, objective.distillation_samples) * sample if objective.loss == "distillation" else drawn
    fitted = _flop(policy, P * prompt + learned, learned)
    parts["update"] = fitted * (3 if trains_all(config.policy) else 2) * objective.epochs
    if objective.step_kl is not None:  # after each update, the KL of a sample of each prompt
        parts["update"] += _flop(policy, P * (prompt + sample), P * sample) * objective.epochs * objective.minibatches
    return StepCompute(parts)


def describe_compute(config: TrainConfig | RLHFConfig) -> list[str]:
    """Lines that say what a run computes and how long that takes on one device of a common kind."""
    step = step_compute(config)
    shares = ", ".join(f"{name} {value / step.total:.0%}" for name, value in step.parts.items())
    run = step.total * config.run.steps
    hours = run / (_SHARE * _PEAK) / 3600
    return [
        f"arithmetic, at the greatest lengths: {step.total / 1e15:.3g} PFLOP a step ({shares}), {run / 1e15:.3g} PFLOP in "
        f"{config.run.steps} steps: {hours:.2g} h of one {_DEVICE} at {_SHARE:.0%} of its {_PEAK / 1e12:.0f} TFLOP/s (bfloat16); "
        "generation in small batches takes longer, since it waits for memory"
    ]


def _flop(size: ModelSize, tokens: int, logits: int) -> float:
    """FLOP of a forward pass over some tokens, with the logits of some of them."""
    return 2.0 * (size.linear * tokens + size.head * logits)
