"""Commands that are forked from a process in which the libraries are loaded."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignpro.errors import TrainingError
from alignpro.experiments.forking import ForkingRunner
from alignpro.experiments.process import THIS_PYTHON, last_error

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="commands are forked under Linux only")

PROGRAM = """
import os, signal, sys, time
import loaded_before
how, *rest = sys.argv[1:]
print(*rest, loaded_before.where == os.getppid(), os.getsid(0) == os.getpid(), flush=True)
if how == "fail":
    sys.stderr.write("error: no such\\n  thing\\n")
    sys.exit(3)
if how == "raise":
    raise ValueError("what nobody expected")
if how == "save":
    def save(*_):
        open(rest[0], "w").write("saved")
        sys.exit(143)
    signal.signal(signal.SIGTERM, save)
    print("ready", flush=True)
    time.sleep(60)
if how == "die":
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkingRunner]:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "loaded_before.py").write_text("import os\nprint('noise')\nwhere = os.getpid()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    runner = ForkingRunner("program", ["loaded_before"])
    yield runner
    runner.close()


def never() -> None:
    return None


def test_each_command_is_a_process_of_its_own_with_what_was_loaded(run: ForkingRunner, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert run(THIS_PYTHON, ["end", "a.yaml"], log, never) == 0
    assert log.read_text() == "a.yaml True True\n"
    other = tmp_path / "other.txt"
    assert run(THIS_PYTHON, ["fail"], other, never) == 3
    assert last_error(other) == "no such\n  thing"
    assert run(THIS_PYTHON, ["raise"], other, never) == 1
    assert "ValueError: what nobody expected" in other.read_text()
    assert log.read_text() == "a.yaml True True\n"  # each writes to its own file


def test_a_request_to_stop_is_passed_on_and_waited_for(run: ForkingRunner, tmp_path: Path) -> None:
    log, saved = tmp_path / "log.txt", tmp_path / "saved"

    def once_ready() -> int | None:
        return signal.SIGTERM if log.exists() and "ready" in log.read_text() else None

    assert run(THIS_PYTHON, ["save", str(saved)], log, once_ready) == 143
    assert saved.read_text() == "saved"


def test_a_server_that_was_killed_is_an_error_and_the_next_command_starts_another(
    run: ForkingRunner, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="the process that runs the cells ended: exit status -9"):
        run(THIS_PYTHON, ["die"], tmp_path / "log.txt", never)
    assert run(THIS_PYTHON, ["end"], tmp_path / "log.txt", never) == 0


def test_what_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="No module named 'no_such_library'"):
        ForkingRunner("program", ["no_such_library"])(THIS_PYTHON, ["end"], tmp_path / "log.txt", never)


def test_a_launcher_is_started_as_it_is(run: ForkingRunner, tmp_path: Path) -> None:
    launcher = (sys.executable, "-c", "import sys; print(*sys.argv[1:])")
    assert run(launcher, ["train"], tmp_path / "log.txt", never) == 0
    assert (tmp_path / "log.txt").read_text() == "alignpro train\n"


def test_a_command_ends_when_its_experiment_is_killed(run: ForkingRunner, tmp_path: Path) -> None:
    script = (
        "from pathlib import Path; from alignpro.experiments.forking import ForkingRunner; "
        "from alignpro.experiments.process import THIS_PYTHON; "
        f"ForkingRunner('program', ['loaded_before'])(THIS_PYTHON, ['save', 'x'], Path({str(tmp_path / 'log')!r}), lambda: None)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not ((tmp_path / "log").exists() and "ready" in (tmp_path / "log").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    while not (tmp_path / "x").exists():  # the command was asked to stop, and saved
        assert time.monotonic() < deadline
        time.sleep(0.02)
