"""Gather the packages that a GPU machine without a network lacks, as wheels in a folder that travels with the sources.

    python requirements/gather_wheels.py [--to .wheels] [--python 3.12] [--present FILE] [--also NAME…]

The packages are those of cpu.txt that an image does not have (gpu_image.txt), in the versions that the tests ran with. A
package without a wheel is built from its source distribution, which must be pure Python, as DeepSpeed is if none of its
operators are compiled. `.ci/gpu` installs the folder. It needs pip and, to build, setuptools and torch.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17, 12, 5)] + ["manylinux2014_x86_64"]


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--to", type=Path, default=Path(".wheels"), help="the folder (default: .wheels)")
    parser.add_argument("--python", default="3.12", help="Python of the GPU machine (default: 3.12)")
    parser.add_argument("--present", type=Path, default=HERE / "gpu_image.txt", help="packages that it has: pip freeze")
    parser.add_argument("--also", nargs="*", default=[], help="further packages, such as liger-kernel")
    options = parser.parse_args(arguments)
    wanted = missing(names(options.present), HERE / "cpu.txt") + options.also
    options.to.mkdir(parents=True, exist_ok=True)
    for old in options.to.glob("*.whl"):
        old.unlink()
    for requirement in wanted:
        gather(requirement, options.to, options.python)
    wheels = sorted(options.to.glob("*.whl"))
    lines = ["==".join(wheel.name.split("-")[:2]) for wheel in wheels]
    (options.to / "requirements.txt").write_text("".join(f"{line}\n" for line in lines))
    size = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{options.to}: {len(wheels)} wheels, {size / (1 << 20):.1f} MiB")


def names(file: Path) -> set[str]:
    """Return the normalised names in a file of requirements, or in the output of ``pip freeze``."""
    lines = (line.strip() for line in file.read_text().splitlines())
    return {normalised(re.split(r"[^\w.-]", line)[0]) for line in lines if line and line[0] not in "#-"}


def missing(present: set[str], pins: Path) -> list[str]:
    """Return the pinned requirements whose packages are not present, without their markers."""
    lines = [line.partition(";")[0].strip() for line in pins.read_text().splitlines()]
    return [line for line in lines if line and line[0] != "#" and normalised(line.partition("==")[0]) not in present]


def normalised(name: str) -> str:
    """Return a package's name as PEP 503 normalises it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def gather(requirement: str, folder: Path, python: str) -> None:
    """Download the wheel of a requirement, or build it.

    Raises:
        SystemExit: There is no source distribution either, or what it gives depends on the machine.
    """
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    target += [word for platform in PLATFORMS for word in ("--platform", platform)]
    if pip("download", "--no-deps", *target, "--dest", str(folder), requirement) == 0:
        return
    before = set(folder.glob("*.whl"))
    print(f"{requirement}: there is no wheel for Python {python} on Linux; building it", flush=True)
    if pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), requirement):
        sys.exit(f"{requirement}: there is no wheel, and it could not be built; see pip's message above")
    for built in set(folder.glob("*.whl")) - before:
        if not built.name.endswith("-none-any.whl"):
            built.unlink()
            sys.exit(f"{requirement}: {built.name} runs on this machine only; build it on one like the GPU machine")


def pip(command: str, *arguments: str) -> int:
    """Run pip and return its exit status; DeepSpeed then compiles none of its operators."""
    run = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", command, *arguments]
    return subprocess.run(run, env=os.environ | {"DS_BUILD_OPS": "0"}).returncode


if __name__ == "__main__":
    main()
