"""The number of threads and how they wait are settled before torch is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignpro.models.cpu import threads

V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/cpu"


def of_v1(quota: int, group: str = V1) -> dict[str, str]:
    return {f"{group}/cpu.cfs_quota_us": f"{quota}\n", f"{group}/cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({f"{V2}/cpu.max": "max 100000\n"}, None),
        ({f"{V2}/cpu.max": "150000 100000\n"}, 1.5),
        (of_v1(50000), 0.5),
        (of_v1(-1), None),
        ({f"{V2}/cpu.max": ""}, None),
        ({}, None),
        # a service: the root group has no such file, and the least of the groups above the process counts
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                f"{V2}/a/cpu.max": "150000 100000\n",
                f"{V2}/a/b/cpu.max": "max 100000\n",
            },
            1.5,
        ),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                f"{V2}/a/cpu.max": "90000 100000\n",
                f"{V2}/a/b/cpu.max": "200000 100000\n",
            },
            0.9,
        ),
        ({"proc/self/cgroup": "0::/a\n", f"{V2}/other/cpu.max": "50000 100000\n"}, None),
        ({"proc/self/cgroup": "9:memory:/x\n4:cpu,cpuacct:/docker/0f\n"} | of_v1(250000, f"{V1}/docker/0f"), 2.5),
        ({"proc/self/cgroup": "4:cpu,cpuacct:/on/the/host\n0::/\n"} | of_v1(120000), 1.2),
    ],
)
def test_the_quota_of_a_container_or_service_is_read(
    tmp_path: Path, files: dict[str, str], cores: float | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.cpu_quota(tmp_path) == cores


@pytest.mark.parametrize(("quota", "expected"), [(None, None), (0.5, "1"), (1.9, "1"), (1e6, None)])
def test_a_quota_limits_the_threads_unless_the_user_has(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, expected: str | None
) -> None:
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    monkeypatch.setattr(threads, "num_cores", lambda: 4)
    for own in (None, "3"):
        environment = {} if own is None else {"OMP_NUM_THREADS": own, "OMP_WAIT_POLICY": "ACTIVE"}
        monkeypatch.setattr(os, "environ", environment)
        threads.set_environment()
        assert environment.get("OMP_NUM_THREADS") == (own or expected)
        assert environment["OMP_WAIT_POLICY"] == ("ACTIVE" if own else "PASSIVE")
        assert environment.get("GOMP_SPINCOUNT") == (None if own else "600")


def test_the_command_settles_it_before_torch_is_loaded() -> None:
    code = (
        "import os, sys; import alignpro.models.cpu.threads as t; assert 'torch' not in sys.modules; "
        "sys.argv = ['alignpro', '--help']; import alignpro.__main__ as m\n"
        "try: m.main()\nexcept SystemExit: print(os.environ['OMP_WAIT_POLICY'])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip().endswith("PASSIVE")
