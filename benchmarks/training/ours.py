"""This project's step, from the configuration of `alignpro train`."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import yaml

from alignpro.config import TrainConfig, load_config
from alignpro.training.builders import prompter_training
from alignpro.training.distribution import Distribution, SingleProcess
from benchmarks.training.step import Step
from benchmarks.training.task import LORA_ALPHA, REWARD, Task
from benchmarks.training.tokens import TokenCounter


class OurTraining:
    """The training that `alignpro train` runs, with defaults for everything that the task does not specify.

    Args:
        task: Models, prompts and lengths.
        device: The device of both models.
        overrides: Configuration overrides, as on the command line of `alignpro train`.
        distribution: The processes to train on; if absent, only this one.

    Raises:
        ConfigError: A key is unknown or a value is invalid.
    """

    def __init__(
        self,
        task: Task,
        device: torch.device,
        overrides: Sequence[str] = (),
        distribution: Distribution | None = None,
    ) -> None:
        distribution = distribution or SingleProcess()
        ranks = distribution.ranks
        self._training = prompter_training(configure(task, device, overrides), distribution)
        self._training.run.out.mkdir(exist_ok=True)
        models = {"policy": self._training.policy.model.causal}
        # Without a frozen copy, the policy with its adapter disabled is the reference.
        if (reference := self._training.policy.reference) is not None:
            models["reference"] = reference.causal
        self._counter = TokenCounter(models, lambda: not ranks.phase.endswith("rollout"))

    def step(self, index: int) -> Step:
        """Make step ``index``, counted from 0."""
        computed = self._training.engine.stats.computed.copy()
        self._counter.clear()
        started = time.perf_counter()
        metrics = self._training.step(index)
        seconds = time.perf_counter() - started
        phases = {n.removeprefix("seconds/"): value for n, value in metrics.items() if n.startswith("seconds/")}
        return Step(seconds, phases, self._tokens(self._training.engine.stats.computed - computed))

    def _tokens(self, generated: Counter[str]) -> dict[str, int]:
        """Count tokens by phase: generation by the engine's statistics; of the rest, update with gradients, credit without."""
        update = sum(count for call, count in self._counter.calls.items() if call.grad)
        return dict(generated) | {"credit": self._counter.calls.total() - update, "update": update}


def configure(task: Task, device: torch.device, overrides: Sequence[str] = ()) -> TrainConfig:
    """Return the configuration of a task, which is also written to its directory, as for `alignpro train`.

    Raises:
        ConfigError: A key is unknown or a value is invalid.
    """
    file = task.directory / f"train_{os.getpid()}.yaml"  # per process, since ranks write concurrently
    file.write_text(yaml.safe_dump(_configuration(task, device)))
    return load_config(TrainConfig, [str(file), *overrides])


def _adapter(task: Task) -> dict[str, Any]:
    return {} if task.lora is None else {"adapter": {"kind": "lora", "rank": task.lora, "alpha": LORA_ALPHA}}


def _configuration(task: Task, device: torch.device) -> dict[str, Any]:
    workload = task.workload
    return {
        "run": {"out": str(task.directory / "run"), "seed": task.seed, "steps": task.steps, "sample_every": task.steps},
        "data": {"source": str(task.directory / "prompts.jsonl"), "holdout": 0.0},
        "policy": {"path": str(task.prompter), "device": str(device)} | _adapter(task),
        "target": {"path": str(task.target), "device": str(device)},
        "reward": {"components": [{"kind": "function", "function": REWARD}]},
        "prompting": {"meta_prompt": str(task.directory / "meta_prompt.jinja")},
        "rollout": {
            "prompts_per_step": workload.prompts,
            "rewrites_per_prompt": workload.K,
            "responses_per_rewrite": workload.M,
            "rewrite": {"max_tokens": workload.rewrite},
            "respond": {"max_tokens": workload.response},
        },
        "objective": {"kl": {"coef": task.kl_coef}, "step_kl": None},  # the peers do not measure how far a step goes
        "optimizer": {"learning_rate": task.learning_rate, "micro_batch_size": workload.prompts * workload.K},
    }
