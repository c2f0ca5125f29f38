"""A copy of the sources as it travels to a GPU machine, whose image lacks some packages, and wheels of those packages."""

from __future__ import annotations

import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
_GATHER = runpy.run_path(str(ROOT / "requirements" / "gather_wheels.py"))

_SITECUSTOMIZE = '''
import sys
from importlib.machinery import PathFinder

class Lacking:
    """Finds the modules that the image lacks only where the wheels have been installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if path is not None or name not in {modules!r}:
            return None
        spec = PathFinder.find_spec(name, [{site!r}])
        if spec is None:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        return spec

sys.meta_path.insert(0, Lacking)
'''


class Travelled:
    """The sources without .venv and history, on a machine with the packages of requirements/gpu_image.txt.

    Args:
        root: The directory to make.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()
        for name in ("alignpro", "benchmarks", "csrc", "kernels", "launch", "pyproject.toml", "requirements", "tests"):
            (root / name).symlink_to(ROOT / name)
        shutil.copytree(ROOT / ".ci", root / ".ci")
        present = _GATHER["names"](ROOT / "requirements" / "gpu_image.txt")
        missing = _GATHER["missing"](present, ROOT / "requirements" / "cpu.txt")
        self.lacks = [name for name in (each.partition("==")[0] for each in missing) if _installed(name)]
        """The distributions of cpu.txt that are installed here and missing there."""
        machine = root.with_name("machine")
        (machine / "bin").mkdir(parents=True)
        python = machine / "bin" / "python3"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        # Some version of what PyTorch needs is on every such machine, even where another one travels.
        needed = {
            _GATHER["normalised"](re.split(r"[^\w.-]", each)[0]) for each in importlib.metadata.requires("torch") or ()
        }
        hidden = [name for name in self.lacks if _GATHER["normalised"](name) not in needed]
        modules = {module for name in hidden for module in _modules(name)}
        code = _SITECUSTOMIZE.format(modules=modules, site=str(root / "build" / "gpu-site"))
        (machine / "sitecustomize.py").write_text(code)
        self._machine = machine

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run .ci/gpu."""
        kept = {name: value for name, value in os.environ.items() if name not in ("OUT", "PYTHON", "WHEELS", "COMMIT")}
        path = f"{self._machine / 'bin'}{os.pathsep}{os.environ['PATH']}"
        environment = kept | {"PATH": path, "PYTHONPATH": str(self._machine)} | variables
        return subprocess.run([self.root / ".ci" / "gpu", *arguments], env=environment, capture_output=True, text=True)


def repacked(names: Iterable[str], folder: Path) -> None:
    """Make wheels of installed distributions, with their requirements.txt, as gather_wheels.py leaves them."""
    folder.mkdir()
    lines = []
    for name in names:
        distribution = importlib.metadata.distribution(name)
        wheel = folder / f"{name.replace('-', '_')}-{distribution.version}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as file:
            for path in distribution.files or []:
                if ".." not in path.parts and "__pycache__" not in path.parts:
                    file.write(str(distribution.locate_file(path)), str(path))
        lines.append(f"{name}=={distribution.version}\n")
    (folder / "requirements.txt").write_text("".join(lines))


def _installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _modules(name: str) -> set[str]:
    """Return the top-level modules of a distribution."""
    files = importlib.metadata.distribution(name).files or []
    tops = {path.parts[0].removesuffix(".py") for path in files if path.suffix == ".py" and ".." not in path.parts}
    return {top for top in tops if top.isidentifier()}
