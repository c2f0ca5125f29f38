"""The demo on two ranks reaches the same figures as in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import ends_well, launch

FIGURES = {"no_finetuning": 0.329, "align_pro": 0.920, "oracle": 0.927}
"""The figures in README.md: seed 0, one process."""


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["z2", "z3"])
def test_the_demo_under_deepspeed_reaches_its_figures(zero: str, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    ends_well(launch("--module", "alignpro", "demo", "--out", str(out), "--zero", zero), within=3600.0)
    summary = json.loads((out / "summary.json").read_text())
    for arm, mean in FIGURES.items():
        assert summary[arm]["mean"] == pytest.approx(mean, abs=0.02), arm
    assert summary["gap_recovered"] >= 0.95
    assert summary["align_pro"]["variance"] < summary["no_finetuning"]["variance"]
