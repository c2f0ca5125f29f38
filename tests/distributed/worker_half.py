"""The program of ranks that train in float16 by DeepSpeed on a CPU.

DeepSpeed refuses this on processors without float16 instructions. PyTorch can compute it anyway, only slowly. That is
enough to test loss scaling, skipped updates and sharding.
"""

from __future__ import annotations

import sys

from deepspeed.accelerator import get_accelerator
from worker import main

if __name__ == "__main__":
    get_accelerator().is_fp16_supported = lambda: True
    main(sys.argv[-1])
