"""Requests that many tests make, fault injection into their runs, and what it may change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from checks import assert_same
from tiny_models import ragged
from torch import Tensor

from alignpro.engine import Completion, Engine, Request, SamplingParams, TokenPrompt, derive_seed
from alignpro.models.language_model import LanguageModel

TEMPLATE = ragged(1, 60, shortest=20, longest=20, seed=5)[0]
PROMPTS = [TEMPLATE + tail for tail in ragged(6, 60, shortest=1, longest=30, seed=6)]
PARAMS = SamplingParams(max_tokens=14, n=3, stop_token_ids=(0, 1))
RESPOND = SamplingParams(max_tokens=9, n=2, stop_token_ids=(2, 3), temperature=0.8)
SEEDS = [derive_seed(7, i) for i in range(len(PROMPTS))]

Check = Callable[[Tensor], None]
"""Receives the token ids of a forward pass, (T,), and may raise."""


@contextmanager
def watched(model: LanguageModel, check: Check) -> Iterator[None]:
    """Call ``check`` before every forward pass of a model within the context."""
    embedding = model.causal.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda _, inputs: check(inputs[0].flatten()))
    try:
        yield
    finally:
        hook.remove()


def probed(models: dict[str, LanguageModel], **options: Any) -> Engine:
    """Return an engine that has already probed its models, as after its first run."""
    engine = Engine(models, audit=True, **options)
    assert engine.workers
    return engine


def raises_at(*tokens: int) -> Check:
    """Return a check that raises when a forward pass has one of these tokens."""

    def check(ids: Tensor) -> None:
        if bad := sorted(set(tokens) & set(ids.tolist())):
            raise ValueError(f"token {bad[0]} is poison")

    return check


def runs_out_above(count: int) -> Check:
    """Return a check that runs out of memory in forward passes of more than ``count`` tokens."""

    def check(ids: Tensor) -> None:
        if len(ids) > count:
            raise torch.OutOfMemoryError(f"no memory for {len(ids)} tokens")

    return check


def is_hit(prompt: Sequence[int], free: Completion, bad: Sequence[int]) -> bool:
    """Return whether a sequence computes one of the bad tokens. Its last token is drawn, but never computed."""
    return not set(bad).isdisjoint([*prompt, *free.tokens[:-1]])


def assert_failed_alone(
    groups: list[list[Completion]], free: list[list[Completion]], inputs: Sequence[Sequence[int]], bad: Sequence[int]
) -> int:
    """Check that exactly the sequences with a bad token failed and the others are unchanged; return how many failed."""
    failed = 0
    for group, others, prompt in zip(groups, free, inputs, strict=True):
        for one, other in zip(group, others, strict=True):
            if is_hit(prompt, other, bad):
                failed += 1
                assert (one.tokens, one.logprobs, one.finish_reason) == ([], [], "error")
                assert f"raised ValueError: token {bad[0]} is poison" in (one.error or "")
            else:
                assert_same(one, other)
    return failed


def to_target(i: int, sample: Completion) -> TokenPrompt:
    return TokenPrompt([*TEMPLATE[::-1], *sample.tokens, 2])


def submit_all(engine: Engine, name: str = "m") -> list[Request]:
    return [engine.submit(name, prompt, PARAMS, seed) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
