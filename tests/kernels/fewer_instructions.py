"""Run tests again with a smaller instruction set than the processor's, as csrc/cpu uses on older processors.

    python tests/kernels/fewer_instructions.py avx2 tests/kernels/test_decoder.py       within ATEN_CPU_CAPABILITY=avx2

All other tests use the largest instruction set of the processor.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from fast_backends import need

from alignpro_kernels import cpp_library

PYTORCH_NAMES = {
    "generic": "default",
    "neon": "",
    "avx2": "avx2",
    "avx512": "avx512",
    "avx512_bf16": "avx512",
    "amx": "avx512",
}
"""Our names → PyTorch's names, ascending on each processor."""
FEWER = ["generic", "avx2", "avx512"]


def splits_states() -> bool:
    """Whether states are split in two for products with weights in bfloat16, as they are where AMX multiplies them."""
    return cpp_library.unavailable() is None and cpp_library.state_parts() == 2


def run_with(instructions: str, *arguments: str) -> None:
    """Run pytest in a process of its own, since the instruction set is chosen once per process; it must pass.

    Skips if there is no compiler, or if the processor has no larger instruction set.
    """
    need("cpp")
    ranks = list(PYTORCH_NAMES)
    if ranks.index(instructions) >= ranks.index(here := cpp_library.instructions()):
        pytest.skip(f"{instructions}: the other tests run with {here}")
    command = [sys.executable, __file__, instructions, *arguments]
    environment = os.environ | {
        "ATEN_CPU_CAPABILITY": PYTORCH_NAMES[instructions],
        "ALIGNPRO_CPU_BFLOAT16": "widened",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


if __name__ == "__main__":
    assert cpp_library.unavailable() is None, cpp_library.unavailable()
    assert cpp_library.instructions() == sys.argv[1], cpp_library.instructions()
    raise SystemExit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *sys.argv[2:]]))
