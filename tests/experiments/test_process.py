"""Commands in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignpro.experiments.process import THIS_PYTHON, last_error, run_command


def starter(tmp_path: Path, program: str) -> tuple[str, str]:
    """Starts a Python program in place of `alignpro`, whose name is its first argument."""
    file = tmp_path / "program.py"
    file.write_text(program)
    return sys.executable, str(file)


def never() -> None:
    return None


def test_output_and_status_of_a_command(tmp_path: Path) -> None:
    program = "import sys; print(*sys.argv[1:]); sys.stderr.write('error: no such\\n  thing\\n'); sys.exit(3)"
    log = tmp_path / "log.txt"
    assert run_command(starter(tmp_path, program), ["train", "a.yaml"], log, never) == 3
    assert "alignpro train a.yaml" in log.read_text()
    assert "no such\n  thing" in str(last_error(log))


def test_a_log_without_an_error_has_none(tmp_path: Path) -> None:
    assert last_error(tmp_path / "absent") is None
    (tmp_path / "log").write_text("no error: here\n")
    assert last_error(tmp_path / "log") is None


def test_a_request_to_stop_is_passed_on_and_waited_for(tmp_path: Path) -> None:
    program = """
import signal, sys, time
def save(*_):
    open(sys.argv[2], "w").write("saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""
    log, saved = tmp_path / "log.txt", tmp_path / "saved"

    def once_ready() -> int | None:
        return signal.SIGTERM if log.exists() and "ready" in log.read_text() else None

    assert run_command(starter(tmp_path, program), [str(saved)], log, once_ready) == 143
    assert saved.read_text() == "saved"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals the children of a process that was killed")
def test_a_command_ends_when_its_experiment_is_killed(tmp_path: Path) -> None:
    program = "import os, sys, time; open(sys.argv[2], 'w').write(str(os.getpid())); time.sleep(60)"
    pid_file = tmp_path / "pid"
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from alignpro.experiments.process import run_command; "
            f"run_command({starter(tmp_path, program)!r}, [{str(pid_file)!r}], Path({str(tmp_path / 'log')!r}), lambda: None)",
        ]
    )
    deadline = time.monotonic() + 60
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child = int(pid_file.read_text())
    parent.kill()
    parent.wait()
    while _alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_this_python_starts_modules() -> None:
    assert subprocess.run([*THIS_PYTHON, "this"], capture_output=True).returncode == 0
