"""Bad input to the commands: one message says what, where and what to do; the exit status is not zero; nothing is lost."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from tiny_runs import Workshop, rows, steps_of_checkpoints
from transformers import AutoTokenizer

from alignpro.cli import main

Refused = Callable[..., str]


@pytest.fixture
def refused(workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Return ``refused(command, *overrides, says=[…])``, which runs a command that must fail and leave no files."""

    def check(command: str, *overrides: str, says: Sequence[str]) -> str:
        out = tmp_path / "run"
        capsys.readouterr()
        assert workshop.run(command, out, *overrides) == 1
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.count("error: ") == 1
        message = shown.err.partition("error: ")[2]
        assert "Traceback" not in shown.err
        assert 10 < len(message) < 1000
        for part in says:
            assert part in message
        assert rows(out) == 0
        assert steps_of_checkpoints(out) == []
        return message

    return check


def copy_model(workshop: Workshop, name: str, to: Path) -> Path:
    shutil.copytree(workshop.root / name, to)
    return to


def edit_tokenizer(directory: Path, **changes: object) -> None:
    """Set entries of tokenizer_config.json; None removes one."""
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


# ------------------------------------------------------------------------------------------------------- configuration


def test_a_configuration_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(tmp_path / "nowhere.yaml")])
    assert stopped.value.code == 1
    assert capsys.readouterr().err == f"error: configuration file {tmp_path}/nowhere.yaml: not found\n"


@pytest.mark.parametrize(
    ("command", "override", "says"),
    [
        ("train", "objective.kl.coeff=0.1", ["objective.kl.coeff: unknown key (did you mean 'coef'?)"]),
        ("train", "kl.coef=0.1", ["kl: unknown key", "objective.kl"]),
        ("train", "objective.kl.coef=-0.1", ["objective.kl.coef: ", "greater than or equal to 0", "(got -0.1)"]),
        ("train", "optimizer.learning_rate=fast", ["optimizer.learning_rate: ", "number", "fast"]),
        ("train", "policy.dtype=int8", ["policy.dtype: ", "bfloat16", "int8"]),
        ("train", "run.steps=0", ["run.steps: ", "greater than or equal to 1"]),
        ("train", "optimizer", ["argument 'optimizer'", "section.key=value"]),
        (
            "train",
            "rollout.rewrites_per_prompt=1",
            ["rollout.rewrites_per_prompt=1", "leave_one_out", "at least 2", "running_baseline"],
        ),
        (
            "rlhf",
            "rollout.responses_per_prompt=1",
            ["rollout.responses_per_prompt=1", "leave_one_out", "at least 2", "running_baseline"],
        ),
        ("train", "rollout.rewrite.temperature=0", ["rollout.rewrite", "temperature > 0"]),
        ("train", "objective.epochs=2", ["policy_gradient is on-policy", "epochs=1"]),
        ("train", "run.out=null", ["run.out"]),
        ("train", f"run.seed={2**63}", ["run.seed", "less than"]),
        ("train", "run.out=" + "x" * 300, ["run.out", "the path is too long"]),
    ],
)
def test_a_bad_value_is_named_by_its_key(refused: Refused, command: str, override: str, says: list[str]) -> None:
    refused(command, override, says=says)


def test_all_problems_of_a_configuration_are_reported_at_once(refused: Refused) -> None:
    message = refused(
        "train", "run.step=3", "objective.kl.coef=-1", says=["run.step: unknown key", "objective.kl.coef"]
    )
    assert len(message.strip().splitlines()) == 3


def test_a_missing_section_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", f"run.out={tmp_path}/run"])
    message = capsys.readouterr().err
    for section in ("data", "policy", "target", "reward"):
        assert f"{section}: missing" in message


# ---------------------------------------------------------------------------------------------------------------- data


def test_a_data_file_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    refused("train", f"data.source={tmp_path}/none.jsonl", says=[f"{tmp_path}/none.jsonl", "presets:"])


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_column_that_is_not_there(refused: Refused, command: str) -> None:
    refused(command, "data.columns.prompt=question", says=["question", "columns", "prompt"])


def test_a_command_without_the_column_that_it_needs(refused: Refused, workshop: Workshop) -> None:
    source = workshop.root / "prompts.jsonl"
    refused("sft", f"data.source={source}", says=[str(source), "no column for rewrite", "data.columns.rewrite=COLUMN"])
    refused("reward", f"data.source={source}", says=["no column for chosen, rejected"])


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.csv", "empty.json", "empty.jsonl.gz"])
def test_an_empty_data_set(refused: Refused, tmp_path: Path, name: str) -> None:
    content = {"empty.csv": b"prompt,rewrite\n", "empty.json": b"[]"}.get(name, b"")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    for command in ("train", "sft"):
        refused(command, f"data.source={tmp_path / name}", says=[name, "no prompts"])


def test_a_split_that_holds_out_all_prompts(refused: Refused, workshop: Workshop) -> None:
    refused("train", "data.limit=1", "data.holdout=0.9999", says=["data.holdout=0.9999", "lower it"])


def test_more_broken_rows_than_allowed(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n[3]\n{"prompt": "b"}\n')
    source = f"data.source={tmp_path}/broken.jsonl"
    refused("train", source, "data.max_bad_rows=1", says=["broken.jsonl:2", "broken.jsonl:3", "data.max_bad_rows"])


def test_prompts_longer_than_the_context(
    refused: Refused, workshop: Workshop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """If all are too long, it is an error. If some are, they are dropped and counted, and the run continues."""
    long = [{"prompt": f"{i} " + "word " * 100} for i in range(3)]
    source = tmp_path / "long.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in long))
    for command in ("train", "rlhf"):
        refused(
            command, f"data.source={source}", says=["3 of 3 prompts do not fit", "long.jsonl:1", "max_prompt_tokens"]
        )
    source.write_text(source.read_text() + (workshop.root / "prompts.jsonl").read_text())
    caplog.clear()
    assert workshop.run("train", tmp_path / "some", f"data.source={source}", "run.steps=1") == 0
    assert "3 of 27 prompts do not fit in the" in caplog.text
    assert "were dropped" in caplog.text


def test_no_room_for_a_prompt(refused: Refused) -> None:
    refused("train", "rollout.respond.max_tokens=128", says=["respond.max_tokens=128", "context of 128"])
    refused("train", "rollout.rewrite.max_tokens=127", says=["do not fit", "sample fewer tokens"])
    refused("train", "rollout.rewrite.max_tokens=500", says=["rollout.rewrite.max_tokens=500", "context of 128"])
    refused("rlhf", "rollout.respond.max_tokens=500", says=["rollout.respond.max_tokens=500", "context of 128"])


def test_skipped_rows_are_reported(workshop: Workshop, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "mixed.jsonl"
    source.write_text((workshop.root / "prompts.jsonl").read_text() + 'no JSON\n{"prompt": ""}\n')
    assert workshop.run("train", tmp_path / "run", f"data.source={source}", "run.steps=1") == 0
    assert "24 prompts from 26 rows (0 duplicates, 2 bad rows)" in caplog.text
    assert f"{source}:25: not valid JSON" in caplog.text
    assert f"{source}:26: no prompt" in caplog.text


# -------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("command", "key"), [("train", "policy"), ("train", "target"), ("sft", "policy"), ("reward", "model")]
)
def test_a_model_that_is_not_there(refused: Refused, tmp_path: Path, command: str, key: str) -> None:
    refused(command, f"{key}.path={tmp_path}/none", says=[f"{tmp_path}/none", "no such directory"])
    refused(command, f"{key}.path=some/model", says=["some/model: no such directory, and", "the hub"])


@pytest.mark.parametrize(("command", "key"), [("train", "policy"), ("train", "target"), ("reward", "model")])
def test_a_model_directory_without_a_tokenizer(
    refused: Refused, workshop: Workshop, tmp_path: Path, command: str, key: str
) -> None:
    model = copy_model(workshop, "target", tmp_path / "model")
    for path in model.glob("*token*"):
        path.unlink()
    says = [str(model), "has no tokenizer", "name one in `tokenizer`"]
    refused(command, f"{key}.path={model}", says=says)


@pytest.mark.parametrize("command", ["train", "rlhf", "sft", "reward"])
def test_a_tokenizer_without_a_chat_template(
    refused: Refused, workshop: Workshop, tmp_path: Path, command: str
) -> None:
    model = copy_model(workshop, "target", tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    key = "model" if command == "reward" else "policy"
    refused(command, f"{key}.path={model}", says=[str(model), "no chat template", "chat_template=plain"])
    assert workshop.run(command, tmp_path / "run", f"{key}.path={model}", f"{key}.chat_template=plain") == 0


@pytest.mark.parametrize(
    ("command", "key"), [("train", "policy"), ("rlhf", "policy"), ("sft", "policy"), ("reward", "model")]
)
def test_float16_is_not_trained_in_a_single_process(refused: Refused, command: str, key: str) -> None:
    refused(command, f"{key}.dtype=float16", says=["float16", "bfloat16 or float32", "deepspeed launcher"])


def test_a_reward_models_tokenizer_without_a_pad_token(refused: Refused, workshop: Workshop, tmp_path: Path) -> None:
    model = without_pad_token(workshop, tmp_path / "model")
    assert workshop.run("reward", tmp_path / "own", f"model.path={model}") == 0  # the model has a pad token of its own
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    refused("reward", f"model.path={model}", says=[str(model), "no pad token", "set pad_token to a token that ends no"])
    assert workshop.run("reward", tmp_path / "run", f"model.path={model}", "model.pad_token=<unk>") == 0


@pytest.mark.parametrize(
    ("command", "key"), [("train", "policy"), ("train", "target"), ("rlhf", "policy"), ("sft", "policy")]
)
def test_a_causal_model_needs_no_pad_token(workshop: Workshop, tmp_path: Path, command: str, key: str) -> None:
    model = without_pad_token(workshop, tmp_path / "model")
    assert workshop.run(command, tmp_path / "run", f"{key}.path={model}") == 0


def without_pad_token(workshop: Workshop, directory: Path) -> Path:
    model = copy_model(workshop, "target", directory)
    edit_tokenizer(model, pad_token=None)
    assert AutoTokenizer.from_pretrained(model).pad_token_id is None
    return model


def test_a_model_directory_without_weights(refused: Refused, workshop: Workshop, tmp_path: Path) -> None:
    model = copy_model(workshop, "prompter", tmp_path / "model")
    (model / "model.safetensors").unlink()
    refused("train", f"policy.path={model}", says=[str(model), "cannot be loaded"])


def test_weights_cut_short(refused: Refused, workshop: Workshop, tmp_path: Path) -> None:
    model = copy_model(workshop, "prompter", tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for command in ("train", "sft"):
        refused(command, f"policy.path={model}", says=[str(model), "cannot be loaded"])


def test_a_device_that_is_not_there(refused: Refused) -> None:
    for device in ("cuda:77", "abacus"):
        refused("train", f"policy.device={device}", says=["device", device])


def test_a_reference_with_another_vocabulary(refused: Refused, workshop: Workshop) -> None:
    refused("train", f"policy.reference={workshop.root}/target", says=["vocabulary"])


# ------------------------------------------------------------------------------------------------------------- rewards


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("no_such_module:score", ["no_such_module", "import path"]),
        ("alignpro.demo.world:judge", ["alignpro.demo.world", "has no 'judge'", "reward"]),
        ("alignpro.demo.world.reward", ["expected package.module:function"]),
        ("nowhere.py:score", ["nowhere.py not found"]),
    ],
)
def test_a_reward_function_that_is_not_there(refused: Refused, function: str, says: list[str]) -> None:
    refused("train", f"reward.components.0.function={function}", says=[function, *says])


def test_a_language_model_as_a_reward_model(refused: Refused, workshop: Workshop) -> None:
    component = f"{{kind: model, model: {{path: {workshop.root}/target, device: cpu}}}}"
    refused("rlhf", f"reward.components=[{component}]", says=["reward model", "checkpoint lacks", "alignpro reward"])


# ------------------------------------------------------------------------------------------------- templates and others


def test_a_template_that_is_not_there(refused: Refused) -> None:
    refused("train", "policy.chat_template=none.jinja", says=["chat_template none.jinja", "no such file", "plain"])
    refused("train", "prompting.meta_prompt=sonnet", says=["prompting.meta_prompt sonnet", "clarify"])


def test_a_run_directory_in_use(workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert workshop.run("sft", out) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "run.lock"}
    capsys.readouterr()
    assert workshop.run("sft", out) == 1
    assert capsys.readouterr().err == (
        f"error: run directory {out}: holds a run already; continue it with --resume, or name another run.out\n"
    )
    assert {path: path.read_bytes() for path in before} == before


def test_a_failed_start_does_not_block_the_next(refused: Refused, workshop: Workshop, tmp_path: Path) -> None:
    refused("train", f"policy.path={tmp_path}/none", says=["no such directory"])
    assert workshop.run("train", tmp_path / "run") == 0


@pytest.mark.parametrize("name", ["nowhere", "empty", "unfinished"])
def test_rewriting_without_a_finished_run(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.yaml").write_text((workshop.root / "train.yaml").read_text())
    with pytest.raises(SystemExit) as stopped:
        main(["rewrite", "a question", "--run", str(tmp_path / name)])
    assert stopped.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith(f"error: run directory {tmp_path / name}: ")
    assert "not a finished run of `alignpro train`" in message


@pytest.mark.parametrize(
    ("command", "given", "says"),
    [
        ("eval", {"gibbs_candidates": 4}, ["gibbs_candidates", "`reference`"]),
        ("eval", {"target": {"path": "./none"}}, ["./none", "no such directory"]),
        ("eval", {"data": {"source": "none.jsonl"}}, ["none.jsonl"]),
        ("eval", {"gibbs_candidates": [1]}, ["gibbs_candidates"]),
        ("eval", {"arms": ["gibbs"]}, ["arms: gibbs", "no_finetuning"]),
        ("eval", {"instructions": {"a": "{{ b }}"}}, ["instructions.a", "unknown variable b"]),
        ("eval", {"instructions": {"a b": "c"}}, ["instructions"]),
        ("optimal", {"kl_coef": 0}, ["kl_coef", "greater than 0"]),
        ("optimal", {"prompter": {"path": "./none"}}, ["./none", "no such directory"]),
        ("eval", {"respond": {"max_tokens": 500}}, ["respond.max_tokens=500", "context of 128"]),
        ("optimal", {"rewrite": {"max_tokens": 500}}, ["rewrite.max_tokens=500", "context of 128"]),
    ],
)
def test_bad_input_to_an_evaluation(
    workshop: Workshop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    given: dict[str, object],
    says: list[str],
) -> None:
    training = yaml.safe_load((workshop.root / "train.yaml").read_text())
    config = {name: training[name] for name in ("data", "target", "reward")} | {"out": str(tmp_path / "out")}
    if command == "optimal":
        config["prompter"] = training["policy"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | given))
    with pytest.raises(SystemExit) as stopped:
        main([command, str(tmp_path / "config.yaml")])
    assert stopped.value.code == 1
    shown = capsys.readouterr()
    assert "error: " in shown.err
    assert "Traceback" not in shown.err
    for part in says:
        assert part in shown.err
