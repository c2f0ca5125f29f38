"""An evaluation on several targets continues with those that it has not finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_server import TinyServer

from alignpro.config import EvalConfig, validate_config
from alignpro.errors import BudgetError, TrainingError
from alignpro.evaluation.several_targets import evaluate_targets


def test_targets_that_are_finished_stay_so_when_the_budget_is_raised(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "explain {i}"}}\n' for i in range(6)))
    (tmp_path / "reward.py").write_text(
        "def score(prompts, responses):\n    return [float(len(y)) for y in responses]\n"
    )
    with TinyServer(honours_n=False) as server:

        def evaluated(**changes: Any) -> dict[str, Any]:
            endpoint = {"base_url": server.url, "model": "tiny"}
            config = {
                "out": str(tmp_path / "out"),
                "data": {"source": str(tmp_path / "prompts.jsonl"), "holdout": 0},
                "target": {
                    "mixture": [
                        {"endpoint": endpoint, "name": "a"},
                        {"endpoint": endpoint | {"system": "x"}, "name": "b"},
                    ]
                },
                "reward": {"components": [{"kind": "function", "function": f"{tmp_path}/reward.py:score"}]},
                "instructions": {"short": "Be brief."},
                "prompts": 6,
                "rewrites_per_prompt": 2,
                "respond": {"max_tokens": 8},
            }
            return evaluate_targets(validate_config(EvalConfig, config | changes))

        with pytest.raises(BudgetError, match="raise the budget and continue"):
            evaluated(budget={"requests": 75})
        first = (tmp_path / "out/a/summary.json").read_bytes()
        assert not (tmp_path / "out/b/summary.json").exists()
        with pytest.raises(TrainingError, match="already exists"):
            evaluated(budget={"requests": 300}, seed=1)
        assert list(evaluated(budget={"requests": 300})) == ["b"]
    assert (tmp_path / "out/a/summary.json").read_bytes() == first
    assert list(json.loads((tmp_path / "out/summary.json").read_text())["targets"]) == ["a", "b"]
