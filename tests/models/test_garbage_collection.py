"""The garbage collector is paused while libraries are imported and models are loaded."""

from __future__ import annotations

import gc

import pytest

from alignpro.models.garbage_collection import paused_collection


def test_it_is_as_before_afterwards() -> None:
    with pytest.raises(ValueError, match="whatever"), paused_collection(), paused_collection():
        assert not gc.isenabled()
        raise ValueError("whatever")
    assert gc.isenabled()
    gc.disable()
    try:
        with paused_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
