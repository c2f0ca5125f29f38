"""The DeepSpeed configuration of a job: a named ZeRO set-up or a JSON file, checked against the run's own settings.

The run's configuration sets batch sizes, precision, clipping and the optimizer; a JSON file that sets them, too, must
agree. Values that it leaves out are taken from the run, so it needs no "auto".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.version import Version

from alignpro.config import OptimizerConfig, PolicyConfig
from alignpro.errors import ConfigError

MIN_VERSION = Version("0.19.8")
"""0.18.7 to 0.18.x break ZeRO-1 and 2 on a CPU; from 0.19.8 on all stages skip a step whose gradient is not finite."""

_RUN_SECTIONS = (
    "optimizer",
    "scheduler",
    "activation_checkpointing",
    "checkpoint",
    "datastates_ckpt",
    "data_types",
    "managed_gradient_accumulation",
)
"""Sections that only the run's own configuration may set."""


@dataclass(frozen=True)
class ZeroConfig:
    """A DeepSpeed configuration that agrees with the run's."""

    name: str
    """The name or path by which it was requested."""
    content: dict[str, Any]
    """The configuration for `deepspeed.initialize`."""

    @property
    def stage(self) -> int:
        """The ZeRO stage: 0 shards nothing, 1 optimizer states, 2 gradients as well, 3 weights as well."""
        return int(self.content["zero_optimization"]["stage"])

    @property
    def offloads_optimizer(self) -> bool:
        """Whether optimizer states and updates are offloaded to the CPU."""
        return self.content["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"

    @property
    def replicated(self) -> bool:
        """Whether every rank holds all weights, gradients and optimizer states, and uses plain AdamW."""
        return self.stage == 0


def check_ranks(prompts_per_step: int, ranks: int) -> None:
    """Check that each rank gets at least one prompt of a step.

    Raises:
        ConfigError: There are more ranks than prompts.
    """
    if ranks > prompts_per_step:
        raise ConfigError(
            f"rollout.prompts_per_step={prompts_per_step} on {ranks} ranks: each rank needs at least one whole prompt; "
            "raise it, or start fewer ranks"
        )


def load_zero_config(
    name: str, policy: PolicyConfig, optimizer: OptimizerConfig, *, samples_per_update: int, ranks: int
) -> ZeroConfig:
    """Read a DeepSpeed configuration and complete it from the run's.

    Args:
        name: ``z0``, ``z1``, ``z2``, ``z3``, ``z2_offload`` or ``z3_offload``, or the path of a JSON file.
        policy: Sets the precision.
        optimizer: Sets the micro-batch size and clipping.
        samples_per_update: Sequences per optimizer step, over all ranks.
        ranks: Number of ranks.

    Raises:
        ConfigError: There is no such file, it is not a DeepSpeed configuration, or it contradicts the run's.
    """
    where = f"deepspeed.config={name}"
    given = read_zero_config(name)
    stage = given["zero_optimization"]["stage"]
    if policy.dtype == "float64":
        raise ConfigError(f"{where}: DeepSpeed does not train policy.dtype=float64; set float32, bfloat16 or float16")
    if stage == 0 and policy.dtype != "float32":
        raise ConfigError(
            f"{where}: stage 0 with policy.dtype={policy.dtype}: DeepSpeed scales gradients wrongly there; use stage 1, which "
            "also keeps weights and gradients whole, or policy.dtype=float32"
        )
    _refuse_auto(where, given)
    for section in _RUN_SECTIONS:
        if section in given:
            raise ConfigError(f"{where}: {section} is decided by the run's configuration: leave it out of the JSON")
    auto = optimizer.micro_batch_size == "auto"
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if auto and key in given:
            raise ConfigError(
                f"{where}: {key} is decided by optimizer.micro_batch_size=auto: leave it out of the JSON, or set "
                "optimizer.micro_batch_size to a number"
            )
    size = 1 if auto else optimizer.rows_per_pass  # the chosen number comes later, and decides nothing here
    accumulated = -(-samples_per_update // (size * ranks))
    expected: dict[str, Any] = {
        "train_batch_size": (
            samples_per_update,
            "samples per optimizer step (prompts × samples per prompt / minibatches)",
        ),
        "train_micro_batch_size_per_gpu": (size, "optimizer.micro_batch_size"),
        "gradient_accumulation_steps": (accumulated, f"{samples_per_update} samples on {ranks} ranks by {size}"),
        "gradient_clipping": (optimizer.max_grad_norm, "optimizer.max_grad_norm"),
    }
    for key, (value, meaning) in expected.items():
        if key in given and given[key] != value:
            raise ConfigError(f"{where}: {key} is {given[key]}, and the run's configuration says {value} ({meaning})")
    for section, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        enabled = given.get(section, {}).get("enabled")
        if enabled is not None and enabled != (policy.dtype == dtype):
            raise ConfigError(
                f"{where}: {section}.enabled is {str(enabled).lower()}, and policy.dtype is {policy.dtype}; "
                f"leave {section} out of the JSON, or change policy.dtype"
            )
    content = {key: value for key, value in given.items() if key not in expected}
    content |= {
        "train_micro_batch_size_per_gpu": size,
        "gradient_accumulation_steps": 1,  # the trainer's own loop decides when to make a step
        "managed_gradient_accumulation": stage == 0,  # where AdamW is torch's, not DeepSpeed's
        "gradient_clipping": optimizer.max_grad_norm,
        "bf16": given.get("bf16", {}) | {"enabled": policy.dtype == "bfloat16"},
        "fp16": given.get("fp16", {}) | {"enabled": policy.dtype == "float16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    if policy.dtype in ("bfloat16", "float16"):
        content["data_types"] = {"grad_accum_dtype": "fp32"}
    return ZeroConfig(name, content)


def read_zero_config(name: str) -> dict[str, Any]:
    """Read a DeepSpeed configuration as written, and check that it has a ZeRO stage.

    Raises:
        ConfigError: There is no such file, or it is not a DeepSpeed configuration.
    """
    path, where = _path_of(name), f"deepspeed.config={name}"
    try:
        given = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: {path} cannot be read as JSON: {error}") from error
    stage = given.get("zero_optimization", {}).get("stage") if isinstance(given, dict) else None
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"{where}: zero_optimization.stage is {stage!r}; it must be 0, 1, 2 or 3")
    read: dict[str, Any] = given
    return read


def require_deepspeed() -> None:
    """Check that a supported version of DeepSpeed is installed.

    Raises:
        ConfigError: DeepSpeed is not installed, or too old.
    """
    try:
        version = Version(metadata.version("deepspeed"))
    except metadata.PackageNotFoundError as error:
        raise ConfigError("training on several ranks needs DeepSpeed: pip install 'alignpro[deepspeed]'") from error
    if version < MIN_VERSION:
        broken = "; 0.18.7 to 0.18.x break ZeRO on the CPU" if Version("0.18.7") <= version < Version("0.19") else ""
        raise ConfigError(
            f"DeepSpeed {version} is installed, and {MIN_VERSION} is the oldest that works{broken}: "
            "pip install --upgrade 'alignpro[deepspeed]'"
        )


def _path_of(name: str) -> Path:
    """Return the file of a named set-up, or the path itself."""
    if name.endswith(".json") or "/" in name:
        return Path(name)
    here = Path(__file__).resolve().parent
    folders = (here / "zero", here.parents[2] / "launch" / "zero")  # installed, or in the source tree
    folder = next((each for each in folders if each.is_dir()), folders[0])
    known = sorted(path.stem for path in folder.glob("*.json"))
    if name not in known:
        raise ConfigError(
            f"deepspeed.config={name}: no such set-up; there are {', '.join(known)}, or give a path to a .json file"
        )
    return folder / f"{name}.json"


def _refuse_auto(where: str, value: Any, key: str = "") -> None:
    if value == "auto":
        raise ConfigError(f'{where}: {key} is "auto", which is not supported: give a number, or leave it out')
    if isinstance(value, dict):
        for name, each in value.items():
            _refuse_auto(where, each, f"{key}.{name}".lstrip("."))
