"""A rival whose proposer is behind a server: it is asked for instructions, and never for responses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_rival_search import rival
from tiny_runs import Workshop
from tiny_server import TinyServer

from alignpro.cli import main


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    made = Workshop(tmp_path_factory.mktemp("helped"))
    (made.root / "plain_reward.py").write_text(
        "def score(prompts, responses):\n    return [sum(map(ord, each)) % 17 / 17 for each in responses]\n"
    )
    return made


def run(shop: Workshop, out: Path, url: str, kind: str = "gepa") -> int:
    """Run `alignpro rival` with a proposer at a URL; returns its exit status."""
    proposer = {"endpoint": {"base_url": url, "model": "tiny", "max_retries": 0}}
    search = {"validation": 4, "training": 4, "proposals": 2, "propose": {"max_tokens": 8}, "proposer": proposer}
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(rival(shop, out, kind, target_calls=24, search=search)))
    with pytest.raises(SystemExit) as ended:
        main(["rival", str(file)])
    return int(ended.value.code or 0)


@pytest.mark.parametrize(("kind", "needs"), [("gepa", "gepa"), ("miprov2", "optuna")])
def test_the_server_proposes_and_the_target_of_this_process_answers(
    shop: Workshop, tmp_path: Path, kind: str, needs: str
) -> None:
    pytest.importorskip("dspy")
    pytest.importorskip(needs)
    with TinyServer() as server:
        assert run(shop, tmp_path / "whole", server.url, kind) == 0
        asked = server.count
        result = json.loads((tmp_path / "whole/rival.json").read_text())
        proposals = [
            each for each in server.requests if "instruction" in json.dumps(each.json)
        ]  # others check the server
        assert proposals and 0 < result["proposer_calls"] <= asked  # MIPROv2 asks for a summary of the data, too
        assert result["unusable_proposals"] < result["proposer_calls"] and result["target_calls"] <= 24
        assert all(each.json.get("max_tokens", each.json.get("max_completion_tokens")) == 8 for each in proposals)
        assert (tmp_path / "whole/ledger.sqlite").exists()
        (tmp_path / "again").mkdir()
        (tmp_path / "again/answers.jsonl").write_bytes((tmp_path / "whole/answers.jsonl").read_bytes())
        assert run(shop, tmp_path / "again", server.url, kind) == 0
        again = json.loads((tmp_path / "again/rival.json").read_text())
        assert again | {"seconds": 0} == result | {"seconds": 0}
        assert server.count - asked < asked  # nothing but the check of the server


def test_a_proposer_that_is_not_there_is_named(
    shop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("dspy")
    pytest.importorskip("gepa")
    assert run(shop, tmp_path / "absent", "http://127.0.0.1:9/v1") == 1
    said = capsys.readouterr().err
    assert "http://127.0.0.1:9/v1" in said and "Traceback" not in said


def test_a_search_that_a_budget_ended_goes_on_with_a_higher_one(
    shop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("dspy")
    pytest.importorskip("gepa")
    search = {"validation": 4, "training": 4, "propose": {"max_tokens": 8}}

    def search_within(out: Path, url: str, requests: int, **settings: Any) -> int:
        target = {"endpoint": {"base_url": url, "model": "tiny", **settings}}
        config = rival(shop, out, "gepa", target_calls=24, target=target, search=search)
        out.with_suffix(".yaml").write_text(yaml.safe_dump(config | {"budget": {"requests": requests}}))
        with pytest.raises(SystemExit) as ended:
            main(["rival", str(out.with_suffix(".yaml"))])
        return int(ended.value.code or 0)

    with TinyServer() as server:
        assert search_within(tmp_path / "whole", server.url, 500) == 0
        of_whole = server.count
        assert search_within(tmp_path / "cut", server.url, 20) == 1
        assert "raise budget.requests and continue (a training with --resume)" in capsys.readouterr().err
        assert search_within(tmp_path / "cut", server.url, 500, max_retries=2) == 0
        assert server.count - of_whole <= of_whole + 1  # the check of the server
    whole, cut = (json.loads((tmp_path / each / "rival.json").read_text()) for each in ("whole", "cut"))
    assert (cut["target_calls"], cut["refused"]) == (whole["target_calls"], whole["refused"]) == (24, True)
