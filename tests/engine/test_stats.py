"""Merged statistics of several ranks' engines."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from alignpro.engine import EngineStats


def test_counts_of_ranks_add_up_and_times_are_the_longest() -> None:
    one = EngineStats(
        computed=Counter(prefill=10, decode=30),
        floor_tokens=20,
        cache_hit_tokens=5,
        preemptions=1,
        decode_ticks=Counter(replayed=3),
        peak_pages=Counter(policy=7, target=2),
        seconds=defaultdict(float, forward=2.0),
        run_seconds=4.0,
    )
    other = EngineStats(
        computed=Counter(decode=60),
        floor_tokens=30,
        peak_pages=Counter(policy=3, target=4),
        seconds=defaultdict(float, forward=1.0, plan=0.5),
        run_seconds=5.0,
    )
    assert EngineStats.merged([one, other]).metrics() == {
        "engine/computed/prefill": 10,
        "engine/computed/decode": 90,
        "engine/computed/recompute": 0,
        "engine/computed/wasted": 0,
        "engine/floor_ratio": 2.0,
        "engine/hit_tokens": 5,
        "engine/preemptions": 1,
        "engine/pages/policy": 7,
        "engine/pages/target": 4,
        "engine/decode_ticks/replayed": 3,
        "engine/tokens_per_s": 20.0,
        "engine/seconds/plan": 0.5,
        "engine/seconds/forward": 2.0,
        "engine/seconds/sample": 0.0,
    }


def test_the_statistics_of_one_rank_are_unchanged() -> None:
    stats = EngineStats(computed=Counter(decode=3), floor_tokens=3, run_seconds=0.5)
    assert EngineStats.merged([stats]).metrics() == pytest.approx(stats.metrics())
