"""The program of a test's ranks: updates of a linear layer by the DeepSpeed backend, one of them with a NaN on rank 1."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import torch
from torch import nn

from alignpro.config import OptimizerConfig, PolicyConfig
from alignpro.distributed.deepspeed.zero_config import load_zero_config
from alignpro.distributed.ranks import Ranks
from alignpro.distributed.session import distributed_session
from alignpro.training.deepspeed_backend import DeepSpeedBackend

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def updates(ranks: Ranks, stage: str, dtype: str) -> dict[str, object]:
    """Return norms and weights of three updates, of which the second has a NaN."""
    torch.manual_seed(0)
    module = nn.Linear(3, 1, bias=False).to(DTYPES[dtype])
    config = OptimizerConfig(learning_rate=0.1)
    policy = PolicyConfig(path="none", dtype=dtype)  # type: ignore[arg-type]
    zero = load_zero_config(stage, policy, config, samples_per_update=4, ranks=ranks.size)
    backend = DeepSpeedBackend(module, config, 3, zero, ranks)
    norms, weights = [], []
    for update in range(3):
        for part in (1.0, 2.0):
            x = torch.full((1, 3), part + ranks.rank, dtype=DTYPES[dtype])
            loss = backend.engine(x).float().sum()
            backend.backward(loss * float("nan") if update == 1 and ranks.rank == 1 and part == 2.0 else loss)
        norms.append(backend.step())
        with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=zero.stage == 3):
            weights.append(module.weight.flatten().float().tolist())
    return {"norms": norms, "weights": weights, "updates": backend.updates}


if __name__ == "__main__":
    out = Path(sys.argv[-1])
    with distributed_session(60.0) as group:
        cases = [(f"z{stage}", dtype) for stage in range(4) for dtype in DTYPES if (stage, dtype) != (0, "bfloat16")]
        result = {f"{stage} {dtype}": updates(group, stage, dtype) for stage, dtype in cases}
        (out / f"{group.rank}.json").write_text(json.dumps(result))
