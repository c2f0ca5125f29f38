"""Configurations that say the same have the same fingerprint, whatever keys the version that wrote them had."""

from __future__ import annotations

from typing import Any

import yaml

from alignpro.config import TrainConfig, dump_config, validate_config
from alignpro.config.fingerprint import fingerprint, fingerprint_of_run

GIVEN: dict[str, Any] = {
    "run": {"out": "runs/a", "seed": 1},
    "data": {"source": "prompts.jsonl"},
    "policy": {"path": "models/small"},
    "target": {"path": "models/target"},
    "reward": {"components": [{"kind": "function", "function": "reward.py:score"}]},
}


def written(**changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(dump_config(validate_config(TrainConfig, GIVEN | changes)))
    return content


def test_a_key_that_a_later_version_added_does_not_count() -> None:
    now = written()
    before = written()
    del before["rollout"]["engine"]["async_scheduling"], before["data"]["limit"]
    assert fingerprint_of_run(before) == fingerprint_of_run(now) == fingerprint_of_run(GIVEN)


def test_seed_and_place_do_not_count_and_everything_else_does() -> None:
    assert fingerprint_of_run(written(run={"out": "runs/b", "seed": 2})) == fingerprint_of_run(written())
    others = [
        written(run={"out": "runs/a", "seed": 1, "steps": 3}),
        written(objective={"kl": {"coef": 0.3}}),
        written(policy={"path": "models/other"}),
    ]
    assert len({fingerprint_of_run(each) for each in (*others, written())}) == 4


def test_what_this_version_cannot_read_counts_as_it_is_written() -> None:
    unknown = written() | {"from_another_version": 1}
    assert fingerprint_of_run(unknown) == fingerprint_of_run(unknown | {"run": unknown["run"] | {"seed": 5}})
    assert fingerprint_of_run(unknown) != fingerprint_of_run(unknown | {"from_another_version": 2})


def test_keys_can_be_left_out() -> None:
    one, other = (validate_config(TrainConfig, GIVEN | {"data": {"source": name}}) for name in ("a.jsonl", "b.jsonl"))
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one, without={"data"}) == fingerprint(other, without={"data"})
