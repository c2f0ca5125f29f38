"""Runs of a tiny random prompter in front of a tiny random target, for the tests of the rewriting side of the proxy."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import torch
from tiny_models import save_tiny, tiny_language_model

from alignpro.config import EngineConfig, ModelConfig, TrainConfig, dump_config
from alignpro.config.serving_rewriting import RewritingConfig
from alignpro.environments.rewriter import Rewriter
from alignpro.environments.trained_prompter import TrainedPrompter
from alignpro.serving.contract import Api, Asked, Outcome
from alignpro.serving.engine_thread import EngineThread
from alignpro.serving.prompt_writer import ServedRun
from alignpro.serving.rewriter import PromptRewriter
from alignpro.serving.rewriting import Rewriting

ENGINE = EngineConfig(pool_bytes=1 << 22)
PLAIN: dict[str, Any] = {"guards": (), "skip_truncated": False, "deadline_ms": 60_000, "engine": ENGINE}
"""A random prompter's rewrites are nonsense of full length, which is used here as it is."""


def run_config(out: Path | str = "out", path: str = "nowhere", **sections: Any) -> TrainConfig:
    """Return the configuration of a run of `alignpro train`."""
    return TrainConfig.model_validate(
        {
            "run": {"out": str(out)},
            "data": {"source": "nowhere.jsonl"},
            "policy": {"path": path, "device": "cpu"},
            "target": {"path": "nowhere", "device": "cpu"},
            "reward": {"components": [{"kind": "function", "function": "nowhere:reward"}]},
            "rollout": {"rewrite": {"max_tokens": 8}, "respond": {"max_tokens": 8}},
            **sections,
        }
    )


def save_run(out: Path, **sections: Any) -> Path:
    """Write what a finished run leaves."""
    save_tiny("qwen2", out / "model")
    (out / "config.yaml").write_text(dump_config(run_config(out, str(out / "model"), **sections)))
    return out


def served(run_id: str = "run", seed: int = 0) -> ServedRun:
    """Return a run whose prompter is a random model."""
    return ServedRun(run_id, f"{run_id}#0", TrainedPrompter(tiny_language_model("qwen2", seed=seed), run_config()))


def with_rewriter(
    run: ServedRun, use: Callable[[PromptRewriter, EngineThread], Awaitable[Any]], /, *others: ServedRun, **config: Any
) -> Any:
    """Await ``use(rewriter, engine)`` on an event loop of its own."""

    async def main() -> Any:
        settings = RewritingConfig(**{**PLAIN, **config})
        runs = (run, *others)
        engine = EngineThread({each.name: each.prompter.model for each in runs}, settings.engine)
        rewriter = PromptRewriter(settings, engine, runs)
        try:
            return await use(rewriter, engine)
        finally:
            await rewriter.close()
            await engine.close()

    return asyncio.run(asyncio.wait_for(main(), 60))


def outcomes(run: ServedRun, *requests: Asked, **config: Any) -> list[Outcome]:
    """Return what becomes of requests, one after the other."""

    async def use(rewriter: PromptRewriter, engine: EngineThread) -> list[Outcome]:
        return [await rewriter.rewrite(request) for request in requests]

    found: list[Outcome] = with_rewriter(run, use, **config)
    return found


def expected(run: ServedRun, text: str) -> str:
    """The rewrite that `alignpro rewrite` writes."""
    ((rewritten,),) = Rewriter(run.prompter.model, None, run.prompter.config).rewrite([text])
    return rewritten.rewrite


def with_rewriting(use: Callable[[Rewriting], Any], *runs: Path, target: Path | None = None, **config: Any) -> Any:
    """Await ``use(rewriting)`` of runs, and of a target in this process."""

    async def main() -> Any:
        model = None if target is None else ModelConfig(path=str(target), device="cpu")
        rewriting = await Rewriting.open(RewritingConfig(**{**PLAIN, **config}), runs, model)
        try:
            return await use(rewriting)
        finally:
            await rewriting.close()

    return asyncio.run(asyncio.wait_for(main(), 60))


def ask(*contents: Any, api: Api = "chat", body: Any = None, **fields: Any) -> Asked:
    """Return a request: a conversation of user and assistant in turn, or any body."""
    if body is None:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": each} for i, each in enumerate(contents)]
        body = {"model": "m", "messages": messages} if api == "chat" else {"model": "m", "prompt": contents[0]}
    return Asked(api, body, json.dumps(body).encode("utf-8", "surrogatepass"), "request", **fields)


def last_text(body: bytes) -> Any:
    """Return the content of the last message."""
    return json.loads(body)["messages"][-1]["content"]


def slow(run: ServedRun, seconds: float) -> ServedRun:
    """Let each pass of a run's prompter take longer."""
    embeddings = run.prompter.model.causal.get_input_embeddings()
    assert isinstance(embeddings, torch.nn.Module)

    def wait(*_: object) -> None:
        time.sleep(seconds)

    embeddings.register_forward_pre_hook(wait)
    return run
