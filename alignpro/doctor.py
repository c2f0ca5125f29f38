"""`alignpro doctor`: what is installed, what works on this machine, and why the rest does not.

The requirements are read from the package's own metadata, so they never disagree with pyproject.toml. Nothing here raises
because a package or a tool is missing or broken: its purpose is to report that.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    import torch

    from alignpro.engine import EngineStats

Status: TypeAlias = Literal["ok", "off", "problem"]
_MARKS = {"ok": "[green]✓[/green]", "off": "[dim]–[/dim]", "problem": "[red]✗[/red]"}

_EXTRAS = {
    "deepspeed": "ZeRO on one or several devices",
    "flash-attn": "attention kernels for CUDA",
    "wandb": "metrics to Weights & Biases",
    "benchmarks": "the libraries that the benchmarks compare with",
    "dev": "tests, lint and types",
}
"""What each extra of pyproject.toml is for."""

_BROKEN = {
    "deepspeed": (
        SpecifierSet(">=0.18.7,<0.19"),
        "ZeRO-1 and ZeRO-2 fail on the CPU with “Output 0 of Split is a view…”",
    ),
}
"""Versions that install but do not work: package → versions and symptom."""

_BACKENDS = {
    "triton": "runs on the GPU",
    "cpp": "runs on the CPU",
    "torch": "runs where no faster one does",
    "reference": "runs only when requested by name: the specification",
}
"""When each available kernel backend is used."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    section: str
    """The heading under which it is printed: ``Machine``, ``Packages``, ``Devices``, …"""
    name: str
    status: Status
    """``ok``: works. ``off``: optional and not available. ``problem``: required but missing, or present but broken."""
    detail: str
    """Version, size or reason."""
    remedy: str = ""
    """What to do about it: a command if there is one."""


def diagnose() -> list[Finding]:
    """Check the machine, the packages and the project's own backends.

    Returns:
        The findings, grouped by section.
    """
    probes: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("Machine", _machine),
        ("Packages", _packages),
        ("Devices", _torch),
        ("Devices", _devices),
        ("Devices", _triton),
        ("Kernels", _kernels),
        ("Generation", _generation),
        ("Compilers", _compilers),
        ("Extras", _extras),
        ("Meta-prompts", _meta_prompts),
    ]
    return [finding for section, probe in probes for finding in _told(section, probe)]


def print_diagnosis(console: Console | None = None) -> bool:
    """Print what `diagnose` finds, by section.

    Returns:
        Whether everything that training needs is available.
    """
    console = console or Console()
    findings = diagnose()
    for section in dict.fromkeys(finding.section for finding in findings):
        table = Table(
            box=None, show_header=False, pad_edge=False, title=section, title_justify="left", title_style="bold"
        )
        table.add_column(width=1)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for finding in (each for each in findings if each.section == section):
            remedy = f"\n[cyan]→ {escape(finding.remedy)}[/cyan]" if finding.remedy else ""
            table.add_row(_MARKS[finding.status], escape(finding.name), escape(finding.detail) + remedy)
        console.print(table)
        console.print()
    problems = [finding for finding in findings if finding.status == "problem"]
    if problems:
        console.print(f"[red]To fix: {escape(', '.join(each.name for each in problems))}[/red]")
    else:
        console.print("[green]Everything that training needs is available.[/green]")
    return not problems


def _told(section: str, probe: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield the probe's findings, followed by one more if an import fails in it."""
    try:
        yield from probe()
    except (ImportError, OSError) as error:  # OSError: a shared library that an extension needs is missing
        yield Finding(section, probe.__name__.strip("_"), "problem", f"cannot be checked: {error}", "make setup")


def _machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("Machine", "system", "ok", f"{platform.system()} {platform.machine()}, {cores} cores")
    yield Finding("Machine", "python", "ok", f"{platform.python_version()} at {sys.executable}")


def _packages() -> Iterator[Finding]:
    try:
        requirements = _requirements()
    except metadata.PackageNotFoundError:
        yield Finding("Packages", "alignpro", "problem", "runs from a folder and is not installed", "pip install -e .")
        return
    yield Finding("Packages", "alignpro", "ok", metadata.version("alignpro"))
    for requirement in requirements.get("", []):
        status, detail = _installed(requirement)
        remedy = "" if status == "ok" else f"pip install '{_line(requirement)}'"
        yield Finding("Packages", requirement.name, "ok" if status == "ok" else "problem", detail, remedy)


def _extras() -> Iterator[Finding]:
    try:
        extras = _requirements()
    except metadata.PackageNotFoundError:
        return  # reported under Packages
    for extra, requirements in extras.items():
        if not extra:
            continue
        states = {requirement.name: _installed(requirement) for requirement in requirements}
        statuses = {status for status, _ in states.values()}
        status: Status = "problem" if "problem" in statuses else "off" if "off" in statuses else "ok"
        if statuses == {"off"}:
            detail = "not installed"
        else:
            detail = ", ".join(detail if name == extra else f"{name} {detail}" for name, (_, detail) in states.items())
        remedy = "" if status == "ok" else f"pip install 'alignpro[{extra}]'"
        purpose = _EXTRAS.get(extra)
        yield Finding("Extras", extra, status, f"{purpose}: {detail}" if purpose else detail, remedy)


def _requirements() -> dict[str, list[Requirement]]:
    """Return the requirements of the package (key ``""``) and of each extra, on this platform.

    Raises:
        PackageNotFoundError: The package is not installed.
    """
    package = metadata.distribution("alignpro")
    needed: dict[str, list[Requirement]] = {"": []}
    needed |= {extra: [] for extra in package.metadata.get_all("Provides-Extra", [])}
    for requirement in map(Requirement, package.requires or []):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            needed[""].append(requirement)
            continue
        for extra in needed:
            if extra and marker.evaluate({"extra": extra}):
                needed[extra].append(requirement)
    return needed


def _installed(requirement: Requirement) -> tuple[Status, str]:
    """Return whether a requirement is met, and the version found or what is wrong with it."""
    try:
        version: str | None = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return "off", "not installed"
    if not version:
        return "problem", "damaged: its metadata has no version"
    broken, what_happens = _BROKEN.get(requirement.name, (None, ""))
    if broken is not None and broken.contains(version, prereleases=True):
        return "problem", f"{version} is known to be broken: {what_happens}"
    if not requirement.specifier.contains(version, prereleases=True):
        return "problem", f"{version} does not meet {requirement.specifier}"
    return "ok", version


def _line(requirement: Requirement) -> str:
    """Format a requirement's name and version range, without its marker, which has been evaluated."""
    return f"{requirement.name}{requirement.specifier}"


def _torch() -> Iterator[Finding]:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else None
    build = f"ROCm {torch.version.hip}" if torch.version.hip else build
    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding("Devices", "torch build", "ok", f"{torch.__version__}, {build or 'CPU only'}")
    yield Finding("Devices", "cpu", "ok", f"{torch.get_num_threads()} threads, vector instructions {capability}")


def _devices() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            architecture = (
                properties.gcnArchName if torch.version.hip else f"capability {properties.major}.{properties.minor}"
            )
            memory = f"{properties.total_memory / 2**30:.1f} GiB"
            yield Finding("Devices", f"cuda:{index}", "ok", f"{properties.name}, {memory}, {architecture}")
        return
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    driver = _driver()
    if accelerator is not None:
        yield Finding("Devices", accelerator.type, "ok", f"{torch.accelerator.device_count()} devices")
    elif driver is None:
        yield Finding("Devices", "gpu", "off", "none found: everything runs on the CPU")
    elif torch.version.cuda is None and torch.version.hip is None:
        detail = f"{driver} is present, but torch is built for the CPU only"
        yield Finding("Devices", "gpu", "problem", detail, "make setup, which installs the GPU build on such a machine")
    else:
        detail = f"{driver} is present, but torch sees no device"
        yield Finding("Devices", "gpu", "problem", detail, "check the driver's version and CUDA_VISIBLE_DEVICES")


def _driver() -> str | None:
    """Return a sign of a GPU driver, detected as in the Makefile, or None."""
    for tool in ("nvidia-smi", "rocm-smi"):
        if shutil.which(tool) and _output(tool) is not None:
            return tool
    return "/dev/nvidia0" if Path("/dev/nvidia0").exists() else None


def _triton() -> Iterator[Finding]:
    import torch

    try:
        import triton
    except ModuleNotFoundError:
        yield Finding("Devices", "triton", "off", "not installed: the Triton kernels cannot run", "make setup")
        return
    if os.environ.get("TRITON_INTERPRET") == "1":
        yield Finding("Devices", "triton", "ok", f"{triton.__version__}, interpreted: on the CPU, for tests")
    elif torch.cuda.is_available():
        yield Finding("Devices", "triton", "ok", f"{triton.__version__}, compiled")
    else:
        detail = f"{triton.__version__}, no device to run on"
        yield Finding("Devices", "triton", "off", detail, "TRITON_INTERPRET=1 interprets the kernels on the CPU")


def _kernels() -> Iterator[Finding]:
    from alignpro_kernels import backends, cpp_library, flash_attention

    for name, reason in backends().items():
        if reason is not None:
            again = "python -m alignpro_kernels.build retries and shows the full output; until then torch is used"
            yield Finding("Kernels", name, "off", _in_short(reason), again if name == "cpp" else "")
        else:
            instructions = f", with {cpp_library.instructions()} instructions" if name == "cpp" else ""
            yield Finding("Kernels", name, "ok", _BACKENDS[name] + instructions)
    reason = flash_attention.unavailable()
    detail = "attention for generation: runs only when requested by name"
    yield Finding("Kernels", "flash", "off" if reason else "ok", reason or detail)


def _generation() -> Iterator[Finding]:
    """Run a few chains of the demo's untrained models through the engine: on the CPU, and on a GPU if there is one."""
    import torch

    from alignpro.errors import AlignProError
    from alignpro_kernels import BackendError

    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        try:
            stats = _run_chains(torch.device(device))
        except (AlignProError, BackendError, RuntimeError) as error:
            yield Finding(
                "Generation", device, "problem", _in_short(str(error)), "see the findings under Devices and Kernels"
            )
        else:
            yield Finding("Generation", device, "ok", _describe(stats))


def _run_chains(device: torch.device) -> EngineStats:
    """Generate 4 prompts → 4 rewrites each → 2 responses each; return the engine's statistics.

    Raises:
        ModelError: A sequence failed.
    """
    import torch

    from alignpro.demo.models import prompter_tokenizer, target_tokenizer, untrained_prompter, untrained_target
    from alignpro.engine import Engine, SamplingParams, TokenPrompt
    from alignpro.errors import ModelError
    from alignpro.models.language_model import LanguageModel

    with torch.random.fork_rng(), device:
        policy = LanguageModel(untrained_prompter().eval(), prompter_tokenizer(), "prompter")
        target = LanguageModel(untrained_target().eval(), target_tokenizer(), "target")
    engine = Engine({"policy": policy, "target": target}, audit=True)
    template = list(range(20, 52))  # the prefix of every prompt and every rewrite
    chains = engine.run_chains(
        [[*template, i] for i in range(4)],
        rewrite=SamplingParams(max_tokens=8, n=4),
        to_target=lambda _, sample: TokenPrompt(template + [token % target.vocabulary for token in sample.tokens]),
        respond=SamplingParams(max_tokens=8, n=2),
    )
    for completion in (c for group in chains for chain in group for c in (chain.sample, *chain.responses)):
        if completion.error:
            raise ModelError(completion.error)
    return engine.stats


def _describe(stats: EngineStats) -> str:
    computed = ", ".join(f"{kind} {count}" for kind, count in stats.computed.items())
    pages = ", ".join(f"{model} {count}" for model, count in stats.peak_pages.items())
    ticks = ", ".join(f"{how} {count}" for how, count in stats.decode_ticks.items())
    seconds = ", ".join(f"{phase} {spent:.3f} s" for phase, spent in stats.seconds.items())
    return (
        f"{stats.sequences} sequences in {stats.run_seconds:.2f} s ({seconds}); tokens computed: {computed}, "
        f"{stats.floor_ratio:.2f}× the minimum; {stats.cache_hit_tokens} from the cache; pages: {pages}; "
        f"{stats.preemptions} preemptions" + (f"; decode ticks: {ticks}" if ticks else "")
    )


def _in_short(reason: str) -> str:
    """Shorten a reason to one line: for a failed command, the first error of its output, else the last line."""
    command, *output = [line.strip() for line in reason.splitlines() if line.strip()]
    said = [line for line in output if line != "failed with"]
    if not output:
        return command
    error = next((line for line in said if re.search(r"\berror\b", line, re.IGNORECASE)), None)
    return f"{Path(command.split()[0]).name} failed: {error or (said or ['no output'])[-1]}"


def _compilers() -> Iterator[Finding]:
    # The compilers that the kernel build looks for, in the same order.
    compilers = [name for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name]
    cuda_home = os.environ.get("CUDA_HOME")
    cuda = [str(Path(cuda_home) / "bin" / "nvcc"), "nvcc"] if cuda_home else ["nvcc"]
    for name, programs, remedy in (
        ("c++", compilers, "the CPU kernels need one: install g++ with the system's package manager"),
        ("nvcc", cuda, "optional, for CUDA sources: install the CUDA toolkit, or set CUDA_HOME"),
    ):
        path = next(filter(None, map(shutil.which, programs)), None)
        output = _output(path, "--version") if path else None
        if path is None:
            yield Finding("Compilers", name, "off", f"{', '.join(programs)} not found", remedy)
        elif output is None:
            yield Finding("Compilers", name, "problem", f"{path} does not run", remedy)
        else:
            version = re.search(r"release \S+|\d+(\.\d+)+", output)
            yield Finding("Compilers", name, "ok", f"{version[0].rstrip(',') if version else 'runs'}, {path}")


def _output(program: str, *arguments: str) -> str | None:
    """Return what a program prints, or None if it fails, hangs or cannot be started."""
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=20, check=True, stdin=subprocess.DEVNULL
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout


def _meta_prompts() -> Iterator[Finding]:
    from alignpro.prompting.meta_prompt import available_meta_prompts

    for name, description in available_meta_prompts().items():
        yield Finding("Meta-prompts", name, "ok", description)
