"""``optimizer.micro_batch_size: auto`` is the most that fits by formula, within the limits of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import Workshop

from alignpro.config import RewardModelConfig, RLHFConfig, RunSection, SFTConfig, TrainConfig, load_config
from alignpro.errors import ConfigError
from alignpro.planning import memory_table as table_module
from alignpro.planning.free_memory import free_memory
from alignpro.planning.memory import ONE_PROCESS, JobModels, estimate_memory
from alignpro.planning.memory_table import memory_table
from alignpro.planning.micro_batch import MARGIN, choose_micro_batch, with_micro_batch
from alignpro.planning.supervised_memory import supervised_update_bytes

KINDS: dict[str, type[RunSection]] = {
    "train": TrainConfig,
    "rlhf": RLHFConfig,
    "sft": SFTConfig,
    "reward": RewardModelConfig,
}
GROUPS = ("rollout.prompts_per_step=6", "rollout.rewrites_per_prompt=4", "rollout.rewrite.max_tokens=64")


def job(made: Workshop, command: str, *overrides: str) -> RunSection:
    _, *arguments = made.arguments(command, made.root / "run", "optimizer.micro_batch_size=auto", *overrides)
    return load_config(KINDS[command], arguments)


def train_job(made: Workshop, *overrides: str) -> TrainConfig:
    config = job(made, "train", *GROUPS, *overrides)
    assert isinstance(config, TrainConfig)
    return config


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [
        ([], [1, 2, 3, 4, 8, 12, 16, 20, 24]),
        (["objective.loss=ppo_clip", "objective.minibatches=3"], [1, 2, 3, 4, 8]),
    ],
)
def test_the_largest_size_whose_update_fits_is_chosen(made: Workshop, overrides: list[str], sizes: list[int]) -> None:
    config = train_job(made, *overrides)
    models = JobModels.of(config)
    needs = {n: estimate_memory(with_micro_batch(config, n), ONE_PROCESS, 1, models).update for n in sizes}
    assert list(needs.values()) == sorted(set(needs.values()))
    for size, need in needs.items():
        exact, less = (
            choose_micro_batch(config, ONE_PROCESS, 1, scale * need / (1 - MARGIN), models)
            for scale in (1.0001, 0.9999)
        )
        assert (exact.size, exact.planned, exact.fits, exact.whole) == (size, need, True, size == sizes[-1])
        assert less.size == sizes[max(0, sizes.index(size) - 1)]
        assert less.fits == (size > 1)


def test_several_ranks_need_no_more_than_their_share(made: Workshop) -> None:
    assert choose_micro_batch(train_job(made), "z2", 4, 1e15).size == 8  # two of six prompts, four rewrites each


def test_the_reason_is_told(made: Workshop) -> None:
    config = train_job(made)
    assert str(choose_micro_batch(config, ONE_PROCESS, 1, 2.0**40)).startswith(
        "24 sequences a pass, all that a step has; an update"
    )
    needed = estimate_memory(with_micro_batch(config, 8), ONE_PROCESS, 1).update
    some = str(choose_micro_batch(config, ONE_PROCESS, 1, 1.0001 * needed / (1 - MARGIN)))
    assert some.startswith("8 sequences a pass, the most that fit in 80% of the ")
    assert "expect to run out of memory" in str(choose_micro_batch(config, ONE_PROCESS, 1, 1.0))


@pytest.mark.parametrize(("command", "batch"), [("sft", 6), ("reward", 4)])
@pytest.mark.parametrize("trained", ["full", "lora"])
def test_supervised_jobs_are_planned_too(made: Workshop, command: str, batch: int, trained: str) -> None:
    config = job(made, command, *([f"policy.adapter.kind={trained}"] if command == "sft" else []))
    assert isinstance(config, SFTConfig | RewardModelConfig)
    need = supervised_update_bytes(config)
    for size in (1, 3, batch):
        assert choose_micro_batch(config, ONE_PROCESS, 1, 1.0001 * need(size) / (1 - MARGIN)).size == size
    assert choose_micro_batch(config, ONE_PROCESS, 1, 1e15).size == batch


def test_one_pass_may_take_less_than_two(made: Workshop) -> None:
    config = job(made, "sft", "max_tokens=2")
    assert isinstance(config, SFTConfig)
    need = supervised_update_bytes(config)
    assert need(6) < need(5), "which has the gradients of an earlier pass beside its activations"
    assert choose_micro_batch(config, ONE_PROCESS, 1, 1.0001 * need(6) / (1 - MARGIN)).size == 6


def test_the_plan_shows_the_choice(made: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    config = train_job(made)
    ample, scarce = memory_table(config, 2, device_bytes=1e12), memory_table(config, 2, device_bytes=1.0)
    assert {line.split()[1] for line in ample[1:-1]} == {"12"}
    assert {line.split()[1] for line in scarce[1:-1]} == {"1"}
    assert ample[-1] == "micro-batch: the most sequences a pass whose update fits in 80% of the 931.3 GiB of the device"
    monkeypatch.setattr(table_module, "free_memory", lambda device: 2.0**40)
    here = memory_table(config, 1)
    assert here[-1].endswith("80% of the 1024.0 GiB of free memory on this machine")
    assert here[1].split()[:2] == [ONE_PROCESS, "24"]
    fixed = memory_table(with_micro_batch(config, 4), 1, device_bytes=1e12)
    assert fixed[-1].split()[1] == "4"


def test_a_plan_for_a_device_that_is_elsewhere_asks_for_its_memory(made: Workshop) -> None:
    elsewhere = train_job(made, "policy.device=cuda:63")
    with pytest.raises(ConfigError, match=r"optimizer.micro_batch_size=auto: depends on the device's memory, .* --gib"):
        memory_table(elsewhere, 1)
    assert memory_table(elsewhere, 1, device_bytes=1e12)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


CPU = torch.device("cpu")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a machine with 1000 kB available."""
    for variable in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    write(tmp_path / "proc/meminfo", "MemTotal:  2000 kB\nMemFree:  100 kB\nMemAvailable:  1000 kB\n")
    return tmp_path


def test_the_host_leaves_what_its_kernel_says(machine: Path) -> None:
    assert free_memory(CPU, machine) == 1000 * 1024
    (machine / "proc/meminfo").unlink()
    assert free_memory(CPU, machine) > 1e6


def test_ranks_on_one_machine_share_its_memory(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_SIZE", "4")
    assert free_memory(CPU, machine) == 250 * 1024


def group(path: Path, limit: str, usage: int, cached: int, version: int = 2) -> None:
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    write(path / names[0], f"{limit}\n")
    write(path / names[1], f"{usage}\n")
    write(path / "memory.stat", f"anon 1\n{'inactive_file' if version == 2 else 'total_inactive_file'} {cached}\n")


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({"": ("9000", 5000, 1000)}, 5000),
        ({"a/b": ("9000", 5000, 1000), "a": ("7000", 6000, 500)}, 1500),
        ({"a/b": ("max", 5000, 1000), "a": ("max", 5000, 0)}, 1000 * 1024),
        ({"a": ("9000", 9500, 0)}, 0),
    ],
)
def test_the_tightest_control_group_is_the_limit(
    machine: Path, limits: dict[str, tuple[str, int, int]], left: int
) -> None:
    write(machine / "proc/self/cgroup", "0::/a/b\n")
    for path, (limit, usage, cached) in limits.items():
        group(machine / "sys/fs/cgroup" / path, limit, usage, cached)
    assert free_memory(CPU, machine) == left


def test_control_groups_of_version_1_count(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "9:cpu,cpuacct:/x\n4:memory:/docker/0f\n")
    group(machine / "sys/fs/cgroup/memory", "8000", 3000, 100, version=1)  # of a container, which does not see its path
    assert free_memory(CPU, machine) == 5100
