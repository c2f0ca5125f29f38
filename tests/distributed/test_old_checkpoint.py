"""A checkpoint that an earlier version wrote on two ranks is resumed on two ranks: see tests/old_runs/README.md."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import ends_well, launch
from tiny_runs import assert_near, steps_of_checkpoints


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_as_the_undisturbed_one(old_runs: Path) -> None:
    out = old_runs / "runs" / "zero2"
    begun = (out / "metrics.jsonl").read_bytes()
    arguments = ["train", "runs/zero2/config.yaml", "run.steps=4", "--resume"]
    ends_well(launch("--module", "alignpro", *arguments, directory=old_runs))
    assert steps_of_checkpoints(out) == [4]
    assert (out / "metrics.jsonl").read_bytes().startswith(begun), "it began anew"
    assert_near(out, old_runs / "expected" / "zero2")
