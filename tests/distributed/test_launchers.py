"""Every way to start a job in docs/launch.md trains the same weights as one process.

Short programs, first on PATH, stand in for Slurm and pdsh. They start locally what the real ones start on other nodes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from launching import ROOT, difference, environment, free_port, workshop
from tiny_runs import Workshop

STEP = ["run.steps=2", "run.checkpoint_every=2", "run.eval_every=0", "optimizer.learning_rate=0.0005"]
SCRIPT = str(ROOT / "launch" / "train_prompter.py")
BIN = Path(sys.executable).parent

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
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=$task SLURM_NTASKS=2 "$@" &
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


def begin(command: Sequence[str | Path], **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(part) for part in command],
        env=environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


def ends_well(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, output[-4000:]


def job(made: Workshop, out: Path) -> list[str]:
    """Return the arguments of ``alignpro train``."""
    return made.arguments("train", out, *STEP)[1:]


def same_as_single(made: Workshop, out: Path) -> None:
    metrics, weights = difference(made.root / "single", out)
    assert metrics < 1e-5
    assert weights < 1e-5


def with_programs(made: Workshop) -> dict[str, str]:
    return {"PATH": os.pathsep.join([str(made.root / "bin"), os.environ["PATH"]]), "PYTHON": sys.executable}


@pytest.mark.slow
def test_the_package_as_a_module(made: Workshop, tmp_path: Path) -> None:
    port = str(free_port())
    command = [BIN / "deepspeed", "--num_accelerators", "2", "--master_port", port, "--module", "alignpro", "train"]
    ends_well(begin([*command, *job(made, tmp_path / "run")]))
    same_as_single(made, tmp_path / "run")


@pytest.mark.slow
def test_two_nodes_without_ssh(made: Workshop, tmp_path: Path) -> None:
    common = ["--no_ssh", "--hostfile", made.root / "hosts", "--master_addr", "127.0.0.1"]
    common += ["--master_port", str(free_port())]
    nodes = [
        begin([BIN / "deepspeed", *common, "--node_rank", n, SCRIPT, *job(made, tmp_path / "run")]) for n in ("0", "1")
    ]
    ends_well(*nodes)
    same_as_single(made, tmp_path / "run")


@pytest.mark.slow
def test_two_nodes_by_pdsh(made: Workshop, tmp_path: Path) -> None:
    common = ["--no_ssh_check", "--hostfile", made.root / "hosts", "--master_addr", "127.0.0.1"]
    common += ["--master_port", str(free_port())]
    ends_well(begin([BIN / "deepspeed", *common, SCRIPT, *job(made, tmp_path / "run")], **with_programs(made)))
    same_as_single(made, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["srun", "launcher"])
def test_slurm(script: str, made: Workshop, tmp_path: Path) -> None:
    variables = {
        "SLURM_JOB_ID": str(free_port()),  # the port is derived from it
        "SLURM_JOB_NODELIST": "node-[1-2]",
        "SLURM_GPUS_ON_NODE": "1",
    }
    path = ROOT / "launch" / "slurm" / f"{script}.sbatch"
    ends_well(begin(["bash", path, *job(made, tmp_path / "run")], **with_programs(made), **variables))
    same_as_single(made, tmp_path / "run")
    assert not list(ROOT.glob(".hostfile-*"))


@pytest.mark.slow
def test_deepspeeds_slurm_launcher(made: Workshop, tmp_path: Path) -> None:
    variables = with_programs(made) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common = ["--launcher", "slurm", "--no_ssh_check", "--master_addr", "127.0.0.1", "--hostfile", made.root / "hosts"]
    ends_well(begin([BIN / "deepspeed", *common, SCRIPT, *job(made, tmp_path / "run")], **variables))
    same_as_single(made, tmp_path / "run")


def refused(made: Workshop, out: Path, setting: str, **variables: str) -> str:
    """Start a job that must fail within seconds; return its only error message."""
    started = time.monotonic()
    port = str(free_port())
    command = [BIN / "deepspeed", "--num_accelerators", "2", "--master_port", port, SCRIPT, *job(made, out), setting]
    process = begin(command, **variables)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert time.monotonic() - started < 100  # it takes seconds on an idle machine
    assert "Traceback" not in output
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, output[-4000:]
    assert not (out / "metrics.jsonl").exists()
    return errors[0]


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
