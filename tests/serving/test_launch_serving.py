"""The examples in launch/serving fit the command."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from alignpro.cli import main
from alignpro.config import ServeConfig, load_config

FOLDER = Path(__file__).parents[2] / "launch" / "serving"


def test_the_configuration_loads_and_drains_before_it_is_killed() -> None:
    config = load_config(ServeConfig, [str(FOLDER / "serve.yaml")])
    unit = (FOLDER / "alignpro-serve.service").read_text()
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    assert f"TimeoutStopSec={config.limits.drain_seconds + 15}\n" in unit
    assert compose["services"]["proxy"]["stop_grace_period"] == f"{config.limits.drain_seconds + 15}s"


def test_the_container_runs_a_valid_command(capsys: pytest.CaptureFixture[str]) -> None:
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    arguments = ["serve", "--config", str(FOLDER / "serve.yaml"), *compose["services"]["proxy"]["command"], "--dry-run"]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert not stopped.value.code
    assert yaml.safe_load(capsys.readouterr().out)["target"] == "http://target:8001/v1"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = (FOLDER / "alignpro-serve.service").read_text().replace("/opt/alignpro/bin/alignpro", "/bin/true")
    (tmp_path / "alignpro-serve.service").write_text(unit)
    checked = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "alignpro-serve.service")]
    done = subprocess.run(checked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "alignpro-serve" not in done.stderr
