"""Compiles the parts of DeepSpeed that a job needs, before ranks wait for each other; or once a machine, beforehand:

    python -m alignpro.distributed.build [--offload]

The libraries go to ``$TORCH_EXTENSIONS_DIR`` (``~/.cache/torch_extensions``). Each takes about a minute, a C++ compiler
and ninja.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from alignpro.errors import ConfigError


def use_own_ninja() -> None:
    """Have programs beside this Python found first: `ninja` is one, and another version of it would build all again."""
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def compile_operators(*, offload: bool) -> None:
    """Compile what is not there yet: collectives on a CPU, AdamW of an optimizer that is offloaded.

    Args:
        offload: Whether the optimizer is.

    Raises:
        ConfigError: It cannot be compiled.
    """
    use_own_ninja()
    from deepspeed.accelerator import get_accelerator  # two seconds, and not every installation has it

    accelerator = get_accelerator()
    needed = {}
    if accelerator.device_name() == "cpu":
        needed["ShareMemCommBuilder"] = "DeepSpeed's collectives on a CPU"
    if offload:
        needed["CPUAdamBuilder"] = "an optimizer that is offloaded"
    for name, purpose in needed.items():
        builder = accelerator.create_op_builder(name)
        if name == "ShareMemCommBuilder" and not (builder and builder.is_compatible()):
            continue  # there is none for this CPU, and DeepSpeed does without
        try:
            builder.load(verbose=False)
        except (OSError, RuntimeError, ImportError, subprocess.CalledProcessError) as error:
            raise ConfigError(
                f"{purpose} must be compiled, and cannot be: {_reason(error)}; install a C++ compiler and ninja, or "
                + ("take a set-up without offload" if name == "CPUAdamBuilder" else "train in one process")
            ) from error


def _reason(error: Exception) -> str:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"there is no compiler {compiler!r} on PATH"
    return str(error).strip()[-500:]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m alignpro.distributed.build", description=__doc__)
    parser.add_argument("--offload", action="store_true", help="what an offloaded optimizer needs, too")
    given = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
    try:
        compile_operators(offload=given.offload)
    except ConfigError as problem:
        sys.exit(f"error: {problem}")
