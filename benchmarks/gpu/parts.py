"""What the run consists of: parts, each of which is commands with a time limit, on a GPU or as a trial on a CPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.hardware import ROOT

HEADS = ("2048x128256", "qwen2.5-1.5b", "llama-3.1-8b")
"""D × V of the heads that the kernels are measured at: of Llama-3.2-1B, Qwen2.5-1.5B and Llama-3.1-8B."""
PATIENCE = 3
"""By how much a trial may take longer: Triton's interpreter is slow, and a CPU is shared."""
KERNEL_ENTRANTS = ("ours-triton", "naive", "liger*")


@dataclass(frozen=True)
class Command:
    """A process, and how long it may take."""

    name: str
    arguments: list[str]
    """Of the Python interpreter."""
    seconds: float


@dataclass(frozen=True)
class Place:
    """Where the run takes place."""

    device: str
    """``cuda`` or ``cpu``."""
    tiny: bool
    """A trial of everything with tiny shapes; its figures are not valid."""
    results: Path
    """The folder of the device's results."""

    def file(self, name: str) -> str:
        """Return the path of a results file."""
        return str(self.results / f"{name}.json")


def smoke(place: Place) -> list[Command]:
    """Return the independent checks; see `smoke`."""
    seconds = 74 * (PATIENCE if place.tiny else 1)
    options = ["--seconds", str(seconds), "--json", place.file("smoke")]
    return [_module("smoke", "benchmarks.gpu.smoke", 80, place, *options)]


def tests(place: Place) -> list[Command]:
    """Return the tests marked gpu; their files are named, so that no other test has to be importable."""
    files = [str(file.relative_to(ROOT)) for file in gpu_tests()]
    options = ["-m", "gpu", "-p", "no:cacheprovider", "--tb=short", "-rfE", "--durations=5"]
    options += ["-o", "faulthandler_timeout=60", "-o", "faulthandler_exit_on_timeout=true"]
    if importlib.util.find_spec("xdist") is not None:
        options += ["-n", "2" if place.tiny else "8"]
    if place.tiny:
        files = files[:1]
    return [Command("tests", ["-m", "pytest", *options, *files], 150)]


def kernels(place: Place) -> list[Command]:
    """Return the operators of the head at three heads, beside bare products."""
    options = ["--rows", "4096", "--rounds", "7", "--case-seconds", "2", "--dtype", "bfloat16"]
    options += [word for head in HEADS for word in ("--shape", head)]
    options += [word for name in KERNEL_ENTRANTS for word in ("--entrants", name)]
    if place.tiny:
        options = ["--quick", "--entrants", "ours-torch", "--entrants", "naive", "--cases", "policy"]
    return [_module("kernels", "benchmarks.kernels", 120, place, *options, "--out", str(place.results))]


def engine(place: Place) -> list[Command]:
    """Return a decode tick taken apart, and a workload of chains beside transformers' `generate`."""
    quick = ["--quick"] if place.tiny else []
    options = ["--workload", "gpu", "--rounds", "1", "--entrants", "ours", "--entrants", "hf-generate", *quick]
    return [
        _module("tick", "benchmarks.engine.tick", 60, place, *quick, "--json", place.file("tick")),
        _module("engine", "benchmarks.engine", 120, place, *options, "--json", place.file("engine")),
    ]


def training(place: Place) -> list[Command]:
    """Return a training step under ZeRO-3 by phase, with its peak memory beside the plan."""
    options = ["--workload", "gpu", "--setup", "z3", "--steps", "2", "--warmup", "1", "--ranks", "1"]
    options += ["--dtype", "bfloat16", *(["--quick"] if place.tiny else [])]
    return [_module("training", "benchmarks.distributed", 180, place, *options, "--json", place.file("distributed"))]


PARTS: dict[str, Callable[[Place], list[Command]]] = {
    "smoke": smoke,
    "tests": tests,
    "kernels": kernels,
    "engine": engine,
    "training": training,
}


def gpu_tests() -> list[Path]:
    """Return the test files with tests that need a GPU."""
    return sorted(
        file for file in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in file.read_text(encoding="utf-8")
    )


def environment(place: Place) -> dict[str, str]:
    """Return the variables of all commands: output as it comes, no network; on a CPU, kernels in Triton's interpreter."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    variables = {
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if place.device == "cpu":
        variables |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return dict(os.environ) | variables


def _module(name: str, module: str, seconds: float, place: Place, *arguments: str) -> Command:
    patience = PATIENCE if place.tiny else 1
    return Command(name, ["-m", module, "--device", place.device, *arguments], patience * seconds)
