"""Checkpoints and their files: atomic and checksummed, with tests of damage and of a full disk."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import flip_bit

from alignpro.errors import CheckpointError
from alignpro.training.checkpoint import CheckpointStore, find_damage, recorded_run, save_torch
from alignpro.training.durability import (
    PARTIAL,
    disk_errors,
    remove_directory,
    remove_leftovers,
    replace_directory,
    replace_text,
)
from alignpro.training.rng_state import get_rng_state, seed_all, set_rng_state

MEGABYTE = torch.zeros(2**18)


def write_some(directory: Path) -> None:
    save_file({"w": torch.arange(1000.0)}, directory / "policy.safetensors")
    save_torch({"step": torch.ones(100)}, directory / "policy_optimizer.pt")
    (directory / "state.json").write_text('{"step": 1, "task": {}}')


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=3)


@pytest.fixture
def small_disk(mount_disk: Callable[[str], Path]) -> Path:
    return mount_disk("1m")


def test_a_saved_checkpoint_is_complete_and_the_newest(store: CheckpointStore) -> None:
    assert store.latest() is None
    for step in (2, 10, 4):
        assert store.save(step, write_some) == store.path(step)
    assert store.available() == [2, 4, 10]
    assert store.latest() == 10
    assert find_damage(store.path(10)) is None


def test_only_the_newest_are_kept(store: CheckpointStore) -> None:
    for step in range(1, 8):
        store.save(step, write_some)
    assert store.available() == [5, 6, 7]
    assert sorted(path.name for path in store.directory.iterdir()) == ["step_000005", "step_000006", "step_000007"]


def test_steps_beyond_a_million_are_sorted(store: CheckpointStore) -> None:
    for step in (999_999, 1_000_000, 1_000_001, 2_000_000):
        store.save(step, write_some)
    assert store.available() == [1_000_000, 1_000_001, 2_000_000]


def test_other_files_are_left_alone(store: CheckpointStore) -> None:
    store.save(1, write_some)
    (store.directory / "step_of_mine").mkdir()
    assert store.available() == [1]


def test_saving_a_step_again_replaces_it(store: CheckpointStore) -> None:
    store.save(1, write_some)
    store.save(1, lambda directory: (directory / "state.json").write_text("new"))
    assert tree(store.path(1)).keys() == {"state.json", "manifest.json"}
    assert store.latest() == 1


def drop_from_manifest(directory: Path, name: str, *keys: str) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    del manifest["files"][name]
    for key in keys:
        del manifest[key]
    (directory / "manifest.json").write_text(json.dumps(manifest))


def write_manifest(text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / "manifest.json").write_text(text)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit of the weights flipped": lambda directory: flip_bit(directory / "policy.safetensors"),
    "a bit of the optimizer flipped": lambda directory: flip_bit(directory / "policy_optimizer.pt", 0.99),
    "a bit of the state flipped": lambda directory: flip_bit(directory / "state.json", 0.0),
    "weights truncated": lambda directory: os.truncate(directory / "policy.safetensors", 100),
    "a file empty": lambda directory: os.truncate(directory / "policy_optimizer.pt", 0),
    "a file missing": lambda directory: (directory / "state.json").unlink(),
    "a directory in a file's place": lambda directory: (
        (directory / "state.json").unlink(),
        (directory / "state.json").mkdir(),
    ),
    "manifest missing": lambda directory: (directory / "manifest.json").unlink(),
    "manifest truncated": lambda directory: os.truncate(directory / "manifest.json", 60),
    "manifest empty": write_manifest(""),
    "manifest no text": lambda directory: (directory / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "manifest of another kind": write_manifest("[1, 2]"),
    "manifest without files": write_manifest('{"step": 2}'),
    "manifest with no files": write_manifest('{"step": 2, "files": {}}'),
    "manifest with files of another kind": write_manifest('{"step": 2, "files": 3}'),
    "manifest that lists some files": lambda directory: drop_from_manifest(directory, "policy_optimizer.pt"),
    "a listed file removed from both": lambda directory: (
        drop_from_manifest(directory, "policy_optimizer.pt"),
        (directory / "policy_optimizer.pt").unlink(),
    ),
    "old manifest that lists some files": lambda directory: drop_from_manifest(
        directory, "policy_optimizer.pt", "checksum", "run"
    ),
    "empty directory": lambda directory: (shutil.rmtree(directory), directory.mkdir()),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_detected_and_the_previous_one_used(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    for step in (1, 2):
        store.save(step, write_some)
    DAMAGES[how](store.path(2))
    with caplog.at_level(logging.WARNING):
        assert store.latest() == 1
    (warning,) = caplog.messages
    assert str(store.path(2)) in warning
    assert "damaged" in warning
    with pytest.raises(CheckpointError, match="damaged"):
        store.require(2)
    store.require(1)


def test_a_renamed_checkpoint_is_not_used(store: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    for step in (5, 10):
        store.save(step, write_some)
    store.path(10).rename(store.path(14))
    assert store.latest() == 5
    assert f"{store.path(14)} is damaged (it is the checkpoint of step 10)" in caplog.text


def test_a_checkpoint_of_another_run_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stores = {}
    for run in ("mine", "theirs"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "run_id").write_text(f"{run}\n")
        stores[run] = CheckpointStore(tmp_path / run / "checkpoints", 3, tmp_path / run / "run_id")
        stores[run].save(1, write_some)
    stores["theirs"].save(2, write_some)
    shutil.copytree(stores["theirs"].path(2), stores["mine"].path(2))
    assert stores["theirs"].latest() == 2
    assert stores["mine"].latest() == 1
    assert "it belongs to another run" in caplog.text
    with pytest.raises(CheckpointError, match="it belongs to another run; omit --at"):
        stores["mine"].require(2)
    assert recorded_run(tmp_path / "theirs" / "checkpoints") == "theirs"


def test_a_checkpoint_of_a_version_without_identities_is_used(tmp_path: Path) -> None:
    (tmp_path / "run_id").write_text("mine")
    store = CheckpointStore(tmp_path / "checkpoints", 3, tmp_path / "run_id")
    store.save(1, write_some)
    manifest = json.loads((store.path(1) / "manifest.json").read_text())
    del manifest["run"], manifest["checksum"]
    (store.path(1) / "manifest.json").write_text(json.dumps(manifest))
    assert store.latest() == 1


def test_any_flipped_bit_is_detected(store: CheckpointStore) -> None:
    """Except for bits of the manifest that change neither a name nor a checksum."""
    store.save(1, write_some)
    directory, draw = store.path(1), random.Random(0)
    for path in directory.iterdir():
        original = path.read_bytes()
        for _ in range(20):
            flip_bit(path, draw.random())
            if path.name != "manifest.json" or _files(path) != json.loads(original)["files"]:
                assert find_damage(directory) is not None
            path.write_bytes(original)
    assert find_damage(directory) is None


def _files(manifest: Path) -> object:
    try:
        return json.loads(manifest.read_bytes())["files"]
    except (ValueError, KeyError):
        return None


def test_only_damaged_checkpoints_are_an_error(store: CheckpointStore) -> None:
    for step in (1, 2):
        store.save(step, write_some)
        flip_bit(store.path(step) / "policy.safetensors")
    with pytest.raises(CheckpointError, match=f"{store.directory}: every checkpoint is damaged; start again"):
        store.latest()


def test_a_missing_step_is_an_error_that_lists_the_steps(store: CheckpointStore) -> None:
    with pytest.raises(CheckpointError, match=r"step_000007: no such checkpoint; there are: none"):
        store.require(7)
    for step in (1, 2):
        store.save(step, write_some)
    with pytest.raises(CheckpointError, match=r"step_000007: no such checkpoint; there are: 1, 2"):
        store.require(7)


def test_a_full_disk_leaves_the_earlier_checkpoints(small_disk: Path) -> None:
    store = CheckpointStore(small_disk / "checkpoints", keep=1)
    store.save(1, write_some)
    before = tree(store.directory)
    writers: dict[str, Callable[[Path], object]] = {
        "safetensors": lambda directory: save_file({"w": MEGABYTE}, directory / "w.safetensors"),
        "torch": lambda directory: save_torch({"w": MEGABYTE}, directory / "w.pt"),
        "text": lambda directory: (directory / "w.txt").write_text("x" * 2**21),
    }
    for write in writers.values():
        with pytest.raises(CheckpointError) as caught:
            store.save(2, write)
        assert str(store.path(2)) in str(caught.value)
        assert "No space left on device" in str(caught.value)
        assert "--resume" in str(caught.value)
        assert tree(store.directory) == before
    assert store.save(2, write_some) == store.path(2), "files of the failed attempts still take up space"


def test_an_unwritable_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the directory should be")
    with pytest.raises(CheckpointError, match="cannot be written"):
        CheckpointStore(tmp_path / "checkpoints", keep=1).save(1, write_some)


def test_an_interruption_is_not_a_disk_error() -> None:
    """torch raises a RuntimeError if a KeyboardInterrupt comes while it writes."""
    with pytest.raises(KeyboardInterrupt), disk_errors("a checkpoint", "make room"):
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos")


def test_later_checkpoints_are_dropped(store: CheckpointStore) -> None:
    for step in (1, 2, 3):
        store.save(step, write_some)
    store.remove_after(1)
    assert store.available() == [1]


def test_partial_files_of_a_killed_process_are_removed_and_never_loaded(store: CheckpointStore) -> None:
    store.save(1, write_some)
    for name in (".partial-step_000002", ".discarded-step_000000"):
        shutil.copytree(store.path(1), store.directory / name)
    assert store.available() == [1]
    store.remove_partial()
    assert [path.name for path in store.directory.iterdir()] == ["step_000001"]


def test_random_state_continues() -> None:
    def draw() -> tuple[object, ...]:
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()

    draw()
    state = get_rng_state()
    expected = [draw() for _ in range(3)]
    set_rng_state(state)
    assert [draw() for _ in range(3)] == expected
    seed_all(2**40)
    seeded = draw()
    assert seeded != draw()
    seed_all(2**40)
    assert draw() == seeded


def test_random_state_survives_a_file(tmp_path: Path) -> None:
    save_torch(get_rng_state(), tmp_path / "random.pt")
    expected = random.random(), torch.rand(1).item()
    set_rng_state(torch.load(tmp_path / "random.pt", weights_only=True))
    assert (random.random(), torch.rand(1).item()) == expected


def test_a_failed_write_leaves_a_directory_and_a_text_unchanged(tmp_path: Path, small_disk: Path) -> None:
    replace_directory(small_disk / "model", write_some)
    replace_text(small_disk / "config.yaml", "a: 1\n")
    before = tree(small_disk)

    def write_half(directory: Path) -> None:
        (directory / "state.json").write_text("half")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        replace_directory(small_disk / "model", write_half)
    with pytest.raises(OSError, match="No space left"):
        replace_text(small_disk / "config.yaml", "x" * 2**21)
    assert tree(small_disk) == before


def replaced_until(directory: Path, at: int) -> bool:
    """Replace a directory in a child that is killed at its ``at``-th operation on files; whether it was."""
    child = os.fork()
    if child == 0:
        operations = 0

        def count(event: str, _: object) -> None:
            nonlocal operations
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
                operations += 1
                if operations == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        replace_directory(directory, lambda new: [(new / name).write_text("new") for name in "abc"])
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_kill_at_any_operation_leaves_the_old_directory_or_the_new_one(tmp_path: Path) -> None:
    """When a checkpoint is written again, it may be the only one."""
    old, new = (dict.fromkeys("abc", text) for text in ("old", "new"))
    found, at = [], 1
    while True:
        step = tmp_path / f"{at}" / "step_000001"
        step.mkdir(parents=True)
        for name in old:
            (step / name).write_text("old")
        killed = replaced_until(step, at)
        remove_leftovers(step.parent)
        assert [each.name for each in step.parent.iterdir()] == [step.name], at
        found.append({name: text.decode() for name, text in tree(step).items()})
        at += 1
        if not killed:
            break
    turn = found.index(new)
    assert turn > 5 and found == [old] * turn + [new] * (len(found) - turn)


def test_a_directory_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = tmp_path / "model"
    replace_directory(write, write_some)
    before, rename = tree(tmp_path), Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name.startswith(PARTIAL):
            raise OSError("Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        replace_directory(write, lambda new: (new / "a").write_text("new"))
    assert tree(tmp_path) == before


def test_discarding_a_missing_directory_does_nothing(tmp_path: Path) -> None:
    remove_directory(tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []
