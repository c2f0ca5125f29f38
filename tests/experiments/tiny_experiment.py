"""An experiment with models of a few thousand weights, whose commands run in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from tiny_runs import Workshop

from alignpro.cli import main

METHODS: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"},
    "instruction": {"kind": "instruction"},
    "prior": {"kind": "prior"},
    "gibbs": {"kind": "gibbs", "candidates": [2, 4]},
    "best_of": {"kind": "best_of", "candidates": [2]},
    "align_pro": {"kind": "train"},
    "grpo": {
        "kind": "train",
        "settings": {"objective": {"advantage": "group_normalized", "kl": {"estimator": "k3"}}},
    },
    "dial": {"kind": "dial", "of": "align_pro", "strengths": [0.5]},
    "oracle": {"kind": "rlhf"},
}


def tiny_experiment(shop: Workshop, out: Path, *, prior: bool = False, **changes: Any) -> dict[str, Any]:
    """The sections of an experiment on the models, prompts and reward of a workshop.

    Args:
        shop: The workshop.
        out: Directory of the experiment.
        prior: Whether the prompter is prepared by supervised fine-tuning of a LoRA; all weights are trained then.
        changes: Other values of top-level keys.
    """
    steps = {"steps": 1, "eval_every": 0}
    optimizer = {"learning_rate": 0.01, "micro_batch_size": 4}
    device = {"device": "cpu"}
    policy: dict[str, Any] = {"path": str(shop.root / "prompter"), **device, "adapter": {"kind": "full"}}
    sft = {
        "data": {"source": str(shop.root / "rewrites.jsonl")},
        "policy": {"adapter": {"kind": "lora", "rank": 2}},
        "run": steps,
        "batch_size": 4,
        "optimizer": optimizer,
    }
    return {
        "out": str(out),
        "seeds": [0],
        "prompters": {"tiny": {"policy": policy, **({"prior": sft} if prior else {})}},
        "targets": {"toy": {"path": str(shop.root / "target"), **device}},
        "tasks": {
            "letters": {
                "data": {"source": str(shop.root / "prompts.jsonl"), "holdout": 0.5},
                "reward": {"components": [{"kind": "function", "function": f"{shop.root}/plain_reward.py:score"}]},
                "instructions": {"short": "Be brief."},
            }
        },
        "methods": METHODS,
        "rewrite": {"max_tokens": 4},
        "respond": {"max_tokens": 4},
        "train": {
            "run": steps,
            "optimizer": optimizer,
            "rollout": {"prompts_per_step": 2, "rewrites_per_prompt": 2},
        },
        "rlhf": {
            "run": steps,
            "optimizer": optimizer,
            "rollout": {"prompts_per_step": 2, "responses_per_prompt": 2},
        },
        "evaluation": {"prompts": 4, "rewrites_per_prompt": 2, "responses_per_rewrite": 2},
    } | changes


class InThisProcess:
    """Runs the commands of cells in this process, and keeps their arguments.

    Args:
        before: Called with the arguments of each command; what it raises ends the command with this message.
    """

    def __init__(self, before: Callable[[Sequence[str]], None] = lambda arguments: None) -> None:
        self.commands: list[list[str]] = []
        self._before = before

    def __call__(
        self, starter: Sequence[str], arguments: Sequence[str], log: Path, stopped: Callable[[], int | None]
    ) -> int:
        self.commands.append([*starter, *arguments])
        with log.open("a") as file, redirect_stderr(file):
            try:
                self._before(arguments)
                main(arguments)
            except SystemExit as stop:
                return int(stop.code or 0)
            except CommandError as error:
                file.write(f"error: {error}\n")
                return 1
        raise AssertionError("main returns by SystemExit")


class CommandError(Exception):
    """A command that fails."""
