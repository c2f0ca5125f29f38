"""Where a pretrained model or tokenizer is: a directory, or a name on the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from alignpro.errors import ModelError

_TIMEOUT = 10.0
"""Seconds that the hub may take to answer whether it has a model."""


def require_pretrained(name: str, key: str = "path", *, ask_hub: bool = True) -> None:
    """Check that a directory exists, or that the hub or its cache has a model: one question, without retries.

    Args:
        name: A directory, or a name on the hub.
        key: The configuration key that names it.
        ask_hub: Whether to ask the hub for a name that is not in its cache; if not, such a name passes, unless the hub is
            not to be asked at all.

    Raises:
        ModelError: There is neither.
    """
    directory = Path(name).expanduser()
    if directory.is_dir():
        return
    if directory.exists():
        raise ModelError(f"{name}: is a file; `{key}` names a model directory or a model on the hub")
    if directory.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"{name}: no such directory; `{key}` names a model directory or a model on the hub")
    try:
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", "adapter_config.json")):
            return
        if constants.is_offline_mode():
            raise ModelError(
                f"{name}: no such directory, and the hub's cache does not have it (HF_HUB_OFFLINE keeps it from being loaded)"
            )
        if ask_hub:
            HfApi().model_info(name, timeout=_TIMEOUT)
    except HFValidationError as error:
        raise ModelError(f"{name}: no such directory, and no name on the hub can be like this") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{name}: no such directory, and no such model on the hub (a private one needs a login)"
        ) from error
    except ModelError:
        raise
    except Exception as error:  # of the library's HTTP client, which has changed before
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"{name}: no such directory, and the hub cannot be asked for it: {reason}") from error
