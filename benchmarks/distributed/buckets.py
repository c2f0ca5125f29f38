"""DeepSpeed set-ups with buckets scaled to a small model: those of launch/zero/ would dominate its memory."""

from __future__ import annotations

import json
from pathlib import Path

from alignpro.distributed.deepspeed.zero_config import read_zero_config


def write_scaled(setup: str, parameters: int, directory: Path) -> Path:
    """Write a set-up with buckets of 1/8 of the model's size and a persistence threshold of 1/300.

    Args:
        setup: A value of ``deepspeed.config``.
        parameters: The number of parameters of the model.
        directory: The directory to write to.

    Returns:
        The path, a valid value of ``deepspeed.config``.
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
