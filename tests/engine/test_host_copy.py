"""Arrays travel to a device in one buffer, each with its dtype and shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alignpro.engine.host_copy import HostTokens, pack, to_device, unpack

ARRAYS = [
    np.arange(5),
    np.zeros(0, np.int64),
    np.arange(6, dtype=np.int32).reshape(2, 3),
    np.array([1.5], np.float32),
    np.arange(8).reshape(2, 4)[:, ::2],
]


def test_packed_arrays_are_unpacked_as_they_were() -> None:
    memory = torch.zeros(200, dtype=torch.uint8)
    pack(ARRAYS, memory)
    for tensor, array in zip(unpack(ARRAYS, memory), ARRAYS, strict=True):
        assert torch.equal(tensor, torch.from_numpy(array)) and tensor.data_ptr() % 16 == memory.data_ptr() % 16


def test_on_a_cpu_nothing_is_copied() -> None:
    (tensor,) = to_device(ARRAYS[:1], torch.device("cpu"))
    assert tensor.data_ptr() == ARRAYS[0].ctypes.data


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
        ),
    ],
)
def test_drawn_tokens_arrive_as_they_were(device: str) -> None:
    """Also the greatest ids and parts of them."""
    tokens, logprobs = torch.tensor([0, 5, 2**40 + 1]), torch.tensor([-0.1, -2.5, -1e-8])
    sent = HostTokens(tokens.to(device), logprobs.to(device), torch.tensor(7.25, device=device))
    for places in ([0, 1, 2], [2], [1, 0]):
        here, of_them, total = sent.at(np.array(places)).wait()
        assert torch.equal(here, tokens[places]) and torch.equal(of_them.float(), logprobs[places]) and total == 7.25
