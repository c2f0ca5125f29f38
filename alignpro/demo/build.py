"""Retrain the two models of the embedded world with the project's own SFT: ``python -m alignpro.demo.build``.

This takes half an hour on two cores. The same seed gives the same data and initial weights; the trained weights agree
with the packaged ones up to rounding differences between machines.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path
from typing import Any

import yaml

from alignpro.demo import world
from alignpro.demo.models import save_untrained
from alignpro.demo.run import HERE, WEIGHTS
from alignpro.training.jobs import train

RECORD_COUNT = 150_000
STAGES = {"target": 3, "prompter": 2}
Records = list[dict[str, Any]]


def records(name: str, stage: int) -> Records:
    """The SFT records of a stage: correct data first, and in the last stage the data that make the wording matter."""
    if name == "prompter":
        return world.prompter_records(RECORD_COUNT, 0, mixed=stage == 2)
    if stage == 2:
        return world.target_records(RECORD_COUNT, 1, careless=False, canonical_share=0.2)
    return world.target_records(RECORD_COUNT, 0, careless=stage == 3)


def main() -> None:
    """Train the models and copy them into the package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(STAGES), help="the model to train (default: both)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo-weights"), help="directory of the runs")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in [arguments.model] if arguments.model else list(STAGES):
        build(name, arguments.out)


def build(name: str, out: Path) -> None:
    """Run all stages of SFT from random weights; an interrupted build is resumed."""
    save_untrained(out / "untrained")
    start = out / "untrained" / name
    for stage in range(1, STAGES[name] + 1):
        run_out, source = out / f"{name}_{stage}", out / f"{name}_{stage}.jsonl"
        config: dict[str, Any] = yaml.safe_load((HERE / f"sft_{name}_{stage}.yaml").read_text())
        config["run"] |= {"out": str(run_out)}
        config["policy"] |= {"path": str(start)}
        config["data"]["source"] = str(source)
        world.write_records(source, records(name, stage))
        train(config, job="sft", resume=True)
        start = run_out / "model"
    shutil.rmtree(WEIGHTS / name, ignore_errors=True)
    shutil.copytree(start, WEIGHTS / name, ignore=shutil.ignore_patterns("alignpro.json"))


if __name__ == "__main__":
    main()
