"""An evaluation asks a prompter as it was trained, and says on what it was trained."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import Workshop

from alignpro.config import EvalConfig, HeadroomConfig, validate_config
from alignpro.errors import TrainingError
from alignpro.evaluation.evaluate import evaluate
from alignpro.evaluation.headroom import headroom
from alignpro.evaluation.results import Evaluation
from alignpro.experiments.directory import locked


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """With a run that was asked with a meta-prompt of a file, for additions of three tokens."""
    made = Workshop(tmp_path_factory.mktemp("workshop"))
    (made.root / "ask.jinja").write_text("Rw: {{ prompt }}")
    (made.root / "length.py").write_text(
        "def score(prompts, responses):\n    return [len(set(response)) / 8 for response in responses]\n"
    )
    asked = (f"prompting.meta_prompt={made.root}/ask.jinja", "prompting.form=addition", "rollout.rewrite.max_tokens=3")
    short = ("run.steps=1", "run.checkpoint_every=1", "run.eval_every=0", "data.holdout=0.3")
    assert made.run("train", made.root / "run", *asked, *short) == 0
    (made.root / "ask.jinja").unlink()  # what counts is the copy beside the model
    return made


def configuration(workshop: Workshop, out: Path, **settings: Any) -> dict[str, Any]:
    root = workshop.root
    return {
        "out": str(out),
        "data": {"source": str(root / "prompts.jsonl"), "holdout": 0.3},
        "target": {"path": str(root / "target"), "device": "cpu"},
        "prompter": {"path": str(root / "run" / "model"), "device": "cpu"},
        "reward": {"components": [{"kind": "function", "function": f"{root}/length.py:score"}]},
        "prompts": 5,
        "rewrites_per_prompt": 2,
    } | settings


def run(workshop: Workshop, out: Path, **settings: Any) -> tuple[Evaluation, dict[str, Any]]:
    """Evaluate; returns the result and the configuration that it used."""
    used: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alignpro.evaluation.evaluate.write_outputs", lambda config, *_: used.update(config.model_dump()))
        result = evaluate(validate_config(EvalConfig, configuration(workshop, out, **settings)))
    return result, used


def test_what_is_not_given_is_that_of_the_training(
    workshop: Workshop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        result, used = run(workshop, tmp_path / "out", prompting={"max_prompt_tokens": 90})
    assert used["prompting"]["form"] == "addition" and used["prompting"]["max_prompt_tokens"] == 90
    assert used["prompting"]["meta_prompt"] == str(workshop.root / "run/model/meta_prompt.jinja")
    assert used["rewrite"]["max_tokens"] == 3 and not any("has seen some" in note for note in result.notes)
    assert "rewrite.max_tokens=3" in caplog.text and f"as in the training of {workshop.root / 'run'}" in caplog.text
    rewrites = [row for row in result.rows if row["arm"] == "align_pro"]
    assert rewrites and all(row["rewrite"].startswith(row["prompt"]) for row in rewrites)
    _, given = run(workshop, tmp_path / "given", prompting={"form": "whole"}, rewrite={"max_tokens": 2})
    assert given["prompting"]["form"] == "whole" and given["rewrite"]["max_tokens"] == 2


def test_headroom_asks_a_prompter_as_it_was_trained(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = configuration(workshop, tmp_path / "headroom", gibbs_candidates=[2])
    given["tasks"] = {"length": {"reward": given.pop("reward")}}
    used = list[HeadroomConfig]()
    monkeypatch.setattr("alignpro.evaluation.headroom._headroom", lambda config, *_: used.append(config))
    headroom(validate_config(HeadroomConfig, given))
    assert used[0].prompting.form == "addition" and used[0].rewrite.max_tokens == 3


@pytest.mark.parametrize(("holdout", "said"), [(0.0, "all prompts"), (0.6, "data.holdout=0.6")])
def test_prompts_of_the_training_are_told(
    workshop: Workshop, tmp_path: Path, caplog: pytest.LogCaptureFixture, holdout: float, said: str
) -> None:
    data = {"source": [str(workshop.root / "prompts.jsonl")], "holdout": holdout}
    result, _ = run(workshop, tmp_path / "out", data=data)
    (note,) = (each for each in result.notes if "has seen some of these prompts in training" in each)
    assert f"was trained with data.holdout=0.3, and is evaluated on {said} of the same source" in note
    assert note in caplog.text
    (tmp_path / "other.jsonl").write_bytes((workshop.root / "prompts.jsonl").read_bytes())
    elsewhere, _ = run(workshop, tmp_path / "other", data=data | {"source": str(tmp_path / "other.jsonl")})
    assert not any("in training" in note for note in elsewhere.notes)


def test_no_other_command_writes_into_a_training_run(workshop: Workshop) -> None:
    run_directory = workshop.root / "run"
    before = yaml.safe_load((run_directory / "config.yaml").read_text())
    with pytest.raises(TrainingError, match="run: holds a training run, whose files would be overwritten"):
        run(workshop, run_directory)
    with pytest.raises(TrainingError, match="holds a training run"), locked(run_directory):
        pass
    assert yaml.safe_load((run_directory / "config.yaml").read_text()) == before
