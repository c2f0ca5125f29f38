"""Small synthetic records of evaluations, whose truth is known."""

from __future__ import annotations

import numpy as np

from alignpro.evaluation.comparison import Record
from alignpro.evaluation.comparison_results import Cost
from alignpro.evaluation.rewards_file import ArmRewards, EvaluationRewards

MEANS = {
    "no_finetuning": 0.2,
    "instruction_short": 0.4,
    "instruction_role": 0.25,
    "gibbs_16": 0.5,
    "align_pro": 0.7,
    "oracle": 0.9,
}
TRAINED = ("align_pro", "oracle")


def rewards(
    mean: float, seed: int, *, method: str = "align_pro", prompts: int = 40, cluster: int = 1, between: float = 0.01
) -> EvaluationRewards:
    """Rewards (P, 2, 2) around a mean that varies by prompt, in all systems alike, and by seed."""
    of_prompt = 0.1 * np.random.default_rng(99).normal(size=(prompts, 1, 1))
    own = np.random.default_rng([seed, int(1000 * mean)])
    raw = mean + of_prompt + between * own.normal() + 0.1 * own.normal(size=(prompts, 2, 2))
    return EvaluationRewards(
        prompts=[f"{i:016x}" for i in range(prompts)],
        clusters=[i // cluster for i in range(prompts)],
        arms={method: ArmRewards(raw, raw - 0.05)},
        seed=seed,
        reward="feed",
    )


def records(
    tasks: tuple[str, ...] = ("house style",),
    *,
    seeds: int = 3,
    means: dict[str, float] = MEANS,
    prompters: tuple[str, ...] = ("P1",),
    **settings: float,
) -> list[Record]:
    """One record per task, method and seed; methods that are not trained have one seed and no prompter."""
    made = []
    for task in tasks:
        for method, mean in means.items():
            trained = method in TRAINED
            named = prompters if method in ("align_pro", "gibbs_16") else (None,)
            for prompter in named:
                for seed in range(seeds if trained else 1):
                    made.append(
                        Record(
                            task,
                            prompter,
                            "F1",
                            method,
                            seed,
                            rewards(mean, seed, method=method, **settings),
                            Cost(target_calls=2560.0 if trained else 0.0, tokens=81_000.0, seconds=780.0),
                        )
                    )
    return made
