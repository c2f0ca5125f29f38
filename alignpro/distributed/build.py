"""Compiles the DeepSpeed extensions that a job needs, before ranks wait for each other; or once per machine, in advance:

    python -m alignpro.distributed.build [--offload]

The libraries go to ``$TORCH_EXTENSIONS_DIR`` (``~/.cache/torch_extensions``). Each takes about a minute and needs a C++
compiler and ninja.
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
    """Put this Python's directory first on PATH, so that its `ninja` is used: another version would rebuild everything."""
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def compile_operators(*, offload: bool) -> None:
    """Compile the extensions that are missing: collectives on a CPU, and AdamW for an offloaded optimizer.

    Args:
        offload: Whether the optimizer is offloaded.

    Raises:
        ConfigError: An extension cannot be compiled.
    """
    use_own_ninja()
    from deepspeed.accelerator import get_accelerator  # takes two seconds to import, and is optional

    accelerator = get_accelerator()
    needed = {}
    if accelerator.device_name() == "cpu":
        needed["ShareMemCommBuilder"] = "DeepSpeed's collectives on a CPU"
    if offload:
        needed["CPUAdamBuilder"] = "AdamW for an offloaded optimizer"
    for name, purpose in needed.items():
        builder = accelerator.create_op_builder(name)
        if name == "ShareMemCommBuilder" and not (builder and builder.is_compatible()):
            continue  # not available for this CPU, where DeepSpeed works without it
        try:
            builder.load(verbose=False)
        except (OSError, RuntimeError, ImportError, subprocess.CalledProcessError) as error:
            raise ConfigError(
                f"{purpose} must be compiled, and cannot be: {_reason(error)}; install a C++ compiler and ninja, or "
                + ("use a set-up without offload" if name == "CPUAdamBuilder" else "train in one process")
            ) from error


def _reason(error: Exception) -> str:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"there is no compiler {compiler!r} on PATH"
    return str(error).strip()[-500:]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m alignpro.distributed.build", description=__doc__)
    parser.add_argument("--offload", action="store_true", help="also compile AdamW for an offloaded optimizer")
    given = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
    try:
        compile_operators(offload=given.offload)
    except ConfigError as problem:
        sys.exit(f"error: {problem}")
