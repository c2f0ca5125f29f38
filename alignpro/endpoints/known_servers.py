"""What was found of servers: kept in a file of the job, so that a job which continues does not pay for the same probes again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignpro.config import EndpointConfig
from alignpro.endpoints.preflight import Findings
from alignpro.endpoints.types import Sampling

FILE_NAME = "servers.json"

_RELEVANT = (
    "base_url",
    "api_key_env",
    "model",
    "api",
    "extra_headers",
    "extra_query",
    "extra_body",
    "n",
    "seed",
    "seed_bits",
)
"""The settings on which findings depend; limits and time-outs change nothing."""


class KnownServers:
    """Findings by server and by how it is sampled. The file holds hashes of the settings, not the settings.

    Args:
        path: The file, which is read now and written at each addition; without it nothing outlasts the process.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._found: dict[str, dict[str, Findings]] = {}
        if path is not None and path.is_file():
            self.update(_read(path))

    def of(self, config: EndpointConfig, sampling: Sampling) -> Findings | None:
        """What was found of a server that is sampled so; None if it has not been examined."""
        return self._found.get(_digest(_settings(config)), {}).get(_digest(asdict(sampling)))

    def of_any_sampling(self, config: EndpointConfig) -> Findings | None:
        """What was found of a server however it was sampled: whether it takes ``n`` and ``seed`` does not depend on that."""
        return next(iter(self._found.get(_digest(_settings(config)), {}).values()), None)

    def add(self, config: EndpointConfig, sampling: Sampling, found: Findings) -> None:
        """Note what was found."""
        self._found.setdefault(_digest(_settings(config)), {})[_digest(asdict(sampling))] = found
        if self._path is not None:
            self._path.write_text(f"{json.dumps(self.as_dict(), indent=1)}\n")

    def as_dict(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Everything, as JSON."""
        return {
            server: {sampling: asdict(found) for sampling, found in each.items()}
            for server, each in self._found.items()
        }

    def update(self, found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
        """Take over what `as_dict` of another one returned."""
        for server, each in found.items():
            for sampling, values in each.items():
                known = Findings(**{**values, "unverified": tuple(values["unverified"])})
                self._found.setdefault(server, {})[sampling] = known


def _settings(config: EndpointConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", include=set(_RELEVANT))


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """The findings of a file; none of one that another version has written, or that is damaged: they can be found again."""
    names = set(Findings.__dataclass_fields__)
    try:
        found: dict[str, dict[str, dict[str, Any]]] = json.loads(path.read_text())
        same = all(set(values) == names for each in found.values() for values in each.values())
    except (ValueError, AttributeError, TypeError):
        return {}
    return found if same else {}
