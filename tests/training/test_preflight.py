"""Inputs are checked before any model is loaded, in a dry run too."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_runs import Workshop

from alignpro.cli import main
from alignpro.config import EvalConfig, validate_config
from alignpro.errors import DataError
from alignpro.training import jobs, multi_process
from alignpro.training.preflight import check_inputs

Refused = Callable[..., None]


@pytest.fixture
def refused(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Refused:
    """Return a function that runs a command, and its dry run, and checks what is said before any model is loaded."""
    monkeypatch.setattr(jobs, "build_trainer", lambda *_: pytest.fail("a model is loaded first"))

    def run(command: str, *arguments: str, says: list[str]) -> None:
        for index, flags in enumerate((["--dry-run"], [])):
            assert workshop.run(command, tmp_path / f"out{index}", *arguments, *flags) == 1
            message = capsys.readouterr().err
            assert all(part in message for part in says), message
            assert "Traceback" not in message

    return run


@pytest.mark.parametrize(("command", "key"), [("train", "target"), ("rlhf", "policy"), ("reward", "model")])
def test_a_missing_model(refused: Refused, tmp_path: Path, command: str, key: str) -> None:
    refused(command, f"{key}.path={tmp_path}/none", says=[f"{tmp_path}/none: no such directory; `{key}.path` names"])


def test_a_missing_reference(refused: Refused) -> None:
    refused("train", "policy.reference=./none", says=["./none: no such directory; `policy.reference` names"])


def test_data(refused: Refused, workshop: Workshop, tmp_path: Path) -> None:
    refused("train", f"data.source={tmp_path}/none.jsonl", says=["none.jsonl"])
    refused("train", "data.columns.prompt=text", says=["prompts.jsonl", "text", "columns:"])
    prompts = workshop.root / "prompts.jsonl"
    refused("sft", f"data.source={prompts}", says=["no column for rewrite", "data.columns.rewrite=COLUMN"])
    refused("reward", f"data.source={prompts}", says=["no column for chosen"])


def test_a_reward_function_that_is_missing_or_takes_something_else(refused: Refused, tmp_path: Path) -> None:
    def components(function: str) -> str:
        return f"reward.components=[{{kind: function, function: '{function}'}}]"

    refused("train", components(f"{tmp_path}/none.py:score"), says=["none.py"])
    (tmp_path / "mine.py").write_text("def score(a, b, c): return [0.0] * len(b)\n")
    refused("train", components(f"{tmp_path}/mine.py:score"), says=["mine.py:score", "(a, b, c)"])


def test_a_column_that_a_reward_function_asks_for(refused: Refused, workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def score(completions, solution): return [0.0] * len(completions)\n")
    function = f"reward.components=[{{kind: function, function: '{tmp_path}/mine.py:score'}}]"
    refused("train", function, says=["its parameter 'solution' is neither in params nor a column of the data"])
    rows = [json.loads(line) for line in (workshop.root / "prompts.jsonl").read_text().splitlines()]
    rows[-1]["solution"] = "x"  # the other rows have none
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert workshop.run("train", tmp_path / "some", function, f"data.source={tmp_path}/some.jsonl", "--dry-run") == 0


def test_a_judge_that_cannot_be_asked(refused: Refused, tmp_path: Path) -> None:
    def judge(fields: str) -> str:
        server = "{base_url: 'http://127.0.0.1:9/v1', model: m}"
        return f"reward.components=[{{kind: judge, endpoint: {server}, {fields}}}]"

    refused("train", judge("low: 10, high: 1"), says=["low=10 is not below high=1"])
    (tmp_path / "mine.jinja").write_text("{{ answer }}")
    refused("train", judge(f"rubric: {tmp_path}/mine.jinja"), says=["mine.jinja: unknown variable answer"])
    refused(
        "train",
        judge("reference: solution"),
        says=["reward 'judge'", "no text in the column 'solution'", "prompts.jsonl"],
    )


def test_a_json_server_that_cannot_be_asked(refused: Refused) -> None:
    def http(body: str) -> str:
        fields = f"kind: http, server: {{url: 'http://127.0.0.1:9/x'}}, score: s, body: {body}"
        return f"reward.components=[{{{fields}}}]"

    refused("train", http("{y: $respons}"), says=["reward 'http'", "unknown placeholder '$respons'", "'$response'"])
    refused(
        "train", http("{y: $response, a: $metadata.solution}"), says=["$metadata.solution is no column of the data"]
    )


def test_a_target_without_a_chat_template(refused: Refused, workshop: Workshop, tmp_path: Path) -> None:
    model = shutil.copytree(workshop.root / "target", tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    refused("train", f"target.path={model}", says=[str(model), "has no chat template; set chat_template=plain"])


def test_an_environment_and_an_advantage_of_the_users_own(refused: Refused, tmp_path: Path) -> None:
    refused("train", f"environment={tmp_path}/none.py:Mine", says=["none.py"])
    refused("rlhf", f"objective.advantage={tmp_path}/none.py:Mine", says=["none.py"])


def test_prompting_and_moves(refused: Refused, tmp_path: Path) -> None:
    refused("train", "prompting.meta_prompt=nope", says=["prompting.meta_prompt nope"])
    (tmp_path / "moves.yaml").write_text('loud: "{{ prompt | upper }}"')
    settings = [f"data.moves={tmp_path}/moves.yaml", "prompting.form=addition"]
    refused("sft", *settings, says=["prompting.form=addition: none of the moves adds a text"])


def test_a_template_of_a_reward_model(refused: Refused) -> None:
    refused("reward", "model.chat_template=nope", says=["chat_template nope: no such file"])


def test_room_in_the_context(refused: Refused) -> None:
    for command, key in (("train", "rewrite"), ("train", "respond"), ("rlhf", "respond")):
        refused(command, f"rollout.{key}.max_tokens=128", says=[f"rollout.{key}.max_tokens=128 leaves no room"])


def test_an_output_that_is_a_file(workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("mine")
    for flags in (["--dry-run"], []):
        assert workshop.run("sft", tmp_path / "out", *flags) == 1
        assert "out: is a file; name another run.out" in capsys.readouterr().err


def test_clusters_by_a_key_that_no_prompt_has(workshop: Workshop, tmp_path: Path) -> None:
    config = {
        "out": str(tmp_path / "eval"),
        "data": {"source": str(workshop.root / "prompts.jsonl"), "cluster": "nope"},
        "target": {"path": str(workshop.root / "target")},
        "reward": {"components": [{"kind": "function", "function": f"{workshop.root}/reward.py:score"}]},
    }
    with pytest.raises(DataError, match=r"data\.cluster=nope: it has no such key in its metadata"):
        check_inputs(validate_config(EvalConfig, config))
    config["data"] = {"source": str(workshop.root / "prompts.jsonl"), "cluster": "source"}
    check_inputs(validate_config(EvalConfig, config))


def test_a_disk_without_room_for_a_checkpoint(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 90, 10))
    refused("train", says=["a checkpoint takes at least", "make room, or write elsewhere"])


def test_a_dry_run_of_what_is_in_order(workshop: Workshop, tmp_path: Path) -> None:
    for command in ("train", "rlhf", "sft", "reward"):
        assert workshop.run(command, tmp_path / "out", "--dry-run") == 0
    assert not (tmp_path / "out").exists()


def test_a_plan_names_a_missing_model_and_too_many_ranks(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["plan", *workshop.arguments("train", tmp_path / "out")[1:], *arguments])
        assert stop.value.code == 1
        return capsys.readouterr().err

    assert "/nope: no such directory; `path` names" in plan("target.path=/nope")
    assert "rollout.prompts_per_step=2 on 8 ranks: each rank needs at least one whole prompt" in plan("--ranks", "8")


def test_a_name_that_is_neither_directory_nor_in_the_hubs_cache_is_one_line(refused: Refused) -> None:
    refused("train", "target.path=some/model", says=["error: some/model: no such directory, and the hub"])
    refused("train", "target.path=not a name", says=["error: not a name: no such directory, and no name on the hub"])


def test_resuming_where_there_is_no_run_says_so(
    workshop: Workshop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert workshop.run("train", tmp_path / "new", "run.steps=1", "--resume") == 0
    assert f"{tmp_path / 'new'} has no checkpoint: starting from the first step" in caplog.text
    assert sum("new" in record.getMessage() and "start" in record.getMessage() for record in caplog.records) == 1


def test_more_ranks_than_gpus_are_found_before_deepspeed_is_imported(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(multi_process, "require_deepspeed", lambda: pytest.fail("imported first"))
    assert workshop.run("train", tmp_path / "out") == 1
    assert "2 ranks on a machine with 1 GPU: start one for each (deepspeed --num_gpus 1)" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert workshop.run("train", tmp_path / "out") == 1
    assert "rollout.prompts_per_step=2 on 3 ranks" in capsys.readouterr().err
