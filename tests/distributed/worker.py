"""The program of a test's ranks: several commands of `alignpro` in one process group."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch

from alignpro.distributed.session import distributed_session
from alignpro.training.jobs import train


def main(path: str) -> None:
    torch.set_num_threads(1)
    with distributed_session(120.0) as ranks:
        for command, *arguments in json.loads(Path(path).read_text()):
            at = next((int(each.removeprefix("--at=")) for each in arguments if each.startswith("--at=")), None)
            given = [argument for argument in arguments if not argument.startswith("--at=")]
            if command == "copy":
                ranks.on_rank_zero(lambda source=arguments[0], to=arguments[1]: shutil.copytree(source, to))  # type: ignore[misc]
                continue
            train(given, job=command, resume=at is not None, from_step=at, ranks=ranks)


if __name__ == "__main__":
    main(sys.argv[-1])
