"""Builds of DeepSpeed's extensions take turns, and a killed one holds up nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignpro.distributed.deepspeed.compilation import build_lock

HOLDER = """
import sys, time
from alignpro.distributed.deepspeed.compilation import build_lock
with build_lock("extension"):
    print("building", flush=True)
    time.sleep(float(sys.argv[1]))
"""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "extension").mkdir()
    return tmp_path


def building(seconds: float) -> subprocess.Popen[str]:
    """A process that holds the lock for so long."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "building\n"
    return process


def test_the_lock_file_of_a_killed_build_is_removed(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    (directory / "extension" / "lock").touch()
    (directory / "another").mkdir()
    (directory / "another" / "lock").touch()  # may be held by a program that is none of ours
    with build_lock("extension"):
        assert not (directory / "extension" / "lock").exists()
    assert (directory / "another" / "lock").exists()
    assert "was left by a build that was killed" in caplog.text


def test_a_process_waits_for_its_turn(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    process = building(1.0)
    started = time.monotonic()
    with caplog.at_level("INFO"), build_lock("extension"):
        assert time.monotonic() - started > 0.5
    assert process.wait() == 0
    assert "waiting for another process that compiles" in caplog.text


def test_the_turn_of_a_killed_process_ends(directory: Path) -> None:
    process = building(600.0)
    os.kill(process.pid, signal.SIGKILL)
    with build_lock("extension"):
        assert process.wait() == -signal.SIGKILL


def test_each_environment_builds_in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")  # so that it is as it was afterwards
    found = set()
    for prefix in ("one", "other", "one"):
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
        monkeypatch.setattr(sys, "prefix", prefix)
        with build_lock("extension"):
            found.add(Path(os.environ["TORCH_EXTENSIONS_DIR"]))
    assert len(found) == 2
    assert all(path.is_relative_to(tmp_path) for path in found)
