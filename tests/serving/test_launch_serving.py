"""The examples in launch/serving fit the command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from proxies import Proxy

from alignpro.cli import main
from alignpro.config import ServeConfig, load_config

FOLDER = Path(__file__).parents[2] / "launch" / "serving"
DOCKERFILE = (FOLDER / "Dockerfile").read_text().splitlines()


def test_the_configuration_loads_and_drains_before_it_is_killed() -> None:
    config = load_config(ServeConfig, [str(FOLDER / "serve.yaml")])
    unit = (FOLDER / "alignpro-serve.service").read_text()
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    assert f"TimeoutStopSec={config.limits.drain_seconds + 15}\n" in unit
    assert compose["services"]["proxy"]["stop_grace_period"] == f"{config.limits.drain_seconds + 15}s"


def dry_run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    """The configuration that a command line gives, with serve.yaml at its place here."""
    here = [str(FOLDER / "serve.yaml") if each == "/etc/alignpro/serve.yaml" else each for each in arguments]
    with pytest.raises(SystemExit) as stopped:
        main([*here, "--dry-run"])
    assert not stopped.value.code
    return yaml.safe_load(capsys.readouterr().out)


def instruction(name: str) -> str:
    """What stands behind an instruction of the Dockerfile that is there once."""
    (found,) = [line for line in DOCKERFILE if line.startswith(f"{name} ")]
    return found.removeprefix(f"{name} ")


def test_the_container_runs_a_valid_command(capsys: pytest.CaptureFixture[str]) -> None:
    proxy = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]["proxy"]
    program, *arguments = json.loads(instruction("ENTRYPOINT"))
    assert program == "/opt/venv/bin/alignpro"
    config = dry_run([*arguments, *proxy["command"]], capsys)
    assert (config["target"], config["runs"]) == ("http://target:8001/v1", ["/runs/served"])
    assert proxy["ports"] == [f"{instruction('EXPOSE')}:{config['listen']['port']}"]
    assert proxy["environment"] == [config["access"]["tokens_env"]]
    assert dry_run(arguments, capsys)["target"] == "http://127.0.0.1:8001/v1"


def test_the_unit_runs_a_valid_command(capsys: pytest.CaptureFixture[str]) -> None:
    unit = (FOLDER / "alignpro-serve.service").read_text().splitlines()
    (command,) = [line.removeprefix("ExecStart=") for line in unit if line.startswith("ExecStart=")]
    program, *arguments = command.split()
    assert program == "/opt/alignpro/bin/alignpro"
    assert dry_run(arguments, capsys)["access"]["tokens_env"] == "ALIGNPRO_TOKENS"


def test_the_image_is_made_of_files_that_are_there() -> None:
    root = FOLDER.parents[1]
    copies = [line.split()[1] for line in DOCKERFILE if line.startswith("COPY ")]
    scripts = [part for line in DOCKERFILE if line.startswith("RUN sh ") for part in line.split() if "/" in part][:1]
    assert all((root / path).exists() for path in [*copies, *scripts])
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().split()
    needed = ("alignpro", "kernels", "csrc", "requirements", "pyproject.toml", "README.md", "launch")
    assert not any(fnmatch(name, each) for name in needed for each in ignored)


@pytest.mark.parametrize("up", [True, False])
def test_the_container_is_healthy_if_the_proxy_answers(proxy: Proxy, up: bool) -> None:
    _, _, command = instruction("HEALTHCHECK").partition(" CMD ")
    _, option, code = json.loads(command)
    assert option == "-c" and f"127.0.0.1:{instruction('EXPOSE')}/health" in code
    port = str(proxy.port) if up else "9"
    done = subprocess.run([sys.executable, "-c", code.replace(instruction("EXPOSE"), port)], capture_output=True)
    assert (done.returncode == 0) == up


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = (FOLDER / "alignpro-serve.service").read_text().replace("/opt/alignpro/bin/alignpro", "/bin/true")
    (tmp_path / "alignpro-serve.service").write_text(unit)
    checked = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "alignpro-serve.service")]
    done = subprocess.run(checked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "alignpro-serve" not in done.stderr
