"""Every way to start a job in docs/launch.md trains the same weights as one process.

Short programs, first on PATH, stand in for Slurm and pdsh. They start locally what the real ones start on other nodes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import (
    DEEPSPEED,
    ROOT,
    assert_close_runs,
    begin,
    ends_badly,
    ends_well,
    free_port,
    launch,
    workshop,
)
from tiny_runs import Workshop

STEP = ["run.steps=2", "run.checkpoint_every=2", "run.eval_every=0", "optimizer.learning_rate=0.0005"]
SCRIPT = str(ROOT / "launch" / "train_prompter.py")

SCONTROL = """#!/bin/bash
printf 'localhost\\n127.0.0.1\\n'
"""
SRUN = """#!/bin/bash
# srun OPTION… COMMAND …, with two tasks. If the command is a launcher, each task stands for a node.
while [[ $1 == -* ]]; do
    [[ $1 == -n ]] && shift
    shift
done
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=$task SLURM_NTASKS=2 SLURM_STEP_TASKS_PER_NODE='1(x2)' "$@" &
done
status=0
for task in 0 1; do wait -n || status=$?; done
exit $status
"""
PDSH = """#!/bin/bash
# pdsh -S -f FAN_OUT -w HOSTS COMMAND …, with %n replaced by the number of the host.
hosts=$5
shift 5
command="$*"
status=0
for n in $(seq 0 "$(tr -cd , <<<"$hosts" | wc -c)"); do bash -c "${command//%n/$n}" & done
for host in ${hosts//,/ }; do wait -n || status=$?; done
exit $status
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Create models, data, a run in one process, a hostfile, and the stand-in programs."""
    shop = workshop(tmp_path_factory.mktemp("launchers"))
    assert shop.run("train", shop.root / "single", *STEP) == 0
    (shop.root / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    programs = shop.root / "bin"
    programs.mkdir()
    for name, text in {"scontrol": SCONTROL, "srun": SRUN, "sinfo": "#!/bin/bash", "pdsh": PDSH}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return shop


def job(made: Workshop, out: Path) -> list[str]:
    """Return the arguments of ``alignpro train``."""
    return made.arguments("train", out, *STEP)[1:]


def check(made: Workshop, out: Path, *processes: subprocess.Popen[str]) -> None:
    """Wait for the launchers of a job, which must give the results of one process."""
    for process in processes:
        ends_well(process, within=500.0)
    assert_close_runs(made.root / "single", out)


def with_programs(made: Workshop) -> dict[str, str]:
    return {"PATH": os.pathsep.join([str(made.root / "bin"), os.environ["PATH"]]), "PYTHON": sys.executable}


def nodes(made: Workshop, *options: str) -> list[str | Path]:
    """Return the command of the launcher on the nodes of the hostfile."""
    common = ["--hostfile", made.root / "hosts", "--master_addr", "127.0.0.1"]
    return [DEEPSPEED, *common, *options]


@pytest.mark.slow
def test_the_package_as_a_module(made: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "run"
    check(made, out, launch("--module", "alignpro", "train", *job(made, out)))


@pytest.mark.slow
def test_two_nodes_without_ssh(made: Workshop, tmp_path: Path) -> None:
    out, port = tmp_path / "run", str(free_port())
    commands = [
        nodes(made, "--no_ssh", "--master_port", port, "--node_rank", rank, SCRIPT, *job(made, out)) for rank in "01"
    ]
    check(made, out, *map(begin, commands))


@pytest.mark.slow
def test_two_nodes_by_pdsh(made: Workshop, tmp_path: Path) -> None:
    out, port = tmp_path / "run", str(free_port())
    command = nodes(made, "--no_ssh_check", "--master_port", port, SCRIPT, *job(made, out))
    check(made, out, begin(command, **with_programs(made)))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["srun", "launcher"])
def test_slurm(script: str, made: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "run"
    variables = {
        "SLURM_JOB_ID": str(free_port()),  # the port is derived from it
        "SLURM_JOB_NODELIST": "node-[1-2]",
        "SLURM_GPUS_ON_NODE": "1",
    }
    path = ROOT / "launch" / "slurm" / f"{script}.sbatch"
    check(made, out, begin(["bash", path, *job(made, out)], **with_programs(made), **variables))
    assert not list(ROOT.glob(".hostfile-*"))


@pytest.mark.slow
def test_deepspeeds_slurm_launcher(made: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "run"
    variables = with_programs(made) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = nodes(made, "--launcher", "slurm", "--no_ssh_check", SCRIPT, *job(made, out))
    check(made, out, begin(command, **variables))


def refused(made: Workshop, out: Path, setting: str, **variables: str) -> str:
    """Start a job that must fail within seconds; return its only error message."""
    started = time.monotonic()
    error, output = ends_badly(launch(SCRIPT, *job(made, out), setting, **variables), within=300.0)
    assert time.monotonic() - started < 100  # it takes seconds on an idle machine
    assert "Traceback" not in output
    assert not (out / "metrics.jsonl").exists()
    return error


@pytest.mark.slow
def test_a_missing_compiler_is_one_error(made: Workshop, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    bash = shutil.which("bash")
    assert bash is not None
    (tools / "bash").symlink_to(bash)
    error = refused(
        made,
        tmp_path / "run",
        "deepspeed.config=z2_offload",
        PATH=str(tools),
        TORCH_EXTENSIONS_DIR=str(tmp_path / "empty"),
    )
    assert "must be compiled, and cannot be: there is no compiler 'c++' on PATH" in error


@pytest.mark.slow
def test_a_dtype_unsupported_for_training_is_one_error(made: Workshop, tmp_path: Path) -> None:
    error = refused(made, tmp_path / "run", "policy.dtype=float16")
    assert "policy.dtype=float16: DeepSpeed does not train in it on this device (cpu); take bfloat16" in error
