"""Where a chat template comes from: the tokenizer, one of its named templates, a Jinja file, or ``plain``."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from alignpro.errors import ModelError

PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{{- {'system': 'System', 'user': 'User', 'assistant': 'Assistant'}[message['role']] }}: {{ message['content'] -}}
{{- (eos_token or '') if message['role'] == 'assistant' else '' }}{{ '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}Assistant:{% endif -%}"""
"""``chat_template: plain``, for base models: ``User: …`` and ``Assistant: …`` on separate lines."""

FIXED_DATE = datetime(2024, 7, 26)
"""Some templates write the current date into the system turn; a fixed date keeps runs reproducible."""

_DIRECTIVES = [f"%{minus}{letter}" for minus in ("-", "") for letter in "aAwdebBmhyYHkIlpMSfzZjUWuGVcxXDFRTrs"]


def read_chat_template(name: str | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the Jinja source of a chat template; None if none is named and the tokenizer has none.

    Args:
        name: ``plain``, the name of one of the tokenizer's templates, or a file; None for the tokenizer's only or default
            template.
        tokenizer: The tokenizer. If it puts a BOS token before a text, so does ``plain``.

    Raises:
        ModelError: There is no such template or file, it is not UTF-8 text, or None does not say which of several templates.
    """
    own = tokenizer.chat_template
    named: dict[str, str] = own if isinstance(own, dict) else {}
    if name is None:
        if named and "default" not in named:
            raise ModelError(
                f"{tokenizer.name_or_path}: its tokenizer has several chat templates and none of them is the default: set "
                f"chat_template to one of {', '.join(sorted(named))}"
            )
        return named.get("default") if named else own or None
    if name in named:
        return named[name]
    if name == "plain":
        return _beginning(tokenizer) + PLAIN_TEMPLATE
    path = Path(name).expanduser()
    if not path.is_file():
        names = "".join(f"{each}, " for each in sorted(named))
        raise ModelError(f"chat_template {name}: no such file; expected {names}`plain` or a Jinja file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ModelError(f"chat_template {name}: not UTF-8") from error


def with_fixed_date(source: str) -> str:
    """Return a template in which ``strftime_now`` formats `FIXED_DATE`.

    transformers passes only plain data to templates, so the function is replaced by a macro.
    """
    if "strftime_now" not in source:
        return source
    known = {each: FIXED_DATE.strftime(each) for each in _DIRECTIVES}
    filters = "".join(f" | replace({json.dumps(each)}, {json.dumps(text)})" for each, text in known.items())
    macro = "{% macro strftime_now(format) %}{{ format" + filters + " | replace('%%', '%') }}{% endmacro %}"
    return (
        macro + "{{ '' }}" + source
    )  # the empty text keeps Jinja from trimming a line feed at the template's beginning


def _beginning(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return Jinja source that writes what the tokenizer puts before a text: a BOS token, or nothing."""
    whole, bare = tokenizer.encode("x"), tokenizer.encode("x", add_special_tokens=False)
    count = next((i for i in range(len(whole)) if bare and whole[i : i + len(bare)] == bare), 0)
    text = "".join(map(str, tokenizer.convert_ids_to_tokens(whole[:count])))
    return "{{- " + json.dumps(text, ensure_ascii=False) + " -}}\n" if text else ""
