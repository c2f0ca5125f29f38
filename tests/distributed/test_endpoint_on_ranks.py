"""A target behind a server, under the real launcher: two ranks have the results of one process, and pay for no answer twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from engine_server import EngineModel
from launching import assert_close_runs, run_cases, workshop
from tiny_server import TinyServer

from alignpro.training.jobs import train
from alignpro.training.loggers.jsonl import read_rows

SETTINGS = ["rollout.prompts_per_step=3", "rollout.responses_per_rewrite=2", "optimizer.learning_rate=0.0002"]
SETTINGS += ["run.eval_prompts=3", "run.checkpoint_every=1", "deepspeed.config=z2"]
"""Three prompts on two ranks: the ranks have unequal shares."""


def against(server: TinyServer, root: Path) -> str:
    """The configuration file of a training run against the server."""
    config = yaml.safe_load((root / "train.yaml").read_text())
    config["target"] = {"endpoint": {"base_url": server.url, "model": "big"}}
    path = root / f"against-{server.port}.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def is_check(text: str) -> bool:
    return "one to twenty" in text


def bought(server: TinyServer) -> dict[tuple[str, int | None, int], int]:
    """How often each choice was computed, without those of the check of the server."""
    return {choice: count for choice, count in server.computed.items() if not is_check(choice[0])}


@pytest.mark.slow
def test_two_ranks_have_the_results_of_one_process_and_share_their_requests(tmp_path: Path) -> None:
    answering = EngineModel(workshop(tmp_path).root / "target")
    ranks, alone = tmp_path / "ranks", tmp_path / "alone"
    with TinyServer(answering, model="big") as server:
        train([against(server, tmp_path), f"run.out={alone}", "run.steps=3", *SETTINGS])
        of_one = bought(server)
    with TinyServer(answering, model="big") as server:
        command = ["train", against(server, tmp_path), f"run.out={ranks}", *SETTINGS]
        run_cases(tmp_path, [[*command, "run.steps=2"], [*command, "run.steps=3", "--at=2"]])
        assert bought(server) == of_one and set(of_one.values()) == {1}
        requests = sum(not is_check(str(request.json)) for request in server.requests)
    assert_close_runs(alone, ranks)
    rows = read_rows(ranks / "metrics.jsonl")
    counted = [row.get(f"{of}endpoint/requests", 0) for row in rows for of in ("", "eval/")]
    assert sum(counted) == requests
