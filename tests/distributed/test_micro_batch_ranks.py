"""Ranks that have different memory agree on the micro-batch that fits on all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from thread_ranks import results, run_ranks
from tiny_runs import Workshop

from alignpro.config import TrainConfig, load_config
from alignpro.distributed.ranks import Ranks
from alignpro.planning.memory import estimate_memory
from alignpro.planning.micro_batch import MARGIN, with_micro_batch
from alignpro.training import micro_batch_size
from alignpro.training.micro_batch_size import settle_micro_batch_size


class OpenRun:
    """What is asked of a run: its ranks, and a place to record."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.recorded = ranks, 0

    def record(self, config: TrainConfig) -> None:
        self.recorded = config.optimizer.rows_per_pass


def test_ranks_agree_on_the_smallest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("optimizer.micro_batch_size=auto", "rollout.prompts_per_step=12")
    _, *arguments = Workshop(tmp_path).arguments("train", tmp_path / "run", *settings)
    config = load_config(TrainConfig, arguments)
    need = estimate_memory(with_micro_batch(config, 6), "z2", 3).update
    free = {0: 1e15, 1: 1.0001 * need / (1 - MARGIN), 2: 1e15}
    monkeypatch.setattr(micro_batch_size, "free_memory", lambda device: free[dist.get_rank()])

    def work(ranks: Ranks) -> tuple[int, int]:
        run: Any = OpenRun(ranks)
        return settle_micro_batch_size(config, run, "z2").optimizer.rows_per_pass, run.recorded

    assert results(run_ranks(3, work)) == [(6, 6)] * 3
