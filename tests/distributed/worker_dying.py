"""The program of a test's ranks: a sharded target; rank 1 dies at one of its layers in the second forward pass."""

from __future__ import annotations

import os
import sys
from typing import Any

from alignpro.config import ModelConfig
from alignpro.distributed.session import process_group
from alignpro.distributed.sharding.frozen import ShardedModels
from alignpro.engine import Engine, SamplingParams
from alignpro.models.loading import load_language_model

passes = 0


def die(*_: Any) -> None:
    global passes
    passes += 1
    if passes == 2:
        os._exit(9)


if __name__ == "__main__":
    with process_group(600.0) as ranks:
        models = ShardedModels(ranks, 1)
        target = models.load(ModelConfig(path=sys.argv[-1], device="cpu"), load_language_model)
        if ranks.rank == 1:
            target.causal.base_model.layers[1].register_forward_pre_hook(die)
        with ranks.raise_together(), models.materialized():
            Engine({"target": target}).generate("target", [[5, 6]], SamplingParams(max_tokens=6))
