"""requirements/install.sh with a script in place of Python: which failures end it, and which are only reported."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "requirements" / "install.sh"
ANSWERS = 'case "$*" in *{fails}*) echo "no such luck" >&2; exit 1 ;; esac'


def set_up(root: Path, device: str, fails: str) -> subprocess.CompletedProcess[str]:
    """Run the script with a Python that fails when it is called with ``fails``, and that lists its calls."""
    python = root / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$*" >>"{root}/calls"\n{ANSWERS.format(fails=fails)}\n')
    python.chmod(0o755)
    command = ["sh", str(SCRIPT), str(root / "venv"), device]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


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
    done = set_up(tmp_path, "cpu", fails)
    assert (done.returncode == 0) == succeeds, done.stderr
    assert said in done.stderr
    assert not said or "no such luck" in done.stderr  # the failed command's output is shown
    assert (tmp_path / "venv" / ".device").exists() == succeeds
    assert not (tmp_path / "venv" / ".installing").exists()


@pytest.mark.parametrize(("fails", "torch"), [("nothing", "--index-url"), ("--index-url", "-c")])
def test_the_oldest_versions_take_the_place_of_their_pins(tmp_path: Path, fails: str, torch: str) -> None:
    """Without PyTorch's index, torch comes from the configured sources with its dependencies."""
    assert set_up(tmp_path, "oldest", fails).returncode == 0
    pins = (tmp_path / "venv" / "pins.txt").read_text().splitlines()
    oldest, newest = ((SCRIPT.parent / name).read_text().splitlines() for name in ("oldest.txt", "cpu.txt"))
    assert set(oldest) <= set(pins) <= {*oldest, *newest}
    names = [line.partition("==")[0] for line in pins if not line.startswith("#")]
    assert len(names) == len(set(names))
    assert set(names) >= {line.partition("==")[0] for line in newest if not line.startswith("#")}
    calls = (tmp_path / "calls").read_text().splitlines()
    installed, *_ = [call for call in calls if f"{torch} " in call]  # its dependencies come later
    assert "torch.txt" in installed and "setuptools" not in installed
    assert (tmp_path / "venv" / "torch.txt").read_text() == f"{oldest[2]}\n"


def test_an_interrupted_set_up_stops_the_kernels_that_are_built_beside_it(tmp_path: Path) -> None:
    begun, stopped = tmp_path / "begun", tmp_path / "stopped"
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"""#!/bin/sh
case "$*" in
    *alignpro_kernels.build) trap 'touch "{stopped}"; exit' TERM; touch "{begun}"; while :; do sleep 0.01; done ;;
    *dev.txt) until [ -e "{begun}" ]; do sleep 0.01; done; kill -TERM $PPID ;;
esac
""")
    python.chmod(0o755)
    done = subprocess.run(["sh", str(SCRIPT), str(tmp_path / "venv"), "cpu"], capture_output=True, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM
    deadline = time.monotonic() + 30
    while not stopped.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (tmp_path / "venv" / ".installing").exists()
