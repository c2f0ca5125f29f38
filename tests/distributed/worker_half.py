"""What a rank runs where DeepSpeed is to train in float16 on a CPU.

DeepSpeed refuses that where the processor has no units for it. PyTorch computes it all the same, only slowly, and what
is looked at is not speed: the scaling of losses, the updates that are skipped, and the shards.
"""

from __future__ import annotations

import sys

from deepspeed.accelerator import get_accelerator
from worker import main

if __name__ == "__main__":
    get_accelerator().is_fp16_supported = lambda: True
    main(sys.argv[-1])
