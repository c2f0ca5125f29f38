"""These tests run in separate processes (see `test_triton_interpreter`): Triton reads TRITON_INTERPRET on import.

Triton's interpreter computes `tl.dot` with `numpy.matmul`. A BLAS chooses the order of the sum by processor and shape, so
the same row may have other bits in a product of another shape. On a GPU the tile alone determines the order. Therefore
one product with a fixed order takes the place of `numpy.matmul`, and the tests can require equal bits on every processor.

At each call of a function in a kernel, `tl.sum` included, the interpreter looks through the whole of `triton.language` for
functions to replace. Here it looks once.
"""

import inspect
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignpro_kernels.triton_support import interpreting

collect_ignore_glob = [] if interpreting() else ["test_*.py"]

sys.path.insert(0, str(Path(__file__).parents[1]))  # problems shared with other tests


def product_in_order(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return (..., M, K) times (..., K, N) in ``dtype``; the terms are rounded, then added from the first to the last."""
    a, b = a.astype(dtype), b.astype(dtype)
    terms = np.multiply(np.moveaxis(a, -1, 0)[..., None], np.moveaxis(b, -2, 0)[..., None, :], order="C")
    return np.add.reduce(terms)  # along the outermost axis in memory, which NumPy adds one by one: (K, ..., M, N)


@pytest.fixture(autouse=True, scope="session")
def products_in_order() -> Iterator[None]:
    """Let Triton's interpreter multiply by `product_in_order`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "matmul", product_in_order)
        yield


@pytest.fixture(autouse=True, scope="session")
def builtins_looked_for_once() -> Iterator[None]:
    """Let Triton's interpreter look for the functions that it replaces once in each module and class."""
    from triton.language import core  # may not be installed where these tests are not run
    from triton.runtime import interpreter

    @cache
    def builtins_of(place: object) -> list[str]:
        return [name for name, member in inspect.getmembers(place) if core.is_builtin(member)]

    def replace_builtins(place: object, *builder: Any) -> None:
        for name in builtins_of(place):
            if core.is_builtin(member := getattr(place, name)):  # which a replaced one is not
                interpreter._patch_attr(place, name, member, *builder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_builtin", replace_builtins)
        yield
