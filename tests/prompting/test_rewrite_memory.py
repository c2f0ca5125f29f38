"""The memory of past rewrites: similarity, ranking, what is kept, what fits in the input, its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from alignpro.config import MemoryConfig, PromptingConfig, TrainConfig, validate_config
from alignpro.data import Prompt
from alignpro.errors import ConfigError, ModelError
from alignpro.prompting.bm25 import BM25, K1, B, terms
from alignpro.prompting.memory import FILE_NAME, Memory, read_memory
from alignpro.prompting.memory_context import MemoryContext
from alignpro.prompting.memory_template import MemoryTemplate, PastRewrite
from alignpro.prompting.prompter_prompt import PrompterTemplate

EGG, RICE, DNS = map(Prompt.from_text, ("boil an egg", "boil rice for two people", "what is dns"))
SHORT = (
    "{% for each in best %}+{{ each.rewrite }}\n{% endfor %}{% for each in worst %}-{{ each.rewrite }}\n{% endfor %}"
)


def memory(template: str | None = None, **settings: object) -> Memory:
    config = MemoryConfig.model_validate(settings)
    return Memory(config, None if template is None else MemoryTemplate(template, "short"))


def filled(template: str | None = None, **settings: object) -> Memory:
    made = memory(template, **settings)
    rewrites = [["egg, well", "egg, badly", "egg"], ["rice, well", "rice, badly", "rice"], ["dns", "", "dns!"]]
    made.add(1, [EGG, RICE, DNS], rewrites, [[0.8, 0.1, 0.5], [0.9, 0.2, 0.5], [0.4, 0.0, 0.3]])
    return made


def shown(made: Memory, text: str) -> tuple[list[str], list[str]]:
    recalled = made.recall(Prompt.from_text(text))
    return [each.rewrite for each in recalled.best], [each.rewrite for each in recalled.worst]


def test_bm25_is_the_formula_in_float64() -> None:
    generator = np.random.default_rng(0)
    documents = [
        [f"t{i}" for i in generator.zipf(1.6, size=generator.integers(1, 30)) if i < 40] + ["end"] for _ in range(50)
    ]
    query = [f"t{i}" for i in range(1, 12)]
    vocabulary = {term: i for i, term in enumerate(sorted({term for each in [*documents, query] for term in each}))}
    counts = np.zeros((len(documents), len(vocabulary)))
    for row, document in zip(counts, documents, strict=True):
        np.add.at(row, [vocabulary[term] for term in document], 1.0)
    n = (counts > 0).sum(0)
    idf = np.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
    lengths = counts.sum(1, keepdims=True)
    parts = idf * counts * (K1 + 1) / (counts + K1 * (1 - B + B * lengths / lengths.mean()))  # (documents, terms)
    expected = parts[:, [vocabulary[term] for term in query]].sum(1)
    found = BM25(documents).scores([*query, *query])  # a term counts once in a query
    np.testing.assert_allclose([found.get(i, 0.0) for i in range(len(documents))], expected, rtol=1e-13, atol=0)
    assert set(found) == set(np.flatnonzero(expected).tolist())
    assert BM25([]).scores(query) == BM25([[]]).scores(query) == {}


def test_terms_are_words_in_lower_case_and_letters_where_there_are_no_spaces() -> None:
    assert terms("Boil an EGG_white, don't: 3½ Straße") == ["boil", "an", "egg", "white", "don", "t", "3½", "strasse"]
    assert terms("用 Python3 写代码") == ["用", "python3", "写", "代", "码"]


def test_the_best_and_the_worst_rewrites_of_the_most_similar_prompts_are_shown() -> None:
    assert shown(filled(), "how to boil eggs") == (["rice, well", "egg, well"], ["egg, badly"])
    assert shown(filled(similar=1, best=1, worst=2), "boil for people") == (["rice, well"], ["rice, badly", "rice"])
    assert shown(filled(best=0, worst=1), "dns?") == ([], ["dns!"])  # the empty rewrite is not remembered
    assert shown(filled(), "nothing in common") == ([], [])
    made = memory()
    made.add(1, [EGG], [["a", "b"]], [[0.5, 0.5]])
    assert shown(made, "boil")[1] == []  # what is as good as the best is not bad


def test_a_prompt_does_not_see_its_own_rewrites_unless_that_is_asked_for() -> None:
    assert shown(filled(), EGG.text) == (["rice, well", "rice"], ["rice, badly"])
    assert shown(filled(own=True, similar=1), EGG.text) == (["egg, well", "egg"], ["egg, badly"])


def test_a_rewrite_sampled_again_is_worth_the_mean_of_its_rewards() -> None:
    made = memory(best=1, worst=0)
    made.add(1, [EGG], [["lucky", "good", "lucky"]], [[1.0, 0.7, 0.5]])
    assert made.rewrites == [PastRewrite(EGG.text, "lucky", 0.75, step=1, count=2)]
    made.add(2, [EGG, EGG], [["lucky"], ["good"]], [[0.0], [0.6]])
    assert made.rewrites == [PastRewrite(EGG.text, "good", 0.6, step=2)]


def test_prompts_that_were_not_rewritten_for_longest_are_dropped_first() -> None:
    made = filled(size=2)
    assert [made.holds(each) for each in (EGG, RICE, DNS)] == [False, True, True]
    made.add(2, [RICE, EGG], [["more rice"], ["egg"]], [[0.1], [0.1]])
    assert [made.holds(each) for each in (EGG, RICE, DNS)] == [True, True, False]
    assert len(made.rewrites) <= 2 * 3


def test_a_memory_read_from_its_file_is_the_same(tmp_path: Path) -> None:
    made = filled(size=2)
    made.add(7, [Prompt.from_text("line\u2028and \ud83d")], [["{{ x }}\n\u0085y"]], [[1 / 3]])
    (tmp_path / FILE_NAME).write_bytes(made.dumps())
    again = read_memory(tmp_path)
    assert again is not None and read_memory("a name on the hub") is None
    assert (again.dumps(), again.rewrites, again.config) == (made.dumps(), made.rewrites, made.config)
    for each in (made, again):
        each.add(8, [EGG], [["new"]], [[0.25]])
    assert again.dumps() == made.dumps() and shown(again, "boil rice") == shown(made, "boil rice")


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (
            b'"format": 1',
            b'"format": 2',
            r"memory\.jsonl: is a memory of format 2, .* reads 1: use the version that wrote",
        ),
        (b'"size": 512', b'"size": -1', r"memory\.jsonl:1: .* is damaged \(ValidationError: 1 validation error"),
        (b"{{ request }}", b"{{ nothing }}", r"memory\.jsonl:1: .* unknown variable nothing"),
        (b'"reward": 0.9', b'"reward": NaN', r"memory\.jsonl:5: .* reward=nan: expected a finite number"),
        (b'"step": 1', b'"steps": 1', r"memory\.jsonl:2: .* is damaged \(TypeError: .*steps.*\): restore the file"),
        (b'"rewrite": "dns"', b'"rewrite": 3', r"memory\.jsonl:8: .* expected a str, got 3"),
        (b'"count": 1}\n', b'"cou', r"memory\.jsonl:2: .* is damaged \(JSONDecodeError"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_the_line(tmp_path: Path, old: bytes, new: bytes, complaint: str) -> None:
    (tmp_path / FILE_NAME).write_bytes(filled().dumps().replace(old, new, 1))
    with pytest.raises(ModelError, match=complaint) as error:
        read_memory(tmp_path)
    assert "\n" not in str(error.value)


def test_the_built_in_template_writes_them_before_the_instruction() -> None:
    template = MemoryTemplate.read("contrast")
    good, bad = PastRewrite("{{ x }}", "y {% raw %}", 0.875, 1), PastRewrite("u", "v", -1.0, 1)
    assert template.render("Rewrite: z", [], []) == "Rewrite: z"
    text = template.render("Rewrite: z", [good], [bad])
    assert text == (
        "These rewrites of similar requests were answered well:\n\n[request] {{ x }}\n[rewrite, reward 0.88] y {% raw %}\n\n"
        "These rewrites of similar requests were answered badly:\n\n[request] u\n[rewrite, reward -1.00] v\n\nRewrite: z"
    )
    assert template.version == MemoryTemplate(template.source, "copy").version
    assert template.version != MemoryTemplate(f"{template.source} ", "other").version


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{{ request }} {{ answer }}", "unknown variable answer; expected request, best or worst"),
        ("\n{% if %}", r"mine\.jinja:2: "),
        ("{{ best }}", r"never uses \{\{ request \}\}"),
    ],
)
def test_bad_templates(tmp_path: Path, source: str, complaint: str) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(source)
    with pytest.raises(ConfigError, match=complaint):
        MemoryTemplate.read(str(file))
    with pytest.raises(
        ConfigError, match=r"memory\.template none: no such template; expected contrast, or a Jinja file"
    ):
        MemoryTemplate.read("none")
    file.write_bytes(b"{{ request }}\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        MemoryTemplate.read(str(file))
    with pytest.raises(ConfigError, match=r"UndefinedError.*nothing.*\(request 'boil'\)"):
        MemoryTemplate("{{ request }}{{ best[0].nothing.x }}", "mine").render("boil", [PastRewrite("", "", 0, 1)], [])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"memory": {"best": 0, "worst": 0}}, "memory: best=0 and worst=0 show no rewrite"),
        ({"memory": {"bset": 1}}, r"memory\.bset: unknown key \(did you mean 'best'\?\)"),
        ({"memory": {}, "rollout": {"ahead": 1}}, "rollout.ahead=1 with memory: .*set rollout.ahead=0"),
    ],
)
def test_configurations_that_make_no_sense(settings: dict, complaint: str) -> None:
    given = {
        "run": {"out": "x"},
        "data": {"source": "x"},
        "policy": {"path": "x"},
        "target": {"path": "x"},
        "reward": {"components": [{"kind": "function", "function": "x:y"}]},
    }
    with pytest.raises(ConfigError, match=complaint):
        validate_config(TrainConfig, given | settings)


def test_the_memory_is_put_into_the_user_turn_as_far_as_it_fits(qwen: PreTrainedTokenizerBase) -> None:
    plain = PrompterTemplate(qwen, PromptingConfig(meta_prompt="rewrite"))
    prompt = Prompt.from_text("boil an egg or rice")
    length = len(plain.encode(prompt))

    def encoded(limit: int, **settings: int) -> tuple[str, int]:
        context = MemoryContext(filled(f"{SHORT}{{{{ request }}}}", **settings), limit)
        template = PrompterTemplate(qwen, PromptingConfig(meta_prompt="rewrite"), memory=context)
        tokens = template.encode(prompt)
        assert tokens == template.encode(prompt)
        assert len(tokens) <= max(length, min(limit, length + context.memory.config.max_tokens))
        text = qwen.decode(tokens)
        assert text.endswith(qwen.decode(plain.encode(prompt)).rpartition("Rewrite the request")[2])
        return text, context.shown(prompt)

    text, count = encoded(1000)
    assert "+rice, well\n+egg, well\n-egg, badly\nRewrite the request" in text and count == 3
    tight = len(qwen.encode("+rice, well\n-egg, badly\n", add_special_tokens=False))
    text, count = encoded(1000, max_tokens=tight)  # the best, then the worst, and then there is no room
    assert "+rice, well\n-egg, badly\nRewrite the request" in text and count == 2
    assert encoded(length + tight) == (text, count)
    assert encoded(length)[1] == encoded(5)[1] == encoded(1000, max_tokens=1)[1] == 0
    assert "+rice …\n+egg, …\n-egg, …\n" in encoded(1000, max_characters=4)[0]


def test_an_input_follows_the_memory_when_that_changes(qwen: PreTrainedTokenizerBase) -> None:
    made = memory(f"{SHORT}{{{{ request }}}}")
    template = PrompterTemplate(qwen, PromptingConfig(), memory=MemoryContext(made, 1000))
    empty = template.encode(DNS)
    assert empty == PrompterTemplate(qwen, PromptingConfig()).encode(DNS)
    made.add(1, [Prompt.from_text("what is tcp")], [["Explain TCP."]], [[1.0]])
    assert "+Explain TCP.\nwhat is dns" in qwen.decode(template.encode(DNS))
    made.restore(memory())
    assert template.encode(DNS) == empty
