"""The base class of all configuration sections."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict


def _require_possible(path: Path) -> Path:
    """Check that a path can exist at all; whether it can be written is found out when it is."""
    try:
        path.lstat()
    except ValueError as error:
        raise ValueError("a path cannot contain a NUL character") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError("the path is too long for this file system") from error
    return path


OutputPath = Annotated[Path, AfterValidator(_require_possible)]
"""A file or directory that will be written."""


class Section(BaseModel):
    """A section of the configuration: immutable, rejects unknown keys, and requires finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


def default_of(section: Section, key: str) -> Any:
    """The value of a key that is not given."""
    return type(section).model_fields[key].default
