"""What a rank of the tests runs: several commands of `alignpro` in one process group."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from alignpro.config import RLHFConfig, TrainConfig, load_config
from alignpro.distributed.environment import launched_size
from alignpro.distributed.session import process_group
from alignpro.jobs import prompter_training, response_training
from alignpro.training.launched import train_on, zero_of


def main(path: str) -> None:
    torch.set_num_threads(1)
    with process_group(120.0) as ranks:
        for command, *arguments in json.loads(Path(path).read_text()):
            resume = "--resume" in arguments
            given = [argument for argument in arguments if argument != "--resume"]
            kind, build = (TrainConfig, prompter_training) if command == "train" else (RLHFConfig, response_training)
            config = load_config(kind, given)
            train_on(ranks, config, zero_of(config, launched_size()), build, resume)


if __name__ == "__main__":
    main(sys.argv[-1])
