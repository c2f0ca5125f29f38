"""What becomes of a request's prompt: rewritten as the run would, or left as it was, for a reason that is said."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rewriting_runs import ask, expected, last_text, outcomes, save_run, served, slow, with_rewriter, with_rewriting

from alignpro.config import GuardConfig
from alignpro.errors import ModelError
from alignpro.serving.contract import Asked, Outcome
from alignpro.serving.engine_thread import EngineThread
from alignpro.serving.prompt_writer import ServedRun
from alignpro.serving.rewriter import PromptRewriter
from alignpro.serving.rewriting import Rewriting

TEXT = "flip the word stone pls"


@pytest.fixture(scope="module")
def run() -> ServedRun:
    return served()


def test_the_rewrite_is_that_of_the_run_and_takes_the_place_of_the_text(run: ServedRun) -> None:
    request = ask(TEXT)
    (outcome,) = outcomes(run, request)
    rewrite = expected(run, TEXT)
    assert (outcome.skipped, outcome.original, outcome.rewrite, outcome.run) == (None, TEXT, rewrite, "run")
    assert last_text(outcome.body) == rewrite != TEXT
    assert outcome.seconds > 0
    assert outcome.details is not None
    assert outcome.details["treated"] == 1
    assert 0 < outcome.details["prompter_tokens"] <= 8
    (completion,) = outcomes(run, ask(TEXT, api="completions"))
    assert json.loads(completion.body) == {"model": "m", "prompt": rewrite}


def test_a_rewrite_is_of_the_user_whose_turn_it_was(run: ServedRun) -> None:
    """Another user's equal first turn may have gone to the target as it was."""

    async def use(rewriter: PromptRewriter, _: EngineThread) -> list[str]:
        async def first_turn(user: str, then: str) -> str:
            outcome = await rewriter.rewrite(ask(TEXT, "enots", then, user=user))
            return str(json.loads(outcome.body)["messages"][0]["content"])

        await rewriter.rewrite(ask(TEXT, user="a", opt_out=True))
        await rewriter.rewrite(ask(TEXT, user="b"))
        found = [await first_turn(user, "go on") for user in ("a", "b")]
        await rewriter.rewrite(ask(TEXT, user="b", opt_out=True))  # the target answers the original this time
        return [*found, await first_turn("b", "further")]

    assert with_rewriter(run, use) == [TEXT, expected(run, TEXT), TEXT]


def test_a_large_body_is_rewritten_too(run: ServedRun) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:," + "A" * 300_000}}
    request = ask([image, {"type": "text", "text": TEXT}])
    (outcome,) = outcomes(run, request)
    assert outcome.body == request.raw.replace(
        TEXT.encode(), json.dumps(expected(run, TEXT), ensure_ascii=False)[1:-1].encode()
    )


def test_no_log_holds_a_prompt(run: ServedRun, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    found = outcomes(run, ask("secret " * 60), ask(TEXT), guards=(GuardConfig(kind="length_ratio", high=0.0),))
    assert [each.skipped for each in found] == ["refused", "guard:length_ratio"]
    assert "secret" not in caplog.text
    assert TEXT not in caplog.text


def test_many_at_the_same_time_get_what_each_gets_alone(run: ServedRun) -> None:
    texts = [f"sort {word}" for word in ("stone", "abc", "lamp", "tree", "x" * 30)]

    async def use(rewriter: PromptRewriter, engine: EngineThread) -> list[Outcome]:
        return await asyncio.gather(*(rewriter.rewrite(ask(text)) for text in texts * 3))

    rewrites = [outcome.rewrite for outcome in with_rewriter(run, use, cached_rewrites=0)]
    assert rewrites == [expected(run, text) for text in texts] * 3


def test_a_prompt_that_comes_again_is_not_generated_again(run: ServedRun) -> None:
    first, second, other = outcomes(run, ask(TEXT), ask(TEXT), ask("hi", "hello", TEXT))
    assert first.rewrite == second.rewrite
    assert first.details and second.details and other.details
    assert ["cached" in each.details for each in (first, second, other)] == [False, True, False]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("request_", "config", "reason"),
    [
        (ask(TEXT, opt_out=True), {}, "opt_out"),
        (ask(TEXT, run="other"), {}, "unknown_run"),
        (ask("hi", "hello"), {}, "no_user_text"),
        (
            ask([{"type": "text", "text": "a"}, {"type": "image_url"}, {"type": "text", "text": "b"}]),
            {},
            "several_texts",
        ),
        (ask(TEXT), {"max_characters": 5}, "too_long"),
        (ask("long " * 60), {}, "refused"),
        (ask(TEXT), {"skip_truncated": True}, "truncated"),
        (ask("add 12 and 30"), {"guards": (GuardConfig(kind="numbers_kept", low=1.0),)}, "guard:numbers_kept"),
        (ask(TEXT), {"guards": (GuardConfig(kind="length_ratio", high=0.0),)}, "guard:length_ratio"),
        (ask(TEXT), {"percent": 0.0}, "canary"),
    ],
)
def test_the_original_goes_through_unchanged(
    request_: Asked, config: dict[str, Any], reason: str, run: ServedRun
) -> None:
    (outcome,) = outcomes(run, request_, **config)
    assert (outcome.skipped, outcome.body) == (reason, request_.raw)


def test_sampled_rewrites_depend_on_prompt_and_seed_alone(run: ServedRun) -> None:
    texts = [f"sort {word}" for word in ("stone", "abc", "lamp")]

    def rewrites(*requests: Asked, **config: Any) -> list[str | None]:
        return [each.rewrite for each in outcomes(run, *requests, temperature=1.0, cached_rewrites=0, **config)]

    first = rewrites(*map(ask, texts))
    assert first == rewrites(*(ask(text, user="another") for text in reversed(texts)))[::-1]
    assert first != rewrites(*map(ask, texts), seed=1)
    assert first != [expected(run, text) for text in texts]


def test_without_a_run_nothing_is_rewritten(run: ServedRun) -> None:
    async def use(rewriter: PromptRewriter, engine: EngineThread) -> Outcome:
        rewriter.served = ()
        return await rewriter.rewrite(ask(TEXT))

    assert with_rewriter(run, use).skipped == "no_run"


def test_what_is_late_or_too_much_is_sent_as_it_is_and_ends_at_once() -> None:
    run = slow(served(), 0.02)

    async def use(rewriter: PromptRewriter, engine: EngineThread) -> list[Outcome]:
        both = await asyncio.gather(*(rewriter.rewrite(ask(TEXT)) for _ in range(3)))
        assert engine.waiting("run#0") == 0
        return both

    assert [each.skipped for each in with_rewriter(run, use, deadline_ms=30, max_waiting=2)] == [
        "deadline",
        "deadline",
        "queue_full",
    ]


def test_cancelling_ends_the_work() -> None:
    run = slow(served(), 0.01)

    async def use(rewriter: PromptRewriter, engine: EngineThread) -> None:
        task = asyncio.create_task(rewriter.rewrite(ask(TEXT)))
        await asyncio.sleep(0.03)
        assert engine.waiting("run#0") == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.waiting("run#0") == 0

    with_rewriter(run, use)


def test_a_prompter_that_fails_and_one_that_is_dead() -> None:
    run = served()
    error: list[Exception] = [ValueError("poison")]

    def check(*_: object) -> None:
        if error:
            raise error[0]

    async def use(rewriter: PromptRewriter, engine: EngineThread) -> list[str | None]:
        run.prompter.model.causal.get_input_embeddings().register_forward_pre_hook(check)
        found = [(await rewriter.rewrite(ask(TEXT))).skipped]
        error.clear()
        found.append((await rewriter.rewrite(ask(TEXT))).skipped)
        error.append(torch.AcceleratorError("CUDA error"))
        found += [(await rewriter.rewrite(ask(text))).skipped for text in ("one", "two")]
        assert engine.failure is not None
        error.clear()
        return found

    assert with_rewriter(run, use) == ["error", None, "engine_failed", "engine_failed"]


def test_closing_skips_what_is_unfinished() -> None:
    run = slow(served(), 0.02)

    async def use(rewriter: PromptRewriter, engine: EngineThread) -> list[str | None]:
        tasks = [asyncio.create_task(rewriter.rewrite(ask(TEXT))) for _ in range(2)]
        await asyncio.sleep(0.02)
        await rewriter.close()
        await engine.close()
        return [(await task).skipped for task in tasks] + [(await rewriter.rewrite(ask(TEXT))).skipped]

    assert with_rewriter(run, use) == ["closed", "closed", "closed"]


def test_earlier_turns_stay_as_they_were_rewritten(run: ServedRun) -> None:
    first, *later = outcomes(
        run,
        ask("one"),
        ask("one", "Answer.", "two"),
        ask("one", "Answer.", "two", "Sure, here"),  # a prefill
        ask("one", "Answer.", "two", "Sure", "long " * 60),  # cannot be rewritten
        ask("one", "Answer.", "two", opt_out=True),
        ask("one!", "Answer.", "two"),
    )
    contents = [[each["content"] for each in json.loads(outcome.body)["messages"]] for outcome in later]
    one, two = first.rewrite, later[0].rewrite
    assert contents[0] == [one, "Answer.", two]
    assert contents[1] == [one, "Answer.", two, "Sure, here"]
    assert contents[2] == [one, "Answer.", two, "Sure", "long " * 60]
    assert contents[3] == ["one", "Answer.", "two"]
    assert contents[4][:2] == ["one!", "Answer."]
    assert [outcome.skipped for outcome in later] == [None, "no_user_text", "refused", "opt_out", None]
    assert [outcome.details and outcome.details["history"] for outcome in later[:3]] == [1, 2, 2]


def test_a_turn_that_was_sent_as_it_was_stays_so() -> None:
    run, error = served(), list[Exception]()

    def check(*_: object) -> None:
        if error:
            raise error.pop()

    async def use(rewriter: PromptRewriter, engine: EngineThread) -> list[Any]:
        run.prompter.model.causal.get_input_embeddings().register_forward_pre_hook(check)
        first = await rewriter.rewrite(ask("one"))
        error.extend([ValueError("poison")] * 2)
        again = await rewriter.rewrite(ask("one"))
        later = await rewriter.rewrite(ask("one", "Answer to the original.", "two"))
        return [first.skipped, again.skipped, json.loads(later.body)["messages"][0]["content"]]

    assert with_rewriter(run, use, cached_rewrites=0) == [None, "error", "one"]


def test_the_history_is_of_the_run_and_bounded(run: ServedRun) -> None:
    other = served("other", seed=3)

    async def use(rewriter: PromptRewriter, engine: EngineThread) -> list[Any]:
        await rewriter.rewrite(ask("one"))
        mixed = await rewriter.rewrite(ask("one", "Answer.", "two", run="other"))
        await rewriter.rewrite(ask("another"))
        forgotten = await rewriter.rewrite(ask("one", "Answer.", "two"))
        return [json.loads(each.body)["messages"][0]["content"] for each in (mixed, forgotten)]

    assert with_rewriter(run, use, other, cached_turns=1) == ["one", "one"]


def test_shadow_mode_rewrites_without_using_it(run: ServedRun) -> None:
    async def use(rewriter: PromptRewriter, engine: EngineThread) -> tuple[Outcome, Outcome]:
        outcome = await rewriter.rewrite(ask(TEXT))
        assert outcome.later is not None
        return outcome, await outcome.later

    outcome, later = with_rewriter(run, use, shadow=True)
    assert (outcome.skipped, outcome.rewrite, outcome.body) == ("shadow", None, ask(TEXT).raw)
    assert (later.skipped, later.rewrite) == ("shadow", expected(run, TEXT))
    assert later.details["treated"] == 1


@pytest.mark.parametrize("begun", [True, False])
def test_a_shadow_that_is_not_awaited_ends_with_the_proxy(begun: bool) -> None:
    run = slow(served(), 0.05)

    async def use(rewriter: PromptRewriter, engine: EngineThread) -> Outcome:
        outcome = await rewriter.rewrite(ask(TEXT))
        if begun:
            await asyncio.sleep(0.01)
        await rewriter.close()
        assert outcome.later is not None
        return await outcome.later

    assert with_rewriter(run, use, shadow=True).skipped == "closed"


def test_the_share_is_sticky_by_user_and_of_the_right_size(run: ServedRun) -> None:
    async def use(rewriter: PromptRewriter, engine: EngineThread) -> list[list[bool]]:
        conversation = [ask("no text", "a", "b", user=f"user {i}") for i in range(400)]
        await rewriter.rewrite(ask("b"))
        return [
            [(await rewriter.rewrite(each)).skipped == "canary" for each in conversation],
            [(await rewriter.rewrite(ask("b", user=each.user))).skipped == "canary" for each in conversation],
            [(await rewriter.rewrite(ask("b"))).skipped == "canary" for _ in range(5)],
        ]

    first, second, anonymous = with_rewriter(run, use, percent=25.0)
    assert first == second
    assert len(set(anonymous)) == 1
    assert 0.65 < sum(first) / len(first) < 0.85


def test_the_control_group_is_measured_too(run: ServedRun) -> None:
    async def use(rewriter: PromptRewriter, engine: EngineThread) -> Outcome:
        outcome = await rewriter.rewrite(ask(TEXT))
        assert outcome.later is not None
        return await outcome.later

    guards = (GuardConfig(kind="length_ratio", high=99.0),)
    later = with_rewriter(run, use, percent=0.0, compare=True, guards=guards)
    assert (later.skipped, later.rewrite, later.details["treated"]) == ("canary", expected(run, TEXT), 0)
    assert "guard/length_ratio" in later.details


Json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "user", "messages", "prompt"]), inner, max_size=4
        )
    ),
    max_leaves=10,
)


def test_no_body_raises(run: ServedRun) -> None:
    async def use(rewriter: PromptRewriter, engine: EngineThread) -> None:
        loop = asyncio.get_running_loop()

        @settings(max_examples=25)
        @given(st.dictionaries(st.sampled_from(["messages", "prompt", "model"]), Json), st.booleans())
        def check(body: dict[str, Any], chat: bool) -> None:
            request = ask(body=body, api="chat" if chat else "completions")
            outcome = asyncio.run_coroutine_threadsafe(rewriter.rewrite(request), loop).result()
            assert outcome.skipped is not None or outcome.rewrite is not None

        await asyncio.to_thread(check)

    with_rewriter(run, use)


def test_runs_are_loaded_and_unloaded_while_requests_are_rewritten(tmp_path: Path) -> None:
    first, second = save_run(tmp_path / "first"), save_run(tmp_path / "second")

    async def use(rewriting: Rewriting) -> None:
        rewriter = rewriting.rewriter
        assert rewriter.runs == ("first",)
        stop = asyncio.Event()

        async def client(i: int) -> list[str | None]:
            found = []
            while not stop.is_set():
                found.append((await rewriter.rewrite(ask(f"{i} {len(found)}"))).skipped)
                await asyncio.sleep(0.005)
            return found

        clients = [asyncio.create_task(client(i)) for i in range(2)]
        await asyncio.sleep(0.02)
        assert await rewriting.serve([first, second]) == ("first", "second")
        assert await rewriting.serve([second, first]) == ("second", "first")  # the default first
        await rewriting.serve([second])
        assert rewriter.runs == ("second",)
        await asyncio.sleep(0.02)
        stop.set()
        found = [each for client in clients for each in await client]
        assert len(found) > 8
        assert set(found) == {None}
        assert rewriting.failure is None
        assert rewriting.waiting == 0

    with_rewriting(use, first, cached_rewrites=0)


def test_a_run_that_cannot_be_loaded_changes_nothing(tmp_path: Path) -> None:
    first = save_run(tmp_path / "a" / "run")
    other = save_run(tmp_path / "b" / "run")

    async def use(rewriting: Rewriting) -> None:
        served = rewriting.rewriter.served
        with pytest.raises(ModelError, match=r"is served under the name run: rename one of them"):
            await rewriting.serve([first, other])
        with pytest.raises(ModelError, match=r"not a finished run"):
            await rewriting.serve([other, tmp_path])
        assert rewriting.rewriter.served == served
        assert (await rewriting.rewriter.rewrite(ask(TEXT))).skipped is None

    with_rewriting(use, first)
