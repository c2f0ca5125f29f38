"""What a result says about the run that made it."""

from __future__ import annotations

import sys

import pytest

from benchmarks import environment


@pytest.mark.parametrize("where", [["--json", "/home/me/x.json"], ["--out=/home/me"], []])
def test_the_recorded_command_has_no_output_path(where: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--workload", "paper", *where, "--steps", "3"])
    assert environment.command_line() == ["--workload", "paper", "--steps", "3"]
