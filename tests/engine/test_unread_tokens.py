"""Drawn tokens stay in the arrays of the running sequences until somebody reads them."""

from __future__ import annotations

import pytest
from checks import assert_completions, assert_nothing_is_held, finish
from faults import probed, submit_all

from alignpro.engine import Completion, Engine, Request, sequence_table
from alignpro.models.language_model import LanguageModel


@pytest.mark.parametrize("kept", [1, 3, 256])
def test_tokens_are_read_before_others_take_their_place(
    llama: LanguageModel, free: list[list[Completion]], monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    monkeypatch.setattr(sequence_table, "UNREAD", kept)
    engine = Engine({"m": llama}, cuda_graphs="padded", pool_bytes=1 << 16)
    requests = submit_all(engine)
    finish(engine)
    assert_completions(requests, free)


def test_tokens_can_be_read_at_any_time(llama: LanguageModel, free: list[list[Completion]]) -> None:
    """Not only when a sequence ends; each reader sees all that has been drawn."""
    engine = probed({"m": llama}, cuda_graphs="padded", max_batch=5)
    requests, lengths = submit_all(engine), set()
    while engine.num_unfinished_requests:
        for request, group in zip(requests, free, strict=True):
            for sequence, expected in zip(request.sequences, group, strict=True):
                count = len(sequence.output_ids)
                lengths.add(count)
                assert sequence.output_ids == expected.tokens[:count] and len(sequence.logprobs) == count
        engine.step()
    assert len(lengths) > 10
    assert_nothing_is_held(engine)


def test_an_interrupted_sequence_has_no_unread_tokens(llama: LanguageModel, free: list[list[Completion]]) -> None:
    """Its row may belong to another sequence by then."""
    engine = probed({"m": llama}, cuda_graphs="padded")
    old = submit_all(engine)
    for _ in range(4):
        engine.step()
    engine._changing = True  # as after an interrupt that nothing could react to
    engine.step()
    before = drawn(old)
    new = submit_all(engine)
    finish(engine)
    assert {one.error for request in old for one in request.completions} == {"generation was interrupted"}
    assert drawn(old) == before
    assert_completions(new, free)


def drawn(requests: list[Request]) -> list[tuple[list[int], list[float]]]:
    """Return copies of the tokens and log-probabilities of all sequences."""
    return [(one.output_ids.copy(), one.logprobs.copy()) for request in requests for one in request.sequences]
