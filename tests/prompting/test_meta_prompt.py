"""Meta-prompts, built in and from files."""

import pytest
from example_tokenizers import DIALOGUE, prompt

from alignpro.config import PromptingConfig
from alignpro.data import Message, Prompt
from alignpro.errors import ConfigError
from alignpro.prompting.meta_prompt import MetaPrompt, available_meta_prompts
from alignpro.prompting.prompter_prompt import PrompterTemplate


def test_built_in_meta_prompts_are_documented_and_contain_the_prompt():
    built_in = available_meta_prompts()
    assert {"none", "rewrite", "clarify", "expand", "structure"} <= built_in.keys()
    assert all(len(doc) > 20 for doc in built_in.values())
    text = 'keep {{ this }} {% raw %} <b>&amp;</b> "as" it\'s\n'
    for name in built_in:
        (message,) = MetaPrompt(name).messages(prompt(text))
        assert message.role == "user"
        assert message.content.endswith(text)
    assert MetaPrompt("none").messages(prompt(text)) == (Message("user", text),)


def test_history_is_written_by_templates_that_use_it_and_kept_as_turns_otherwise():
    multi = Prompt(DIALOGUE)
    assert MetaPrompt("none").messages(multi) == DIALOGUE
    (message,) = MetaPrompt("clarify").messages(multi)
    assert "[user] hi\n[assistant] hello" in message.content
    assert "continues" not in MetaPrompt("clarify").messages(prompt("x"))[0].content


def test_meta_prompt_from_a_file(tmp_path, qwen):
    file = tmp_path / "mine.jinja"
    file.write_text("{# My own. #}\nImprove: {{ prompt | upper }}")
    assert MetaPrompt(str(file)).doc == "My own."
    template = PrompterTemplate(qwen, PromptingConfig(meta_prompt=str(file)))
    assert "Improve: FOX<|im_end|>" in qwen.decode(template.encode(prompt("fox")))


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{{ prompt }} {{ answer }}", "unknown variable answer; expected prompt or history"),
        ("\n{% if %}", r"mine\.jinja:2: "),
        ("no variable", r"never uses \{\{ prompt \}\}"),
    ],
)
def test_bad_meta_prompts(tmp_path, source, complaint):
    file = tmp_path / "mine.jinja"
    file.write_text(source)
    with pytest.raises(ConfigError, match=complaint):
        MetaPrompt(str(file))
    file.write_text("{{ prompt }}{{ history.nothing }}")
    with pytest.raises(ConfigError, match=r"nothing.*\(prompt file:7\)"):
        MetaPrompt(str(file)).messages(prompt("x"))


@pytest.mark.parametrize(
    ("expression", "error"), [("range(10 ** 9) | list", "OverflowError"), ("prompt + 1", "TypeError")]
)
def test_an_error_of_python_in_a_meta_prompt(tmp_path, expression, error):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ prompt }}{{ " + expression + " }}")
    with pytest.raises(ConfigError, match=rf"mine\.jinja: raises {error}: .*\(prompt file:7\)"):
        MetaPrompt(str(file)).messages(prompt("x"))


def test_an_unknown_meta_prompt_is_an_error_that_lists_all():
    with pytest.raises(
        ConfigError, match=r"no such meta-prompt; expected addition, clarify, expand, none, .* or a Jinja file"
    ):
        MetaPrompt("shout")
