"""`alignpro demo`: the main job from end to end on the embedded world, with the project's own commands.

prompts → Align-Pro and the RLHF oracle, trained on the same budget → evaluation on held-out prompts → report
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any, TypeVar

import yaml

from alignpro.config import EvalConfig, RLHFConfig, Section, TrainConfig, validate_config
from alignpro.demo import world
from alignpro.errors import TrainingError
from alignpro.evaluation.evaluate import evaluate
from alignpro.jobs import prompter_training, response_training
from alignpro.training.run import Run

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights"
TRAINING_PROMPTS = 4000
HELDOUT_PROMPTS = 210

ConfigT = TypeVar("ConfigT", bound=Section)


def run_demo(out: Path, seed: int = 0, *, steps: int | None = None) -> dict[str, Any]:
    """Train, compare and report; an interrupted demo goes on where it was.

    Args:
        out: Gets ``summary.json``, ``figure.png``, ``report.html``, and the runs ``align_pro/`` and ``oracle/``.
        seed: Of the prompts, the sampling and the evaluation.
        steps: Training steps of prompter and oracle; a few show that all runs, the packaged number shows what it gives.

    Returns:
        What ``summary.json`` holds.

    Raises:
        TrainingError: ``out`` holds a finished demo, or one of another seed.
    """
    started = time.perf_counter()
    if (out / "summary.json").exists():
        raise TrainingError(f"{out}: holds a finished demo already; name another --out, or remove it")
    train, rlhf, comparison = configurations(out, seed, steps)
    world.write_records(out / "prompts.jsonl", world.prompt_records(TRAINING_PROMPTS, seed, heldout=False))
    world.write_records(out / "heldout.jsonl", world.prompt_records(HELDOUT_PROMPTS, seed, heldout=True))
    logger.info("Align-Pro: the prompter against the frozen target")
    with Run(train, resume=True) as run:
        run.train(prompter_training(train))
    logger.info("Oracle: RLHF of the target itself")
    with Run(rlhf, resume=True) as run:
        run.train(response_training(rlhf))
    logger.info("Evaluation on %d held-out prompts", HELDOUT_PROMPTS)
    evaluate(comparison, extra=lambda: {"seconds": time.perf_counter() - started})
    logger.info("%s  %s  %s", out / "summary.json", out / "figure.png", out / "report.html")
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def configurations(out: Path, seed: int, steps: int | None = None) -> tuple[TrainConfig, RLHFConfig, EvalConfig]:
    """The packaged YAML files with this run's paths and seed."""
    target = {"path": str(WEIGHTS / "target")}
    prompter = {"path": str(WEIGHTS / "prompter")}
    train = _load("train.yaml")
    train["run"] |= {"out": str(out / "align_pro"), "seed": seed}
    train["data"]["source"] = str(out / "prompts.jsonl")
    train |= {"policy": prompter, "target": target}
    rlhf = _load("rlhf.yaml")
    rlhf["run"] |= {"out": str(out / "oracle"), "seed": seed}
    rlhf["data"]["source"] = str(out / "prompts.jsonl")
    rlhf["policy"] = target
    if steps is not None:
        train["run"]["steps"] = rlhf["run"]["steps"] = steps
    comparison = _load("eval.yaml")
    comparison["data"]["source"] = str(out / "heldout.jsonl")
    comparison |= {
        "out": str(out),
        "seed": seed,
        "target": target,
        "reference": prompter,
        "prompter": {"path": str(out / "align_pro" / "model")},
        "oracle": {"path": str(out / "oracle" / "model")},
    }
    return (
        validate_config(TrainConfig, train),
        validate_config(RLHFConfig, rlhf),
        validate_config(EvalConfig, comparison),
    )


def _load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((HERE / name).read_text())
    return loaded
