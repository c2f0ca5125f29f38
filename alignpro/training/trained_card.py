"""What the card of a trained model says of its training, from the run's own files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from alignpro.prompting.model_card import licence_of, write_section
from alignpro.training.loggers.jsonl import read_rows


def describe_training(directory: Path, run: Path) -> None:
    """Add to the card of a saved model: base and its licence, data, reward, λ, estimator, and the last metrics.

    Args:
        directory: Of the saved model.
        run: The run directory, with config.yaml and metrics.jsonl.

    Raises:
        OSError: The card cannot be written.
    """
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    rows = read_rows(run / "metrics.jsonl")
    facts = [*_facts(config), *_last(rows)]
    write_section(
        directory, "Training", ["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in facts)]
    )


def _facts(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of what decided the training."""
    model = config.get("policy") or config.get("model") or {}
    base = str(model.get("path"))
    facts = [("base", f"`{base}`")]
    if Path(base).is_dir():
        facts.append(("licence of the base", licence_of(Path(base)) or "its directory does not tell"))
    adapter = (model.get("adapter") or {}).get("kind")
    if adapter:
        facts.append(
            ("trained part", f"{adapter}, rank {model['adapter']['rank']}" if adapter == "lora" else str(adapter))
        )
    if isinstance(target := config.get("target"), dict):
        facts.append(
            ("target", f"`{target.get('path') or (target.get('endpoint') or {}).get('model') or 'a mixture'}`")
        )
    facts.append(("data", f"`{(config.get('data') or {}).get('source')}`"))
    reward = config.get("reward") or {}
    if reward:
        facts.append(("reward", " + ".join(_component(each) for each in reward.get("components", ()))))
        guards = [each["kind"] for each in reward.get("guards", ())]
        facts += [("guards", ", ".join(guards))] if guards else []
    if objective := config.get("objective"):
        kl = objective.get("kl") or {}
        facts.append(("λ", f"{kl.get('coef')} per nat"))
        facts.append(("estimator", f"{objective.get('loss')}, {objective.get('advantage')}, KL {kl.get('estimator')}"))
    run = config.get("run") or {}
    return [*facts, ("steps, seed", f"{run.get('steps')}, {run.get('seed')}")]


def _component(component: Mapping[str, Any]) -> str:
    name = component.get("function") or component.get("path") or component.get("name") or component["kind"]
    weight = component.get("weight", 1.0)
    return f"{'' if weight == 1 else f'{weight:g} × '}`{name}`"


def _last(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The last values of the metrics that say how good the model is; those of held-out prompts if there are any."""
    names = {
        "reward/mean": "mean reward of the last step's samples",
        "kl": "KL to the reference, nats per sequence",
        "eval/reward": "mean reward on held-out prompts during training",
        "eval/kl": "KL on held-out prompts",
        "eval/loss": "loss on held-out prompts",
        "eval/accuracy": "accuracy on held-out pairs",
    }
    values = {
        key: next((row[key] for row in reversed(rows) if isinstance(row.get(key), int | float)), None) for key in names
    }
    return [(names[key], f"{value:.4g}") for key, value in values.items() if value is not None]


def _cell(value: str) -> str:
    """A text as a cell of a table."""
    return value.replace("|", "\\|").replace("\n", " ")
