"""The program of a test's ranks: a layer's checkpoint is written, or loaded by more ranks, of which rank 1 cannot read it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

from torch import nn, ones

from alignpro.config import OptimizerConfig, PolicyConfig
from alignpro.distributed.deepspeed.zero_config import load_zero_config
from alignpro.distributed.session import distributed_session
from alignpro.training.deepspeed_backend import DeepSpeedBackend


def cannot_read(*_: object, **__: object) -> NoReturn:
    raise OSError("Input/output error")


def main(what: str, directory: Path) -> None:
    with distributed_session(100.0) as ranks:
        config = OptimizerConfig(learning_rate=0.1)
        zero = load_zero_config("z2", PolicyConfig(path="none"), config, samples_per_update=2, ranks=ranks.size)
        backend = DeepSpeedBackend(nn.Linear(3, 1), config, 3, zero, ranks)
        if what == "save":
            backend.backward(backend.engine(ones(1, 3)).sum())
            backend.step()
            backend.save(directory, "model")
            return
        if ranks.rank == 1:
            backend.engine.load_checkpoint = cannot_read
        backend.load(directory, "model")


if __name__ == "__main__":
    main(sys.argv[-2], Path(sys.argv[-1]))
