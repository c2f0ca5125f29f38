"""The demo against its own target behind a server, and runs that are killed: slow."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from engine_server import BatchingServer, EngineModel
from tiny_runs import Process, Workshop, read_metrics, read_model
from tiny_server import TinyServer

from alignpro.config import TrainConfig, validate_config
from alignpro.demo.run import TRAINING_PROMPTS, WEIGHTS, configurations
from alignpro.demo.world import prompt_records, write_records
from alignpro.training.jobs import train

pytestmark = pytest.mark.slow


def results(out: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if not name.startswith("target/")} for row in read_metrics(out)]


def test_the_demo_is_the_demo_in_process_in_at_most_twice_its_time(tmp_path: Path) -> None:
    seconds = train_the_demo(tmp_path, steps=None)
    assert seconds["remote"] <= 2 * seconds["local"]


def train_the_demo(tmp_path: Path, steps: int | None) -> dict[str, float]:
    """Train it in process and against a server, and compare; returns how long each took."""
    seconds = {}
    for name in ("local", "remote"):
        out = tmp_path / name
        config = configurations(out, 0, steps)[0]
        out.mkdir()
        write_records(out / "prompts.jsonl", prompt_records(TRAINING_PROMPTS, 0, heldout=False))
        with BatchingServer(EngineModel(WEIGHTS / "target"), model="demo", is_logged=False) as server:
            if name == "remote":
                raw = config.model_dump(mode="json")
                raw["target"] = {"endpoint": {"base_url": server.url, "model": "demo"}}
                config = validate_config(TrainConfig, raw)
            started = time.perf_counter()
            train(config)
            seconds[name] = time.perf_counter() - started
    runs = [tmp_path / name / "align_pro" for name in seconds]
    assert results(runs[0]) == results(runs[1])
    assert read_model(runs[0]) == read_model(runs[1])
    assert (runs[0] / "samples.jsonl").read_bytes() == (runs[1] / "samples.jsonl").read_bytes()
    print(f"the demo took {seconds['local']:.1f} s in process and {seconds['remote']:.1f} s against a server")
    return seconds


@pytest.mark.parametrize("seed", range(5))
def test_a_run_killed_at_random_moments_has_the_results_of_one_that_was_not(
    seed: int, workshop: Workshop, finished: Callable[..., Path], tmp_path: Path
) -> None:
    moments = random.Random(seed)
    out = tmp_path / "run"
    with TinyServer(EngineModel(workshop.root / "target"), model="big", latency=0.02) as server:
        config = yaml.safe_load((workshop.root / "train.yaml").read_text())
        config["target"] = {"endpoint": {"base_url": server.url, "model": "big", "max_concurrency": 2}}
        path = tmp_path / "train.yaml"
        path.write_text(yaml.safe_dump(config))
        arguments = ["train", str(path), f"run.out={out}", "rollout.responses_per_rewrite=2", "--resume"]
        kills = 0
        while True:
            process = Process(arguments, tmp_path / "log")
            count = server.count + moments.randrange(1, 30)
            while process._process.is_alive() and (server.count < count or kills >= 4):
                time.sleep(0.002)
            if not process._process.is_alive():
                assert process.wait() == 0, process.output()
                break
            process.signal(signal.SIGKILL)
            process.wait()
            kills += 1
        twice = {
            choice: times for choice, times in server.computed.items() if times > 1 and "one to twenty" not in choice[0]
        }
    reference = finished("train", "rollout.responses_per_rewrite=2")
    assert results(out) == results(reference)
    assert read_model(out) == read_model(reference)
    # What was in flight at a kill has an unknown outcome, and is the only thing that may be bought again.
    assert sum(times - 1 for times in twice.values()) <= 2 * 2 * kills
