"""Train a prompter on several devices:

deepspeed launch/train_prompter.py CONFIG.yaml [key=value …] [--resume]
"""

from __future__ import annotations

import sys

from alignpro.cli import main
from alignpro.distributed.launcher import drop_local_rank, set_rank_from_slurm

if __name__ == "__main__":
    set_rank_from_slurm()
    main(["train", *drop_local_rank(sys.argv[1:])])
