"""Packed attention by variable-length calls: equal to padded attention, and used only where it is supported and faster."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignpro.models import packed_attention, packed_choice
from alignpro.models.attention_interface import AttentionSettings
from alignpro.models.packed_attention import PackedAttention, PackedLayout, padded_attention
from alignpro.models.packed_choice import Geometry, supporting, trials, unpadded_attention, unpadded_kernels
from alignpro.models.packed_parts import Segments
from alignpro_kernels import varlen_kernels
from alignpro_kernels.timed_trial import Choice, choose
from alignpro_kernels.varlen_reference import ReferenceKernels

KERNELS = ReferenceKernels()
CPU = torch.device("cpu")

PACKED = {
    "prompts with continuations": Segments(0, (3, 5, 1), ((4, 2), (1,), (3, 3, 2))),
    "a shared prefix": Segments(4, (3, 5, 1), ((4, 2), (1,), (3, 3, 2))),
    "prompts without continuations": Segments(0, (3, 5), ((), ())),
    "some without, and empty ones": Segments(0, (3, 5, 2, 1), ((), (0, 4, 0), (0,), (2,))),
    "a shared prefix without continuations": Segments(3, (2, 1), ((0,), ())),
    "one prompt": Segments(0, (6,), ((3, 3),)),
    "one token": Segments(0, (1,), ((),)),
}


def inputs(segments: Segments, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    torch.manual_seed(0)
    T = segments.prefix + sum(segments.prompts) + sum(map(sum, segments.continuations))
    return [torch.randn(1, n, T, 8, dtype=torch.float64).requires_grad_() for n in (heads, kv_heads, kv_heads)]


def assert_equal(ours: Tensor, theirs: Tensor, leaves: list[Tensor], rounding: float = 1e-12) -> None:
    torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding)
    weight = torch.randn_like(theirs)
    for got, expected in zip(
        torch.autograd.grad(ours, leaves, weight), torch.autograd.grad(theirs, leaves, weight), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=10 * rounding, atol=10 * rounding)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize(("kv_heads", "softcap"), [(4, None), (2, None), (1, 1.5)])
def test_output_and_gradients_equal_those_of_padded_attention(name: str, kv_heads: int, softcap: float | None) -> None:
    segments, settings = PACKED[name], AttentionSettings(0.4, softcap)
    leaves = inputs(segments, kv_heads=kv_heads)
    ours = unpadded_attention(*leaves, segments.parts(CPU), KERNELS, settings, segments)
    rounding = 1e-12 if softcap is None else 1e-6  # with a soft-cap, padded attention takes the softmax in float32
    assert_equal(ours, padded_attention(segments, CPU)(*leaves, settings), leaves, rounding)


@pytest.mark.parametrize(
    ("name", "window"), [("prompts without continuations", 2), ("a shared prefix", 13), ("one prompt", 9)]
)
def test_a_sliding_window_where_it_is_supported(name: str, window: int) -> None:
    """In a causal call, or one so wide that it hides nothing."""
    segments, settings = PACKED[name], AttentionSettings(0.4, sliding_window=window)
    query = torch.zeros(1, 4, 1, 8, dtype=torch.bfloat16)
    assert "window" not in supporting(query, settings, segments)[1]
    leaves = inputs(segments)
    ours = unpadded_attention(*leaves, segments.parts(CPU), KERNELS, settings, segments)
    assert_equal(ours, padded_attention(segments, CPU)(*leaves, settings), leaves)


def test_the_layout_knows_its_segments() -> None:
    layout = PackedLayout.build([7, 5], [(0, 3), (0, 0), (1, 2)], CPU, prefix_length=2)
    assert layout.segments == Segments(2, (5, 3), ((3, 0), (2,)))
    assert layout.segments.longest == 10 and layout.segments.are_shared
    assert not PACKED["prompts without continuations"].are_shared
    assert layout.parts is layout.parts


def test_continuations_alone_see_prompts_that_were_computed_before() -> None:
    segments = PACKED["some without, and empty ones"]
    leaves = inputs(segments)
    own = torch.tensor([3 + 5 + i for i in range(4)] + [3 + 5 + 4 + 2 + 1 + i for i in range(2)])
    before = torch.tensor([*range(8), 12, 13, 14])
    q = leaves[0][:, :, own]
    k, v = (torch.cat([x[:, :, before], x[:, :, own]], dim=2) for x in leaves[1:])
    settings = AttentionSettings(0.4)
    ours = unpadded_attention(q, k, v, segments.continuation_parts(CPU), KERNELS, settings, segments)
    assert_equal(ours, padded_attention(segments, CPU)(*leaves, settings)[:, own], leaves)


def test_what_is_not_supported_is_padded_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library(ReferenceKernels):
        has_softcap = False

    monkeypatch.setattr(varlen_kernels, "KERNELS", (Library(),))
    query = torch.zeros(1, 4, 3, 8, dtype=torch.bfloat16)
    segments, settings = PACKED["one prompt"], AttentionSettings(0.4)

    def reason(x: Tensor = query, **changes: Any) -> str:
        libraries, reason = supporting(x, replace(settings, **changes), segments)
        assert bool(libraries) != bool(reason)
        return reason

    assert reason() == reason(sliding_window=9) == ""
    assert reason(dropout=0.1) == "variable-length attention has no dropout"
    assert reason(sliding_window=8) == "a sliding window of 8 tokens ends within the prompts of some sequences"
    assert reason(softcap=30.0) == "it has no soft-cap"
    assert reason(query.float()) == "it takes bfloat16 and float16, and the input is torch.float32"
    monkeypatch.setattr(Library, "unavailable", lambda _: "there is no CUDA device")
    monkeypatch.setattr(varlen_kernels, "KERNELS", (Library(),))
    assert reason() == "there is no CUDA device"


def test_a_cpu_pads() -> None:
    segments = PACKED["one prompt"]
    query, key, _ = inputs(segments)
    assert unpadded_kernels(query, key, AttentionSettings(0.4), segments, padded_attention) is None


class Accelerator:
    """The device of a tensor, under another name."""

    type = "cuda"


class OnDevice:
    """A query as `unpadded_kernels` looks at it, on a CUDA device."""

    def __init__(self, query: Tensor) -> None:
        self.query, self.device = query, Accelerator()
        self.shape, self.dtype = query.shape, query.dtype

    def __getitem__(self, index: int) -> Tensor:
        return self.query[index]


def test_the_library_that_the_trial_chose_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(varlen_kernels, "KERNELS", (KERNELS,))
    asked = []

    def measured(geometry: Geometry, *_: object) -> Choice:
        asked.append(geometry)
        return Choice(fastest, {}, {})

    monkeypatch.setattr(packed_choice, "measured", measured)
    query: Any = OnDevice(torch.zeros(1, 4, 3, 8, dtype=torch.bfloat16))
    key = torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16)
    segments, settings = PACKED["one prompt"], AttentionSettings(0.4)
    fastest = "reference"
    assert unpadded_kernels(query, key, settings, segments, padded_attention) is KERNELS
    fastest = packed_choice.PADDED
    assert unpadded_kernels(query, key, settings, segments, padded_attention) is None
    assert asked == [Geometry(4, 2, 8, torch.bfloat16, softcap=False)] * 2
    packed_choice._log_padding.cache_clear()
    with caplog.at_level("INFO", packed_choice.__name__):
        for _ in range(2):
            unpadded_kernels(query, key, replace(settings, dropout=0.1), segments, padded_attention)
    assert caplog.messages == ["attention of packed sequences pads them: variable-length attention has no dropout"]
    assert len(asked) == 2


def test_the_candidates_of_a_trial_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_choice, "_TRIAL", Segments(0, (6, 4), ((5, 3), (2, 7))))
    geometry = Geometry(4, 2, 16, torch.bfloat16, softcap=True)
    found = trials(geometry, CPU, padded_attention, [KERNELS])
    assert list(found) == [packed_choice.PADDED, "reference"]
    assert [x.shape[1] for x in found["reference"]()] == [27, 4, 2, 2]
    ticks = iter(range(100))
    assert not choose(found, clock=lambda: float(next(ticks))).reasons
    assert list(trials(geometry._replace(dtype=torch.float32), CPU, padded_attention, [KERNELS])) == ["padding"]


def test_a_trial_inside_a_checkpointed_layer_leaves_its_pass_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_choice, "_TRIAL", PACKED["one prompt"])
    trial = trials(Geometry(2, 2, 8, torch.bfloat16, softcap=False), CPU, padded_attention, [KERNELS])["reference"]
    runs = []

    def layer(x: Tensor) -> Tensor:
        if not runs:
            runs.append(trial())
        return x.sin().exp()

    x = torch.randn(3, requires_grad=True)
    state = torch.random.get_rng_state()
    out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert len(runs) == 1
    torch.testing.assert_close(gradient, x.sin().exp() * x.cos())


def test_attend_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = PACKED["a shared prefix"]
    leaves = inputs(segments)
    layout = PackedLayout.build([7, 9, 5], [(0, 4), (0, 2), (1, 1), (2, 3), (2, 3), (2, 2)], CPU, 4)
    padded = PackedAttention(layout).attend(0, *leaves, AttentionSettings(0.4))
    monkeypatch.setattr(packed_attention, "unpadded_kernels", lambda *_: KERNELS)
    ours = PackedAttention(layout).attend(0, *leaves, AttentionSettings(0.4))
    assert ours.grad_fn is not None and not torch.equal(ours, padded)
    assert_equal(ours, padded, leaves)
