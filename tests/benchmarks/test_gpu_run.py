"""The run on a GPU: time limits, crashes, what is kept, and a trial of all of it on a CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from travelling import ROOT, Travelled, repacked

from alignpro_kernels import varlen_kernels
from alignpro_kernels.torch_flash import TorchFlash
from benchmarks.engine.tick import kind_of
from benchmarks.gpu import archive, summary
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.checks import CHECKS, NotHereError
from benchmarks.gpu.parts import PARTS, Place, gpu_tests
from benchmarks.gpu.process import run
from benchmarks.gpu.smoke import Smoke
from benchmarks.pool import fit, kv_bytes, needed_bytes
from benchmarks.workload import GPU

Run = Callable[..., Any]


@pytest.fixture
def process(tmp_path: Path) -> Run:
    def call(code: str, seconds: float = 20) -> tuple[Any, str]:
        log = tmp_path / "log"
        command = [sys.executable, "-c", code]
        ended = run(command, log, seconds=seconds, environment=os.environ, directory=tmp_path)
        return ended, log.read_text()

    return call


def test_the_output_of_a_process_is_kept_with_its_status(process: Run) -> None:
    ended, log = process("import sys; print('said'); sys.exit(3)")
    assert (ended.status, ended.code, log) == ("failed", 3, "said\n")
    ended, log = process("import os; print('last', flush=True); os.kill(os.getpid(), 11)")
    assert (ended.status, ended.code, log) == ("failed", -11, "last\n")


def test_a_process_that_hangs_ends_at_its_time_limit_with_its_children(process: Run) -> None:
    code = "import subprocess; subprocess.Popen(['sleep', '60']); print('begun', flush=True); subprocess.run(['sleep', '60'])"
    started = time.monotonic()
    ended, log = process(code, seconds=1)
    assert (ended.status, log) == ("timeout", "begun\n")
    assert time.monotonic() - started < 10


def test_a_process_has_ended_though_a_child_holds_its_output(process: Run) -> None:
    started = time.monotonic()
    ended, _ = process("import subprocess; subprocess.Popen(['sleep', '60'])")
    assert ended.status == "ok" and time.monotonic() - started < 10


def test_what_a_process_leaves_behind_has_time_to_end(process: Run, tmp_path: Path) -> None:
    """The leader has ended by then, and been waited for."""
    child = "trap 'sleep 0.5; touch ended; exit' TERM; touch begun; while :; do sleep 0.1; done"
    code = f"import os, subprocess, time; subprocess.Popen(['sh', '-c', {child!r}])\n"
    code += "while not os.path.exists('begun'): time.sleep(0.01)"
    started = time.monotonic()
    ended, _ = process(code)
    assert ended.status == "ok" and (tmp_path / "ended").exists()
    assert time.monotonic() - started < 20


def test_what_does_not_end_by_request_is_killed(process: Run, tmp_path: Path) -> None:
    child = "trap '' TERM; echo $$ > child; while :; do sleep 0.1; done"
    code = f"import os, subprocess, time; subprocess.Popen(['sh', '-c', {child!r}])\n"
    code += "while not (os.path.exists('child') and os.path.getsize('child')): time.sleep(0.01)"
    assert process(code)[0].status == "ok"
    state = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    deadline = time.monotonic() + 20
    while state.exists() and " Z " not in state.read_text():  # the kernel ends it within moments
        assert time.monotonic() < deadline
        time.sleep(0.01)


WORKER = """
import json, os, sys
device, events, *names = sys.argv[1:]
stream = os.fdopen(int(events), "w", buffering=1)
for name in names:
    print(json.dumps({"begins": name}), file=stream)
    if name == "crashes":
        print("what it said last", file=sys.stderr, flush=True)
        os.abort()
    if name == "hangs":
        import time
        time.sleep(60)
    print(json.dumps({"name": name, "status": "PASS", "detail": device, "seconds": 0.1}), file=stream)
"""


def test_a_check_that_crashes_or_hangs_fails_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "smoke.json"
    smoke = Smoke("cpu", file, ["first", "crashes", "second", "hangs", "last"], 3.0, (sys.executable, "-c", WORKER))
    smoke.run(1)
    results = {each["name"]: each for each in json.loads(file.read_text())["checks"]}
    assert [name for name, each in results.items() if each["status"] == "PASS"] == ["first", "second"]
    assert "status -6" in results["crashes"]["detail"] and "what it said last" in results["crashes"]["traceback"]
    assert results["hangs"]["detail"] == results["last"]["detail"].removeprefix("not run: ") == "the time was up"
    assert capsys.readouterr().out.count("FAIL") == 3


def test_the_summary_has_thirty_lines_at_most_and_survives_incomplete_results(tmp_path: Path) -> None:
    commands = {name: {"status": "ok", "seconds": 1.0} for name in ("smoke", "kernels", "tick", "engine", "training")}
    checks = [{"name": f"check {i}", "status": "FAIL", "detail": "x" * 500} for i in range(40)]
    (tmp_path / "smoke.json").write_text(json.dumps({"checks": checks}))
    (tmp_path / "kernels.json").write_text('{"results": [{"ent')
    (tmp_path / "tick.json").write_text("{}")
    card = {"name": "A", "driver": "1"}
    found = summary.lines({"card": card, "commit": None, "tiny": False, "seconds": 9.0, "commands": commands}, tmp_path)
    assert len(found) == 30 and max(map(len, found)) < 160
    (tmp_path / "smoke.json").write_text(json.dumps({"checks": checks[:2]}))
    found = summary.lines({"card": card, "commit": None, "tiny": False, "seconds": 9.0, "commands": commands}, tmp_path)
    assert sum("is incomplete" in line for line in found) == 2


def test_the_summary_names_peers_beside_the_kernels(tmp_path: Path) -> None:
    shutil.copy(ROOT / "benchmarks" / "results" / "cpu" / "kernels.json", tmp_path)
    commands = {"kernels": {"status": "ok", "seconds": 1.0}}
    found = summary.lines(
        {"card": None, "device": "cpu", "commit": None, "tiny": False, "seconds": 9.0, "commands": commands}, tmp_path
    )
    ratios = {
        (result["shape"]["name"], result["case"]["name"], entrant["entrant"]): f"{entrant['ratio_to_floor']:.2f}"
        for result in json.loads((tmp_path / "kernels.json").read_text())["results"]
        for entrant in result["entrants"]
        if entrant["ratio_to_floor"] is not None
    }
    assert max(map(len, found)) < 160
    for (shape, case, entrant), ratio in ratios.items():
        if entrant == "ours-cpp":
            assert any(line.startswith(f"  {shape}, × floor: ") and f"{case} {ratio}" in line for line in found)
        elif case in ("policy", "policy-kl"):
            assert any(line.startswith(f"  {shape}, peers: ") and f"{entrant} {ratio}" in line for line in found)


def test_the_archive_unpacks_into_the_repository(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "smoke.log").write_text("PASS")
    results = Path(archive.__file__).parents[1] / "results" / "cpu"
    archive.write(tmp_path / "gpu.tar.gz", results, logs)
    with tarfile.open(tmp_path / "gpu.tar.gz") as file:
        assert {"benchmarks/results/cpu/kernels.json", "logs/smoke.log"} <= set(file.getnames())


def test_parts_are_named_and_a_cpu_needs_tiny_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, said in ((["doctor"], "no part 'doctor'"), (["--device", "cpu"], "add --tiny")):
        with pytest.raises(SystemExit):
            main(wrong)
        assert said in capsys.readouterr().err


def test_two_calls_of_seven_minutes_hold_all_parts(tmp_path: Path) -> None:
    """A minute of each is left for the start, the wheels and the archive."""
    place = Place("cuda", False, tmp_path)
    seconds = {name: sum(command.seconds for command in part(place)) for name, part in PARTS.items()}
    assert seconds["smoke"] == 80
    assert sum(seconds[name] for name in ("smoke", "tests", "kernels")) <= 360
    assert sum(seconds[name] for name in ("engine", "training")) <= 360


def test_the_check_of_flash_attention_names_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU without the packages, PyTorch's own runs."""

    class OnAGPU(TorchFlash):
        def unavailable(self) -> None:
            return None

    cpu = torch.device("cpu")
    (check,) = (check for check in CHECKS if check.name == "flash-attn")
    monkeypatch.setattr(varlen_kernels, "KERNELS", (TorchFlash(),))
    with pytest.raises(NotHereError, match=r"FlashAttention|GPU|CUDA"):
        check.run(cpu)
    monkeypatch.setattr(varlen_kernels, "KERNELS", (TorchFlash(), OnAGPU()))
    assert check.run(cpu) == "torch"


def test_the_gpu_tests_are_found() -> None:
    names = {file.name for file in gpu_tests()}
    assert {"test_gpu_backends.py", "test_graphs.py", "test_pages.py", "test_frozen_models.py"} <= names


def test_kernels_are_told_apart() -> None:
    names = {
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT": "products",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>": "products",
        "cublasLt::splitKreduce_kernel": "products",
        "attention_kernel": "attention",
        "void flash_fwd_kernel": "attention",
        "sample_kernel": "head",
        "void at::native::vectorized_elementwise_kernel<4, at::native::silu>": "small",
    }
    assert {name: kind_of(name) for name in names} == names


def test_the_pool_fits_the_card_beside_everything_else() -> None:
    token = kv_bytes(GPU.target, 2)
    assert token == 131_072  # 2 · 32 layers · 8 heads · 128 · 2 bytes
    assert kv_bytes(replace(GPU.target, head_dim=64), 2) == token // 2
    needed = needed_bytes(GPU, 2)
    responses, rewrites = GPU.chains * GPU.response, GPU.prompts * GPU.K * GPU.rewrite
    assert responses + rewrites == 294_912
    assert token * 294_912 < needed < 1.15 * token * 294_912
    assert needed_bytes(replace(GPU, prompts=1), 2) * 31 < needed

    small = fit(needed, free=79 * 10**9, total=80 * 10**9, resident=50 * 10**9)
    assert small.bytes == 21 * 10**9 and str(small).endswith("free 79.0 − planned 50.0 − reserve 8.0 GB")
    assert fit(needed, free=140 * 10**9, total=141 * 10**9, resident=50 * 10**9).bytes == needed
    with pytest.raises(MemoryError, match="planned 75"):
        _ = fit(needed, free=79 * 10**9, total=80 * 10**9, resident=75 * 10**9).bytes


def test_smoke_passes_on_an_image_without_the_packages_that_travel(tmp_path: Path) -> None:
    """As on the GPU machine: no .venv, no network, and what the image lacks only as wheels."""
    there = Travelled(tmp_path / "there")
    repacked(there.lacks, there.root / ".wheels")
    done = there.run("smoke", "--device", "cpu", "--tiny", COMMIT="abc123")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nFAIL" not in done.stdout and done.stdout.count("\nPASS") >= len(CHECKS) - 3
    assert (there.root / "build" / "gpu-site" / "pydantic").is_dir()
    lines = (there.root / "runs" / "gpu" / "summary.txt").read_text().splitlines()
    assert "commit abc123" in lines[0] and lines[1].startswith("smoke: ok")
    with tarfile.open(there.root / "runs" / "gpu" / "gpu.tar.gz") as file:
        assert {"build/gpu-trial/smoke.json", "logs/smoke.log", "logs/run.json"} <= set(file.getnames())


@pytest.mark.slow
def test_without_the_wheels_smoke_says_what_is_missing(tmp_path: Path) -> None:
    there = Travelled(tmp_path / "there")
    done = there.run("smoke", "--device", "cpu", "--tiny")
    assert done.returncode == 1
    assert "No module named 'pydantic'" in done.stdout
    assert "\nPASS  card" in done.stdout  # what needs none of them has been checked


@pytest.mark.slow
@pytest.mark.parametrize("part", ["tests", "kernels", "engine", "training"])
def test_a_trial_of_each_part_succeeds_on_a_cpu(part: str, tmp_path: Path) -> None:
    results = tmp_path / "results"
    options = [
        "--device",
        "cpu",
        "--tiny",
        "--out",
        str(tmp_path / "out"),
        "--results",
        str(results),
        "--logs",
        str(tmp_path / "logs"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--only", part, *options], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert len(lines) >= (2 if part == "tests" else 3) and not any("incomplete" in line for line in lines)
    assert done.stdout.endswith("\n".join(lines) + "\n")
