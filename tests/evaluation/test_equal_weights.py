"""An evaluation holds the base of a target and of adapters on it once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from finished_runs import finished_run
from tiny_models import policy_config

from alignpro.evaluation.sampled_arms import Trained
from alignpro.models.loading import load_language_model
from alignpro.models.sequences import SequenceBatch

BATCH = SequenceBatch.build([[5, 17, 3]], [[8, 2, 4]])


@torch.no_grad()
def test_a_lora_on_the_targets_model_shares_its_base(model_directory: Callable[[str], Path], tmp_path: Path) -> None:
    finished_run(tmp_path, model_directory, "lora", seed=1)
    target, reference, prompter = (
        load_language_model(policy_config(path, architecture="qwen2"))
        for path in (model_directory("qwen2"), model_directory("qwen2"), tmp_path / "model")
    )
    before = [model.action_states(BATCH) for model in (target, reference, prompter)]
    Trained(prompter, reference, None).share_weights([target])
    for model, states in zip((target, reference, prompter), before, strict=True):
        assert torch.equal(model.action_states(BATCH), states)
    held = {weight.data_ptr() for weight in target.causal.parameters()}
    assert {weight.data_ptr() for weight in reference.causal.parameters()} == held
    own = {weight.data_ptr(): name for name, weight in prompter.causal.named_parameters()}
    assert held <= own.keys() and all("lora_" in name for place, name in own.items() if place not in held)
