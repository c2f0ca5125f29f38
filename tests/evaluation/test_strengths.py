"""Arms of a prompter at other strengths of its training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from finished_runs import finished_run
from test_evaluate import configuration
from tiny_models import save_tiny
from tiny_runs import Workshop

from alignpro.config import EvalConfig, validate_config
from alignpro.errors import ConfigError, ModelError
from alignpro.evaluation.arms import ArmSampler
from alignpro.evaluation.evaluate import evaluate
from alignpro.evaluation.labels import method_label


def test_the_dial_leads_from_the_reference_to_the_trained_prompter(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At strength 0 and 1 its samples are those of both, and the KL to the reference rises in between."""
    monkeypatch.setattr("alignpro.evaluation.evaluate.write_outputs", lambda *_: None)
    (tmp_path / "length.py").write_text(
        "def score(prompts, responses):\n    return [len(set(response)) / 8 for response in responses]\n"
    )
    trained = {"path": str(save_tiny("qwen2", tmp_path / "trained", seed=1, num_hidden_layers=1)), "device": "cpu"}
    settings = configuration(
        workshop,
        tmp_path / "evaluation",
        data={"source": str(workshop.root / "prompts.jsonl"), "holdout": 0},
        reward={"components": [{"kind": "function", "function": f"{tmp_path}/length.py:score"}]},
        prompter=trained,
        strengths=[1, 0, 0.5, 1.25],
        prompts=4,
    )
    found = evaluate(validate_config(EvalConfig, settings))
    arms = {arm.name: arm for arm in found.arms}
    dial = ["dial_0", "dial_0.5", "dial_1", "dial_1.25"]
    assert list(arms) == ["no_finetuning", "sft_prompter", "align_pro", *dial]
    rewrites = {name: [row["rewrite"] for row in found.rows if row["arm"] == name] for name in arms}
    assert rewrites["dial_0"] == rewrites["sft_prompter"] and rewrites["dial_1"] == rewrites["align_pro"]
    assert rewrites["dial_0.5"] not in (rewrites["dial_0"], rewrites["dial_1"])
    assert arms["dial_0"].kl == pytest.approx(0, abs=1e-6)
    assert arms["dial_0"].kl < arms["dial_0.5"].kl < arms["dial_1"].kl == arms["align_pro"].kl < arms["dial_1.25"].kl
    assert method_label("dial_0.5") == "Dial, s = 0.5"


def test_what_has_no_strength_is_told_before_anything_is_sampled(
    workshop: Workshop, tmp_path: Path, model_directory: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ArmSampler, "_sample", lambda *_: pytest.fail("sampled"))
    finished_run(tmp_path / "soft", model_directory, "soft_prompt")
    soft = {"path": str(tmp_path / "soft" / "model"), "device": "cpu"}
    reference = {"path": str(model_directory("qwen2")), "device": "cpu"}
    (tmp_path / "none.py").write_text("def score(prompts, responses):\n    return [0.0] * len(responses)\n")
    settings = configuration(
        workshop,
        tmp_path / "evaluation",
        reward={"components": [{"kind": "function", "function": f"{tmp_path}/none.py:score"}]},
        data={"source": str(workshop.root / "prompts.jsonl"), "holdout": 0},
        prompter=soft,
        reference=reference,
        strengths=[0, 0.5],
        prompts=4,
    )
    with pytest.raises(ModelError, match="has a soft prompt, which the other models do not"):
        evaluate(validate_config(EvalConfig, settings))


def test_strengths_need_both_prompters(workshop: Workshop, tmp_path: Path) -> None:
    settings = configuration(workshop, tmp_path, strengths=[0.5])
    with pytest.raises(ConfigError, match="they need `reference` and `prompter`"):
        validate_config(EvalConfig, settings | {"reference": None})
    with pytest.raises(ConfigError, match=r"strengths\.0: .*less than or equal to 2"):
        validate_config(EvalConfig, settings | {"strengths": [3]})
