"""Compiles the DeepSpeed extensions that a job needs, before ranks wait for each other; or once per machine, in advance:

    python -m alignpro.distributed.deepspeed.compilation [--offload]

The libraries go to ``$TORCH_EXTENSIONS_DIR``, or to a directory of this virtual environment under
``~/.cache/torch_extensions``. Each takes about a minute and needs a C++ compiler and ninja.

PyTorch marks a build by a file ``lock``, which a killed process leaves behind, and for which all later ones would wait
forever without a message. So builds hold a lock of the operating system as well, which ends with its process: a
file that is there while this one holds it is stale.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alignpro.errors import ConfigError

logger = logging.getLogger(__name__)


def compile_operators(*, offload: bool) -> None:
    """Compile the extensions that are missing: collectives on a CPU, and AdamW for an offloaded optimizer.

    Args:
        offload: Whether the optimizer is offloaded.

    Raises:
        ConfigError: An extension cannot be compiled.
    """
    _prefer_own_ninja()
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
            with build_lock(builder.name):
                builder.load(verbose=False)  # a second load in this process does nothing
        except (OSError, RuntimeError, ImportError, subprocess.CalledProcessError) as error:
            raise ConfigError(
                f"{purpose} must be compiled, and cannot be: {_reason(error)}; install a C++ compiler and ninja, or "
                + ("use a set-up without offload" if name == "CPUAdamBuilder" else "train in one process")
            ) from error


def _prefer_own_ninja() -> None:
    """Put this Python's directory first on PATH, so that its `ninja` is used: another version would rebuild everything."""
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


@contextmanager
def build_lock(extension: str) -> Iterator[None]:
    """Wait until no other job of this environment builds, and remove the lock file of a build that was killed.

    Args:
        extension: The name of its directory.
    """
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        # Another environment's headers are elsewhere: builds in one directory would replace each other's.
        from torch.utils.cpp_extension import get_default_build_root

        environment = hashlib.sha256(f"{sys.prefix} {sys.version}".encode()).hexdigest()[:12]
        os.environ["TORCH_EXTENSIONS_DIR"] = str(Path(get_default_build_root()) / f"alignpro_{environment}")
    directory = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "alignpro.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that compiles in %s", directory)
            fcntl.flock(file, fcntl.LOCK_EX)
        lock = directory / extension / "lock"
        if lock.exists():
            logger.warning("%s was left by a build that was killed: removed", lock)
            lock.unlink()
        yield


def _reason(error: Exception) -> str:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"there is no compiler {compiler!r} on PATH"
    return str(error).strip()[-500:]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m alignpro.distributed.deepspeed.compilation", description=__doc__)
    parser.add_argument("--offload", action="store_true", help="also compile AdamW for an offloaded optimizer")
    given = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
    try:
        compile_operators(offload=given.offload)
    except ConfigError as problem:
        sys.exit(f"error: {problem}")
