"""Evaluations of tiny models: what is compared, what is shown, and what does not change it."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Workshop

from alignpro.config import DataConfig, EvalConfig, OptimalConfig, validate_config
from alignpro.data import load_prompts, split
from alignpro.demo.world import prompt_records, write_records
from alignpro.errors import ConfigError, DataError
from alignpro.evaluation import arms
from alignpro.evaluation.evaluate import evaluate
from alignpro.evaluation.gibbs import gibbs_estimates, split_log_partition
from alignpro.evaluation.optimal import optimal
from alignpro.evaluation.results import Evaluation
from alignpro.evaluation.rewards_file import read_rewards
from alignpro.objectives import gibbs_resample
from alignpro.theory.statistics import Clusters


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    made = Workshop(tmp_path_factory.mktemp("workshop"))
    write_records(made.root / "heldout.jsonl", prompt_records(70, 0, heldout=True))
    (made.root / "length.py").write_text(
        "def score(prompts, responses):\n    return [len(set(response)) / 8 for response in responses]\n"
    )
    return made


def configuration(workshop: Workshop, out: Path, **settings: Any) -> dict[str, Any]:
    root, drawn = workshop.root, {"max_tokens": 4}
    config = {
        "out": str(out),
        "data": {"source": str(root / "heldout.jsonl"), "holdout": 0},
        "target": {"path": str(root / "target"), "device": "cpu"},
        "reference": {"path": str(root / "prompter"), "device": "cpu"},
        "prompter": {"path": str(root / "prompter"), "device": "cpu"},
        "reward": {"components": [{"kind": "function", "function": f"{root}/length.py:score"}]},
        "rewrite": drawn,
        "respond": drawn,
        "prompts": 6,
        "rewrites_per_prompt": 2,
    }
    return config | settings


def run(workshop: Workshop, out: Path, *, files: bool = False, **settings: Any) -> Evaluation:
    """Evaluate; the figure and the report, which take longest, are written on request."""
    config = validate_config(EvalConfig, configuration(workshop, out, **settings))
    with pytest.MonkeyPatch.context() as patch:
        if not files:
            patch.setattr("alignpro.evaluation.evaluate.write_outputs", lambda *_: None)
        return evaluate(config)


def test_penalties_change_the_penalised_means_only(workshop: Workshop, tmp_path: Path) -> None:
    """Guards and truncation: arms without rewrites pay nothing, so arms are compared without."""
    reward = configuration(workshop, tmp_path)["reward"]
    guarded = reward | {"guards": [{"kind": "copy_rate", "high": -1.0, "penalty": 0.25}]}
    free = run(workshop, tmp_path / "free", oracle={"path": str(workshop.root / "target"), "device": "cpu"})
    paid = run(
        workshop,
        tmp_path / "paid",
        reward=guarded,
        prompting={"truncation_penalty": 0.5},
        oracle={"path": str(workshop.root / "target"), "device": "cpu"},
    )
    for before, after in zip(free.arms, paid.arms, strict=True):
        assert after.mean == before.mean == before.penalised.value
        assert after.difference == before.difference
        with_rewrites = after.name in ("sft_prompter", "align_pro")
        assert (after.penalised.value < after.mean - 0.2) == with_rewrites
    of_rewrites = [row for row in paid.rows if row["rewrite"] is not None]
    assert all(row["penalised"] < row["reward"] for row in of_rewrites)


def test_a_prompter_before_training_is_not_called_after_sft(workshop: Workshop, tmp_path: Path) -> None:
    arm = next(arm for arm in run(workshop, tmp_path / "out").arms if arm.name == "sft_prompter")
    assert arm.label == "Reference prompter"


def test_all_sources_are_evaluated_in_whatever_order(workshop: Workshop, tmp_path: Path) -> None:
    lines = (workshop.root / "heldout.jsonl").read_text().splitlines()
    (tmp_path / "reversed.jsonl").write_text("\n".join(reversed(lines)))
    prompts = []
    for name, source in (("a", workshop.root / "heldout.jsonl"), ("b", tmp_path / "reversed.jsonl")):
        result = run(workshop, tmp_path / name, data={"source": str(source), "holdout": 0})
        prompts.append({row["prompt"] for row in result.rows})
    first = {
        prompt.text
        for prompt in load_prompts(validate_config(EvalConfig, configuration(workshop, tmp_path)).data).prompts[:6]
    }
    assert prompts[0] == prompts[1] != first


def test_progress_is_shown_with_the_time_left_and_changes_nothing(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    whole = run(workshop, tmp_path / "whole", gibbs_candidates=3)
    caplog.set_level(logging.INFO, logger="alignpro")
    monkeypatch.setattr(arms, "_CHUNK_PROMPTS", 2)
    parts = run(workshop, tmp_path / "parts", gibbs_candidates=3)
    assert parts.rows == whole.rows
    lines = [message for message in caplog.messages if message.startswith("response ")]
    assert lines[0].startswith(
        "response 12/132  "
    )  # to 2 prompts; 6 prompts × M × (3 candidates, 4 arms of K rewrites)
    assert " left  reward" in lines[0]
    assert lines[-1].startswith("response 132/132  ")


def test_training_free_resampling_shows_progress_and_a_lower_bound(
    workshop: Workshop, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    caplog.set_level(logging.INFO, logger="alignpro")
    config = configuration(workshop, tmp_path / "out", candidates=3)
    del config["reference"], config["rewrites_per_prompt"]
    summary = optimal(validate_config(OptimalConfig, config))
    assert any(message.startswith("response 48/48  ") for message in caplog.messages)
    lower, inflation = summary["lower_bound"], summary["inflation"]
    assert summary["log_partition"] == pytest.approx(lower["value"] + inflation["value"])
    assert lower["low"] < lower["value"] < lower["high"]


def test_what_filtered_samples_report_is_said(workshop: Workshop, tmp_path: Path) -> None:
    filtered = run(workshop, tmp_path / "filtered", rewrite={"max_tokens": 4, "top_p": 0.9, "top_k": 5, "min_p": 0.0})
    (note,) = (note for note in filtered.notes if "filtered" in note)
    assert note.startswith("The samples of Align-Pro are filtered (top_k, top_p)")


def test_what_greedy_samples_report_is_said(workshop: Workshop, tmp_path: Path) -> None:
    greedy = run(workshop, tmp_path / "greedy", files=True, rewrite={"max_tokens": 4, "temperature": 0})
    assert any("Align-Pro are greedy" in note and "temperature 1" in note for note in greedy.notes)
    assert "are greedy" in (tmp_path / "greedy" / "report.html").read_text()
    summary = json.loads((tmp_path / "greedy" / "summary.json").read_text())
    assert summary["notes"] == greedy.notes
    assert summary["align_pro"]["difference"]["adjusted_p"] == greedy.arms[-1].adjusted_p
    rewards = read_rewards(tmp_path / "greedy" / "rewards.json")
    assert len(set(rewards.prompts)) == len(rewards.clusters) == 6
    assert {name: arm.raw.mean() for name, arm in rewards.arms.items()} == pytest.approx(
        {arm.name: arm.mean for arm in greedy.arms}
    )
    assert not any("greedy" in note for note in run(workshop, tmp_path / "drawn").notes)


def test_intervals_are_over_clusters_of_prompts(workshop: Workshop, tmp_path: Path) -> None:
    data = {"source": str(workshop.root / "heldout.jsonl"), "holdout": 0, "cluster": "task"}
    result = run(workshop, tmp_path / "out", prompts=20, data=data)
    assert (result.arms[0].n, result.arms[0].clusters) == (20, 7)
    with pytest.raises(DataError, match=r"data\.cluster=topic"):
        run(workshop, tmp_path / "other", data=data | {"cluster": "topic"})


def test_noise_in_the_reward_inflates_the_estimate_but_not_the_lower_bound() -> None:
    """λ = .05, N = 16, M = 2, rewards of 0 or 1: λ log Ẑ is above the optimum on average, and the lower bound is below."""
    generator = torch.Generator().manual_seed(0)
    kl_coef, P, N, M = 0.05, 4000, 16, 2
    values = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)  # R of three rewrites, equally likely under ρ_sft
    optimum = kl_coef * (values / kl_coef).exp().mean().log().item()
    drawn = values[torch.randint(3, (P, N), generator=generator)]  # (P, N) R of the candidates
    weighed = gibbs_resample(drawn.expand(M, P, N).bernoulli(generator=generator).mean(0), kl_coef)
    chosen = torch.multinomial(weighed.weights, 1, generator=generator)
    fresh = drawn.gather(1, chosen).expand(P, 4).bernoulli(generator=generator)
    estimates = gibbs_estimates(weighed, fresh, kl_coef, Clusters.single(P))
    assert estimates.log_partition > optimum + 0.05
    assert estimates.lower_bound.high < optimum
    assert estimates.inflation.low > 0.05


def test_halves_of_the_responses_remove_the_inflation_by_noise() -> None:
    """λ = .05, N = 16, M = 2 and 5, rewards of 0 or 1: λ log Ẑ is above the optimum, the cross-fitted estimate is not."""
    generator = torch.Generator().manual_seed(1)
    kl_coef, P, N = 0.05, 4000, 16
    values = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    optimum = kl_coef * (values / kl_coef).exp().mean().log().item()
    drawn = values[torch.randint(3, (P, N), generator=generator)]
    for M in (2, 5):
        rewards = drawn[..., None].expand(P, N, M).bernoulli(generator=generator)
        weighed = gibbs_resample(rewards.mean(2), kl_coef)
        estimates = gibbs_estimates(weighed, drawn[:, :1], kl_coef, Clusters.single(P), rewards)
        assert estimates.log_partition > optimum + 0.02
        assert estimates.split is not None
        assert estimates.split.high < optimum
        noise = (values * (1 - values)).mean().item() / M  # of Bernoulli rewards
        assert estimates.noise_variance == pytest.approx(noise, rel=0.02)
        exact = split_log_partition(drawn[..., None].expand(P, N, M), kl_coef)
        assert exact.mean().item() == pytest.approx(gibbs_resample(drawn, kl_coef).value.mean().item())
    single = gibbs_estimates(weighed, drawn[:, :1], kl_coef, Clusters.single(P), rewards[..., :1])
    assert (single.split, single.noise_variance) == (None, None)


def test_instructions_are_arms_that_score_like_a_prompter_that_always_does_this(
    workshop: Workshop, tmp_path: Path
) -> None:
    guards = {"guards": [{"kind": "copy_rate", "high": -1.0, "penalty": 0.25}]}
    result = run(
        workshop,
        tmp_path / "out",
        instructions={"short": "be short", "as_it_is": "{{ prompt }}"},
        reward=configuration(workshop, tmp_path)["reward"] | guards,
        arms=["instruction_as_it_is", "instruction_short", "no_finetuning"],
    )
    arms = {arm.name: arm for arm in result.arms}
    assert list(arms) == ["no_finetuning", "instruction_short", "instruction_as_it_is"]
    assert arms["instruction_as_it_is"].mean == arms["no_finetuning"].mean  # equal seeds: the same responses
    assert arms["instruction_as_it_is"].samples == arms["no_finetuning"].samples
    assert arms["instruction_as_it_is"].penalised.value < arms["no_finetuning"].mean - 0.2
    assert arms["instruction_short"].label == "Instruction: short"
    assert arms["instruction_short"].difference is not None
    rewrites = {row["rewrite"] for row in result.rows if row["arm"] == "instruction_short"}
    assert all(each is not None and each.endswith("\n\nbe short") for each in rewrites)
    with pytest.raises(ConfigError, match=r"instructions\.bad: unknown variable text"):
        run(workshop, tmp_path / "bad", instructions={"bad": "{{ text }}"})


def test_several_numbers_of_candidates_share_their_draws(workshop: Workshop, tmp_path: Path) -> None:
    several = run(workshop, tmp_path / "several", gibbs_candidates=[4, 2], arms=["gibbs_2", "gibbs_4"])
    assert [arm.name for arm in several.arms] == ["gibbs_2", "gibbs_4"]
    assert all(arm.difference is None for arm in several.arms)
    alone = run(workshop, tmp_path / "alone", gibbs_candidates=2, arms=["gibbs"])
    assert alone.arms[0].rewards.tolist() == several.arms[0].rewards.tolist()
    assert alone.gibbs == several.gibbs_by_arm["gibbs_2"]
    assert several.gibbs == several.gibbs_by_arm["gibbs_4"]
    assert several.as_dict()["gibbs_estimates_by_arm"]["gibbs_2"]["noise_variance"] > 0


def test_an_arm_alone_has_the_samples_that_it_has_beside_others(workshop: Workshop, tmp_path: Path) -> None:
    whole = {arm.name: arm for arm in run(workshop, tmp_path / "whole").arms}
    alone = run(workshop, tmp_path / "alone", arms=["align_pro"], files=True)
    assert [arm.name for arm in alone.arms] == ["align_pro"]
    assert alone.arms[0].rewards.tolist() == whole["align_pro"].rewards.tolist()
    assert alone.arms[0].kl == whole["align_pro"].kl
    assert json.loads((tmp_path / "alone" / "summary.json").read_text())["align_pro"]["difference"] is None
    with pytest.raises(ConfigError, match="arms: oracle: expected some of no_finetuning"):
        run(workshop, tmp_path / "none", arms=["oracle"])


def test_models_of_an_earlier_version_are_evaluated_on_what_they_held_out(workshop: Workshop, tmp_path: Path) -> None:
    """A run that hashed whole conversations trained on continuations that a hash of the first turn would hold out."""
    rows = [
        {"messages": [*turns("hello", "hi", str(i))], "answer": "x"} for i in range(40)
    ]  # one conversation with 40 continuations
    write_records(tmp_path / "data.jsonl", rows)
    (tmp_path / "old").mkdir()
    shutil.copytree(workshop.root / "prompter", tmp_path / "old" / "model")
    (tmp_path / "old" / "config.yaml").write_text("data: {source: data.jsonl, holdout: 0.4}\n")
    config = configuration(workshop, tmp_path / "out", data={"source": str(tmp_path / "data.jsonl"), "holdout": 0.4})
    prompter = {"path": str(tmp_path / "old" / "model"), "device": "cpu"}
    result = run(workshop, tmp_path / "out", data=config["data"], prompter=prompter, prompts=40)
    heldout = split(load_prompts(DataConfig(source=str(tmp_path / "data.jsonl"))).prompts, 0.4, "conversation")[1]
    assert {row["prompt"] for row in result.rows} == {prompt.text for prompt in heldout}
    assert result.arms[0].clusters == 1
    assert result.arms[0].reward.not_estimable == "all prompts are in one cluster"


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
