"""Judges of an evaluation's arms, told by planted judges that answer by a rule."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny_runs import Workshop
from tiny_server import Choice, TinyServer, prompt_of

from alignpro.cli import main
from alignpro.config import EngineConfig, EvalConfig, JudgeConfig, JudgingConfig, validate_config
from alignpro.data import Message, Prompt
from alignpro.demo.world import prompt_records, write_records
from alignpro.endpoints.types import Answer, Query
from alignpro.errors import ConfigError, DataError, EndpointError
from alignpro.evaluation import judging_directories
from alignpro.evaluation.evaluate import evaluate
from alignpro.evaluation.judging import Judgement, arm_pairs, judge_arms
from alignpro.evaluation.judging_directories import judge_directories
from alignpro.evaluation.results import SampleRow
from alignpro.evaluation.rewards_file import ArmRewards, EvaluationRewards

ENDPOINT = {"base_url": "http://127.0.0.1:9/v1", "model": "judge"}
COUNT = 60


class Planted:
    """A session whose servers all answer a question by a function of both responses."""

    def __init__(self, answer: Callable[[str, str], str | Answer]) -> None:
        self.answer = answer
        self.queries: list[Query] = []

    def endpoint(self, config: Any, path: str | None = None) -> Planted:
        return self

    def preflight(self, sampling: Any) -> None:
        pass

    def submit(self, query: Query) -> Future[list[Answer]]:
        self.queries.append(query)
        said = self.answer(*both_responses(query.messages[-1][1]))
        future: Future[list[Answer]] = Future()
        future.set_result([said if isinstance(said, Answer) else Answer(said, "stop", model="judge-1")])
        return future


def both_responses(question: str) -> tuple[str, str]:
    """Responses A and B of a question by the built-in rubric."""
    found = re.search(r"response A\n(.*?)\n\n===.*?=== response B\n(.*?)\n\n===", question, re.DOTALL)
    assert found
    return found[1], found[2]


def right(a: str, b: str) -> str:
    """Prefer the response that is called good."""
    good = ["good" in each for each in (a, b)]
    return "Weighed.\nVerdict: " + ("tie" if good[0] == good[1] else "A" if good[0] else "B")


def sampled(
    better: float = 0.8, arms: tuple[str, ...] = ("no_finetuning", "align_pro")
) -> tuple[list, EvaluationRewards]:
    """Samples of two responses per prompt and arm, of which those of the trained arm are good in a share of prompts."""
    draw = np.random.default_rng(0)
    prompts = [Prompt((Message("system", "be kind"), Message("user", f"question {i}"))) for i in range(COUNT)]
    rows = []
    for i, prompt in enumerate(prompts):
        for arm in arms:
            for k in range(2):
                good = draw.random() < (better if arm == "align_pro" else 1 - better)
                text = f"{'good' if good else 'poor'} {arm} {i} {k} " + "x" * int(draw.integers(30))
                history = [{"role": "system", "content": "be kind"}]
                row = SampleRow(arm=arm, prompt=prompt.text, rewrite=None, response=text, reward=0.0, penalised=0.0)
                rows.append(row | {"history": history})
    zeros = np.zeros((COUNT, 1, 4))
    rewards = EvaluationRewards(
        [p.id for p in prompts], list(range(COUNT)), {arm: ArmRewards(zeros, zeros) for arm in arms}, 0, "0"
    )
    return rows, rewards


def judging(**settings: Any) -> JudgingConfig:
    return validate_config(JudgingConfig, {"endpoint": ENDPOINT} | settings)


def judge(
    answer: Callable[[str, str], Any], rows_and_rewards: Any = None, **settings: Any
) -> tuple[Judgement, Planted]:
    session = Planted(answer)
    rows, rewards = rows_and_rewards or sampled()
    return judge_arms(judging(**settings), rows, rewards, session, EngineConfig(), where="runs/eval"), session


def test_a_right_judge_is_believed_and_asked_in_both_orders() -> None:
    judgement, session = judge(right)
    (found,) = judgement.comparisons
    assert found.statistics.diagnosis == "usable"
    assert found.statistics.win_rate.low > 0.5
    assert found.statistics.consistency.value == 1
    assert found.adjusted_p == found.statistics.win_rate.p_value
    assert len(session.queries) == 2 * COUNT
    assert judgement.judges == {"judge": "judge-1"}
    assert judgement.verdict.startswith("By the judge judge, Align-Pro is preferred to No fine-tuning: it wins ")
    assert "at equal lengths" in judgement.verdict
    a, b = (both_responses(query.messages[-1][1]) for query in session.queries[:2])
    assert a == b[::-1]
    assert "[system] be kind" in session.queries[0].messages[-1][1]


@pytest.mark.parametrize(
    ("answer", "diagnosis", "says"),
    [
        (lambda a, b: "Verdict: A", "position", "comes first, in 100% of its verdicts"),
        (lambda a, b: f"Verdict: {'A' if len(a) > len(b) else 'B' if len(b) > len(a) else 'tie'}", "length", "longer"),
        (lambda a, b: "Verdict: tie", "ties", "neither response is better"),
        (lambda a, b: "I like both.", "unreadable", "the first: it ends with 'I like both.', not with `Verdict: A`"),
    ],
)
def test_a_judge_that_cannot_be_used_ends_in_no_judgement(answer: Any, diagnosis: str, says: str) -> None:
    judgement, _ = judge(answer)
    (found,) = judgement.comparisons
    assert found.statistics.diagnosis == diagnosis
    assert judgement.verdict.startswith("No judgement of Align-Pro and No fine-tuning by judge: ")
    assert says in judgement.verdict
    assert "\n" not in judgement.verdict
    assert found.adjusted_p is None


def test_errors_are_excluded_and_counted_and_only_what_cannot_be_read_is_asked_again() -> None:
    def answer(a: str, b: str) -> str | Answer:
        if " 3 0 " in a:
            return "hm"
        return Answer("", "filtered", model="judge-1") if " 5 0 " in a else right(a, b)

    judgement, session = judge(answer, attempts=4)
    (found,) = judgement.comparisons
    assert (found.statistics.pairs, found.statistics.errors) == (COUNT - 2, 2)
    assert len(session.queries) == 2 * COUNT + 2 * 3  # what the filter refuses would be refused again
    assert {query.sampling.temperature for query in session.queries[2 * COUNT :]} == {1.0}
    problems = [row["problem"] for row in judgement.rows if row["problem"]]
    assert len(problems) == 2
    assert "content filter" in problems[1]


def test_a_server_that_changes_its_model_stops_the_judgement() -> None:
    models = iter(["judge-1"] * 70 + ["judge-2"] * 50)
    with pytest.raises(EndpointError, match="now answers as judge-2, and did as judge-1") as error:
        judge(lambda a, b: Answer(right(a, b), "stop", model=next(models)))
    assert "\n" not in str(error.value)


def test_equal_responses_are_not_asked_about() -> None:
    rows, rewards = sampled()
    for row in rows[: 4 * 10]:
        row["response"] = "the same"
    judgement, session = judge(right, (rows, rewards))
    assert judgement.comparisons[0].identical == 10
    assert len(session.queries) == 2 * (COUNT - 10)
    for row in rows:
        row["response"] = "the same"
    assert "all 60 pairs of responses are equal" in judge(right, (rows, rewards))[0].verdict


def test_two_judges_have_a_kappa() -> None:
    judgement, _ = judge(right, second={"endpoint": ENDPOINT, "name": "other"}, pairs_per_prompt=2)
    assert [each.judge for each in judgement.comparisons] == ["judge", "other"]
    assert judgement.agreements[0].kappa.value == 1
    assert judgement.agreements[0].pairs == 2 * COUNT
    assert len(judgement.rows) == 4 * COUNT
    assert json.loads(json.dumps(judgement.as_dict()))["agreements"][0]["kappa"]["value"] == 1


def test_each_arm_is_compared_once_with_each_that_it_is_to_be_compared_with() -> None:
    rows, rewards = sampled(arms=("no_finetuning", "sft_prompter", "align_pro"))
    both = judging(against=["no_finetuning", "sft_prompter"])
    assert [(each.arm, each.against) for each in arm_pairs(both, rows, rewards, "runs/eval")] == [
        ("sft_prompter", "no_finetuning"),
        ("align_pro", "no_finetuning"),
        ("align_pro", "sft_prompter"),
    ]
    with pytest.raises(DataError, match=r"runs/eval: has no arm oracle .*judge\.against"):
        arm_pairs(judging(against=["oracle"]), rows, rewards, "runs/eval")


def test_samples_that_do_not_fit_the_rewards_are_refused() -> None:
    rows, rewards = sampled()
    with pytest.raises(DataError, match=r"runs/eval: samples\.jsonl has 239 rows"):
        judge(right, (rows[:-1], rewards))
    for row in rows:  # as an earlier version wrote them
        del row["history"]
    with pytest.raises(DataError, match=r"samples\.jsonl:1: the prompt 'question 0' is not the one of rewards\.json"):
        judge(right, (rows, rewards))


def test_the_version_of_a_rubric_depends_on_what_is_asked() -> None:
    first, again, other = (judge(right, criteria=each)[0].rubric for each in ("", "", "Be short."))
    assert first == again != other


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model": {"path": "x"}}, "give one of both"),
        ({"second": {"endpoint": ENDPOINT}}, "both judges are called 'judge'"),
        ({"endpoint": ENDPOINT | {"api": "completions"}, "system": "s"}, "api=chat"),
    ],
)
def test_judges_that_cannot_be_asked_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        judging(**settings)


def planted_server() -> TinyServer:
    return TinyServer(complete=lambda request, seed, index: Choice(right(*both_responses_or_none(prompt_of(request)))))


def both_responses_or_none(text: str) -> tuple[str, str]:
    return both_responses(text) if "response B" in text else ("", "")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A finished evaluation."""
    rows, rewards = sampled()
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.json").write_text(json.dumps(rewards.as_dict()))
    (tmp_path / "summary.json").write_text(json.dumps({"kl": 1.5}))
    return tmp_path


def test_a_finished_evaluation_is_judged_by_a_command(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with planted_server() as server:
        who = {"judge": {"endpoint": {"base_url": server.url, "model": "tiny"}}}
        (directory / "config.yaml").write_text(yaml.safe_dump(who | {"title": "A title", "kl_coef": 0.5}))
        with pytest.raises(SystemExit) as ended:
            main(["judge", str(directory)])
        assert not ended.value.code
        assert "By the judge tiny, Align-Pro is preferred to No fine-tuning" in capsys.readouterr().out
        summary = json.loads((directory / "summary.json").read_text())
        assert summary["kl"] == 1.5
        assert summary["judge"]["comparisons"][0]["diagnosis"] == "usable"
        assert len((directory / "judgements.jsonl").read_text().splitlines()) == COUNT
        asked = server.count
        assert judge_directories([directory]) == {}
        assert server.count == asked
        assert len(judge_directories([directory], force=True)) == 1
        assert server.count <= asked + 1  # the check alone: the ledger has all answers
    assert "is preferred to No fine-tuning" in _report(directory)


def test_an_interrupted_call_goes_on_with_what_is_left(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("a", "b")
    for name in names:
        (directory / name).mkdir()
        for file in ("samples.jsonl", "rewards.json", "summary.json"):
            (directory / name / file).write_text((directory / file).read_text())
    both = [directory / name for name in names]
    plain = judging_directories.judge_arms

    def cut(*given: Any, where: str, **others: Any) -> Judgement:
        judgement = plain(*given, where=where, **others)
        if where == str(both[1]):
            raise KeyboardInterrupt  # after the answers have come, before they are written
        return judgement

    with planted_server() as server:
        who = validate_config(JudgeConfig, {"judge": {"endpoint": {"base_url": server.url, "model": "tiny"}}})
        with monkeypatch.context() as patched:
            patched.setattr(judging_directories, "judge_arms", cut)
            with pytest.raises(KeyboardInterrupt):
                judge_directories(both, who)
        asked = server.count
        with caplog.at_level("INFO"):
            assert list(judge_directories(both, who)) == both[1:]
        assert f"{both[0]}: has been judged (--force judges it again)" in caplog.text
        assert server.count <= asked + 1  # the check alone
        assert len((both[1] / "judgements.jsonl").read_text().splitlines()) == COUNT
        for changes in ({"criteria": "Be short."}, {"name": "another"}, {"pairs_per_prompt": 2}):
            other = validate_config(JudgeConfig, {"judge": who.judge.model_dump() | changes})
            with pytest.raises(
                DataError, match="has been judged by tiny, with other judges, another rubric or other pairs"
            ):
                judge_directories(both, other)


def test_what_cannot_be_judged_is_said_before_anybody_is_asked(directory: Path) -> None:
    alone = directory / "experiment" / "cell"
    alone.mkdir(parents=True)
    rows, rewards = sampled(arms=("align_pro",))
    (alone / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (alone / "rewards.json").write_text(json.dumps(rewards.as_dict()))
    with planted_server() as server:
        endpoint = {"base_url": server.url, "model": "tiny"}
        who = validate_config(JudgeConfig, {"judge": {"endpoint": endpoint, "against": ["align_pro"]}})
        with pytest.raises(DataError, match=r"align_pro alone.*a cell of an experiment is of one method"):
            judge_directories([directory, alone], who)
        assert server.count == 0


def _report(directory: Path) -> str:
    from alignpro.evaluation.directory_report import report_directories

    report_directories([directory], directory / "report.html")
    return (directory / "report.html").read_text()


def test_an_evaluation_that_names_no_judge_needs_one(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"no section `judge`.*--config judge\.yaml"):
        judge_directories([directory])
    with pytest.raises(DataError, match="holds no evaluation"):
        judge_directories([directory / "nothing"], JudgeConfig(judge=judging()))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"endpoint": ENDPOINT | {"api_key_env": "MY_KEY"}}, r"sends \$MY_KEY to http://127\.0\.0\.1:9/v1"),
        ({"model": {"path": "theirs", "trust_remote_code": True}}, "lets code run that comes with the model theirs"),
        ({"model": {"path": "theirs"}, "rubric": "/etc/passwd"}, "reads the rubric /etc/passwd"),
        ({"endpoint": ENDPOINT, "ledger": "/tmp/theirs"}, "writes the ledger /tmp/theirs"),
    ],
)
def test_a_directory_from_someone_else_is_not_trusted_with_more_than_asking(
    directory: Path, settings: dict[str, Any], says: str
) -> None:
    ledger = {"ledger": settings.pop("ledger")} if "ledger" in settings else {}
    (directory / "config.yaml").write_text(yaml.safe_dump({"judge": settings} | ledger))
    with pytest.raises(ConfigError, match=says + ".*give that with --config"):
        judge_directories([directory])


class TestWithinAnEvaluation:
    @pytest.fixture(scope="class")
    def workshop(self, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
        made = Workshop(tmp_path_factory.mktemp("workshop"))
        write_records(made.root / "heldout.jsonl", prompt_records(20, 0, heldout=True))
        (made.root / "short.jinja").write_text("{{ response_a[:9] }}|{{ response_b[:9] }}")
        (made.root / "length.py").write_text(
            "def score(prompts, responses):\n    return [len(y) / 8 for y in responses]\n"
        )
        return made

    def run(self, workshop: Workshop, out: Path, judge: dict[str, Any]) -> Any:
        root = workshop.root
        config = {
            "out": str(out),
            "data": {"source": str(root / "heldout.jsonl"), "holdout": 0},
            "target": {"path": str(root / "target"), "device": "cpu"},
            "prompter": {"path": str(root / "prompter"), "device": "cpu"},
            "reward": {"components": [{"kind": "function", "function": f"{root}/length.py:score"}]},
            "rewrite": {"max_tokens": 4},
            "respond": {"max_tokens": 4},
            "prompts": 4,
            "rewrites_per_prompt": 2,
            "judge": judge,
        }
        return evaluate(validate_config(EvalConfig, config))

    def test_a_local_judge_that_is_too_weak_ends_in_no_judgement(self, workshop: Workshop, tmp_path: Path) -> None:
        judge = {
            "model": {"path": str(workshop.root / "target"), "device": "cpu"},
            "rubric": str(workshop.root / "short.jinja"),
            "max_tokens": 4,
            "attempts": 2,
        }
        result = self.run(workshop, tmp_path / "out", judge)
        assert result.judge is not None
        assert "4 pairs has a verdict that can be read in both orders; the first: " in result.judge["verdict"]
        page = (tmp_path / "out" / "report.html").read_text()
        assert "No judgement of Align-Pro and No fine-tuning by target" in page
        assert json.loads((tmp_path / "out" / "summary.json").read_text())["judge"] == result.judge

    def test_a_judge_that_fails_costs_nothing_of_what_was_sampled(
        self, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr("alignpro.evaluation.evaluate.write_outputs", lambda *_: None)
        judge = {"endpoint": ENDPOINT | {"max_retries": 0}}
        result = self.run(workshop, tmp_path / "out", judge)
        assert result.judge is not None
        assert "127.0.0.1:9" in result.judge["problem"]
        assert result.judge["verdict"].startswith("The arms were not judged: ")
        assert f"`alignpro judge {tmp_path / 'out'}` judges what was sampled" in caplog.text
        assert len(result.rows) == 4 * (4 + 2)
