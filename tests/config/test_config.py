"""Configuration: layering, overrides, and error messages, each of which names the key."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from alignpro.config import (
    DataConfig,
    EngineConfig,
    EvalConfig,
    FunctionRewardConfig,
    GuardConfig,
    KLConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RewardModelConfig,
    RLHFConfig,
    SFTConfig,
    SFTDataConfig,
    TrainConfig,
    dump_config,
    load_config,
    resolve_config,
    validate_config,
)
from alignpro.config.dotted_path import load_object
from alignpro.engine import Engine
from alignpro.environments.base import sampling_params
from alignpro.errors import ConfigError

REWARD: dict[str, Any] = {"components": [{"kind": "function", "function": "rewards:exact_match"}]}
TRAIN: dict[str, Any] = {
    "run": {"out": "runs/x"},
    "data": {"source": "prompts.jsonl"},
    "policy": {"path": "models/prompter"},
    "target": {"path": "models/target"},
    "reward": REWARD,
}
EVAL: dict[str, Any] = {"out": "runs/e"} | {key: TRAIN[key] for key in ("data", "target", "reward")}


@pytest.fixture
def train_yaml(tmp_path: Path) -> str:
    return written(tmp_path / "base.yaml", TRAIN)


def written(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return str(path)


BASE = """run: {out: r, steps: 1}
data: {source: x}
reward: {components: [{kind: function, function: "a:b"}]}
"""


def problem(*arguments: str, kind: type = TrainConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(kind, arguments)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------- layering


def test_later_files_win_key_by_key(tmp_path: Path, train_yaml: str) -> None:
    mine = written(tmp_path / "mine.yaml", {"policy": {"dtype": "bfloat16"}, "run": {"steps": 7}})
    config = load_config(TrainConfig, [train_yaml, mine])
    assert (config.policy.path, config.policy.dtype, config.run.steps) == ("models/prompter", "bfloat16", 7)
    assert load_config(TrainConfig, [mine, train_yaml]) == config  # no common key: the order does not matter


def test_arguments_apply_from_left_to_right(tmp_path: Path, train_yaml: str) -> None:
    mine = written(tmp_path / "mine.yaml", {"run": {"steps": 7}})
    assert load_config(TrainConfig, [train_yaml, mine, "run.steps=9"]).run.steps == 9
    assert load_config(TrainConfig, [train_yaml, "run.steps=9", mine]).run.steps == 7


def test_lists_are_replaced_and_not_concatenated(tmp_path: Path, train_yaml: str) -> None:
    first = written(tmp_path / "first.yaml", {"data": {"source": ["a.jsonl", "b.jsonl"]}})
    second = written(tmp_path / "second.yaml", {"data": {"source": ["c.jsonl"]}})
    assert load_config(TrainConfig, [train_yaml, first, second]).data.source == ["c.jsonl"]


def test_an_empty_file_changes_nothing(tmp_path: Path, train_yaml: str) -> None:
    assert load_config(TrainConfig, [train_yaml, written(tmp_path / "empty.yml", "# nothing\n")]) == load_config(
        TrainConfig, [train_yaml]
    )


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optimizer.learning_rate=1e-4", "optimizer", "learning_rate", 1e-4),
        ("optimizer.betas=[0.8, 0.99]", "optimizer", "betas", (0.8, 0.99)),
        ("data.source=[a.jsonl,b.jsonl]", "data", "source", ["a.jsonl", "b.jsonl"]),
        ("data.columns={prompt: text}", "data", "columns", {"prompt": "text"}),
        ("data.limit=null", "data", "limit", None),
        ("run.tensorboard=false", "run", "tensorboard", False),
        ("run.out=runs/a=b.yaml", "run", "out", Path("runs/a=b.yaml")),
        ("policy.path='123'", "policy", "path", "123"),
    ],
)
def test_overrides_are_typed(train_yaml: str, override: str, section: str, key: str, value: object) -> None:
    assert getattr(getattr(load_config(TrainConfig, [train_yaml, override]), section), key) == value


def test_a_column_of_metadata_can_be_given_on_the_command_line(tmp_path: Path) -> None:
    base = written(tmp_path / "base.yaml", "source: x.jsonl\ncolumns: {prompt: q, metadata.answer: gold}\n")
    config = load_config(DataConfig, [base, "columns.metadata.topic=kind", "columns.metadata.answer=label"])
    assert config.columns == {"prompt": "q", "metadata.answer": "label", "metadata.topic": "kind"}
    assert load_config(DataConfig, [written(tmp_path / "dumped.yaml", dump_config(config))]) == config


def test_keys_without_effect_are_refused(train_yaml: str) -> None:
    assert "rank, alpha without kind: no adapter is added" in problem(
        train_yaml, "policy.adapter.rank=4", "policy.adapter.alpha=8"
    )
    load_config(TrainConfig, [train_yaml, "policy.adapter.rank=4", "policy.adapter.kind=lora"])
    data: dict[str, Any] = {"source": "x.jsonl", "copies": 0.2}
    with pytest.raises(ConfigError, match="copies without `moves`"):
        validate_config(SFTDataConfig, data)
    validate_config(SFTDataConfig, data | {"moves": "default"})


def test_a_value_that_yaml_takes_for_missing_is_refused(train_yaml: str) -> None:
    content = yaml.safe_load(Path(train_yaml).read_text())
    content["environment_params"] = {"marks": ["???"]}
    with pytest.raises(ConfigError, match=r"environment_params\.marks\.0: \?\?\? stands for a missing value"):
        resolve_config(TrainConfig, content)
    with pytest.raises(ConfigError, match=r"environment_params\.marks\.0: "):
        dump_config(validate_config(TrainConfig, content))


@pytest.mark.parametrize("key", ["reward.components.1.weight", "reward.components[1].weight"])
def test_an_override_reaches_into_a_list(tmp_path: Path, train_yaml: str, key: str) -> None:
    component = {"kind": "function", "function": "rewards:short"}
    both = written(tmp_path / "both.yaml", {"reward": {"components": [*REWARD["components"], component]}})
    components = load_config(TrainConfig, [train_yaml, both, f"{key}=-0.5"]).reward.components
    assert [each.weight for each in components] == [1.0, -0.5]
    assert isinstance(components[1], FunctionRewardConfig)
    assert components[1].function == "rewards:short"


def test_an_index_beyond_the_list_is_an_error(train_yaml: str) -> None:
    assert "reward.components[4]" in problem(train_yaml, "reward.components.4.weight=1")


def test_a_file_whose_directory_holds_an_equals_sign(tmp_path: Path, train_yaml: str) -> None:
    (tmp_path / "lr=1").mkdir()
    assert (
        load_config(TrainConfig, [train_yaml, written(tmp_path / "lr=1" / "c.yaml", "run: {steps: 3}")]).run.steps == 3
    )


def test_interpolation(tmp_path: Path, train_yaml: str) -> None:
    mine = written(tmp_path / "mine.yaml", "rollout: {rewrite: {max_tokens: 48}, respond: '${.rewrite}'}")
    config = load_config(TrainConfig, [train_yaml, mine, "policy.reference=${policy.path}"])
    assert config.policy.reference == "models/prompter"
    assert config.rollout.respond.max_tokens == 48
    config = load_config(TrainConfig, [train_yaml, mine, "rollout.respond.max_tokens=9"])
    assert (config.rollout.rewrite.max_tokens, config.rollout.respond.max_tokens) == (48, 9)


def test_interpolation_of_an_unknown_key(train_yaml: str) -> None:
    message = problem(train_yaml, "policy.reference=${policy.pth}")
    assert "policy.pth" in message
    assert "policy.reference" in message


# ------------------------------------------------------------------------------------------ unreadable configurations


def test_a_missing_file(tmp_path: Path) -> None:
    assert problem(str(tmp_path / "nowhere.yaml")) == f"configuration file {tmp_path / 'nowhere.yaml'}: not found"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: [1,", "not valid YAML"),
        ("a: 1\na: 2", "duplicate key a"),
        ("a:\n\t- b", "not valid YAML"),
        ("a: !!python/object:os.system 1", "not valid YAML"),
        ("- a\n- b", "expected a mapping"),
        ("3", "configuration file"),
        ("\x00\x01", "not valid YAML"),
        ("reward: {components: {function: f}}", "reward.components: a list cannot be merged with a mapping"),
        ("a: ${b", "configuration file"),
    ],
)
def test_a_file_that_is_not_a_configuration(tmp_path: Path, train_yaml: str, content: str, said: str) -> None:
    path = written(tmp_path / "bad.yaml", content)
    message = problem(train_yaml, path)
    assert said in message
    assert path in message


def test_a_file_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("run: {out: café}".encode("latin-1"))
    assert "not text in UTF-8" in problem(str(path))


@pytest.mark.parametrize("argument", ["run.steps", "=3", "train", "run.steps=[1", 'run.out="x', "run.out=${"])
def test_an_argument_that_is_not_an_override(train_yaml: str, argument: str) -> None:
    assert repr(argument) in problem(train_yaml, argument)


FILES = {
    "sft": "run: {out: r, steps: 1}\ndata: {source: x}\npolicy: {path: m}\nbatch_size: 4",
    "reward": "run: {out: r, steps: 1}\ndata: {source: x}\nmodel: {path: m}",
    "rlhf": f"{BASE}policy: {{path: m}}\nmax_prompt_tokens: 9",
    "eval": f"{BASE}target: {{path: m}}\nout: e".replace("run: {out: r, steps: 1}\n", ""),
}


@pytest.mark.parametrize("command", FILES)
def test_the_file_of_another_command_is_named_as_such(tmp_path: Path, command: str) -> None:
    message = problem(written(tmp_path / "other.yaml", FILES[command]), "optimizer.learnin_rate=1")
    if command == "eval":  # which has no section `optimizer`
        message = problem(str(tmp_path / "other.yaml"))
    assert f"its sections fit `alignpro {command}`, not `alignpro train`, which has no " in message
    assert "unknown key" not in message and len(message.splitlines()) == 1


def test_a_file_that_lacks_sections_is_said_to_fit_the_command_that_needs_none(tmp_path: Path) -> None:
    message = problem(written(tmp_path / "short.yaml", f"{BASE}policy: {{path: m}}"))
    assert "target: missing" in message and "(as it is, it fits `alignpro rlhf`)" in message


# ------------------------------------------------------------------------------------------------------ invalid values


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optimizer.learnin_rate=1", "optimizer.learnin_rate: unknown key (did you mean 'learning_rate'?)"),
        ("target.pth=x", "target.pth: unknown key (did you mean 'path'?)"),
        ("policy.adapter.rnk=4", "policy.adapter.rnk: unknown key (did you mean 'rank'?)"),
        ("learning_rate=1", "learning_rate: unknown key (did you mean 'optimizer.learning_rate'?)"),
        ("zzz=1", "zzz: unknown key"),
        (
            "reward.components=[{kind: function, fuction: f}]",
            "reward.components.0.fuction: unknown key (did you mean 'function'?)",
        ),
        ("reward.components=[{kind: function, fuction: f}]", "reward.components.0.function: missing"),
        (
            "reward.components=[{kind: model, model: {pth: m}}]",
            "reward.components.0.model.pth: unknown key (did you mean 'path'?)",
        ),
        (
            "reward.guards=[{kind: copy_rate, penalti: 1}]",
            "reward.guards.0.penalti: unknown key (did you mean 'penalty'?)",
        ),
    ],
)
def test_an_unknown_key_is_named_with_a_suggestion(train_yaml: str, override: str, line: str) -> None:
    assert f"  {line}" in problem(train_yaml, override).splitlines()


def test_a_suggestion_inside_an_optional_section(tmp_path: Path) -> None:
    message = problem(written(tmp_path / "eval.yaml", EVAL), "prompter.pth=m", kind=EvalConfig)
    assert "prompter.pth: unknown key (did you mean 'path'?)" in message


def test_all_problems_are_reported_at_once() -> None:
    lines = problem("policy.dtype=float8", "run.steps=0").splitlines()
    assert lines[0] == "configuration:"
    assert {line.split(":")[0].strip() for line in lines[1:]} == {
        "run.out",
        "run.steps",
        "data",
        "policy.path",
        "policy.dtype",
        "target",
        "reward",
    }


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("objective.kl.coef=-0.1", "objective.kl.coef: Input should be greater than or equal to 0 (got -0.1)"),
        ("objective.kl.coef=.nan", "objective.kl.coef: Input should be a finite number"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate: Input should be a finite number"),
        ("optimizer.micro_batch_size=0", "optimizer.micro_batch_size: expected auto or a number from 1 (got 0)"),
        (
            "optimizer.micro_batch_size=most",
            "optimizer.micro_batch_size: expected auto or a number from 1 (got 'most')",
        ),
        ("optimizer.micro_batch_size=2.5", "optimizer.micro_batch_size: expected auto or a number from 1 (got 2.5)"),
        ("optimizer.micro_batch_size=null", "optimizer.micro_batch_size: expected auto or a number from 1 (got None)"),
        ("optimizer.betas=[0.9, 1.5]", "optimizer.betas.1: Input should be less than 1"),
        ("objective.kl={coef: 0, target: 5}", "objective.kl: a target KL is reached by scaling `coef`"),
        ("rollout.rewrites_per_prompt=1", "rollout.rewrites_per_prompt=1 with objective.advantage=leave_one_out"),
        ("objective={epochs: 2}", "objective: policy_gradient is on-policy"),
        ("objective={minibatches: 2}", "objective: policy_gradient is on-policy"),
        ("objective={loss: gibbs, kl: {coef: 0}}", "objective: gibbs divides R by λ"),
        ("objective={loss: gibbs, advantage: gae}", "objective: gibbs compares the scores within a group"),
        ("objective={loss: gibbs, entropy_coef: 0.1}", "objective: gibbs compares whole sequences"),
        (
            "objective={loss: ppo_clip, epochs: 2, kl: {estimator: k1}}",
            "objective: kl.estimator=k1 with several updates per rollout: its KL is that of the policy that drew the rollout",
        ),
        ("objective={loss: distillation, kl: {coef: 0}}", "objective: distillation divides R by λ"),
        (
            "objective={loss: distillation, distillation_step: 0}",
            "objective.distillation_step: Input should be greater",
        ),
        ("objective={loss: gibbs, normalize_by: token}", "objective: gibbs compares whole sequences"),
        ("objective={loss: ppo_clip, minibatches: 17}", "objective.minibatches=17 is more than"),
        ("rollout.rewrite.temperature=0", "rollout.rewrite: the policy is trained on samples"),
        ("rollout.rewrite.top_k=40", "rollout.rewrite: the policy is trained on samples"),
        ("rollout.rewrite.top_p=0.9", "rollout.rewrite: the policy is trained on samples"),
        ("rollout.rewrite.min_p=0.1", "rollout.rewrite: the policy is trained on samples"),
        ("rollout.rewrite.stop=['']", "rollout.rewrite.stop.0: String should have at least 1 character"),
        ("rollout.engine.max_batch=0", "rollout.engine.max_batch: Input should be greater than or equal to 1"),
        ("rollout.engine.pool_bytes=0", "rollout.engine.pool_bytes: Input should be greater than or equal to 1"),
        ("rollout.max_batch=4", "rollout.max_batch: "),
        ("rollout.ahead=2", "rollout.ahead: Input should be less than or equal to 1 (got 2)"),
        ("rollout={max_importance_weight: 2}", "rollout: max_importance_weight limits the weights"),
        ("reward.components=[]", "reward.components: List should have at least 1 item"),
        ("reward.components=[{kind: oracle}]", "reward.components.0: Input tag 'oracle'"),
        ("reward.guards=[{kind: copy_rate, penalty: 1}]", "reward.guards.0: a guard with a penalty needs `low`"),
        ("reward.guards=[{kind: length_ratio, low: 2, high: 1}]", "reward.guards.0: low=2.0 is above high=1.0"),
        ("reward.guards=[{kind: embedding_similarity}]", "reward.guards.0: `model` names the encoder"),
        ("reward.guards=[{kind: copy_rate, model: {path: m}}]", "reward.guards.0: `model` names the encoder"),
        ("data.holdout=1", "data.holdout: Input should be less than 1 (got 1)"),
        ("data.source=[]", "data.source: List should have at least 1 item"),
        ("data.source=3", "data.source: Input should be a valid string (got 3)"),
        ("policy=m", "policy: Input should be a valid dictionary"),
    ],
)
def test_a_bad_value_is_named(train_yaml: str, override: str, said: str) -> None:
    assert any(line.startswith(f"  {said}") for line in problem(train_yaml, override).splitlines())


def test_a_single_sample_needs_a_baseline_other_than_its_group(train_yaml: str) -> None:
    alone = [train_yaml, "rollout.rewrites_per_prompt=1"]
    assert load_config(TrainConfig, [*alone, "objective.advantage=running_baseline"]).rollout.rewrites_per_prompt == 1
    assert load_config(TrainConfig, [*alone, "objective.advantage=gae"]).rollout.rewrites_per_prompt == 1
    assert "advantage=group_normalized" in problem(*alone, "objective.advantage=group_normalized")
    for loss in ("gibbs", "distillation"):
        assert f"loss={loss}" in problem(*alone, f"objective.loss={loss}")


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ("{advantage: group_normalized}", "rollout.ahead=1 with objective.advantage=group_normalized"),
        ("{loss: ppo_clip, normalize_by: token}", "rollout.ahead=1 with objective.normalize_by=token"),
        ("{loss: distillation}", "rollout.ahead=1 with objective.loss=distillation"),
    ],
)
def test_what_importance_weights_do_not_correct_is_refused(train_yaml: str, objective: str, said: str) -> None:
    assert said in problem(train_yaml, "rollout.ahead=1", f"objective={objective}")
    for allowed in (
        "{loss: gibbs}",
        "{loss: ppo_clip, epochs: 2}",
        "{advantage: gae}",
        "{advantage: running_baseline}",
    ):
        assert load_config(TrainConfig, [train_yaml, "rollout.ahead=1", f"objective={allowed}"]).rollout.ahead == 1


def test_only_the_target_may_be_sampled_with_filters(train_yaml: str) -> None:
    assert load_config(TrainConfig, [train_yaml, "rollout.respond.top_p=0.9"]).rollout.respond.top_p == 0.9


def test_the_policy_may_have_stop_texts(train_yaml: str) -> None:
    """The drawn tokens determine where a sequence ends, so stop texts do not truncate its distribution."""
    config = load_config(
        TrainConfig, [train_yaml, 'rollout.rewrite.stop=["\\n"]', "rollout.respond.stop=['Human:', END]"]
    )
    assert config.rollout.rewrite.stop == ("\n",)
    assert sampling_params(config.rollout.respond, 3).stop == ("Human:", "END")
    assert validate_config(TrainConfig, yaml.safe_load(dump_config(config))) == config


def test_every_engine_setting_is_an_argument_of_the_engine(train_yaml: str) -> None:
    settings = (
        "rollout.engine={max_batch: 8, pool_bytes: 1000000, page_tokens: 32, token_budget: 64, cuda_graphs: false}"
    )
    engine = load_config(TrainConfig, [train_yaml, settings]).rollout.engine
    made = Engine({}, **engine.model_dump())
    for name, value in engine.model_dump().items():
        assert getattr(made, name) == value


def test_the_engine_and_the_configuration_have_the_same_defaults() -> None:
    arguments = inspect.signature(Engine).parameters
    for name, value in EngineConfig().model_dump().items():
        assert arguments[name].default == value


def test_the_oracle_has_the_same_checks_as_the_prompter(tmp_path: Path) -> None:
    path = written(tmp_path / "rlhf.yaml", {key: TRAIN[key] for key in ("run", "data", "policy", "reward")})
    assert load_config(RLHFConfig, [path]).rollout.responses_per_prompt == 8
    assert "rollout.responses_per_prompt=1" in problem(path, "rollout.responses_per_prompt=1", kind=RLHFConfig)
    assert "rollout.respond: the policy is trained" in problem(path, "rollout.respond.top_k=4", kind=RLHFConfig)


def test_gibbs_needs_the_reference_and_a_positive_kl_coefficient(tmp_path: Path) -> None:
    path = written(tmp_path / "eval.yaml", EVAL)
    assert "they need `reference`" in problem(path, "gibbs_candidates=8", kind=EvalConfig)
    whole = [path, "gibbs_candidates=8", "reference.path=models/sft"]
    assert load_config(EvalConfig, whole).gibbs_candidates == 8
    for few in ("1", "[4, 1]"):
        assert "greater than or equal to 2" in problem(
            path, "reference.path=models/sft", f"gibbs_candidates={few}", kind=EvalConfig
        )
    assert "kl_coef must be positive" in problem(*whole, "kl_coef=0", kind=EvalConfig)


def test_a_long_value_is_cut_in_the_message(train_yaml: str) -> None:
    message = problem(train_yaml, f"run.steps={'x' * 5000}")
    assert "run.steps" in message
    assert len(message) < 300


# ----------------------------------------------------------------------------------------------------------- round trip

CONFIGS = [
    (TrainConfig, TRAIN | {"reward": {**REWARD, "guards": [{"kind": "copy_rate", "penalty": 1.0, "high": 0.9}]}}),
    (RLHFConfig, {key: TRAIN[key] for key in ("run", "data", "policy", "reward")}),
    (SFTConfig, {key: TRAIN[key] for key in ("run", "data", "policy")} | {"optimizer": {"learning_rate": 1e-5}}),
    (RewardModelConfig, {"run": TRAIN["run"], "data": TRAIN["data"], "model": TRAIN["target"]}),
    (EvalConfig, EVAL),
]


@pytest.mark.parametrize(("kind", "raw"), CONFIGS, ids=[kind.__name__ for kind, _ in CONFIGS])
def test_a_dumped_configuration_loads_unchanged(tmp_path: Path, kind: type, raw: dict[str, Any]) -> None:
    config = validate_config(kind, raw)
    assert load_config(kind, [written(tmp_path / "dumped.yaml", dump_config(config))]) == config


TEXTS = st.lists(
    st.sampled_from(["${", "}", "\\", "a", "1", "e", "3", ".", ":", " ", "#", "'", '"', "\n", "é", "-", "[", "null"]),
    max_size=8,
).map("".join)


@settings(max_examples=25)
@given(texts=st.lists(TEXTS, min_size=4, max_size=8))
def test_any_text_survives_the_round_trip(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    raw = EVAL | {"title": texts[0], "reward": {"components": [{**REWARD["components"][0], "params": {"text": texts}}]}}
    config = validate_config(EvalConfig, raw)
    dumped = written(tmp_path_factory.getbasetemp() / "dumped.yaml", dump_config(config))
    assert load_config(EvalConfig, [dumped]) == config


def test_a_configuration_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        OptimizerConfig().learning_rate = 1.0  # type: ignore[misc]


def test_a_guard_without_penalty_is_a_metric_and_needs_no_range() -> None:
    assert GuardConfig(kind="copy_rate").penalty == 0


def test_files_are_looked_for_beside_the_yaml_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, here = tmp_path / "jobs", tmp_path / "here"
    for folder in (jobs, here):
        folder.mkdir()
        (folder / "both.py").touch()
    (here / "here.py").touch()
    (jobs / "template.jinja").touch()
    monkeypatch.chdir(here)
    functions = [
        "both.py:score",
        "here.py:score",
        "none.py:score",
        f"{here}/here.py:score",
        "math:sqrt",
        "${run.out}/x.py:f",
    ]
    components = [{"kind": "function", "name": str(i), "function": each} for i, each in enumerate(functions)]
    models = {
        "policy": {"path": "p", "chat_template": "template.jinja"},
        "target": {"path": "t", "chat_template": "plain"},
    }
    job = {"run": {"out": "runs/x"}, "data": {"source": "d"}, "reward": {"components": components}, **models}
    (jobs / "train.yaml").write_text(yaml.safe_dump(job))
    config = load_config(TrainConfig, ["../jobs/train.yaml"])
    found = [component.function for component in config.reward.components]
    assert found == ["../jobs/both.py:score", *functions[1:5], "runs/x/x.py:f"]
    assert config.policy.chat_template == "../jobs/template.jinja"
    assert config.target_model.chat_template == "plain"
    assert (
        load_config(TrainConfig, [str(jobs / "train.yaml"), "reward.components.0.function=both.py:other"])
        .reward.components[0]
        .function
        == "both.py:other"
    )  # in an override: from the working directory
    with pytest.raises(ConfigError, match=r"here/none.py not found, nor beside the YAML file that names it"):
        load_object("none.py:score", "reward function")


def test_the_kl_estimator_depends_on_the_updates_per_rollout() -> None:
    assert ObjectiveConfig().kl_estimator == "regressed"
    assert ObjectiveConfig(loss="ppo_clip", minibatches=2).kl_estimator == "exact"
    assert ObjectiveConfig(kl=KLConfig(estimator="k3")).kl_estimator == "k3"
    stale = {"estimator": "k1_sequence"}
    assert ObjectiveConfig().step_kl == 0.2 and ObjectiveConfig(loss="distillation").step_kl is None
    assert ObjectiveConfig(loss="distillation", step_kl=0.3).step_kl == 0.3
    assert ObjectiveConfig(loss="gibbs", epochs=2, kl=stale).epochs == 2  # uses no return
    assert ObjectiveConfig(loss="ppo_clip", epochs=2, kl=stale | {"coef": 0}).epochs == 2  # charges no KL
