"""Reward functions that are ``async def`` wait at the same time; they are called and checked as all others are."""

import asyncio
import threading
import time

import pytest

from alignpro.config import RewardConfig
from alignpro.data import Prompt
from alignpro.errors import BudgetError, ConfigError, RewardError
from alignpro.rewards import RewardStack, build_reward

PROMPTS = [Prompt.from_text(f"question {i}", source=f"data.jsonl:{i}", metadata={"answer": str(i)}) for i in range(3)]
RESPONSES = ["0", "one", "2"]


def stack(*functions) -> RewardStack:
    components = [{"kind": "function", "function": each, "name": f"part{i}"} for i, each in enumerate(functions)]
    return build_reward(RewardConfig(components=components))


class Meeting:
    """Async functions that return only once all of them wait: one after another they would wait forever."""

    def __init__(self, parties: int) -> None:
        self.parties = parties
        self.waiting = 0
        self.most = 0
        self.full = threading.Event()

    async def score(self, prompts, responses):
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        if self.waiting == self.parties:
            self.full.set()
        async with asyncio.timeout(30):
            while not self.full.is_set():
                await asyncio.sleep(0.001)
        self.waiting -= 1
        return [float(len(y)) for y in responses]


def test_components_wait_at_the_same_time() -> None:
    meeting = Meeting(parties=3)
    scored = stack(meeting.score, meeting.score, meeting.score)(PROMPTS, RESPONSES, None)
    assert meeting.most == 3
    assert scored.values == [3.0, 9.0, 3.0]


def test_components_wait_while_others_compute() -> None:
    meeting = Meeting(parties=1)

    def computed(prompts, responses):
        assert meeting.full.wait(timeout=30)  # the other one has begun, although it comes second
        return [0.5] * len(responses)

    assert stack(computed, meeting.score)(PROMPTS, RESPONSES, None).components == {
        "part0": [0.5] * 3,
        "part1": [1.0, 3.0, 1.0],
    }


def test_samples_of_a_batch_may_be_gathered_and_the_loop_lasts() -> None:
    loops, in_flight, most = [], 0, 0

    async def one(y):
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await asyncio.sleep(0.01)
        in_flight -= 1
        return float(len(y))

    async def score(responses, rewrites, metadata):
        loops.append(asyncio.get_running_loop())
        assert [each["answer"] for each in metadata] == ["0", "1", "2"]
        assert rewrites == ["a", "b", "c"]
        return await asyncio.gather(*map(one, responses))

    reward = stack(score)
    for _ in range(2):
        assert reward(PROMPTS, RESPONSES, ["a", "b", "c"]).values == [1.0, 3.0, 1.0]
    assert most == 3
    assert loops[0] is loops[1]  # what a function keeps of it, such as a client's connections, is still good


def test_objects_with_an_async_call_are_awaited() -> None:
    class Score:
        async def __call__(self, prompts, responses, bonus=0.0):
            await asyncio.sleep(0)
            return [bonus] * len(responses)

    component = {"kind": "function", "function": Score(), "name": "scored", "params": {"bonus": 2.0}}
    assert build_reward(RewardConfig(components=[component]))(PROMPTS, RESPONSES, None).values == [2.0] * 3


def test_results_are_checked_as_those_of_other_functions() -> None:
    async def bad(prompts, responses):
        return [1.0, float("nan"), 1.0]

    async def failing(prompts, responses):
        raise ZeroDivisionError("by zero")

    with pytest.raises(RewardError, match=r"'part0' returned nan(.|\n)*data.jsonl:1"):
        stack(bad)(PROMPTS, RESPONSES, None)
    with pytest.raises(
        RewardError, match=r"'part0' raised ZeroDivisionError: by zero \(.*in failing\)(.|\n)*data.jsonl:0"
    ):
        stack(failing)(PROMPTS, RESPONSES, None)

    async def graded(responses, level):
        return level

    with pytest.raises(ConfigError, match="parameter 'level' is neither"):
        stack(graded).scorable(PROMPTS)


def test_an_error_ends_those_that_still_wait() -> None:
    cancelled = threading.Event()

    async def forever(prompts, responses):
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def failing(prompts, responses):
        await asyncio.sleep(0.01)
        raise BudgetError("nothing is left")

    with pytest.raises(BudgetError, match=r"^nothing is left$"):
        stack(forever, failing)(PROMPTS, RESPONSES, None)
    assert cancelled.wait(timeout=30)


def test_the_thread_ends_with_the_reward() -> None:
    async def score(prompts, responses):
        return [0.0] * len(responses)

    def threads():
        return [each for each in threading.enumerate() if each.name == "rewards"]

    before = len(threads())
    reward = stack(score)
    reward(PROMPTS, RESPONSES, None)
    assert len(threads()) >= 1
    del reward
    deadline = time.monotonic() + 30
    while len(threads()) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(threads()) <= before
