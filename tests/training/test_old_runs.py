"""Runs of an earlier version can be continued, used and evaluated: see tests/old_runs/README.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import assert_near, assert_near_values, steps_of_checkpoints

from alignpro.cli import main

INTERVALS = ("ci95", "low", "high", "gap_recovered", "gap_recovered_ci95", "holds", "note")
"""Intervals and verdicts of an evaluation, which the earlier version computed otherwise."""

COMMANDS = {
    "train": "train",
    "lora": "train",
    "activated_lora": "train",
    "rlhf": "rlhf",
    "sft": "sft",
    "reward": "reward",
}


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return int(stopped.value.code or 0)


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_resumed_run_goes_on_as_the_undisturbed_one(old_runs: Path, kind: str) -> None:
    out = old_runs / "runs" / kind
    begun = (out / "metrics.jsonl").read_bytes()
    assert run(COMMANDS[kind], f"runs/{kind}/config.yaml", "run.steps=4", "--resume") == 0
    assert (out / "metrics.jsonl").read_bytes().startswith(begun), "it began anew"
    assert steps_of_checkpoints(out) == [4]
    assert_near(out, old_runs / "expected" / kind)


@pytest.mark.parametrize("kind", ["train", "lora", "activated_lora"])
def test_rewrites_and_responses_are_those_of_before(old_runs: Path, kind: str) -> None:
    given = ["--data", "data/heldout.jsonl", "--out", "rewrites.jsonl", "--answer", "--n", "4", "--temperature", "1"]
    assert run("rewrite", "--run", f"runs/{kind}", *given) == 0
    assert Path("rewrites.jsonl").read_text() == Path("expected", kind, "rewrites.jsonl").read_text()


def test_old_runs_are_evaluated_as_before(old_runs: Path) -> None:
    """The prompter, the oracle, the reward model and the curves of the report come from old run directories."""
    assert run("eval", "evaluation/config.yaml", "out=again") == 0
    assert_near_values(*map(summary, ("again", "evaluation")))
    assert_near_values(*map(samples, ("again", "evaluation")))
    assert 'alt="Training curves"' in Path("again/report.html").read_text()


def summary(out: str) -> dict[str, Any]:
    """Return the content of summary.json without what differs from one evaluation to the next."""
    content: dict[str, Any] = json.loads(Path(out, "summary.json").read_text())
    return without(content, ("seconds", "versions", *INTERVALS))


def without(content: Any, keys: Sequence[str]) -> Any:
    """Return nested mappings without some keys."""
    if not isinstance(content, dict):
        return content
    return {name: without(value, keys) for name, value in content.items() if name not in keys}


def samples(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(out, "samples.jsonl").read_text().splitlines()]
