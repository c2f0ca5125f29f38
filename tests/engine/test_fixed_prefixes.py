"""What stays cached from step to step: a frozen target's fixed prefix always, the prompter's until its weights change.

A step draws rewrites of new prompts and responses to them, then the prompter's weights change, as in training on a CPU.
"""

from __future__ import annotations

import itertools

import pytest
from checks import TOKEN, assert_nothing_is_held
from tiny_models import ACTIVATED, ragged, tiny_adapted

from alignpro.config import AdapterConfig
from alignpro.engine import Completion, Engine, SamplingParams, TokenPrompt
from alignpro.engine.prefix_tree import Node
from alignpro.models.language_model import LanguageModel

META_PROMPT, TEMPLATE = (ragged(1, 100, shortest=40, longest=40, seed=seed)[0] for seed in (5, 6))
REWRITE, RESPOND = SamplingParams(max_tokens=12, n=3, stop_token_ids=(0, 1)), SamplingParams(max_tokens=8, n=2)
STEPS = 4


def prompts(step: int) -> list[list[int]]:
    """Return new prompts for each step, whose fixed prefix is the meta-prompt; they differ from its end on."""
    tails = ragged(5, 100, shortest=8, longest=20, seed=10 + step)
    return [[*META_PROMPT, 5 + i, *tail] for i, tail in enumerate(tails)]


def run_step(engine: Engine, step: int) -> None:
    """Run chains whose targets' prompts differ from the end of the template on: short common beginnings would be copied."""
    numbers = itertools.count(step * 5 * REWRITE.n)

    def to_target(i: int, rewrite: Completion) -> TokenPrompt:
        return TokenPrompt([*TEMPLATE, next(numbers), *rewrite.tokens, 2])

    engine.run_chains(prompts(step), rewrite=REWRITE, to_target=to_target, respond=RESPOND)


def tokens_in_tree(engine: Engine, name: str) -> int:
    (worker,) = engine.workers.values()
    return sum(len(node.tokens) for node in worker.tree.nodes(name) if node.model == name)


def fixed_node(engine: Engine, name: str) -> Node:
    """Return the only node below the root of a model: its fixed prefix."""
    (worker,) = engine.workers.values()
    nodes = [node for node in worker.tree.nodes(name) if node.start == 0]
    assert len(nodes) == 1 and nodes[0].computed == len(nodes[0].tokens)
    return nodes[0]


def test_the_prompter_computes_its_fixed_prefix_once_a_step_and_the_target_once(
    llama: LanguageModel, target: LanguageModel
) -> None:
    engine = Engine({"policy": llama, "target": target}, audit=True)
    held = 0
    for step in range(STEPS):
        before = engine.stats.snapshot()
        run_step(engine, step)
        own = tokens_in_tree(engine, "policy")
        assert own == len(META_PROMPT) + sum(len(prompt) - len(META_PROMPT) for prompt in prompts(step))
        new = tokens_in_tree(engine, "target") - held
        assert engine.stats.since(before).computed["prefill"] == own + new
        assert fixed_node(engine, "target").tokens == tuple(TEMPLATE)  # which is new in the first step only
        held += new
        engine.weights_updated("policy")
        assert tokens_in_tree(engine, "policy") == 0


def test_an_evaluation_and_the_step_after_it_share_the_prompters_prefix(
    llama: LanguageModel, target: LanguageModel
) -> None:
    engine = Engine({"policy": llama, "target": target}, audit=True)
    run_step(engine, 0)  # nothing is updated after an evaluation
    prefix, before = fixed_node(engine, "policy"), engine.stats.snapshot()
    run_step(engine, 1)
    assert fixed_node(engine, "policy") is prefix
    assert engine.stats.since(before).cache_hit_tokens >= len(META_PROMPT) * len(prompts(1))


def test_a_full_pool_evicts_old_rewrites_and_not_the_prefix_that_they_share(
    llama: LanguageModel, target: LanguageModel
) -> None:
    engine = Engine({"policy": llama, "target": target}, pool_bytes=70 * 16 * 3 * TOKEN, audit=True)
    run_step(engine, 0)
    prefix = fixed_node(engine, "target")
    old = {id(node) for node in prefix.children.values()}
    for step in range(1, 2 * STEPS):
        engine.weights_updated("policy")
        before = engine.stats.snapshot()
        run_step(engine, step)
        assert fixed_node(engine, "target") is prefix
        assert engine.stats.since(before).preemptions == 0
    (worker,) = engine.workers.values()
    assert worker.tree.num_cached + worker.pool.num_free == worker.pool.total
    assert not old <= {id(node) for node in prefix.children.values()}  # the pool was full
    assert_nothing_is_held(engine)


@pytest.mark.parametrize("adapter", [AdapterConfig(kind="lora", rank=4), ACTIVATED], ids=["lora", "activated"])
def test_only_an_activated_lora_keeps_its_prefix_when_its_weights_change(adapter: AdapterConfig) -> None:
    model = tiny_adapted(adapter=adapter, size=0.1).requires_grad_(False)
    ids = list(model.invocation)
    engine = Engine({"policy": model}, audit=True)
    computed = []
    for step in range(3):
        before = engine.stats.snapshot()
        engine.generate("policy", [[*prompt, *ids, 7] for prompt in prompts(step)], REWRITE)
        computed.append(engine.stats.since(before).computed["prefill"])
        engine.weights_updated("policy")
    new = [sum(len(prompt) + len(ids) + 1 for prompt in prompts(step)) for step in range(3)]
    shared = (len(prompts(0)) - 1) * len(META_PROMPT)
    again = 0 if ids else len(META_PROMPT)
    assert computed[0] == new[0] - shared
    assert computed[1:] == [count - shared - len(META_PROMPT) + again for count in new[1:]]
