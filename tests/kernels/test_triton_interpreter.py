"""Run the tests of tests/kernels/interpreted: every Triton kernel in Triton's interpreter on the CPU, in three processes.

The interpreter takes seconds for a case, so cases that only combine what others try one by one are marked slow there, too.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

DIRECTORY = Path(__file__).parent / "interpreted"
FILES = sorted(path.name for path in DIRECTORY.glob("test_*.py"))

pytest.importorskip("triton")

PARTS = [FILES[i::3] for i in range(3)]
"""Each process takes seconds to start."""

WITH_SLOW_CASES = [name for name in FILES if "pytest.mark.slow" in (DIRECTORY / name).read_text()]


@pytest.mark.parametrize("names", PARTS, ids=" ".join)
def test_interpreted(names: list[str]) -> None:
    run_interpreted(names, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_SLOW_CASES)
def test_further_cases_interpreted(name: str) -> None:
    run_interpreted([name], "slow")


def run_interpreted(names: list[str], marked: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment = {k: v for k, v in environment.items() if not k.startswith("PYTEST_")}
    options = [
        "-q",
        "-m",
        marked,
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        f"--confcutdir={DIRECTORY}",
        "--tb=short",
    ]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(str(DIRECTORY / name) for name in names)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, f"{names} failed:\n{run.stdout[-8000:]}\n{run.stderr[-2000:]}"


def test_there_are_files_to_run() -> None:
    assert FILES, f"no test was found in {DIRECTORY}"


def test_without_the_package_it_says_so() -> None:
    code = "import sys; sys.modules['triton'] = None; from alignpro_kernels import triton_support as t; print(t.unavailable())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "triton is not installed" in run.stdout, run.stderr
