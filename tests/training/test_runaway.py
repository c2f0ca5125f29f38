"""The warning of a policy that runs away comes once, early, and not in training that goes well."""

from __future__ import annotations

from alignpro.training.runaway import RunawayWatch


def warnings_of(kl: list[float], entropy: list[float] | None = None) -> list[tuple[int, str]]:
    watch, found = RunawayWatch(), []
    for step, (each, spread) in enumerate(zip(kl, entropy or [1.0] * len(kl), strict=True)):
        found += [(step, line) for line in watch({"kl": each, "entropy": spread})]
    return found


def test_a_kl_that_runs_away_is_reported_once() -> None:
    (found,) = warnings_of([0.0, 0.1, 0.2, 0.5, 1.1, 4.0, 9.0, 13.0, 13.0, 13.5, 13.4, 13.2, 13.3])
    assert found[0] == 5
    assert "kl went from 0 to 4 nats per sequence in 5 steps" in found[1]
    assert "objective.step_kl" in found[1]


def test_a_second_episode_is_reported_again() -> None:
    found = warnings_of([0.0, 5.0, *[5.0] * 8, 12.0])
    assert [step for step, _ in found] == [1, 10]


def test_a_kl_that_grows_steadily_is_not_reported() -> None:
    assert warnings_of([0.3 * step for step in range(60)]) == []
    assert warnings_of([30.0 + 2.0 * step for step in range(20)]) == []  # of long responses, far from the reference


def test_an_entropy_that_collapses_is_reported_and_one_that_converges_is_not() -> None:
    ((step, line),) = warnings_of([1.0] * 8, [1.2, 1.1, 1.1, 1.0, 0.6, 0.2, 0.05, 0.01])
    assert step == 5
    assert "entropy went from 1.2 to 0.2 nats per token" in line
    assert warnings_of([1.0] * 60, [0.3 * 0.9**step for step in range(60)]) == []


def test_a_policy_that_grows_certain_of_a_higher_reward_is_not_reported() -> None:
    for rewards, expected in (([0.8] * 4 + [0.99] * 4, 0), ([0.8] * 4 + [0.1] * 4, 1)):
        watch, entropy = RunawayWatch(), [0.15] * 4 + [0.02] * 4
        rows = [{"kl": 1.0, "entropy": h, "reward/mean": r} for h, r in zip(entropy, rewards, strict=True)]
        assert len([line for row in rows for line in watch(row)]) == expected


def test_what_is_happening_is_noted_for_the_progress_line() -> None:
    watch = RunawayWatch()
    watch({"kl": 0.0, "entropy": 1.0})
    assert watch.notes == ()
    watch({"kl": 8.0, "entropy": 0.01})
    assert watch.notes == ("kl RISES", "entropy COLLAPSES")
    for _ in range(8):
        assert watch({"kl": 8.0, "entropy": 0.01}) == []
    assert watch.notes == ()
    assert watch({"loss": 1.0}) == []
