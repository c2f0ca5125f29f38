"""A micro-batch size that is chosen for a run is recorded, and the same when it is resumed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import Workshop, read_metrics

from alignpro.training import micro_batch_size

AUTO = "optimizer.micro_batch_size=auto"
LOGGER = "alignpro.training.micro_batch_size"


@pytest.fixture
def leave(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Pretend that a number of bytes is free."""
    return lambda free: monkeypatch.setattr(micro_batch_size, "free_memory", lambda device: free)


def recorded(out: Path) -> Any:
    return yaml.safe_load((out / "config.yaml").read_text())["optimizer"]["micro_batch_size"]


@pytest.mark.parametrize(("command", "whole"), [("train", 4), ("sft", 6), ("reward", 4)])
def test_a_resumed_run_takes_the_recorded_size(
    workshop: Workshop,
    tmp_path: Path,
    leave: Callable[[float], None],
    caplog: pytest.LogCaptureFixture,
    command: str,
    whole: int,
) -> None:
    caplog.set_level(logging.INFO, logger=LOGGER)
    out = tmp_path / "run"
    leave(2.0**50)
    assert workshop.run(command, out, AUTO, "run.steps=2", "optimizer.schedule=constant") == 0
    assert recorded(out) == whole
    (chosen,) = caplog.messages
    assert chosen.startswith(f"optimizer.micro_batch_size=auto: {whole} sequences a pass, all that a step has")
    leave(1.0)
    assert workshop.run(command, out, AUTO, "optimizer.schedule=constant", "--resume") == 0
    assert recorded(out) == whole
    assert caplog.messages[1:] == [f"{AUTO}: {whole}, as {out / 'config.yaml'} records"]


def test_a_resumed_run_gives_the_results_of_one_without_interruption(
    workshop: Workshop, tmp_path: Path, leave: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    settings = (AUTO, "optimizer.schedule=constant")
    leave(1.0)
    assert workshop.run("sft", tmp_path / "begun", *settings, "run.steps=2") == 0
    assert recorded(tmp_path / "begun") == 1
    assert caplog.records[-1].levelno == logging.WARNING, "that memory may run out"
    assert workshop.run("sft", tmp_path / "whole", *settings) == 0
    leave(2.0**50)
    assert workshop.run("sft", tmp_path / "begun", *settings, "--resume") == 0
    assert read_metrics(tmp_path / "begun") == read_metrics(tmp_path / "whole")


def test_another_number_is_refused_as_any_other_difference(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert workshop.run("sft", out, AUTO, "run.steps=1") == 0
    assert workshop.run("sft", out, "optimizer.micro_batch_size=2", "run.steps=2", "--resume") == 1
    assert "optimizer.micro_batch_size (was 6, is 2)" in capsys.readouterr().err
