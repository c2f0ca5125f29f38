"""docs/performance.md is correct: its measurements are those of the recorded simulations, its floor that of the model."""

from __future__ import annotations

import re

import pytest
from document import Document, recorded

from benchmarks.engine.floor import num_weights
from benchmarks.engine.simulation.cards import CARDS
from benchmarks.pool import kv_bytes
from benchmarks.workload import GPU

DOCUMENT = Document("performance.md")


def test_everything_it_links_exists() -> None:
    DOCUMENT.check_links()


@pytest.mark.parametrize(("name", "sequences"), [("h100", "256"), ("h200", "1,024")])
def test_the_hosts_time_is_that_of_the_recorded_run(name: str, sequences: str) -> None:
    found = recorded(f"simulation_{name}")
    assert found["run"]["max_batch"] == int(sequences.replace(",", ""))
    medians = [1e3 * one["host_full_median_s"] for one in found["results"]]
    ((least, most, load),) = re.findall(
        rf"with {sequences} sequences (?:was )?(\S+) to (\S+) ms \([^)]*?\bat (?:a load average of )?([\d.]+)\)",
        DOCUMENT.text,
    )
    assert len(medians) == 3 and [f"{min(medians):.2f}", f"{max(medians):.2f}"] == [least, most]
    assert load == f"{found['run']['load_average']:.1f}"


def test_the_passes_launched_ahead_are_those_of_the_recorded_run() -> None:
    runs = recorded("simulation_h100_async")["results"]
    told = [f"{one['ahead_ticks']:,} of {one['ticks']:,}" for one in runs]
    text = " ".join(DOCUMENT.text.split())
    assert f"{told[0]}, {told[1]} and {told[2]}" in text
    for key, said in (
        ("host_s", "of the host's {} to {} s a rollout"),
        ("host_hidden_s", "{} to {} s lie beside a pass"),
    ):
        seconds = [one[key] for one in runs]
        assert said.format(f"{min(seconds):.1f}", f"{max(seconds):.1f}") in text


def test_the_step_of_an_8b_model_follows_from_the_data_sheet() -> None:
    rate = CARDS["h100"].bytes_per_s
    weights, keys = 2 * num_weights(GPU.target, head=True), 256 * 256 * kv_bytes(GPU.target, 2)
    sentence = " ".join(DOCUMENT.text[DOCUMENT.text.index("In an 8B step") :].split())
    told = [
        f"{1e3 * size / rate:.1f} ms for {what} ({size / 1e9:.1f} GB"
        for what, size in (("products", weights), ("attention", keys))
    ]
    assert all(each in sentence for each in told), told
    assert f"{30 * 32 * 2.5e-3:.1f} ms for 30 small kernels" in sentence
