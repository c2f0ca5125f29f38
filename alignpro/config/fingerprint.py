"""Whether two configurations say the same, also where a later version of the package has keys more."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ValidationError

from alignpro.config.commands import COMMANDS, fits


def fingerprint(config: BaseModel, *, without: Any = None) -> str:
    """A digest of a configuration. Keys with their default values do not count.

    Args:
        config: The configuration.
        without: Keys that do not count either, as pydantic's ``exclude`` takes them.
    """
    return _digest(config.model_dump(mode="json", exclude_defaults=True, exclude=without))


def fingerprint_of_run(raw: dict[str, Any]) -> str:
    """A digest of what a run's config.yaml holds, without seed and place: runs with the same one are of one method.

    A configuration that this version cannot read counts as it is written.
    """
    for kind in COMMANDS.values():
        if fits(kind, raw):
            try:
                return fingerprint(kind.model_validate(raw), without={"run": {"seed", "out"}})
            except ValidationError:
                continue
    run = {key: value for key, value in raw.get("run", {}).items() if key not in ("seed", "out")}
    return _digest(raw | {"run": run})


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
