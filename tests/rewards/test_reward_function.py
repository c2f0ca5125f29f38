import textwrap
from pathlib import Path

import pytest

from alignpro.config import RewardConfig
from alignpro.data import Prompt
from alignpro.environments.base import score_texts
from alignpro.errors import ConfigError, RewardError
from alignpro.rewards import build_reward

PROMPTS = [Prompt.from_text(f"question {i}", source=f"data.jsonl:{i}", metadata={"answer": str(i)}) for i in range(3)]
RESPONSES = ["0", "one", "2"]


@pytest.fixture
def reward_from(tmp_path):
    """Return a factory of reward stacks around a function given as source."""

    def make(source: str, function: str = "score", **fields):
        file = tmp_path / "mine.py"
        file.write_text("import math, numpy as np, torch\n" + textwrap.dedent(source))
        component = {"kind": "function", "function": f"{file}:{function}", **fields}
        return build_reward(RewardConfig(components=[component]))

    return make


def returning(value: str) -> str:
    return f"def score(prompts, responses):\n    return {value}\n"


def test_function_sees_the_original_prompts_and_its_params(reward_from):
    reward = reward_from(
        """
        def score(prompts, responses, *, right=1.0):
            return [right * (p.metadata["answer"] == y) for p, y in zip(prompts, responses)]
        """,
        params={"right": 0.5},
        weight=2.0,
        name="exact",
    )
    scored = reward(PROMPTS, RESPONSES, rewrites=["a", "b", "c"])
    assert scored.values == [1.0, 0.0, 1.0]
    assert scored.components == {"exact": [0.5, 0.0, 0.5]}


@pytest.mark.parametrize("value", ["torch.ones(3, requires_grad=True)", "list(torch.ones(3, requires_grad=True))"])
def test_tensors_with_gradients_are_read(reward_from, value):
    assert reward_from(returning(value))(PROMPTS, RESPONSES, RESPONSES).values == [1.0, 1.0, 1.0]


def test_function_by_dotted_path():
    component = {"kind": "function", "function": "tests_reward_by_path:length"}
    with pytest.raises(ConfigError, match=r"tests_reward_by_path:length.*no module 'tests_reward_by_path'"):
        build_reward(RewardConfig(components=[component]))
    component["function"] = "operator:eq"  # takes two arguments, as a reward does, but by position only
    with pytest.raises(RewardError, match=r"'eq' returned bool, expected a list of 1 numbers"):
        build_reward(RewardConfig(components=[component]))(PROMPTS[:1], ["y"], None)


def test_module_on_the_import_path_is_used(tmp_path, monkeypatch):
    package = tmp_path / "reward_package_of_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "scores.py").write_text("def length(prompts, responses): return [len(y) for y in responses]\n")
    monkeypatch.syspath_prepend(tmp_path)
    component = {"kind": "function", "function": "reward_package_of_test.scores:length"}
    assert build_reward(RewardConfig(components=[component]))(PROMPTS, RESPONSES, None).values == [1.0, 3.0, 1.0]


def test_file_with_dataclasses_imports_and_two_files_may_share_a_name(tmp_path):
    components = []
    for value in (1, 2):
        file = tmp_path / str(value) / "mine.py"
        file.parent.mkdir()
        file.write_text(
            "from __future__ import annotations\nfrom dataclasses import dataclass\n"
            f"@dataclass\nclass Score:\n    value: float = {value}\n"
            "def score(prompts, responses): return [Score().value for _ in responses]\n"
        )
        components.append({"kind": "function", "function": f"{file}:score", "name": f"score{value}"})
    scored = build_reward(RewardConfig(components=components))(PROMPTS, RESPONSES, None)
    assert scored.components == {"score1": [1.0] * 3, "score2": [2.0] * 3}
    assert scored.values == [3.0] * 3


@pytest.mark.parametrize(
    "values",
    [
        "[1, 2.5, True]",
        "(1, 2.5, 1)",
        "np.array([1, 2.5, 1])",
        "torch.tensor([1, 2.5, 1], requires_grad=True)",
        "[np.float32(1), torch.tensor(2.5), np.bool_(True)]",
    ],
)
def test_lists_arrays_and_tensors_of_numbers_are_accepted(reward_from, values):
    assert reward_from(returning(values))(PROMPTS, RESPONSES, None).values == [1.0, 2.5, 1.0]


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ("[1.0, math.nan, 1.0]", "returned nan, expected a finite number"),
        ("[1.0, -math.inf, 1.0]", "returned -inf, expected a finite number"),
        ("torch.tensor([1.0, float('nan'), 1.0])", "returned nan"),
        ("[1.0, 10**400, 1.0]", "returned inf"),
        ("[1.0, 1e39, 1.0]", r"returned 1e\+39, expected one of at most 3.4e\+38, the largest in float32"),
        ("[1.0, None, 1.0]", "returned None, which is not a number"),
        ("[1.0, '0.5', 1.0]", "returned '0.5', which is not a number"),
        ("[1.0, [1.0], 1.0]", r"returned \[1.0\], which is not a number"),
        ("[1.0, 1j, 1.0]", "returned 1j, which is not a number"),
    ],
)
def test_an_error_of_a_bad_value_names_its_prompt(reward_from, values, complaint):
    with pytest.raises(RewardError, match=complaint) as caught:
        reward_from(returning(values), name="mine")(PROMPTS, RESPONSES, None)
    message = str(caught.value)
    assert "'mine'" in message
    assert PROMPTS[1].id in message
    assert "data.jsonl:1" in message
    assert "'question 1'" in message
    assert PROMPTS[0].id not in message


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ("[1.0]", "returned 1 values for 3 responses"),
        ("[]", "returned 0 values for 3 responses"),
        ("None", "returned NoneType, expected a list of 3 numbers"),
        ("1.0", "returned float"),
        ("(y for y in responses)", "returned generator"),
        ("{'a': 1}", "returned dict"),
        ("'abc'", "returned str"),
        ("torch.tensor(1.0)", "returned float"),
    ],
)
def test_an_error_of_a_wrong_count_names_the_first_prompt(reward_from, values, complaint):
    with pytest.raises(RewardError, match=complaint) as caught:
        reward_from(returning(values))(PROMPTS, RESPONSES, None)
    assert "begins with prompt " + PROMPTS[0].id in str(caught.value)


def test_raising_function_is_named_with_its_line_and_called_once(reward_from, tmp_path):
    log = tmp_path / "calls"
    reward = reward_from(
        f"""
        def score(prompts, responses):
            with open({str(log)!r}, "a") as file:
                file.write("called\\n")
            return [1 / (y != "one") for y in responses]
        """,
    )
    with pytest.raises(RewardError, match=r"reward 'score' raised ZeroDivisionError: division by zero") as caught:
        reward(PROMPTS, RESPONSES, None)
    message = str(caught.value)
    assert "mine.py:6, in" in message
    assert PROMPTS[0].id in message
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert log.read_text() == "called\n"  # it may have side effects, so it is not called again to find the row


@pytest.mark.parametrize("status", ["'bad key'", "3", ""])
def test_a_function_that_ends_the_process_is_an_error_as_any_other(reward_from, status):
    """As code that grades programs may: the run is saved."""
    reward = reward_from(f"import sys\n\ndef score(prompts, responses):\n    sys.exit({status})\n")
    with pytest.raises(RewardError, match="reward 'score' raised SystemExit"):
        reward(PROMPTS, RESPONSES, None)


def test_a_function_may_change_the_working_directory(reward_from, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reward = reward_from(
        "import os\n\ndef score(prompts, responses):\n    os.chdir('/')\n    return [1.0] * len(responses)\n"
    )
    reward(PROMPTS, RESPONSES, None)
    assert Path.cwd() == tmp_path


def test_long_prompt_is_cut_in_the_message(reward_from):
    prompt = Prompt.from_text("a" * 5000)
    with pytest.raises(RewardError) as caught:
        reward_from(returning("[math.nan]"))([prompt], ["y"], None)
    assert "a" * 200 + "…" in str(caught.value)
    assert "a" * 201 not in str(caught.value)


def test_function_may_modify_its_lists(reward_from):
    prompts, responses = list(PROMPTS), list(RESPONSES)
    reward_from(
        "def score(prompts, responses):\n    n = len(prompts); prompts.clear(); responses.clear(); return [0.0] * n\n"
    )(prompts, responses, None)
    assert (prompts, responses) == (PROMPTS, RESPONSES)


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("no_colon", "expected package.module:function"),
        (":function", "expected package.module:function"),
        ("module:", "expected package.module:function"),
        ("missing/file.py:score", r"missing/file.py not found"),
        ("no.such.module:score", "there is no module 'no'"),
        ("alignpro.no_such:score", "there is no module 'alignpro.no_such'"),
        ("alignpro.rewards:score", "alignpro.rewards has no 'score'; its functions: build_reward, encode_conversation"),
        ("math:pi", "'pi' is a float, not a function"),
    ],
)
def test_a_bad_path_is_an_error_with_the_reason(path, complaint):
    with pytest.raises(ConfigError, match=complaint) as caught:
        build_reward(RewardConfig(components=[{"kind": "function", "function": path}]))
    assert path in str(caught.value)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (
            "import no_such_package_here\n",
            "importing it raised ModuleNotFoundError: No module named 'no_such_package_here'",
        ),
        ("def broken(:\n", "importing it raised SyntaxError"),
        ("1 / 0\n", "importing it raised ZeroDivisionError"),
    ],
)
def test_module_that_does_not_import_is_a_configuration_error(reward_from, source, complaint):
    with pytest.raises(ConfigError, match=complaint):
        reward_from(source)


@pytest.mark.parametrize("params", [{"alpha": 1, "gamma": 2}, {"gamma": 2}])
def test_params_are_checked_before_the_run(reward_from, params):
    with pytest.raises(ConfigError, match=r"its signature \(prompts, responses, alpha\) does not take"):
        reward_from("def score(prompts, responses, alpha): ...\n", params=params)


def test_columns_are_checked_before_the_run(reward_from):
    reward = reward_from("def score(prompts, responses, alpha): return [0.0] * len(responses)\n")
    message = (
        r"its parameter 'alpha' is neither in params nor a column of the data \(columns: answer\); .*metadata\.alpha"
    )
    with pytest.raises(ConfigError, match=message):
        reward.scorable(PROMPTS)
    with pytest.raises(RewardError, match=r"no prompt of a batch has 'alpha' in its metadata"):
        reward(PROMPTS, RESPONSES, None)
    prompts = [Prompt.from_text("q", metadata={"alpha": 1}), Prompt.from_text("r")]
    assert reward.scorable(prompts) == prompts
    assert reward(prompts, ["y", "y"], None).values == [0.0, 0.0]


@pytest.mark.parametrize("name", ["mean", "std", "guard"])
def test_names_of_metrics_are_reserved(reward_from, name):
    with pytest.raises(ConfigError, match=f"'{name}' is taken"):
        reward_from(returning("[0.0]"), name=name)


def test_components_need_different_names(tmp_path):
    component = {"kind": "function", "function": "builtins:len"}
    with pytest.raises(ConfigError):  # len takes one argument
        build_reward(RewardConfig(components=[component]))
    file = tmp_path / "mine.py"
    file.write_text(returning("[0.0]"))
    component["function"] = f"{file}:score"
    with pytest.raises(ConfigError, match="'score' occurs more than once: give each a `name`"):
        build_reward(RewardConfig(components=[component, component]))


def test_weights_that_overflow_are_caught(reward_from):
    """Rewards are float32: what fits into a float64 would be infinite there."""
    with pytest.raises(RewardError, match="the weighted sum returned inf, expected a finite number"):
        reward_from(returning("[1e30] * len(prompts)"), weight=1e300)(PROMPTS, RESPONSES, None)
    with pytest.raises(RewardError, match=r"the weighted sum returned 1e\+40, expected one of at most") as caught:
        reward_from(returning("[1.0, 1e38, 1.0]"), weight=100.0)(PROMPTS, RESPONSES, None)
    assert PROMPTS[1].id in str(caught.value)


def test_no_rows_score_nothing_and_uneven_ones_are_refused(reward_from):
    reward = reward_from(returning("1 / 0"))
    assert reward([], [], []).values == []
    with pytest.raises(ValueError, match="3 prompts, 2 responses"):
        reward(PROMPTS, RESPONSES[:2], None)
    with pytest.raises(ValueError, match="1 rewrites"):
        reward(PROMPTS, RESPONSES, ["a"])


def test_numbers_keep_their_precision(reward_from):
    values = reward_from(returning("[0.1, 1/3, 1e-12]"))(PROMPTS, RESPONSES, None).values
    assert values == [0.1, 1 / 3, 1e-12]
    assert all(type(value) is float for value in values)


class TestNames:
    """Functions that are called by the names of their parameters, such as those written for TRL."""

    @pytest.mark.parametrize(
        ("signature", "expected"),
        [
            ("completions, **columns", "completions, columns['answer'], columns['prompts'], columns['rewrites']"),
            ("prompts, completions, answer, **kwargs", "completions, answer, prompts, kwargs['rewrites']"),
            ("completions, answer, prompts, rewrites", "completions, answer, prompts, rewrites"),
            ("*, rewrites, prompts, completions, answer", "completions, answer, prompts, rewrites"),
            ("**kwargs", "kwargs['completions'], kwargs['answer'], kwargs['prompts'], kwargs['rewrites']"),
        ],
    )
    def test_functions_of_completions_get_texts_and_columns(self, reward_from, signature, expected):
        reward = reward_from(
            f"""
            def score({signature}):
                completions, answer, prompts, rewrites = {expected}
                assert prompts == ["question 0", "question 1", "question 2"]
                assert rewrites == ["a", "b", "c"]
                return [float(y == a) for y, a in zip(completions, answer)]
            """
        )
        reward.scorable(PROMPTS)
        assert reward(PROMPTS, RESPONSES, ["a", "b", "c"]).values == [1.0, 0.0, 1.0]

    @pytest.mark.parametrize(
        "signature",
        [
            "prompts, responses, answer",
            "responses, prompts, answer",
            "prompts, responses, rewrites, answer",
            "prompts, responses, *, answer",
        ],
    )
    def test_functions_of_responses_get_prompt_records(self, reward_from, signature):
        reward = reward_from(
            f"""
            def score({signature}):
                return [float(y == a == p.metadata["answer"]) for p, y, a in zip(prompts, responses, answer)]
            """
        )
        assert reward(PROMPTS, RESPONSES, ["a", "b", "c"]).values == [1.0, 0.0, 1.0]

    @pytest.mark.parametrize("signature", ["prompts, responses, metadata", "completions, metadata=None", "**kwargs"])
    def test_functions_get_the_metadata_of_each_prompt(self, reward_from, signature):
        metadata = "kwargs['metadata']" if signature == "**kwargs" else "metadata"
        reward = reward_from(f"def score({signature}): return [float(each['answer']) for each in {metadata}]\n")
        reward.scorable(PROMPTS)
        assert reward(PROMPTS, RESPONSES, None).values == [0.0, 1.0, 2.0]

    def test_params_of_the_configuration_are_no_columns(self, reward_from):
        source = "def score(completions, answer, weight=1.0): return [weight * (answer == 'x') for _ in completions]\n"
        assert reward_from(source, params={"answer": "x", "weight": 3})(PROMPTS, RESPONSES, None).values == [3.0] * 3
        with pytest.raises(ConfigError, match="does not take"):
            reward_from("def score(completions): ...\n", params={"answer": "x"})

    def test_a_column_that_some_prompts_lack_is_none_there(self, reward_from):
        prompts = [*PROMPTS[:2], Prompt.from_text("no answer")]
        reward = reward_from("def score(completions, answer): return [float(a is None) for a in answer]\n")
        assert reward.scorable(prompts) == prompts
        assert reward(prompts, RESPONSES, None).values == [0.0, 0.0, 1.0]

    def test_defaults_stand_for_columns_that_no_prompt_has(self, reward_from):
        reward = reward_from("def score(completions, level=(1, 2, 3)): return list(level)\n")
        reward.scorable(PROMPTS)
        assert reward(PROMPTS, RESPONSES, None).values == [1.0, 2.0, 3.0]

    def test_without_rewrites_they_are_none(self, reward_from):
        reward = reward_from("def score(responses, rewrites): return [float(rewrites is None)] * len(responses)\n")
        assert reward(PROMPTS, RESPONSES, None).values == [1.0] * 3

    def test_functions_of_other_names_are_called_by_position(self, reward_from):
        reward = reward_from("def score(xs, ys, strict=False): return [float(len(y)) for y in ys]\n")
        assert reward(PROMPTS, RESPONSES, None).values == [1.0, 3.0, 1.0]


class TestAbstention:
    """A function that returns None for a sample is left out of its reward."""

    @pytest.fixture
    def two(self, tmp_path):
        file = tmp_path / "two.py"
        file.write_text(
            "def digits(completions, **kwargs): return [float(y) if y.isdigit() else None for y in completions]\n"
            "def length(prompts, responses): return [len(y) if len(y) > 1 or y == '0' else None for y in responses]\n"
        )
        names = ("digits", "length")
        parts = [{"kind": "function", "function": f"{file}:{each}", "weight": 2.0} for each in names]
        return build_reward(RewardConfig(components=parts))

    def test_it_counts_for_the_samples_that_it_scores(self, two):
        scored = two(PROMPTS[:2], RESPONSES[:2], None)
        assert scored.components == {"digits": [0.0, None], "length": [1, 3]}
        assert scored.values == [2.0, 6.0]

    def test_a_sample_that_no_component_scores_is_an_error(self, two):
        message = r"reward 'digits' returned None, .*, and 'length' abstain too(.|\n)*question 2"
        with pytest.raises(RewardError, match=message) as caught:
            two([*PROMPTS, PROMPTS[0]], ["0", "one", "x", "0"], None)
        assert "data.jsonl:2" in str(caught.value)

    def test_abstentions_are_counted_and_left_out_of_the_mean(self, two):
        scores = score_texts(PROMPTS[:2], None, [[["0"], ["one"]], [["12"], ["0"]]], two)
        assert scores.metrics["reward/digits"] == pytest.approx((0 + 12 + 0) / 3)
        assert scores.metrics["reward/digits/abstained"] == 0.25
        assert "reward/length/abstained" not in scores.metrics
        assert scores.values.tolist() == [[2.0, 6.0], [28.0, 2.0]]
