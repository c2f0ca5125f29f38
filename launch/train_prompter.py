"""Train a prompter on several devices:

deepspeed launch/train_prompter.py CONFIG.yaml [key=value …] [--resume]
"""

from __future__ import annotations

import sys

from alignpro.cli import main
from alignpro.distributed.launcher import take_slurm_rank, without_local_rank

if __name__ == "__main__":
    take_slurm_rank()
    main(["train", *without_local_rank(sys.argv[1:])])
