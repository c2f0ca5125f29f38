"""A run against a server that samples as the engine does is, bit for bit, the run against the same target in its process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from engine_server import EngineModel
from server_faults import Fault, at, randomly
from tiny_runs import Workshop, read_metrics, read_model, rows
from tiny_server import Choice, TinyServer, prompt_of

import alignpro
from alignpro.cli import main
from alignpro.errors import ModelError

TWO_RESPONSES = "rollout.responses_per_rewrite=2"
KEY = "sk-never-written-anywhere"


@pytest.fixture(scope="module")
def answering(workshop: Workshop) -> EngineModel:
    return EngineModel(workshop.root / "target")


@pytest.fixture
def server(answering: EngineModel) -> Iterator[TinyServer]:
    with TinyServer(answering, model="big", key=KEY) as running:
        yield running


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIG_KEY", KEY)


@pytest.fixture
def remote(workshop: Workshop, tmp_path: Path) -> Callable[..., int]:
    """Return ``remote(command, out, server, *overrides)``, which runs a command against a server; returns its status."""

    def run(command: str, out: Path, server: TinyServer, *overrides: str) -> int:
        config = yaml.safe_load((workshop.root / f"{command}.yaml").read_text())
        config["target"] = {"endpoint": {"base_url": server.url, "model": "big", "api_key_env": "BIG_KEY"}}
        path = tmp_path / f"{command}.yaml"
        path.write_text(yaml.safe_dump(config))
        try:
            main([command, str(path), f"run.out={out}", *overrides])
        except SystemExit as stop:
            return int(stop.code or 0)
        raise AssertionError("main returns by SystemExit")

    return run


def results(out: Path) -> list[dict[str, float]]:
    """The metrics that a run in the process has too."""
    return [{name: value for name, value in row.items() if not name.startswith("target/")} for row in read_metrics(out)]


def assert_same_results(out: Path, reference: Path) -> None:
    assert results(out) == results(reference)
    assert read_model(out) == read_model(reference)
    assert (out / "samples.jsonl").read_bytes() == (reference / "samples.jsonl").read_bytes()


def bought_twice(server: TinyServer) -> list[Any]:
    """The choices that were computed more than once; those of the check of a server are not counted."""
    return [choice for choice, count in server.computed.items() if count > 1 and "one to twenty" not in choice[0]]


@pytest.mark.parametrize("refused", [(), ("n",)])
def test_rewrites_rewards_and_weights_are_those_of_the_run_in_process(
    refused: tuple[str, ...],
    remote: Callable[..., int],
    finished: Callable[..., Path],
    server: TinyServer,
    tmp_path: Path,
) -> None:
    server.refused = refused
    assert remote("train", tmp_path / "run", server, TWO_RESPONSES) == 0
    assert_same_results(tmp_path / "run", finished("train", TWO_RESPONSES))
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"seconds/target", "endpoint/requests", "endpoint/tokens", "endpoint/throttled"} <= row.keys()
    assert (row["target/filtered"], row["target/changed"]) == (0, 0)
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.name == "ledger.sqlite" for path in written)
    assert not [path for path in written if KEY.encode() in path.read_bytes()]


def test_random_failures_change_nothing(
    remote: Callable[..., int], finished: Callable[..., Path], server: TinyServer, tmp_path: Path
) -> None:
    server.faults = randomly(0.2, seed=4)
    assert remote("train", tmp_path / "run", server, TWO_RESPONSES) == 0
    assert_same_results(tmp_path / "run", finished("train", TWO_RESPONSES))


def test_a_server_that_fails_stops_the_run_saved_and_nothing_is_bought_twice(
    remote: Callable[..., int], finished: Callable[..., Path], server: TinyServer, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "run"
    server.faults = at({number: Fault("status", 403) for number in range(14, 100)})
    assert remote("train", out, server, TWO_RESPONSES) == 1
    told = capsys.readouterr()
    assert server.url in told.err and KEY not in told.err + told.out
    assert 0 < rows(out) < 4
    server.faults = None
    assert remote("train", out, server, TWO_RESPONSES, "--resume") == 0
    assert_same_results(out, finished("train", TWO_RESPONSES))
    assert not bought_twice(server)


def test_a_spent_budget_stops_the_run_saved_and_a_higher_one_goes_on(
    remote: Callable[..., int], finished: Callable[..., Path], server: TinyServer, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "run"
    assert remote("train", out, server, TWO_RESPONSES, "budget.requests=14") == 1
    told = capsys.readouterr().err
    assert "--resume" in told
    assert "requests" in told
    assert server.count <= 14
    assert remote("train", out, server, TWO_RESPONSES, "--resume", "budget.requests=200") == 0
    assert_same_results(out, finished("train", TWO_RESPONSES))
    assert not bought_twice(server)


def test_a_run_that_samples_ahead_fails_and_goes_on_as_the_one_in_process(
    remote: Callable[..., int], finished: Callable[..., Path], server: TinyServer, tmp_path: Path
) -> None:
    """Rewrites of two steps have been drawn when the server fails; the resumed run draws none of them again."""
    ahead, out = (TWO_RESPONSES, "rollout.ahead=1"), tmp_path / "run"
    server.faults = at({number: Fault("status", 403) for number in range(14, 100)})
    assert remote("train", out, server, *ahead) == 1
    assert 0 < rows(out) < 4
    server.faults = None
    assert remote("train", out, server, *ahead, "--resume") == 0
    assert_same_results(out, finished("train", *ahead))
    assert not bought_twice(server)


def graded(request: Any, seed: int | None, index: int) -> Choice:
    """A judge whose score depends on every letter of the question."""
    return Choice(f"Score: {1 + sum(map(ord, prompt_of(request))) % 10}")


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_judge_that_fails_is_asked_again_for_nothing_that_it_has_answered(
    ahead: int, remote: Callable[..., int], server: TinyServer, tmp_path: Path
) -> None:
    """It is asked while the target still answers; whatever fails, the run has the results of one in which nothing did."""
    outs = [tmp_path / name for name in ("disturbed", "calm")]
    for out in outs:
        with TinyServer(graded) as judge:
            given = f"[{{kind: judge, endpoint: {{base_url: '{judge.url}', model: tiny}}, max_tokens: 8}}]"
            arguments = ("train", out, server, TWO_RESPONSES, f"rollout.ahead={ahead}", f"reward.components={given}")
            if out == outs[0]:
                # the first requests check the judge
                judge.faults = at({number: Fault("status", 403) for number in range(16, 100)})
                assert remote(*arguments) == 1
                assert rows(out) < 4
                judge.faults = randomly(0.2, seed=7)
            assert remote(*arguments, *(["--resume"] if out == outs[0] else [])) == 0
            assert not bought_twice(server)
            questions = [each for each in judge.computed.items() if "one to twenty" not in each[0][0]]
            if out == outs[1]:
                assert questions and all(count == 1 for _, count in questions)
        server.computed.clear()
    assert results(outs[0]) == results(outs[1])
    assert read_model(outs[0]) == read_model(outs[1])


@pytest.mark.parametrize(("limit", "step"), [("requests=7", "8"), ("tokens=8255", "8,256")])
def test_a_budget_below_a_step_is_refused_before_anything_is_sent(
    limit: str, step: str, remote: Callable[..., int], server: TinyServer, tmp_path: Path, capsys: Any
) -> None:
    assert remote("train", tmp_path / "run", server, TWO_RESPONSES, f"budget.{limit}") == 1
    told = capsys.readouterr().err
    assert f"budget.{limit.split('=')[0]} is" in told and f"a step can take {step}: raise" in told
    assert server.count == 0


@pytest.mark.slow
def test_a_repeated_run_on_the_same_ledger_buys_nothing(
    remote: Callable[..., int], server: TinyServer, tmp_path: Path
) -> None:
    shared = f"ledger={tmp_path / 'shared.sqlite'}"
    assert remote("train", tmp_path / "first", server, shared) == 0
    assert remote("train", tmp_path / "second", server, shared) == 0
    assert not bought_twice(server)
    assert read_metrics(tmp_path / "first") == read_metrics(tmp_path / "second")


@pytest.mark.parametrize("problem", ["key", "model", "down"])
def test_a_server_is_checked_before_a_model_is_loaded(
    problem: str,
    remote: Callable[..., int],
    server: TinyServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("alignpro.policy.policy.Policy.load", load)
    overrides = ["target.endpoint.max_retries=0"]
    if problem == "key":
        monkeypatch.setenv("BIG_KEY", "sk-wrong")
    elif problem == "model":
        overrides.append("target.endpoint.model=bigger")
    else:
        overrides.append("target.endpoint.base_url=http://127.0.0.1:9/v1")
    assert remote("train", tmp_path / "run", server, *overrides) == 1
    told = capsys.readouterr().err
    assert told.count("error:") == 1
    assert {"key": "401", "model": "bigger", "down": "127.0.0.1:9"}[problem] in told
    assert "sk-wrong" not in told


def test_a_dry_run_sends_nothing_and_tells_the_cost(
    remote: Callable[..., int], server: TinyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = ["prices.big.input=1", "prices.big.output=2", "budget.usd=0.001"]
    assert remote("train", tmp_path / "run", server, TWO_RESPONSES, *prices, "--dry-run") == 0
    told = capsys.readouterr().out
    # 2 prompts × 2 rewrites × 2 responses, 1024 tokens of a prompt and 4 of its rewrite, 4 of an answer
    assert "in a step: at most 8 requests and 8,256 tokens" in told.replace("big at " + server.url + ", a", "in a")
    assert "may not be enough for a single step: the run does not start" in told
    assert server.count == 0


def test_the_rewriter_answers_from_the_server(
    finished: Callable[..., Path], server: TinyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    local, run = finished("train", TWO_RESPONSES), tmp_path / "run"
    shutil.copytree(local, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["target"] = {"endpoint": {"base_url": server.url, "model": "big", "api_key_env": "BIG_KEY"}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with (
        alignpro.Rewriter.load(local, with_target=True) as here,
        alignpro.Rewriter.load(run, with_target=True, trust_endpoint=True) as there,
    ):
        assert here.rewrite(["add one", "and two"], n=2) == there.rewrite(["add one", "and two"], n=2)
    assert f"answers come from big at {server.url}" in caplog.text


def test_a_run_directory_alone_sends_no_key(finished: Callable[..., Path], server: TinyServer, tmp_path: Path) -> None:
    """It may come from someone else, and name a variable that holds something else."""
    run = tmp_path / "run"
    shutil.copytree(finished("train", TWO_RESPONSES), run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["target"] = {"endpoint": {"base_url": server.url, "model": "big", "extra_headers": {"x": "env:BIG_KEY"}}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(
        ModelError, match=rf"sends \$BIG_KEY to {server.url}; if you trust it, say so: --trust-endpoint"
    ):
        alignpro.Rewriter.load(run, with_target=True)
    assert server.count == 0


def letters(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward that depends on every letter."""
    return [sum(map(ord, response)) % 17 / 17 for response in responses]


def comparison(workshop: Workshop, target: dict[str, Any], out: Path) -> dict[str, Any]:
    prompter = {"path": str(workshop.root / "prompter"), "device": "cpu"}
    sampling = {"max_tokens": 4}
    return {
        "out": str(out),
        "data": {"source": str(workshop.root / "prompts.jsonl"), "holdout": 0},
        "target": target,
        "reward": {"components": [{"kind": "function", "function": f"{__file__}:letters"}]},
        "prompter": prompter,
        "rewrite": sampling,
        "respond": sampling,
        "prompts": 6,
    }


def same_in_both(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in summary.items() if name not in ("seconds", "versions", "notes", "bound")}


def run_comparison(command: str, config: dict[str, Any], path: Path) -> dict[str, Any]:
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as stop:
        main([command, str(path)])
    assert not stop.value.code
    return same_in_both(json.loads((Path(config["out"]) / "summary.json").read_text()))


def test_an_evaluation_equals_that_in_process(
    workshop: Workshop, server: TinyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = {"path": str(workshop.root / "target"), "device": "cpu"}
    remote = {"endpoint": {"base_url": server.url, "model": "big", "api_key_env": "BIG_KEY"}}
    summaries = []
    for name, target in (("local", local), ("remote", remote)):
        config = comparison(workshop, target, tmp_path / name)
        config |= {"reference": config["prompter"], "gibbs_candidates": 3, "bound": True, "oracle": local}
        config |= {"rewrites_per_prompt": 2}
        if name == "local":
            with monkeypatch.context() as patch:
                patch.setattr("alignpro.evaluation.evaluate.write_outputs", lambda *_: None)
                summary = same_in_both(alignpro.evaluate(config).as_dict())
            assert summary["oracle"].pop("kl") == pytest.approx(0, abs=1e-6)
        else:
            summary = run_comparison("eval", config, tmp_path / f"{name}.yaml")
            assert summary["oracle"].pop("kl") is None
            del summary["seed"]
        summaries.append(summary)
    assert json.loads(json.dumps(summaries[0])) == summaries[1]
    written = json.loads((tmp_path / "remote" / "summary.json").read_text())
    told = "not computable: the target is behind an endpoint, which gives no log-probabilities"
    assert written["bound"]["note"] == told
    assert any(told in note for note in written["notes"])
    assert told in (tmp_path / "remote" / "report.html").read_text()
    files = [path for path in (tmp_path / "remote").rglob("*") if path.is_file()]
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert not bought_twice(server)


def test_resampling_equals_that_in_process(workshop: Workshop, server: TinyServer, tmp_path: Path) -> None:
    local = {"path": str(workshop.root / "target"), "device": "cpu"}
    remote = {"endpoint": {"base_url": server.url, "model": "big", "api_key_env": "BIG_KEY"}}
    made = []
    for name, target in (("local", local), ("remote", remote)):
        config = comparison(workshop, target, tmp_path / name) | {"candidates": 3}
        summary = run_comparison("optimal", config, tmp_path / f"{name}.yaml")
        made.append((summary, (tmp_path / name / "rewrites.jsonl").read_text()))
    assert made[0] == made[1]


@pytest.mark.slow
def test_a_mixture_is_evaluated_on_each_target_apart(workshop: Workshop, server: TinyServer, tmp_path: Path) -> None:
    local = {"path": str(workshop.root / "target"), "device": "cpu"}
    remote = {"endpoint": {"base_url": server.url, "model": "big", "api_key_env": "BIG_KEY"}}
    config = comparison(workshop, {"mixture": [local, remote]}, tmp_path / "both")
    run_comparison("eval", config, tmp_path / "both.yaml")
    summary = json.loads((tmp_path / "both" / "summary.json").read_text())["targets"]
    assert summary.keys() == {"target", "big"}
    for name in summary:
        assert (tmp_path / "both" / name / "report.html").exists()
    assert (tmp_path / "both" / "ledger.sqlite").exists()
