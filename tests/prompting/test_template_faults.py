"""Chat templates that lose text, fail, need a choice, print dates, or open reasoning."""

from __future__ import annotations

import pytest
from example_tokenizers import QWEN, bpe_tokenizer, char_tokenizer, prompt

from alignpro.config import ModelConfig
from alignpro.data import Message
from alignpro.errors import DataError, ModelError
from alignpro.prompting.chat_template import ChatTemplate
from alignpro.prompting.target_prompt import TargetTemplate
from alignpro.prompting.template_source import PLAIN_TEMPLATE
from alignpro.prompting.tokenization import load_tokenizer

USER, ASSISTANT, SYSTEM = Message("user", "u"), Message("assistant", "a"), Message("system", "s")


def with_template(template):
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    "content",
    [
        "message['contents']",
        "''",
        "message['content'] | upper",
        "message['content'] | e",
        "message['content'] | tojson",
        "message['content'].split() | join(' ')",
        "message['content'][:20]",
        "message['content'] | map(attribute='text') | join",
    ],
)
def test_a_template_that_drops_or_changes_text_is_refused(content):
    template = "{% for message in messages %}{{ message['role'] + ': ' }}{{ " + content + " }}{% endfor %}"
    with pytest.raises(ModelError, match=r"drops or changes the text of a turn of the user: .*must write message\["):
        ChatTemplate(with_template(template))


def test_a_template_that_drops_answers_is_refused():
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ModelError, match="drops or changes the text of a turn of the assistant"):
        ChatTemplate(with_template(template))


def test_a_template_may_trim_text():
    chat = ChatTemplate(with_template(QWEN.replace("m.content", "(m.content | trim)")))
    assert chat.encode([Message("user", " u ")]) == chat.encode([USER])


def test_conversations_whose_turns_would_be_dropped_are_refused():
    chat = ChatTemplate(with_template(QWEN.replace("in messages", "in messages if m.role != 'system'")))
    assert chat.encode([USER, ASSISTANT, USER])
    with pytest.raises(DataError, match="its chat template drops or changes the text of system turns"):
        chat.encode([SYSTEM, USER])
    chat = ChatTemplate(with_template(QWEN.replace("in messages", "in messages[-2:]")))
    assert chat.encode([SYSTEM, USER])
    with pytest.raises(DataError, match="its chat template drops or changes the text of earlier turns"):
        chat.encode([USER, ASSISTANT, USER])


@pytest.mark.parametrize(
    ("condition", "lossy", "whole"),
    [
        ("m.role != 'system' or loop.first", [USER, ASSISTANT, SYSTEM, USER], [SYSTEM, USER, ASSISTANT, USER]),
        ("m.role != 'system' or messages | length == 2", [SYSTEM, USER, ASSISTANT, USER], [SYSTEM, USER]),
    ],
)
def test_system_turns_that_are_dropped_in_some_places_alone(condition, lossy, whole):
    template = QWEN.replace("in messages %}", "in messages %}{% if " + condition + " %}", 1)
    chat = ChatTemplate(with_template(template.replace("{% endfor", "{% endif %}{% endfor", 1)))
    assert chat.encode(whole)
    with pytest.raises(DataError, match="its chat template drops or changes the text of system turns"):
        chat.encode(lossy)


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("messages[0].content + 1", "TypeError"),
        ("range(10 ** 9) | list", "OverflowError"),
        ("messages[0].content.encode('ascii').decode()", "UnicodeEncodeError"),
    ],
)
def test_a_template_that_raises_an_error_of_python(expression, error, tmp_path):
    template = QWEN + "{{ " + expression + " }}"
    with pytest.raises(ModelError, match=f"raises {error} on a user turn followed by an assistant turn: "):
        ChatTemplate(with_template(template))
    file, directory = tmp_path / "chat.jinja", tmp_path / "model"
    file.write_text(template)
    bpe_tokenizer().save_pretrained(directory)
    if error != "UnicodeEncodeError":  # which the text of the check at loading does not cause
        with pytest.raises(ModelError, match=f"chat_template .*: raises {error} on a user turn"):
            load_tokenizer(ModelConfig(path=str(directory), chat_template=str(file)))


def test_an_error_of_python_on_some_conversations_names_their_roles():
    chat = ChatTemplate(with_template(QWEN + "{% if messages | length > 2 %}{{ 1 / 0 }}{% endif %}"))
    with pytest.raises(DataError, match="raises ZeroDivisionError on a conversation of user, assistant, user"):
        chat.encode([USER, ASSISTANT, USER])


def test_dates_are_fixed():
    chat = ChatTemplate(with_template(QWEN + "{{ strftime_now('%d %b %Y') }} {{ date_string }}"))
    assert chat.tokenizer.decode(chat.encode([USER])).endswith("26 Jul 2024 26 Jul 2024")
    chat = ChatTemplate(with_template("\n" + QWEN + "{{ strftime_now('%A, %-d. %B %Y %H:%M %j %%') }}"))
    text = chat.tokenizer.decode(chat.encode([USER]))
    assert text.startswith("\n<|im_start|>")
    assert text.endswith("Friday, 26. July 2024 00:00 208 %")


class TestNamedTemplates:
    """A tokenizer with several chat templates."""

    NAMED = {"rag": QWEN + "rag", "tool_use": QWEN + "tools"}  # noqa: RUF012

    def test_without_a_default_the_names_are_listed(self, tmp_path):
        tokenizer = with_template(self.NAMED)
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(ModelError, match=r"none of them is the default: set chat_template to one of rag, tool_use"):
            load_tokenizer(ModelConfig(path=str(tmp_path)))
        with pytest.raises(ModelError, match=r"chat_template other: no such file; expected rag, tool_use, `plain`"):
            load_tokenizer(ModelConfig(path=str(tmp_path), chat_template="other"))
        loaded = load_tokenizer(ModelConfig(path=str(tmp_path), chat_template="rag"))
        assert ChatTemplate(loaded).template == ChatTemplate(loaded, "rag").template == QWEN + "rag"
        plain = load_tokenizer(ModelConfig(path=str(tmp_path), chat_template="plain"))
        assert ChatTemplate(plain).template == ChatTemplate(plain, "plain").template == PLAIN_TEMPLATE
        assert load_tokenizer(ModelConfig(path=str(tmp_path)), require_chat_template=False)
        assert ChatTemplate(tokenizer, "tool_use").template == QWEN + "tools"

    def test_the_default_is_used(self):
        assert ChatTemplate(with_template(self.NAMED | {"default": QWEN})).template == QWEN


THINKING = QWEN.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif")


class TestReasoning:
    """What a model writes between think tags is no part of the rewrite or the response."""

    @pytest.fixture(params=["text", "added tokens", "special tokens"])
    def tokenizer(self, request):
        tokenizer = bpe_tokenizer() if request.param != "text" else char_tokenizer()
        if request.param != "text":
            tokenizer.add_tokens(["<think>", "</think>"], special_tokens=request.param == "special tokens")
        return tokenizer

    @pytest.mark.parametrize(
        ("written", "answer"),
        [
            ("hm, so</think>\n\nthe rewrite", "the rewrite"),
            ("hm, so", ""),
            ("", ""),
            ("</think>the rewrite", "the rewrite"),
            ("a</think><think>b</think>the rewrite", "the rewrite"),
            ("a</think><think>b", ""),
            ("a</think>say </think> twice", "say </think> twice"),
        ],
    )
    def test_reasoning_that_the_template_opens(self, tokenizer, written, answer):
        tokenizer.chat_template = THINKING
        assert ChatTemplate(tokenizer).decode(tokenizer.encode(written)) == answer

    @pytest.mark.parametrize(
        ("written", "answer"),
        [
            ("<think>hm</think>\n\nthe rewrite", "the rewrite"),
            ("\n<think>\nhm", ""),
            ("the rewrite", "the rewrite"),
            ("put <think>this</think> there", "put <think>this</think> there"),
        ],
    )
    def test_reasoning_that_the_model_opens(self, tokenizer, written, answer):
        tokenizer.chat_template = QWEN
        assert ChatTemplate(tokenizer).decode(tokenizer.encode(written)) == answer

    def test_reasoning_that_the_template_closes_is_none(self, tokenizer):
        tokenizer.chat_template = THINKING.replace("<think>\\n' }}", "<think>\\n\\n</think>\\n\\n' }}")
        assert ChatTemplate(tokenizer).decode(tokenizer.encode("the rewrite")) == "the rewrite"

    def test_a_completion_closes_it(self, tokenizer):
        tokenizer.chat_template = THINKING
        chat = ChatTemplate(tokenizer)
        completion = chat.completion("the rewrite")
        assert chat.decode(completion) == "the rewrite"
        assert completion[-1] == chat.end_token_id

    def test_the_same_holds_for_responses(self, tokenizer):
        tokenizer.chat_template = THINKING
        target = TargetTemplate(tokenizer, max_tokens=200)
        assert target.decode(tokenizer.encode("hm</think>yes")) == "yes"
        assert target.encode(prompt("x"), "y").tokens
