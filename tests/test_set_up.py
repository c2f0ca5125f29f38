"""requirements/install.sh with a script in place of Python: which failures end it, and which are only reported."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "requirements" / "install.sh"
ANSWERS = 'case "$*" in *{fails}*) echo "no such luck" >&2; exit 1 ;; esac'


@pytest.mark.parametrize(
    ("fails", "succeeds", "said"),
    [
        ("nothing", True, ""),
        ("alignpro_kernels.build", True, "could not all be built"),
        ("--no-build-isolation", False, "pip could not install the packages"),
    ],
)
def test_a_set_up_fails_without_its_packages_and_not_without_compiled_kernels(
    tmp_path: Path, fails: str, succeeds: bool, said: str
) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{ANSWERS.format(fails=fails)}\n")
    python.chmod(0o755)
    command = ["sh", str(SCRIPT), str(tmp_path / "venv"), "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode == 0) == succeeds, done.stderr
    assert said in done.stderr
    assert not said or "no such luck" in done.stderr  # the failed command's output is shown
    assert (tmp_path / "venv" / ".device").exists() == succeeds
    assert not (tmp_path / "venv" / ".installing").exists()
