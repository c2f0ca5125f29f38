"""The packages that are required, and the optional extras, in their installed versions."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from alignpro.doctor.findings import Finding, Status

EXTRAS = {
    "deepspeed": "ZeRO on one or several devices",
    "flash-attn": "attention kernels for CUDA: prefill and packed training",
    "gguf": "models from and to GGUF files, the format of llama.cpp",
    "serve": "alignpro serve: the proxy that rewrites prompts",
    "rivals": "alignpro rival: GEPA and MIPROv2 of dspy",
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


def requirements() -> Iterator[Finding]:
    """The package itself and what it requires."""
    try:
        required = _requirements()[""]
    except metadata.PackageNotFoundError:
        yield Finding("Packages", "alignpro", "problem", "runs from a folder and is not installed", "pip install -e .")
        return
    yield Finding("Packages", "alignpro", "ok", metadata.version("alignpro"))
    for requirement in required:
        status, detail = _installed(requirement)
        remedy = "" if status == "ok" else f"pip install '{_line(requirement)}'"
        yield Finding("Packages", requirement.name, "ok" if status == "ok" else "problem", detail, remedy)


def extras() -> Iterator[Finding]:
    """The optional packages, by extra."""
    try:
        declared = _requirements()
    except metadata.PackageNotFoundError:
        return  # reported under Packages
    for extra, requirements in declared.items():
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
        purpose = EXTRAS.get(extra)
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
