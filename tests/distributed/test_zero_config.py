"""DeepSpeed configurations: the named ones are complete, and a contradiction to the run's is an error that names both."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import Workshop

from alignpro.config import OptimizerConfig, PolicyConfig, TrainConfig, load_config
from alignpro.distributed.deepspeed.zero_config import ZeroConfig, check_ranks, load_zero_config, require_deepspeed
from alignpro.errors import ConfigError
from alignpro.training.multi_process import resolve_zero_config

NAMES = {"z0": 0, "z1": 1, "z2": 2, "z2_offload": 2, "z3": 3, "z3_offload": 3}


def read(name: str, dtype: str = "float32") -> ZeroConfig:
    policy = PolicyConfig.model_validate({"path": "none", "dtype": dtype})
    return load_zero_config(name, policy, OptimizerConfig(micro_batch_size=4), samples_per_update=32, ranks=2)


@pytest.mark.parametrize("name", NAMES)
def test_a_named_configuration_is_completed_from_the_runs_own(name: str) -> None:
    zero = read(name, "bfloat16" if NAMES[name] else "float32")
    assert zero.stage == NAMES[name]
    assert zero.offloads_optimizer == name.endswith("offload")
    assert "auto" not in json.dumps(zero.content)
    assert zero.content["bf16"]["enabled"] == (NAMES[name] > 0) and not zero.content["fp16"]["enabled"]
    assert zero.content["gradient_clipping"] == OptimizerConfig().max_grad_norm
    assert zero.content["train_micro_batch_size_per_gpu"] == 4


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"train_batch_size": 64}, "train_batch_size is 64, and the run's configuration says 32"),
        ({"train_micro_batch_size_per_gpu": 8}, "says 4 \\(optimizer.micro_batch_size\\)"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2, .* says 4"),
        ({"gradient_clipping": 0.5}, "optimizer.max_grad_norm"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true, and policy.dtype is float32"),
        ({"zero_optimization": {"stage": 7}}, "stage is 7"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, 'reduce_bucket_size is "auto"'),
        ({"optimizer": {"type": "Adam"}}, "optimizer is decided by the run"),
        ({"datastates_ckpt": {"enabled": True}}, "datastates_ckpt is decided by the run"),
    ],
)
def test_a_contradiction_is_an_error(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | given))
    with pytest.raises(ConfigError, match=said):
        read(str(path))


@pytest.mark.parametrize("key", ["train_micro_batch_size_per_gpu", "gradient_accumulation_steps"])
def test_a_size_in_the_json_contradicts_one_that_is_yet_to_be_chosen(tmp_path: Path, key: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, key: 4}))
    with pytest.raises(ConfigError, match=f"{key} is decided by optimizer.micro_batch_size=auto: leave it out"):
        load_zero_config(str(path), PolicyConfig(path="x"), OptimizerConfig(), samples_per_update=32, ranks=2)


def test_equal_values_are_no_contradiction(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    agreeing = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 4}
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, "fp16": {"enabled": False}} | agreeing))
    assert read(str(path)).stage == 1


def test_unknown_names_missing_files_and_float64_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such set-up; there are z0, z1"):
        read("z4")
    with pytest.raises(ConfigError, match="cannot be read"):
        read(str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="stage 0 with policy"):
        read("z0", "bfloat16")
    with pytest.raises(ConfigError, match="float64"):
        read("z2", "float64")


def test_more_ranks_than_prompts_and_sharding_a_shared_target_are_errors(tmp_path: Path) -> None:
    made = Workshop(tmp_path)
    _, *arguments = made.arguments("train", tmp_path / "run")
    with pytest.raises(ConfigError, match="prompts_per_step=2 on 3 ranks"):
        check_ranks(load_config(TrainConfig, arguments).rollout.prompts_per_step, 3)
    shared = ["target=policy", "policy.adapter.kind=lora"]
    assert resolve_zero_config(load_config(TrainConfig, [*arguments, *shared]), 2).stage == 2
    with pytest.raises(ConfigError, match=r"target=policy with deepspeed\.config=z3"):
        resolve_zero_config(load_config(TrainConfig, [*arguments, *shared, "deepspeed.config=z3"]), 2)
    with pytest.raises(ConfigError, match=r"target=policy with deepspeed\.target_stage=3"):
        resolve_zero_config(load_config(TrainConfig, [*arguments, *shared, "deepspeed.target_stage=3"]), 2)


def test_a_sharded_reference_cannot_be_offloaded_separately(tmp_path: Path) -> None:
    _, *arguments = Workshop(tmp_path).arguments("train", tmp_path / "run", "deepspeed.offload_reference=true")
    assert resolve_zero_config(load_config(TrainConfig, arguments), 2).stage == 2
    with pytest.raises(ConfigError, match=r"offload_reference with deepspeed\.config=z3: .* z3_offload"):
        resolve_zero_config(load_config(TrainConfig, [*arguments, "deepspeed.config=z3"]), 2)


@pytest.mark.parametrize(("version", "said"), [("0.18.8", "break ZeRO"), ("0.17.0", "oldest that works"), ("", "pip")])
def test_a_missing_or_broken_deepspeed_is_an_error(
    version: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if version:
        info = tmp_path / f"deepspeed-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: deepspeed\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
    else:
        monkeypatch.setattr("sys.path", [])
    with pytest.raises(ConfigError, match=said):
        require_deepspeed()
    monkeypatch.undo()
    assert metadata.version("deepspeed")
