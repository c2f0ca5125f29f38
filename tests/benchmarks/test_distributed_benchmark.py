"""The distributed benchmark: memory accounting, merging of the ranks' figures, and a complete small run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer

from alignpro.distributed.deepspeed.zero_config import read_zero_config
from alignpro.distributed.ranks import Ranks
from benchmarks.distributed.__main__ import app
from benchmarks.distributed.buckets import write_scaled
from benchmarks.distributed.memory import PhasePeaks, StorageGauge
from benchmarks.distributed.summary import ratios, times
from benchmarks.models import characters, make_chat_template, make_tokenizer

MIB = 1 << 20


def test_storages_are_counted_once_and_until_they_are_freed() -> None:
    before = torch.empty(MIB, dtype=torch.uint8)
    with StorageGauge() as gauge:
        gauge.count_existing()
        start = gauge.peak()
        assert start >= MIB
        first = torch.empty(2 * MIB, dtype=torch.uint8)
        view = first[:10].view(2, 5)
        assert gauge.peak() == start + 2 * MIB
        del first
        assert gauge.peak() == start + 2 * MIB  # the view keeps the storage alive
        del view
        gauge.peak()
        assert gauge.peak() == start
        float(torch.empty(MIB).sum())  # freed at once, but part of the peak
        assert gauge.peak() >= start + 4 * MIB
        del before
        gauge.peak()
        assert gauge.peak() == start - MIB


def test_each_peak_is_attributed_to_its_phase() -> None:
    ranks = Ranks()
    with StorageGauge() as gauge:
        peaks = PhasePeaks(gauge, ranks)
        with peaks.step():
            ranks.enter_phase("step 1, rollout")
            torch.empty(3 * MIB, dtype=torch.uint8)
            ranks.enter_phase("step 1, update")
            torch.empty(MIB, dtype=torch.uint8)
    assert peaks.bytes["rollout"] - peaks.bytes["update"] == 2 * MIB
    assert ranks.on_phase is None


def test_a_step_takes_as_long_as_its_slowest_rank() -> None:
    def rank(*seconds: float) -> dict[str, object]:
        return {
            "z2": {"steps": [{"seconds": s, "phases": {"rollout": s / 2}, "tokens": {"decode": 10}} for s in seconds]}
        }

    found = times([rank(9, 1, 4), rank(9, 3, 2)], "z2", warmup=1, chains=7)
    assert found["step_s"] == 3.5
    assert found["phases"] == {"rollout": 1.75}
    assert found["chains_per_s"] == 2
    assert found["tokens_per_s"] == 20 / 3.5
    slower = found | {"phases": {"rollout": 3.5}}
    assert ratios({"alone": found | {"step_s": 7}, "z2": found, "z3": slower}) == {
        "z2_step_over_alone": 0.5,
        "z3_rollout_over_z2": 2.0,
    }


def test_bucket_sizes_are_proportional_to_the_model(tmp_path: Path) -> None:
    zero = read_zero_config(str(write_scaled("z3", 2400, tmp_path)))["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["stage3_prefetch_bucket_size"] == 300
    assert zero["stage3_param_persistence_threshold"] == 8
    assert zero["stage"] == 3


def test_a_large_vocabulary_has_one_token_per_character_too() -> None:
    known = characters(151_936)
    assert len(set(known)) == 151_936 and not any(each.isspace() for each in known)
    small, large = (make_tokenizer(make_chat_template("", ""), size) for size in (1000, 5000))
    text = characters(5000)[-20:]
    assert len(large.encode(text)) == len(small.encode(text)) == 20
    assert max(small.encode(text)) < 1000  # unknown characters map to a token that the model has
    with pytest.raises(ValueError, match="characters are available"):
        characters(1_000_000)


@pytest.mark.parametrize("wrong", [["--device", "tpu"], ["--dtype", "int8"], ["--workload", "none"]])
def test_bad_options_are_named(wrong: list[str]) -> None:
    with pytest.raises(typer.BadParameter, match=wrong[1]):
        app(["--quick", *wrong], standalone_mode=False)


@pytest.mark.slow
def test_a_quick_run_writes_times_and_memory(tmp_path: Path) -> None:
    file = tmp_path / "quick.json"
    app(["--quick", "--json", str(file)], standalone_mode=False)
    document = json.loads(file.read_text())
    assert document["setups"].keys() == {"alone", "z2", "z3"}
    assert [found["ranks"] for found in document["setups"].values()] == [1, 2, 2]
    for found in document["setups"].values():
        assert found["step_s"] >= sum(found["phases"].values()) * 0.5 > 0
    assert document["memory"].keys() == {"z2", "z3"}
    assert document["ratios"].keys() == {"z2_step_over_alone", "z3_rollout_over_z2"}
    assert document["run"]["versions"]["deepspeed"]


@pytest.mark.slow
def test_one_rank_in_16_bits_as_on_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    arguments = ["--workload", "gpu", "--quick", "--ranks", "1", "--dtype", "bfloat16", "--setup", "z3"]
    app([*arguments, "--json", str(file)], standalone_mode=False)
    document = json.loads(file.read_text())
    assert document["run"]["dtype"] == "bfloat16"
    assert document["setups"]["z3"]["tokens_per_s"] > 0
    assert document["memory"]["z3"]["measured"]["update"] > 0
