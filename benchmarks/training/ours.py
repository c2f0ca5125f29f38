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
from alignpro.jobs import prompter_training
from alignpro.training.distribution import Distribution
from benchmarks.tokens import TokenCounter
from benchmarks.training.step import Step
from benchmarks.training.task import REWARD, Task


class OurTraining:
    """What `alignpro train` runs; all that the task does not say has its default.

    Args:
        task: Models, prompts and lengths.
        device: Of both models.
        overrides: Of the configuration, as on the command line of `alignpro train`.
        distribution: Over which processes; this one alone when absent.

    Raises:
        ConfigError: There is no such key, or its value is bad.
    """

    def __init__(
        self,
        task: Task,
        device: torch.device,
        overrides: Sequence[str] = (),
        distribution: Distribution | None = None,
    ) -> None:
        self._training = prompter_training(configure(task, device, overrides), distribution)
        self._training.run.out.mkdir(exist_ok=True)
        reference, engine = self._training.policy.reference, self._training.engine
        models = {"policy": self._training.policy.model.causal, "target": engine.models["target"].causal}
        if (sampled := engine.models["policy"].causal) is not models["policy"]:
            models["sampled"] = sampled
        # Without a frozen copy the policy is its own reference, with its adapter off.
        self._counter = TokenCounter(models | ({} if reference is None else {"reference": reference.causal}))

    def step(self, index: int) -> Step:
        """Make a step, counted from 0."""
        computed = self._training.engine.stats.computed.copy()
        self._counter.clear()
        started = time.perf_counter()
        metrics = self._training.step(index)
        seconds = time.perf_counter() - started
        phases = {n.removeprefix("seconds/"): value for n, value in metrics.items() if n.startswith("seconds/")}
        return Step(seconds, phases, self._tokens(self._training.engine.stats.computed - computed))

    def _tokens(self, generated: Counter[str]) -> dict[str, int]:
        """The engine tells what it computed; of the rest, that with gradients is the update, that without the credit."""
        update = sum(count for call, count in self._counter.calls.items() if call.grad)
        return dict(generated) | {
            "credit": self._counter.calls.total() - generated.total() - update,
            "update": update,
        }


def configure(task: Task, device: torch.device, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration of a task; written beside it, as for `alignpro train`.

    Raises:
        ConfigError: There is no such key, or its value is bad.
    """
    file = task.directory / f"train_{os.getpid()}.yaml"  # ranks write theirs at the same time
    file.write_text(yaml.safe_dump(_configuration(task, device)))
    return load_config(TrainConfig, [str(file), *overrides])


def _configuration(task: Task, device: torch.device) -> dict[str, Any]:
    workload = task.workload
    return {
        "run": {"out": str(task.directory / "run"), "seed": task.seed, "steps": task.steps, "sample_every": task.steps},
        "data": {"source": str(task.directory / "prompts.jsonl"), "holdout": 0.0},
        "policy": {"path": str(task.prompter), "device": str(device)},
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
        "objective": {"kl": {"coef": task.kl_coef}},
        "optimizer": {"learning_rate": task.learning_rate, "micro_batch_size": workload.prompts * workload.K},
    }
