"""Compiles what DeepSpeed needs for collectives on a CPU, once a machine, before a job whose ranks would wait for it:

    python -m alignpro.distributed.build

The library goes to ``$TORCH_EXTENSIONS_DIR`` (``~/.cache/torch_extensions``); it takes a C++ compiler and about a minute.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def use_own_ninja() -> None:
    """Have programs beside this Python found first: `ninja` is one, and another version of it would build all again."""
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def build_cpu_collectives() -> None:
    """Build the library, if it is not there.

    Raises:
        ImportError: DeepSpeed is not installed.
        RuntimeError: There is no compiler, or it failed.
    """
    use_own_ninja()
    os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    from deepspeed.accelerator import get_accelerator

    get_accelerator().create_op_builder("ShareMemCommBuilder").load()


if __name__ == "__main__":
    build_cpu_collectives()
