"""metrics.jsonl and TensorBoard's files, also when a run goes back to a checkpoint, is killed, or the disk is full."""

from __future__ import annotations

import builtins
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alignpro.config import RunConfig
from alignpro.errors import ConfigError, TrainingError
from alignpro.training.loggers.jsonl import append_row, read_rows, truncate_rows
from alignpro.training.loggers.metrics_logger import MetricsLogger
from alignpro.training.loggers.tensorboard import TensorBoardWriter
from alignpro.training.metrics import PhaseTimer, mean_of_updates


def write_rows(path: Path, steps: Sequence[int]) -> bytes:
    for step in steps:
        append_row(path, {"step": step, "reward": step / 7, "text": "日本\u2028\x85\x0b"})
    return path.read_bytes()


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


@pytest.fixture
def full_disk(mount_disk: Callable[[str], Path]) -> Path:
    return mount_disk("64k")


def fill(place: Path) -> None:
    with pytest.raises(OSError, match="No space"), (place / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 512)


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    """Unicode line separators in a text do not end the row, and floats keep every bit."""
    path = tmp_path / "metrics.jsonl"
    write_rows(path, [1, 2, 3])
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]
    assert read_rows(path)[0] == {"step": 1, "reward": 1 / 7, "text": "日本\u2028\x85\x0b"}


def test_a_text_that_is_not_valid_utf8_is_written(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    append_row(path, {"step": 1, "text": "half \ud83d of a pair"})
    append_row(path, {"step": 2})
    assert read_rows(path) == [{"step": 1, "text": "half \ud83d of a pair"}, {"step": 2}]


def test_a_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "metrics.jsonl") == []
    truncate_rows(tmp_path / "metrics.jsonl", 3)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("last", [0, 1, 2, 3, 9])
def test_rows_after_a_step_are_removed_and_the_others_keep_every_byte(tmp_path: Path, last: int) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = write_rows(path, [1, 2, 2, 3]).splitlines(keepends=True)
    truncate_rows(path, last)
    kept = [line for line, step in zip(lines, [1, 2, 2, 3], strict=True) if step <= last]
    assert path.read_bytes() == b"".join(kept)


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_truncated_last_row_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = write_rows(path, [1, 2])
    write_rows(path, [3])
    os.truncate(path, path.stat().st_size - cut)
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    truncate_rows(path, 9)
    assert path.read_bytes() == whole
    append_row(path, {"step": 3})
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]


@pytest.mark.parametrize("damaged", [b"\xff{\n", b"12\n", b'{"reward": 1}\n', b"\n"])
def test_a_damaged_row_is_named_and_the_rows_after_it_stay(
    tmp_path: Path, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    first, _, *others = write_rows(path, [1, 2, 3, 4]).splitlines(keepends=True)
    path.write_bytes(first + damaged + b"".join(others))
    assert [row["step"] for row in read_rows(path)] == [1, 3, 4]
    assert f"{path}:2: the row is damaged" in caplog.text
    truncate_rows(path, 3)
    assert path.read_bytes() == first + damaged + others[0]


def test_a_full_disk_leaves_complete_rows_and_gives_a_message(full_disk: Path) -> None:
    path = full_disk / "metrics.jsonl"
    whole = write_rows(path, [1, 2])
    fill(full_disk)
    with pytest.raises(TrainingError) as caught:
        for step in range(3, 1000):
            whole = path.read_bytes()
            append_row(path, {"step": step, "text": "x" * 100})
    assert str(path) in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert "--resume" in str(caught.value)
    assert path.read_bytes() == whole
    truncate_rows(path, 1)
    assert [row["step"] for row in read_rows(path)] == [1], "removing rows needs no disk space"


def test_a_row_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"nowhere/metrics.jsonl: cannot be written: .*No such file"):
        append_row(tmp_path / "nowhere" / "metrics.jsonl", {"step": 1})


def test_tensorboard_reads_the_values(tmp_path: Path) -> None:
    with MetricsLogger(RunConfig(out=tmp_path), 0, {}) as log:
        for step in (1, 2, 3):
            log.write(step, {"reward/mean": step / 4, "kl": float(step)})
    assert scalars(tmp_path / "tensorboard") == {
        "reward/mean": [(1, 0.25), (2, 0.5), (3, 0.75)],
        "kl": [(1, 1.0), (2, 2.0), (3, 3.0)],
    }


def test_tensorboard_sees_each_step_once_after_a_resume(tmp_path: Path) -> None:
    for start, value in ((0, 1.0), (2, 2.0), (3, 3.0)):
        with MetricsLogger(RunConfig(out=tmp_path), start, {}) as log:
            for step in range(start + 1, start + 4):
                log.write(step, {"loss": value})
    assert scalars(tmp_path / "tensorboard")["loss"] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 3.0), (5, 3.0), (6, 3.0)]
    assert [row["loss"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1.0, 1.0, 2.0, 3.0, 3.0, 3.0]


def test_tensorboard_reads_the_complete_events_of_a_truncated_file(tmp_path: Path) -> None:
    """A killed process leaves such a file. The file of the resumed run beside it is read too."""
    killed = TensorBoardWriter(tmp_path, 1)
    for step in (1, 2, 3):
        killed.write(step, {"loss": 1.0})
    killed.close()
    os.truncate(killed.path, killed.path.stat().st_size - 5)
    resumed = TensorBoardWriter(tmp_path, 3)
    resumed.write(3, {"loss": 2.0})
    resumed.close()
    assert scalars(tmp_path)["loss"] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_a_full_disk_is_an_error_when_tensorboard_writes(full_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    events = TensorBoardWriter(full_disk, 1)
    events.write(1, {"loss": 1.0})
    fill(full_disk)
    with pytest.raises(TrainingError) as caught:
        for step in range(2, 10_000):
            events.write(step, {"loss": 1.0})
    assert str(events.path) in str(caught.value)
    assert "No space left on device" in str(caught.value)
    events.close()
    assert "Traceback" not in capfd.readouterr().err


def test_tensorboard_can_be_switched_off(tmp_path: Path) -> None:
    with MetricsLogger(RunConfig(out=tmp_path, tensorboard=False), 0, {}) as log:
        log.write(1, {"loss": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_an_evaluation_is_recognised_by_its_rows(tmp_path: Path) -> None:
    with MetricsLogger(RunConfig(out=tmp_path, tensorboard=False), 0, {}) as log:
        log.write(1, {"loss": 1.0})
        log.write(2, {"loss": 1.0})
        log.write(2, {"eval/loss": 1.0})
        assert not log.has_evaluation(1)
        assert log.has_evaluation(2)


def test_wandb_that_is_not_installed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "wandb":
            raise ImportError("No module named 'wandb'")
        return imported(name, *arguments, **keywords)

    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"run.wandb_project needs .*pip install 'alignpro\[wandb\]'"):
        MetricsLogger(RunConfig(out=tmp_path, wandb_project="p"), 0, {})


def test_wandb_resumes_its_own_run_and_its_errors_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses a stand-in, since wandb needs a server."""

    class RefusedError(Exception):
        pass

    calls: list[tuple[str, Any]] = []

    class Session:
        def log(self, metrics: Mapping[str, float], step: int) -> None:
            calls.append(("log", (step, dict(metrics))))

        def finish(self, exit_code: int) -> None:
            calls.append(("finish", exit_code))

    def init(**keywords: Any) -> Session:
        if keywords["project"] == "locked":
            raise RefusedError("no API key")
        calls.append(("init", keywords["id"]))
        return Session()

    stand_in = SimpleNamespace(init=init, errors=SimpleNamespace(Error=RefusedError))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    config = RunConfig(out=tmp_path, tensorboard=False, wandb_project="p")
    with MetricsLogger(config, 0, {}) as log:
        log.write(1, {"loss": 1.0})
    with pytest.raises(ValueError, match="x"), MetricsLogger(config, 1, {}):
        raise ValueError("x")
    identity = (tmp_path / "wandb_id").read_text()
    expected = [("init", identity), ("log", (1, {"loss": 1.0})), ("finish", 0), ("init", identity), ("finish", 1)]
    assert calls == expected
    with pytest.raises(TrainingError, match="Weights & Biases: no API key; log in with `wandb login`"):
        MetricsLogger(RunConfig(out=tmp_path, tensorboard=False, wandb_project="locked"), 0, {})


def test_seconds_of_phases_add_up() -> None:
    timer = PhaseTimer()
    with timer("rollout"):
        time.sleep(0.01)
    with pytest.raises(ValueError, match="x"), timer("rollout"):
        time.sleep(0.01)
        raise ValueError("x")
    with timer("update"):
        pass
    seconds: Mapping[str, float] = timer.seconds
    assert seconds.keys() == {"seconds/rollout", "seconds/update"}
    assert seconds["seconds/rollout"] >= 0.02
    assert json.dumps(seconds)


def test_clipped_and_skipped_updates_are_counted() -> None:
    norms = (0.5, 3.0, float("inf"), 1.5, 1.0)
    metrics = mean_of_updates([{"loss": 1.0, "gradient_norm": norm} for norm in norms], max_grad_norm=1.0)
    assert metrics == {"loss": 1.0, "gradient_norm": 1.5, "gradient_clipped": 0.5, "updates_skipped": 1.0}
