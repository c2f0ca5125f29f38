"""The files of a finished run of `alignpro train`, without training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tiny_models import policy_config

from alignpro.config import TrainConfig, dump_config
from alignpro.models.adapters import add_adapter
from alignpro.models.loading import load_trainable
from alignpro.models.saving import save_pretrained


def finished_run(
    out: Path, models: Callable[[str], Path], kind: str = "full", *, seed: int = 0, **sections: dict
) -> TrainConfig:
    """Write the files that `alignpro train` leaves, for a Qwen prompter, changed by noise, and a Llama target.

    Args:
        out: The run directory.
        models: The fixture `model_directory`.
        kind: Of the adapter.
        seed: Of the noise.
        sections: Other sections of the configuration.
    """
    policy = policy_config(models("qwen2"), adapter={"kind": kind, "rank": 4, "virtual_tokens": 4})
    config = TrainConfig.model_validate(
        {
            "run": {"out": out},
            "data": {"source": "nowhere.jsonl"},
            "policy": policy.model_dump(),
            "target": {"path": str(models("llama")), "device": "cpu"},
            "reward": {"components": [{"kind": "function", "function": "nowhere:reward"}]},
            "rollout": {"rewrite": {"max_tokens": 12}, "respond": {"max_tokens": 10}},
            **sections,
        }
    )
    model = add_adapter(load_trainable(policy, 0), policy.adapter)
    with torch.no_grad():
        for index, weight in enumerate(model.parameters()):
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1000 * seed + index))
    save_pretrained(model, out / "model")
    (out / "config.yaml").write_text(dump_config(config))
    return config
