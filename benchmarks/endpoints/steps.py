"""The time of a training step against a server, with and without sampling ahead: the demo's prompter, with the models real."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal

import alignpro
from alignpro.data import Prompt
from alignpro.demo import world
from alignpro.demo.run import WEIGHTS
from alignpro.engine import Chain
from alignpro.environments.base import ResponseScores
from alignpro.environments.prompt import PromptEnvironment
from benchmarks.endpoints.server import running

PROMPTS, REWRITES = 16, 4
"""Of a step: 64 chains."""
WARM_UP = 3
"""Steps in which the client finds the server's limit, which are not counted; neither is the last, which draws nothing ahead."""


class ScoredAfterwards(PromptEnvironment):
    """With a `score` of its own, so that a judge is asked only once the whole rollout has been answered."""

    def score(self, prompts: Sequence[Prompt], chains: Sequence[Sequence[Chain]]) -> ResponseScores:
        """Score as every other environment does."""
        return super().score(prompts, chains)


def step_seconds(
    latency: float, concurrency: int, steps: int, ahead: int, judged: Literal["no", "early", "afterwards"] = "no"
) -> dict[str, Any]:
    """Median seconds of a training step and of its phases; ``target`` is the part of the others that waits for answers.

    Args:
        latency: Seconds of an answer, of the target and of the judge.
        concurrency: Most requests at the same time, to each of them.
        steps: Steps that are counted.
        ahead: ``rollout.ahead``.
        judged: Whether the reward is that of a server, and when this is asked.
    """
    with TemporaryDirectory() as directory, running(latency) as url:
        prompts = Path(directory) / "prompts.jsonl"
        world.write_records(prompts, world.prompt_records(256, 0, heldout=False))
        reward: dict[str, Any] = {"kind": "function", "function": f"{__name__}:brevity"}
        if judged != "no":
            reward = {
                "kind": "http",
                "server": {"url": url, "max_concurrency": concurrency},
                "body": {"prompt": "$prompt", "rewrite": "$rewrite", "response": "$response"},
                "score": "usage.completion_tokens",
            }
        config = {
            "environment": f"{__name__}:{ScoredAfterwards.__name__}" if judged == "afterwards" else None,
            "run": {"out": f"{directory}/run", "steps": WARM_UP + steps + 1, "checkpoint_every": 100},
            "data": {"source": str(prompts), "holdout": 0},
            "policy": {"path": str(WEIGHTS / "prompter")},
            "target": {"endpoint": {"base_url": url, "model": "bench", "n": False, "max_concurrency": concurrency}},
            "reward": {"components": [reward]},
            "rollout": {
                "prompts_per_step": PROMPTS,
                "rewrites_per_prompt": REWRITES,
                "responses_per_rewrite": 1,
                "ahead": ahead,
                "rewrite": {"max_tokens": 40},
                "respond": {"max_tokens": 128},
            },
            "optimizer": {"learning_rate": 1e-5, "micro_batch_size": PROMPTS * REWRITES},
        }
        rows = alignpro.train(config).metrics[WARM_UP:-1]
    phases = {
        name: median(row[f"seconds/{name}"] for row in rows)
        for name in ("rollout", "reward", "credit", "update", "target")
    }
    whole = median(sum(row[f"seconds/{name}"] for name in ("rollout", "reward", "credit", "update")) for row in rows)
    return {
        "latency": latency,
        "chains": PROMPTS * REWRITES,
        "concurrency": concurrency,
        "ahead": ahead,
        "judged": judged,
        "steps": len(rows),
        "step_s": whole,
        **{f"{name}_s": seconds for name, seconds in phases.items()},
    }


def brevity(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """A reward for few words; the server's answers are all alike."""
    return [1 / (1 + len(response.split())) for response in responses]
