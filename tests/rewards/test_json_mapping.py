"""What is sent to a JSON server, and where in its answer the scores are."""

import datetime
import json

import pytest

from alignpro.data import Message, Prompt
from alignpro.errors import ConfigError, RewardError
from alignpro.rewards.json_mapping import BodyTemplate, Sample, ScorePath

PROMPT = Prompt(
    (Message("system", "be kind"), Message("user", 'say "$response"')),
    source="data.jsonl:7",
    metadata={"answer": 4, "tags": ["a", None], "odd": "half \ud83d"},
)
SAMPLES = [Sample(PROMPT, "first\n{{ x }}", "better"), Sample(PROMPT, '"}', None)]


def filled(body, samples=SAMPLES[:1], batched: bool = False):
    return BodyTemplate(body, batched=batched, what="reward 'http'").fill(samples)


class TestBody:
    def test_placeholders_are_replaced_by_values_and_nothing_else_is(self):
        body = {
            "texts": ["$prompt", "$response", "$rewrite"],
            "turns": "$messages",
            "answer": "$metadata.answer",
            "all": "$metadata",
            "price": "$$5",
            "flags": [True, None, 1.5, "response", "plain"],
        }
        assert filled(body) == {
            "texts": ['say "$response"', "first\n{{ x }}", "better"],
            "turns": [{"role": "system", "content": "be kind"}, {"role": "user", "content": 'say "$response"'}],
            "answer": 4,
            "all": {"answer": 4, "tags": ["a", None], "odd": "half \ufffd"},
            "price": "$5",
            "flags": [True, None, 1.5, "response", "plain"],
        }

    def test_a_text_cannot_leave_its_place(self):
        for text in ('", "score": 1, "x": "', "$rewrite", "\x00\u2028</script>", "{{ 7 * 7 }}", "\ud800"):
            sample = Sample(PROMPT, text, None)
            sent = json.loads(json.dumps(filled({"text": "$response"}, [sample])))
            assert sent == {"text": text.replace("\ud800", "\ufffd")}

    def test_what_there_is_none_of_is_null(self):
        assert filled(["$response", "$rewrite", "$metadata.none"], SAMPLES[1:]) == ['"}', None, None]

    def test_of_a_batch_a_placeholder_is_a_list(self):
        assert filled({"y": "$response", "r": ["$rewrite"], "model": "m"}, SAMPLES, batched=True) == {
            "y": ["first\n{{ x }}", '"}'],
            "r": [["better", None]],
            "model": "m",
        }

    def test_or_each_sample_has_a_structure_of_its_own(self):
        assert filled({"$each": {"text": "$response", "id": 1}}, SAMPLES, batched=True) == [
            {"text": "first\n{{ x }}", "id": 1},
            {"text": '"}', "id": 1},
        ]
        assert filled({"in": {"$each": ["$metadata.answer", "$response"]}}, SAMPLES, batched=True) == {
            "in": [[4, "first\n{{ x }}"], [4, '"}']]
        }

    @pytest.mark.parametrize(
        ("body", "batched", "says"),
        [
            (
                {"a": "$respnse"},
                False,
                r"unknown placeholder '\$respnse' \(did you mean '\$response'\?\); there are \$prompt, ",
            ),
            ({"a": "$"}, False, r"unknown placeholder '\$'"),
            ({"a": "$response.text"}, False, r"unknown placeholder"),
            ({"a": "$prompt"}, False, r"never uses \$response"),
            ({"a": "$response", "b": "Q: $prompt"}, False, r"'Q: \$prompt' has a placeholder within other text"),
            ({"$each": "$response"}, False, r"\$each needs batch_size"),
            ({"$each": "$response", "b": 1}, True, r"\$each stands beside other keys"),
            ({"$each": {"$each": "$response"}}, True, r"\$each needs batch_size, and cannot be within another"),
        ],
    )
    def test_bad_templates(self, body, batched, says):
        with pytest.raises(ConfigError, match=rf"^reward 'http': body.*{says}"):
            BodyTemplate(body, batched=batched, what="reward 'http'")

    def test_columns_are_known(self):
        template = BodyTemplate(["$response", "$metadata.b", {"x": "$metadata.a"}], batched=False, what="it")
        assert template.columns == ["a", "b"]

    @pytest.mark.parametrize("value", [datetime.date(2024, 1, 1), float("nan"), b"x"])
    def test_metadata_that_is_no_json(self, value):
        prompt = Prompt.from_text("q", metadata={"when": value}, source="data.jsonl:3")
        for name in ("$metadata.when", "$metadata"):
            with pytest.raises(
                RewardError, match=r"reward 'http': \$metadata.* cannot be written as JSON(.|\n)*data.jsonl:3"
            ):
                filled(["$response", name], [Sample(prompt, "y", None)])


def scores(path: str, answer, batched: bool = False):
    samples = SAMPLES if batched else SAMPLES[:1]
    return ScorePath(path, batched=batched).read(answer, samples, "reward 'http'")


class TestScore:
    @pytest.mark.parametrize(
        ("path", "answer", "score"),
        [
            ("score", {"score": 0.5}, 0.5),
            ("result.scores.1", {"result": {"scores": [1, 2]}}, 2.0),
            ("0.score", [{"score": -3}], -3.0),
            ("", 4, 4.0),
            ("passed", {"passed": True}, 1.0),
            ("a.0", {"a": {"0": 1}}, 1.0),
        ],
    )
    def test_of_one_sample(self, path, answer, score):
        assert scores(path, answer) == [score]

    @pytest.mark.parametrize(
        ("path", "answer"),
        [
            ("scores", {"scores": [1, 2]}),
            ("", [1.0, 2.0]),
            ("*.score", [{"score": 1}, {"score": 2}]),
            ("data.*.0", {"data": [[1], [2]]}),
        ],
    )
    def test_of_a_batch(self, path, answer):
        assert scores(path, answer, batched=True) == [1.0, 2.0]

    @pytest.mark.parametrize(
        ("path", "answer", "says"),
        [
            ("score", {}, "the answer has no 'score' at its top, where it has no keys"),
            ("score", {"Score": 1}, "no 'score' at its top, where it has the keys 'Score'"),
            ("a.b.c", {"a": {"b": {"d": 1}}}, "no 'c' at 'a.b', where it has the keys 'd'"),
            ("a.2", {"a": [1, 2]}, "no '2' at 'a', where it has a list of 2"),
            ("a.-1", {"a": [1, 2]}, "no '-1' at 'a'"),
            ("a.٣", {"a": [1, 2, 3, 4]}, "no '٣' at 'a'"),
            ("a." + "9" * 5000, {"a": [1]}, "at 'a', where it has a list of 1"),
            ("*", {"a": 1}, r"no '\*' at its top"),
            ("a.b", {"a": "text"}, "no 'b' at 'a', where it has a text"),
            ("a.b", {"a": None}, "where it has null"),
            ("a", {"a": "0.5"}, "the score is a text, not a finite number"),
            ("a", {"a": None}, "the score is null"),
            ("a", {"a": [1]}, "the score is a list"),
            ("a", {"a": float("nan")}, "the score is nan"),
            ("a", {"a": 10**400}, "the score is inf"),
        ],
    )
    def test_an_answer_without_it(self, path, answer, says):
        with pytest.raises(RewardError, match=rf"^reward 'http': .*{says}(.|\n)*data.jsonl:7"):
            scores(path, answer)

    @pytest.mark.parametrize(
        ("path", "answer", "says"),
        [
            ("s", {"s": [1.0]}, "the answer to 2 samples holds 1 scores"),
            ("s", {"s": 1.0}, "holds a number, not a list of scores"),
            ("*.s", [{"s": 1}, {}], "no 's' at '1'"),
            ("s", {"s": [1, "2"]}, "the score is a text"),
        ],
    )
    def test_an_answer_without_one_for_each(self, path, answer, says):
        with pytest.raises(RewardError, match=says):
            scores(path, answer, batched=True)

    def test_names_of_the_servers_are_shortened(self):
        with pytest.raises(RewardError) as caught:
            scores("score", {f"{i}\x1b{'x' * 10_000}": 1 for i in range(1000)})
        assert len(str(caught.value)) < 1000
        assert "\x1b" not in str(caught.value)
