"""What `alignpro headroom` measures on tiny models, and the sentence that it ends in."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import Workshop

from alignpro.config import HeadroomConfig, validate_config
from alignpro.demo.world import prompt_records, write_records
from alignpro.errors import ConfigError, TrainingError
from alignpro.evaluation.headroom import Headroom, headroom
from alignpro.evaluation.headroom_verdict import judge_headroom
from alignpro.evaluation.results import ArmSummary, adjusted, summarize_arm
from alignpro.planning.dry_run import describe_work

REWARDS = """
def letters(prompts, responses):
    return [len(set(response)) / 8 for response in responses]

def nothing(prompts, responses):
    return [0.25] * len(responses)
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    made = Workshop(tmp_path_factory.mktemp("workshop"))
    write_records(made.root / "heldout.jsonl", prompt_records(30, 0, heldout=True))
    (made.root / "rewards.py").write_text(REWARDS)
    return made


def configuration(workshop: Workshop, out: Path, **settings: Any) -> HeadroomConfig:
    root, drawn = workshop.root, {"max_tokens": 4}

    def task(function: str) -> dict[str, Any]:
        component = {"kind": "function", "function": f"{root}/rewards.py:{function}"}
        return {"reward": {"components": [component]}, "instructions": {"short": "be short"}}

    config = {
        "out": str(out),
        "data": {"source": str(root / "heldout.jsonl"), "holdout": 0},
        "target": {"path": str(root / "target"), "device": "cpu"},
        "prompter": {"path": str(root / "prompter"), "device": "cpu"},
        "tasks": {"letters": task("letters"), "nothing": task("nothing")},
        "rewrite": drawn,
        "respond": drawn,
        "prompts": 5,
        "gibbs_candidates": [4, 2],
    }
    return validate_config(HeadroomConfig, config | settings)


@pytest.fixture(scope="module")
def measured(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> tuple[Headroom, Path]:
    out = tmp_path_factory.mktemp("measured")
    return headroom(configuration(workshop, out)), out


def test_every_task_has_its_arms_and_a_sentence(measured: tuple[Headroom, Path]) -> None:
    result, out = measured
    names = ["no_finetuning", "instruction_short", "sft_prompter", "gibbs_2", "gibbs_4"]
    assert [arm.name for arm in result.tasks["letters"].arms] == names
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["tasks"]["letters"]["arms"]) == names
    assert summary["tasks"]["letters"]["gibbs_estimates"]["gibbs_4"]["split"]["value"] is not None
    assert summary["tasks"]["nothing"]["worth_training"] is False
    assert summary["tasks"]["nothing"]["verdict"].startswith(
        "not worth training: the reward is 0.25 for all 100 samples"
    )
    assert summary["moves"]["other"] == 1  # the tiny prompter writes no move
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 5 * (4 + 1 + 2 + 2 + 2)
    assert {row["task"] for row in rows} == {"letters", "nothing"}
    table = result.table()
    assert "Gibbs, N = 4" in table
    assert summary["tasks"]["letters"]["verdict"] in table


def test_tasks_score_the_same_draws_as_they_do_alone(
    workshop: Workshop,
    measured: tuple[Headroom, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = configuration(workshop, tmp_path / "out")
    monkeypatch.setattr("alignpro.evaluation.arms._CHUNK_RESPONSES", 8)  # chunks of other sizes
    caplog.set_level(logging.INFO, logger="alignpro.training.progress")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    alone = headroom(config.model_copy(update={"tasks": {"letters": config.tasks["letters"]}}))
    last = re.match(r"response (\d+)/(\d+) ", caplog.messages[-1])
    # prompts × M × (K × (no fine-tuning, an instruction, two of Gibbs) + the candidates)
    assert last is not None and last[1] == last[2] == str(5 * 2 * (2 * 4 + 4))
    both = measured[0].tasks["letters"]
    assert [arm.mean for arm in alone.tasks["letters"].arms] == [arm.mean for arm in both.arms]
    assert alone.tasks["letters"].gibbs == both.gibbs
    with pytest.raises(TrainingError, match="already exists"):
        headroom(config)


def test_bad_input_is_refused_before_any_model_is_loaded(workshop: Workshop, tmp_path: Path) -> None:
    config = configuration(workshop, tmp_path / "out").model_dump(mode="json")
    config["tasks"]["letters"]["instructions"] = {"bad": "{% if %}"}
    config["prompter"]["path"] = "nowhere"
    with pytest.raises(ConfigError, match=r"instructions\.bad: not a Jinja template"):
        headroom(config)
    with pytest.raises(ConfigError, match="gibbs_candidates"):
        configuration(workshop, tmp_path, gibbs_candidates=[1])
    with pytest.raises(ConfigError, match="tasks"):
        configuration(workshop, tmp_path, tasks={})
    lines = describe_work(configuration(workshop, tmp_path))
    assert lines[0].startswith("headroom on letters, nothing: ")


def arms(**gains: float) -> list[ArmSummary]:
    """Arms of 30 prompts whose rewards are .3 ± .2 plus a gain that varies a little."""
    generator = np.random.default_rng(0)
    baseline = 0.3 + generator.uniform(-0.2, 0.2, (30, 1, 4))
    made = [summarize_arm("no_finetuning", "", baseline)]
    for name, gain in gains.items():
        rewards = baseline + gain + generator.uniform(-0.1, 0.1, (30, 1, 4))
        made.append(summarize_arm(name, "", rewards, baseline=baseline))
    return adjusted(made)


@pytest.mark.parametrize(
    ("gains", "worth", "start", "contained"),
    [
        (
            {"gibbs_4": 0.1, "gibbs_64": 0.2, "instruction_short": 0.3},
            True,
            "worth training: choosing among 64",
            "(short)",
        ),
        ({"gibbs_64": 0.2}, True, "worth training", "no instruction was tried"),
        ({"gibbs_64": 0.0, "instruction_short": 0.3}, False, "not yet worth training: the best instruction", "moves"),
        ({"gibbs_64": 0.0, "instruction_short": 0.01}, False, "not worth training: choosing", "less than 0.05"),
    ],
)
def test_the_sentence_follows_the_gains(gains: dict[str, float], worth: bool, start: str, contained: str) -> None:
    verdict = judge_headroom(arms(**gains), 0.05)
    assert verdict.worth_training is worth
    assert verdict.sentence.startswith(start)
    assert contained in verdict.sentence


def test_a_gain_that_chance_explains_is_undecided() -> None:
    baseline = np.array([[0.0, 1.0, 0.2, 0.4], [0.3, 0.1, 0.5, 0.9]])[:, None]  # (P, 1, M)
    chance = np.array([[0.9, 1.0, 0.8, 0.7], [0.2, 0.1, 0.3, 0.9]])[:, None]
    made = [summarize_arm("no_finetuning", "", baseline), summarize_arm("gibbs_4", "", chance, baseline=baseline)]
    assert judge_headroom(adjusted(made), 0.005).sentence.startswith("undecided: ")
