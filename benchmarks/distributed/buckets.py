"""DeepSpeed's set-ups with buckets that suit a small model: beside those of launch/zero/ all else would be nothing."""

from __future__ import annotations

import json
from pathlib import Path

from alignpro.distributed.zero_config import read_zero_config


def write_scaled(setup: str, parameters: int, directory: Path) -> Path:
    """A set-up whose buckets are an eighth of a model, and which keeps weights whole up to a three-hundredth of it.

    Args:
        setup: What ``deepspeed.config`` takes.
        parameters: Of the model.
        directory: Where to write it.

    Returns:
        The path, which ``deepspeed.config`` takes.
    """
    content = read_zero_config(setup)
    zero = content["zero_optimization"]
    for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
        if key in zero:
            zero[key] = max(1, parameters // 8)
    if "stage3_param_persistence_threshold" in zero:
        zero["stage3_param_persistence_threshold"] = parameters // 300
    path = directory / f"{Path(setup).stem}_scaled.json"
    path.write_text(json.dumps(content))
    return path
