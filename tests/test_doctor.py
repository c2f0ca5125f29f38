"""`alignpro doctor` reports what is installed, and does not fail on what is missing or broken."""

from __future__ import annotations

import io
import itertools
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_runs import fork

from alignpro.doctor import Finding, diagnose, print_diagnosis
from alignpro.doctor.findings import first_error
from alignpro.doctor.kernels import attention_libraries
from alignpro.doctor.packages import EXTRAS
from alignpro.models import packed_choice
from alignpro.prompting.meta_prompt import available_meta_prompts
from alignpro_kernels import backends, cpp_library, linear_logprob, prefill_choice, varlen_kernels
from alignpro_kernels.timed_trial import Choice
from alignpro_kernels.varlen_reference import ReferenceKernels


def found(findings: list[Finding], section: str, name: str) -> Finding:
    return next(each for each in findings if each.section == section and each.name == name)


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def distribution(site: Path, name: str, version: str) -> None:
    """Write a package's metadata for `importlib.metadata`."""
    directory = site / f"{name}-{version}.dist-info"
    directory.mkdir(parents=True)
    (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_every_required_package_is_found_in_its_installed_version() -> None:
    findings = diagnose()
    for name in ("torch", "transformers", "datasets", "peft"):
        finding = found(findings, "Packages", name)
        assert (finding.status, finding.detail) == ("ok", metadata.version(name))


def test_findings_of_a_section_are_contiguous() -> None:
    headings = [section for section, _ in itertools.groupby(diagnose(), key=lambda each: each.section)]
    assert len(headings) == len(set(headings))


def test_every_backend_and_meta_prompt_is_listed() -> None:
    findings = diagnose()
    for name, reason in backends().items():
        finding = found(findings, "Kernels", name)
        assert (finding.status == "ok") == (reason is None)
        assert reason is None or "\n" in reason or reason == finding.detail
    for kernels in varlen_kernels.KERNELS:
        finding = found(findings, "Attention", kernels.name)
        assert finding.status == "ok" or finding.detail == kernels.unavailable()
    listed = {each.name: each.detail for each in findings if each.section == "Meta-prompts"}
    assert listed == available_meta_prompts()


def test_what_a_trial_chose_for_attention_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library(ReferenceKernels):
        name = "flash-attn 3 (3.0.0)"

    monkeypatch.setattr(varlen_kernels, "KERNELS", (Library(),))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    choices = iter([Choice("flash-attn 3 (3.0.0)", {"flash-attn 3 (3.0.0)": 1e-4, "triton": 2e-4}, {})])

    def measured(*_: object) -> Choice:
        for choice in choices:
            return choice
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(prefill_choice, "measured", measured)
    monkeypatch.setattr(packed_choice, "measured", measured)
    library, prefill, trial = attention_libraries()
    assert (library.name, library.status) == ("flash-attn 3 (3.0.0)", "ok")
    assert prefill.detail == (
        "flash-attn 3 (3.0.0) (flash-attn 3 (3.0.0) 0.100 ms; triton 0.200 ms), "
        "for 32 heads on 8 of 128, pages of 16, bfloat16"
    )
    assert (trial.status, trial.detail) == ("problem", "CUDA out of memory")


def test_the_instruction_set_of_the_cpus_kernels_is_named() -> None:
    if (reason := backends()["cpp"]) is not None:
        pytest.skip(reason)
    finding = found(diagnose(), "Kernels", "cpp")
    assert finding.detail == f"runs on the CPU, with {cpp_library.instructions()} instructions"
    narrow = found(diagnose(), "Kernels", "bfloat16")
    assert narrow.status == ("off" if cpp_library.instructions() == "generic" else "ok")


def test_the_engine_runs_and_reports_its_statistics() -> None:
    finding = found(diagnose(), "Generation", "cpu")
    assert finding.status == "ok"
    for said in (
        r"^48 sequences in ",
        "prefill",
        "decode",
        r"plan \d",
        r"forward \d",
        r"sample \d",
        "policy",
        "target",
    ):
        assert re.search(said, finding.detail), said
    assert "; 0 preemptions" in finding.detail
    assert float(re.search(r"([\d.]+)× the minimum", finding.detail)[1]) <= 1.1  # type: ignore[index]


def test_an_engine_that_cannot_run_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignpro.demo.models.CONTEXT", 16)
    finding = found(diagnose(), "Generation", "cpu")
    assert finding.status == "problem"
    assert "do not fit in the context of 16 tokens" in finding.detail


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("no compiler found: install one", "no compiler found: install one"),
        ("/bin/g++ a.cpp\nfailed with\nIn a.h:1:\na.h:7:1: fatal error: b.h\nstopped.", "a.h:7:1: fatal error: b.h"),
        ("/bin/g++ error.cpp\nfailed with\nKilled\n\n", "Killed"),
        ("/bin/g++ a.cpp\nfailed with\n", "no output"),
    ],
)
def test_a_reason_of_several_lines_is_shortened_to_one(reason: str, told: str) -> None:
    assert first_error(reason) == ("g++ failed: " if "\n" in reason else "") + told


def diagnose_without_a_compiler(compiler: str, cache: str) -> None:
    """Print the finding about the kernels, and a probability that an operator gives all the same."""
    os.environ |= {"CXX": compiler, "ALIGNPRO_KERNELS_CACHE": cache}
    finding = found(diagnose(), "Kernels", "cpp")
    logprob = linear_logprob(torch.zeros(1, 2), torch.zeros(4, 2), torch.tensor([3])).logprob
    print(finding.status, finding.detail, finding.remedy, logprob.exp().item(), sep="\n", flush=True)


def test_a_failed_build_is_reported_and_operators_still_run(tmp_path: Path) -> None:
    program(tmp_path / "g++", "[ $1 = --version ] && exit; echo 'a.h:1:' >&2; echo 'a.h:7: error: no such' >&2; exit 1")
    log = tmp_path / "log"
    process = fork(diagnose_without_a_compiler, log, str(tmp_path / "g++"), str(tmp_path / "cache"))
    process.join(120)
    assert process.exitcode == 0, log.read_text()
    status, detail, remedy, probability = log.read_text().splitlines()[-4:]
    assert (status, float(probability)) == ("off", 0.25)
    assert detail == "g++ failed: a.h:7: error: no such"
    assert remedy.startswith("python -m alignpro_kernels.build")


def test_every_extra_has_a_purpose_and_a_line_that_installs_it() -> None:
    declared = set(metadata.metadata("alignpro").get_all("Provides-Extra") or [])
    assert declared == set(EXTRAS)
    for finding in (each for each in diagnose() if each.section == "Extras"):
        assert finding.status == "ok" or finding.remedy == f"pip install 'alignpro[{finding.name}]'"


@pytest.mark.parametrize(
    ("version", "status", "said"),
    [
        ("0.18.7", "problem", "known to be broken"),
        ("0.18.9", "problem", "known to be broken"),
        ("0.17.0", "problem", "does not meet >=0.19.8"),
        ("0.19.8", "ok", "0.19.8"),
    ],
)
def test_a_broken_deepspeed_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, status: str, said: str
) -> None:
    distribution(tmp_path, "deepspeed", version)
    monkeypatch.syspath_prepend(tmp_path)
    finding = found(diagnose(), "Extras", "deepspeed")
    assert finding.status == status
    assert said in finding.detail


def test_a_required_package_that_is_too_old_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(tmp_path, "datasets", "1.0")
    monkeypatch.syspath_prepend(tmp_path)
    finding = found(diagnose(), "Packages", "datasets")
    assert finding.status == "problem"
    assert finding.detail.startswith("1.0 does not meet >=")
    assert finding.remedy.startswith("pip install 'datasets>=")


def test_a_half_installed_package_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "datasets-5.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert "damaged" in found(diagnose(), "Packages", "datasets").detail


def test_nothing_is_raised_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None\nfrom alignpro.doctor import print_diagnosis; print_diagnosis()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "import of torch halted" in done.stdout
    assert "Compilers" in done.stdout  # later sections are still reported
    assert "To fix: " in done.stdout


@pytest.mark.parametrize(
    ("module", "section", "name", "status"),
    [
        ("triton", "Devices", "triton", "off"),
        ("alignpro_kernels", "Kernels", "kernels", "problem"),
        ("alignpro.prompting.meta_prompt", "Meta-prompts", "meta_prompts", "problem"),
    ],
)
def test_a_part_that_cannot_be_imported_is_reported(
    monkeypatch: pytest.MonkeyPatch, module: str, section: str, name: str, status: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # makes its import fail
    findings = diagnose()
    assert found(findings, section, name).status == status
    assert found(findings, "Packages", "torch").status == "ok"


def test_triton_runs_interpreted_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreted" in found(diagnose(), "Devices", "triton").detail


def test_compilers_are_run_and_not_only_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(
        tmp_path / "bin" / "nvcc", "echo 'nvcc: NVIDIA (R) Cuda compiler driver'; echo 'tools, release 13.1, V13.1.5'"
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    findings = diagnose()
    assert found(findings, "Compilers", "nvcc").detail == f"release 13.1, {tmp_path / 'bin' / 'nvcc'}"
    assert found(findings, "Compilers", "c++").detail == "no-such-compiler, c++, g++, clang++ not found"
    program(tmp_path / "clang++", "exit 3")
    assert found(diagnose(), "Compilers", "c++").detail == f"{tmp_path / 'clang++'} does not run"


def test_a_driver_beside_a_cpu_build_of_torch_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if torch.version.cuda or torch.version.hip:
        pytest.skip("torch is a GPU build here")
    program(tmp_path / "nvidia-smi", "echo GPU 0")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    finding = found(diagnose(), "Devices", "gpu")
    assert finding.status == "problem"
    assert "built for the CPU only" in finding.detail


def test_the_output_ends_with_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def verdict() -> tuple[bool, str]:
        console = Console(file=io.StringIO(), width=100)
        healthy = print_diagnosis(console)
        return healthy, console.file.getvalue().splitlines()[-1]  # type: ignore[attr-defined]

    if any(each.status == "problem" for each in diagnose()):
        pytest.skip("something is wrong with this machine already; see `alignpro doctor`")
    assert verdict() == (True, "Everything that training needs is available.")
    distribution(tmp_path, "peft", "0.1")
    monkeypatch.syspath_prepend(tmp_path)
    assert verdict() == (False, "To fix: peft")
