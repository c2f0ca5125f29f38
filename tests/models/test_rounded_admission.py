"""A bfloat16 model whose states are rounded for products (ALIGNPRO_CPU_BFLOAT16=rounded) is admitted, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignpro_kernels import backends

SCRIPT = """
import torch
from tiny_models import tiny_transformer, tokenizer
from alignpro.models.language_model import LanguageModel
from alignpro_kernels import cpp_library
LanguageModel(tiny_transformer("llama").to(torch.bfloat16), tokenizer("llama"), "m")
assert cpp_library.state_parts() == 1
"""


@pytest.mark.skipif(backends()["cpp"] is not None, reason="no C++ compiler")
def test_a_model_in_bfloat16_is_admitted() -> None:
    environment = os.environ | {"ALIGNPRO_CPU_BFLOAT16": "rounded", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
