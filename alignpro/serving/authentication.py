"""Bearer tokens of clients, compared in constant time."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path

from alignpro.config import AccessConfig
from alignpro.errors import ConfigError
from alignpro.serving.refusals import Refusal

_BEARER = re.compile(rb"bearer[ \t]+(\S+)[ \t]*", re.IGNORECASE)


def bearer_token(authorization: bytes | None) -> bytes | None:
    """The token of an ``authorization`` header; None without one."""
    found = _BEARER.fullmatch(authorization) if authorization else None
    return found[1] if found else None


class Tokens:
    """Tokens that are accepted, kept as hashes alone."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self._digests = [sha256(token.encode()).digest() for token in tokens]

    def require(self, authorization: bytes | None) -> None:
        """Check the header of a request. All tokens are compared, so that the time tells nothing.

        Raises:
            Refusal: With 401.
        """
        token = bearer_token(authorization)
        if token is None:
            raise _refused("Send a token: authorization: Bearer TOKEN.", "missing_token")
        digest = sha256(token).digest()
        if not sum(compare_digest(digest, each) for each in self._digests):
            raise _refused("The token is not valid.", "invalid_token")


def _refused(message: str, code: str) -> Refusal:
    return Refusal(401, message, code, headers=[(b"www-authenticate", b"Bearer")])


def client_tokens(access: AccessConfig) -> Tokens | None:
    """Tokens of clients as the configuration names them; None if none are required.

    Raises:
        ConfigError: The variable or the file is missing or holds no token.
    """
    if access.tokens_env is None and access.tokens_file is None:
        return None
    tokens = [] if access.tokens_env is None else _of_variable(access.tokens_env, "access.tokens_env")
    if access.tokens_file is not None:
        tokens += _of_file(access.tokens_file)
    return Tokens(tokens)


def admin_tokens(access: AccessConfig) -> Tokens | None:
    """Tokens that may reload; None if nobody may.

    Raises:
        ConfigError: The variable is missing or holds no token.
    """
    variable = access.admin_tokens_env
    return None if variable is None else Tokens(_of_variable(variable, "access.admin_tokens_env"))


def _of_variable(variable: str, key: str) -> list[str]:
    tokens = re.split(r"[\s,]+", os.environ.get(variable, "").strip())
    if not tokens[0]:
        raise ConfigError(f"{key}: the environment variable {variable} is not set: give it one token or more")
    return [token for token in tokens if token]


def _of_file(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"access.tokens_file: {file} cannot be read: {error}") from None
    tokens = [line for line in lines if line and not line.startswith("#")]
    if not tokens:
        raise ConfigError(f"access.tokens_file: {file} holds no token: write one in each line")
    return tokens
