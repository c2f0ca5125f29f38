"""Compile csrc/ into operator libraries, once per version of the sources, of torch and of the compilers.

    python -m alignpro_kernels.build            build now, e.g. into an image or before a job with many processes

Otherwise the libraries are built on first use. They are cached in ``$ALIGNPRO_KERNELS_CACHE``, or in
``alignpro_kernels`` under ``$XDG_CACHE_HOME`` (default ``~/.cache``). csrc/cpu needs a C++20 compiler (``$CXX``, c++, g++
or clang++; on Linux not clang), csrc/cuda also needs nvcc (in ``$CUDA_HOME`` or on the PATH). Both use the headers of torch
but not those of Python, so one library works with every Python version. The CUDA library contains code for every GPU
generation that nvcc supports, so an image can be built without a GPU.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils import cpp_extension

logger = logging.getLogger("alignpro_kernels")

_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-maybe-uninitialized")
_OPENMP = () if sys.platform == "darwin" else ("-fopenmp",)
_CUDA_FLAGS = ("-std=c++20", "-O3", "-arch=all-major", "--threads=0", "-Xcompiler=-fPIC,-Wall")
_CLANG = "clang, which on Linux links another OpenMP library than torch, with threads of its own"


class BuildError(RuntimeError):
    """Raised when a library cannot be built; the message says why and what to do."""


def library() -> Path:
    """Return the path of the library of CPU operators, building it first if necessary.

    Raises:
        BuildError: There is no compiler, the cache directory is not writable, or the compiler failed.
    """
    compiler = _compiler(openmp=bool(_OPENMP))
    return _library("cpu", (compiler,), (compiler, *_FLAGS, *_OPENMP), (compiler, *_OPENMP))


def cuda_library() -> Path:
    """Return the path of the library of CUDA C++ operators, building it first if necessary, which needs no GPU.

    The CUDA runtime is linked statically, so its version may differ from that of torch; the driver must be recent enough
    for the version of nvcc.

    Raises:
        BuildError: There is no nvcc or C++ compiler, the cache directory is not writable, or a compiler failed.
    """
    if (nvcc := _nvcc()) is None:
        raise BuildError(
            "no nvcc found: install the CUDA toolkit and set CUDA_HOME to its directory, or put nvcc on the PATH"
        )
    host = _compiler()
    command = (nvcc, f"-ccbin={host}")
    return _library("cuda", (nvcc, host), (*command, *_CUDA_FLAGS), command)


def _library(name: str, programs: tuple[str, ...], compiling: tuple[str, ...], linking: tuple[str, ...]) -> Path:
    """Build csrc/``name`` with the given compile and link commands, unless it is cached; ``programs`` are the compilers."""
    sources = sorted((_source_directory() / name).iterdir())
    path = _cache_directory() / f"{name}-{_key(programs, compiling, sources)}.so"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path.with_suffix(".lock")):
            if not path.exists():  # another process may have built it while this one waited
                _build([source for source in sources if source.suffix in (".cpp", ".cu")], path, compiling, linking)
    except OSError as error:
        raise BuildError(
            f"{path.parent} cannot be written ({error}); set ALIGNPRO_KERNELS_CACHE to another directory"
        ) from error
    return path


def _build(sources: list[Path], path: Path, compiling: tuple[str, ...], linking: tuple[str, ...]) -> None:
    logger.info("building %s with %s; this is done once", path, compiling[0])
    start = time.perf_counter()
    includes = [flag for directory in cpp_extension.include_paths() for flag in ("-isystem", directory)]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        commands = [
            [*compiling, abi, *includes, "-c", str(source), "-o", str(target)]
            for source, target in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        libraries = [f"-L{directory}" for directory in cpp_extension.library_paths()]
        built = Path(scratch) / path.name
        _run([*linking, "-shared", *map(str, objects), *libraries, "-ltorch_cpu", "-lc10", "-o", str(built)])
        built.replace(path)
    logger.info("built in %.0f s", time.perf_counter() - start)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\nfailed with\n{done.stderr[-4000:]}")


def _compiler(*, openmp: bool = False) -> str:
    """Return the compiler; with ``openmp`` not clang, whose own OpenMP would not have the threads of torch's."""
    if named := os.environ.get("CXX"):
        if (found := shutil.which(named)) is None:
            raise BuildError(
                f"CXX is {named!r}, and no such program was found: set it to a compiler, without arguments"
            )
        if openmp and _is_clang(found):
            raise BuildError(f"CXX is {named!r}, {_CLANG}: set it to g++")
        return found
    found_any = [found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))]
    for found in found_any:
        if not (openmp and _is_clang(found)):
            return found
    if found_any:
        raise BuildError(f"{found_any[0]} is {_CLANG}: install g++ (Debian, Ubuntu: apt install g++)")
    raise BuildError("no C++ compiler found: install one (Debian, Ubuntu: apt install g++), or set CXX")


def _is_clang(compiler: str) -> bool:
    return "clang" in subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return (shutil.which(str(Path(home) / "bin" / "nvcc")) if home else None) or shutil.which("nvcc")


def _key(programs: tuple[str, ...], compiling: tuple[str, ...], sources: list[Path]) -> str:
    versions = [subprocess.run([x, "--version"], capture_output=True, text=True).stdout for x in programs]
    digest = hashlib.sha256(repr((torch.__version__, versions, compiling)).encode())
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def _source_directory() -> Path:
    """Return csrc/ of the source tree, or its copy in an installed package."""
    here = Path(__file__).resolve().parent
    for candidate in (here / "csrc", here.parent.parent / "csrc"):
        if candidate.is_dir():
            return candidate
    raise BuildError(f"the C++ sources are neither in {here / 'csrc'} nor in {here.parent.parent / 'csrc'}")


def _cache_directory() -> Path:
    if named := os.environ.get("ALIGNPRO_KERNELS_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignpro_kernels"


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # removes the directory of objects
    try:
        print(library())
        if torch.version.cuda is not None and _nvcc() is not None:
            print(cuda_library())
    except BuildError as error:
        raise SystemExit(f"alignpro_kernels.build: {error}") from None
