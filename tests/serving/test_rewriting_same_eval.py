"""What was evaluated is what is served: rewards through the proxy equal those of `alignpro eval`, to the last digit."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from engine_server import BatchingServer
from rewriting_runs import PLAIN, run_config
from tiny_server import Choice, TinyServer

import alignpro
from alignpro.config import ModelConfig, dump_config
from alignpro.config.serving_rewriting import RewritingConfig
from alignpro.data import Prompt
from alignpro.demo import world
from alignpro.demo.run import WEIGHTS
from alignpro.engine import derive_seed
from alignpro.serving.contract import Asked, TargetRequest
from alignpro.serving.rewriting import Rewriting

PROMPTS = 6
ROLLOUT = {"rewrite": {"max_tokens": 40}, "respond": {"max_tokens": 12}}


class Proxy:
    """Both sides of the proxy that are behind its HTTP: a request is rewritten, and answered by the target."""

    def __init__(self, *runs: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._last = threading.local()
        target = ModelConfig(path=str(WEIGHTS / "target"), device="cpu")
        self._rewriting = self._await(Rewriting.open(RewritingConfig(**PLAIN), runs, target))

    def __call__(self, request: Mapping[str, Any], seed: int | None, index: int) -> Choice:
        if getattr(self._last, "request", None) is not request:
            self._last.request, self._last.choices = request, self.answer(request)
        choice = self._last.choices[index]
        return Choice(choice["message"]["content"], choice["finish_reason"])

    def answer(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        return self._await(self._answer(request))

    def close(self) -> None:
        self._await(self._rewriting.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _await(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(120)

    async def _answer(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        raw = json.dumps(request).encode()
        outcome = await self._rewriting.rewriter.rewrite(Asked("chat", request, raw, "id"))
        assert outcome.skipped in (None, "unchanged", "no_run")
        assert self._rewriting.target is not None
        response = await self._rewriting.target.send(TargetRequest("POST", "/chat/completions", (), outcome.body))
        content = b"".join([chunk async for chunk in response.chunks()])
        assert response.status == 200, content
        return list(json.loads(content)["choices"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run directory with the demo's prompter."""
    out = tmp_path_factory.mktemp("demo") / "align_pro"
    out.mkdir()
    (out / "model").symlink_to(WEIGHTS / "prompter")
    (out / "config.yaml").write_text(dump_config(run_config(out, str(WEIGHTS / "prompter"), rollout=ROLLOUT)))
    return out


@pytest.fixture
def open_proxy() -> Iterator[Callable[..., Proxy]]:
    """Return a function from run directories to a proxy."""
    opened: list[Proxy] = []

    def make(*runs: Path) -> Proxy:
        opened.append(Proxy(*runs))
        return opened[-1]

    yield make
    for proxy in opened:
        proxy.close()


def evaluate(out: Path, target: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Evaluate the demo's prompter on some held-out prompts; returns the rewards of each arm, and the prompts' ids."""
    prompts = out.with_name("heldout.jsonl")
    world.write_records(prompts, world.prompt_records(PROMPTS, 0, heldout=True))
    config = {
        "out": str(out),
        "data": {"source": str(prompts), "holdout": 0},
        "target": target or {"path": str(WEIGHTS / "target"), "device": "cpu"},
        "reward": {"components": [{"kind": "function", "function": "alignpro.demo.world:reward"}]},
        "prompter": {"path": str(WEIGHTS / "prompter"), "device": "cpu"},
        "prompts": PROMPTS,
        "responses_per_rewrite": 2,
        **ROLLOUT,
        **changes,
    }
    rewards = alignpro.evaluate(config).rewards
    assert rewards is not None
    return {name: arm.raw.tolist() for name, arm in rewards.arms.items()} | {"ids": rewards.prompts}


def endpoint(server: TinyServer) -> dict[str, Any]:
    return {"endpoint": {"base_url": server.url, "model": "target"}}


def test_a_sampled_evaluation_with_forwarded_seeds(
    open_proxy: Callable[..., Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignpro.evaluation.evaluate.write_outputs", lambda *_: None)
    with BatchingServer(open_proxy(), model="target") as server:
        assert evaluate(tmp_path / "there", endpoint(server)) == evaluate(tmp_path / "here")


def test_the_greedy_evaluation_of_a_prompter(
    run: Path, open_proxy: Callable[..., Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompts as they are, sent to the proxy, are worth what the prompter's rewrites are worth without it."""
    monkeypatch.setattr("alignpro.evaluation.evaluate.write_outputs", lambda *_: None)
    greedy = {name: {**ROLLOUT[name], "temperature": 0} for name in ROLLOUT}
    here = evaluate(tmp_path / "here", **greedy)
    with BatchingServer(open_proxy(run), model="target") as server:
        there = evaluate(tmp_path / "there", endpoint(server), prompter=None, **greedy)
    as_samples = [[value for responses in prompt for value in responses] for prompt in here["align_pro"]]
    assert [[value for responses in prompt for value in responses] for prompt in there["no_finetuning"]] == as_samples
    assert here["align_pro"] != here["no_finetuning"]


def test_sampled_answers_to_a_prompters_rewrites(
    run: Path, open_proxy: Callable[..., Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignpro.evaluation.evaluate.write_outputs", lambda *_: None)
    here = evaluate(tmp_path / "here", rewrite={**ROLLOUT["rewrite"], "temperature": 0}, seed=5)
    proxy = open_proxy(run)
    records = world.prompt_records(PROMPTS, 0, heldout=True)
    prompts = {(each := Prompt.from_text(record["prompt"], metadata=record["metadata"])).id: each for record in records}
    assert {value for (responses, *_) in here["align_pro"] for value in responses} == {0, 1}
    for i, prompt in enumerate(prompts[id_] for id_ in here["ids"]):
        seed = derive_seed(derive_seed(5, "evaluation", i), "respond", 0)
        request = {"model": "target", "messages": [{"role": "user", "content": prompt.text}], "n": 2, "seed": seed}
        choices = proxy.answer(request | {"max_tokens": 12, "temperature": 1.0})
        assert [world.reward([prompt], [each["message"]["content"]]) for each in choices] == [
            [value] for value in here["align_pro"][i][0]
        ]
