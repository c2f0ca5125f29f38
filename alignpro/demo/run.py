"""`alignpro demo`: the main workflow end to end on the embedded world, with the project's own commands.

prompts → Align-Pro and the RLHF oracle, trained on the same budget → evaluation on held-out prompts → report
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from alignpro.config import EvalConfig, RLHFConfig, TrainConfig, validate_config
from alignpro.demo import world
from alignpro.distributed.deepspeed.zero_config import require_deepspeed
from alignpro.distributed.launcher import launched
from alignpro.distributed.ranks import Ranks
from alignpro.distributed.session import distributed_session
from alignpro.errors import TrainingError
from alignpro.evaluation.evaluate import evaluate
from alignpro.training.jobs import train
from alignpro.training.run_directory import refuse_run

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights"
TRAINING_PROMPTS = 4000
HELDOUT_PROMPTS = 210


def run_demo(out: Path, seed: int = 0, *, steps: int | None = None, zero: str = "z2") -> dict[str, Any]:
    """Train, compare and report; an interrupted demo is resumed. Under the deepspeed launcher, all ranks train.

    Args:
        out: Output directory for ``summary.json``, ``figure.png``, ``report.html``, and the runs ``align_pro/`` and
            ``oracle/``.
        seed: Seed of the prompts, the sampling and the evaluation.
        steps: Training steps of prompter and oracle. A few are enough to check that everything runs; the packaged default
            is needed for meaningful results.
        zero: ``deepspeed.config``, used under the deepspeed launcher.

    Returns:
        The content of ``summary.json``.

    Raises:
        TrainingError: ``out`` contains a finished demo, one with another seed, or files of something else.
    """
    started = time.perf_counter()
    prompter, oracle, comparison = configurations(out, seed, steps, zero)  # these check `out` too
    if (out / "summary.json").exists():
        raise TrainingError(f"{out}: already contains a finished demo; choose another --out, or remove it")
    if out.exists() and not out.is_dir():
        raise TrainingError(f"{out}: is a file; choose another --out")
    with _ranks(prompter.deepspeed.timeout_seconds) as ranks:
        ranks.on_rank_zero(lambda: _write_prompts(out, seed))
        logger.info("Align-Pro: the prompter against the frozen target")
        train(prompter, resume=prompter.run.out.exists(), ranks=ranks)
        logger.info("Oracle: RLHF of the target itself")
        train(oracle, resume=oracle.run.out.exists(), ranks=ranks)
        logger.info("Evaluation on %d held-out prompts", HELDOUT_PROMPTS)
        ranks.on_rank_zero(lambda: _compare(comparison, started))
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


@contextmanager
def _ranks(timeout_seconds: float) -> Iterator[Ranks]:
    """The ranks started by the deepspeed launcher, or this process alone."""
    if not launched():
        yield Ranks()
        return
    require_deepspeed()
    with distributed_session(timeout_seconds) as ranks:
        yield ranks


def _write_prompts(out: Path, seed: int) -> None:
    prompts = {
        "prompts.jsonl": list(world.prompt_records(TRAINING_PROMPTS, seed, heldout=False)),
        "heldout.jsonl": list(world.prompt_records(HELDOUT_PROMPTS, seed, heldout=True)),
    }
    _refuse_other_files(out, prompts)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"{out}: cannot be created: {error}; choose another --out") from error
    for name, records in prompts.items():
        world.write_records(out / name, records)


def _refuse_other_files(out: Path, prompts: Mapping[str, Sequence[Any]]) -> None:
    """Raise before anything is written if ``out`` holds something else than an interrupted demo."""
    refuse_run(out)
    if not out.is_dir() or (out / "align_pro").is_dir():
        return
    # An interrupt before the training's directory was made leaves the prompts alone, the last of them perhaps cut off.
    found = [
        each.name
        for each in sorted(out.iterdir())
        if each.name not in prompts
        or not each.is_file()
        or not world.as_lines(prompts[each.name]).startswith(each.read_text("utf-8", "replace"))
    ]
    if found:
        raise TrainingError(
            f"{out}: is not empty and holds no interrupted demo (it has {', '.join(found[:5])}); choose another --out"
        )


def _compare(config: EvalConfig, started: float) -> None:
    evaluate(config, extra=lambda: {"seconds": time.perf_counter() - started})


def configurations(
    out: Path, seed: int, steps: int | None = None, zero: str = "z2"
) -> tuple[TrainConfig, RLHFConfig, EvalConfig]:
    """The configurations from the packaged YAML files, with this run's paths and seed."""
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
    train["deepspeed"] = rlhf["deepspeed"] = {"config": zero}
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
