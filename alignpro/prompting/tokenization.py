"""Loads tokenizers and checks that they have everything the project needs."""

from __future__ import annotations

from pathlib import Path

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alignpro.config import ModelConfig
from alignpro.errors import ModelError
from alignpro.prompting.pretrained import require_pretrained
from alignpro.prompting.template_source import read_chat_template

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "*.model", "vocab.*", "*.tiktoken", "tokenizer*.py")


def load_tokenizer(
    config: ModelConfig, *, require_chat_template: bool = True, require_pad_token: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that ``config`` names, with its chat template and pad token set.

    Args:
        config: ``tokenizer``, else ``path``, names it; ``chat_template`` and ``pad_token`` override its own.
        require_chat_template: False for encoders, which take plain text rather than conversations.
        require_pad_token: True for models whose batches are padded. Batches of causal language models are packed.

    Raises:
        ModelError: There is no tokenizer, or neither it nor the configuration has a required chat template or pad token.
    """
    name = config.tokenizer or config.path
    require_pretrained(name, "tokenizer" if config.tokenizer else "path")
    _check_directory(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # the type depends on the file that transformers fails to read
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"{name}: cannot load its tokenizer: {reason}; name another in `tokenizer`") from error
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):  # transformers' result without any files
        raise ModelError(f"{name}: its tokenizer has no vocabulary; name another in `tokenizer`")
    if config.chat_template is not None:
        named, source = tokenizer.chat_template, read_chat_template(config.chat_template, tokenizer)
        is_named = isinstance(named, dict) and config.chat_template in named
        tokenizer.chat_template = {**named, "default": source} if is_named else source
        _check_template(tokenizer, config.chat_template)
    if require_chat_template and not read_chat_template(None, tokenizer):
        raise ModelError(
            f"{name}: its tokenizer has no chat template; set chat_template=plain (User: … Assistant: …), "
            "or chat_template to a Jinja file"
        )
    if config.pad_token is not None:
        if config.pad_token not in tokenizer.get_vocab():
            raise ModelError(f"{name}: pad_token={config.pad_token!r} is not in its vocabulary; name a token that is")
        tokenizer.pad_token = config.pad_token
    if require_pad_token and tokenizer.pad_token_id is None:
        hint = f" (its end token would do: {tokenizer.eos_token})" if tokenizer.eos_token else ""
        raise ModelError(f"{name}: its tokenizer has no pad token; set pad_token to a token of its vocabulary{hint}")
    return tokenizer


def _check_directory(name: str) -> None:
    """Refuse a directory without tokenizer files, from whose config.json transformers would build an empty tokenizer."""
    directory = Path(name).expanduser()
    if directory.is_dir() and not any(any(directory.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise ModelError(
            f"{name}: the directory has no tokenizer (no tokenizer.json, tokenizer_config.json or vocabulary); "
            "save one there, or name one in `tokenizer`"
        )


def _check_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"chat_template {name}:{error.lineno}: {error.message}") from error
    except jinja2.TemplateError as error:
        raise ModelError(f"chat_template {name}: refuses a user turn: {error}") from error
    except Exception as error:  # a template may raise any error of Python
        raise ModelError(f"chat_template {name}: raises {type(error).__name__} on a user turn: {error}") from error
