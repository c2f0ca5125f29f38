"""Engine settings of the configuration reach the engine, and stop texts of the policy do not bias its training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import Workshop

from alignpro.config import RLHFConfig, TrainConfig, load_config
from alignpro.engine import Chain
from alignpro.errors import TrainingError
from alignpro.training.builders import prompter_training, response_training
from alignpro.training.reinforcement import RLTrainer


def training(workshop: Workshop, out: Path, *overrides: str) -> RLTrainer:
    out.mkdir()
    return prompter_training(load_config(TrainConfig, workshop.arguments("train", out, *overrides)[1:]))


def test_settings_reach_the_engine(workshop: Workshop, tmp_path: Path) -> None:
    made = training(workshop, tmp_path / "run", "rollout.engine={page_tokens: 4, pool_bytes: 262144, max_batch: 3}")
    engine = made.engine
    assert (engine.page_tokens, engine.pool_bytes, engine.max_batch) == (4, 262144, 3)
    metrics = made.step(0)
    assert metrics["engine/pages/target"] > 0
    assert all(pool.total * pool.page_bytes <= 262144 for pool in engine.pools.values())


def test_only_frozen_models_keep_their_cache_while_the_policy_is_updated(workshop: Workshop, tmp_path: Path) -> None:
    assert training(workshop, tmp_path / "kept").keep_cached == ("target",)
    assert training(workshop, tmp_path / "dropped", "rollout.keep_cache=false").keep_cached == ()
    oracle = load_config(RLHFConfig, workshop.arguments("rlhf", tmp_path)[1:])
    assert response_training(oracle).keep_cached == ()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("keep", [True, False])
def test_a_step_on_a_gpu_keeps_the_targets_prompts_if_asked(workshop: Workshop, tmp_path: Path, keep: bool) -> None:
    where = ("policy.device=cuda", "target.device=cuda", f"rollout.keep_cache={str(keep).lower()}")
    made = training(workshop, tmp_path / "run", *where)
    made.step(0)
    (pool,) = made.engine.pools.values()
    assert pool.used["policy"] == 0
    assert (pool.used["target"] > 0) == keep
    assert made.step(1)["engine/hit_tokens"] >= 0  # the kept pages can be used


def test_tokens_of_a_stop_text_are_actions(workshop: Workshop, tmp_path: Path) -> None:
    """The update needs all drawn tokens with the policy's log-probabilities; the target sees the text before the stop."""
    # Every printable character is a stop text, so that almost all rewrites end by one.
    stops = [chr(code) for code in range(33, 127)]
    overrides = [f"rollout.rewrite.stop={stops!r}", "rollout.rewrite.max_tokens=12", "rollout.rewrites_per_prompt=6"]
    made = training(workshop, tmp_path / "run", *overrides)
    prompts = made.stream.batch(0)
    chains = made.environment.rollout(made.engine, prompts, made.sampling, [1, 2])
    samples = [chain.sample for group in chains for chain in group]
    stopped = [sample for sample in samples if sample.num_text_tokens is not None]
    assert len(stopped) > len(samples) // 2
    tokenizer = made.policy.model.tokenizer
    for sample in stopped:
        assert any(stop in tokenizer.decode(sample.tokens) for stop in stops)
        assert not any(stop in tokenizer.decode(sample.text_tokens) for stop in stops)
    experience = made.compute_advantages(prompts, chains, made.environment.score(prompts, chains))
    rows = zip(experience.batch.actions, experience.batch.mask, samples, strict=True)
    assert all(actions[mask].tolist() == sample.tokens for actions, mask, sample in rows)
    drawn = torch.tensor([logprob for sample in samples for logprob in sample.logprobs])
    torch.testing.assert_close(experience.values.logprob[experience.batch.mask], drawn, atol=1e-4, rtol=0)


def test_a_failed_chain_stops_the_run_and_names_its_prompt(workshop: Workshop, tmp_path: Path) -> None:
    made = training(workshop, tmp_path / "run")
    model = made.policy.model
    first, second = (set(made.environment.encode(prompt)) for prompt in made.stream.batch(0)[:2])
    bad = min(first - second)

    def check(_: object, inputs: tuple[torch.Tensor]) -> None:
        if bad in inputs[0]:
            raise ValueError("poison")

    before = [weight.detach().clone() for weight in model.parameters()]
    hook = model.causal.get_input_embeddings().register_forward_pre_hook(check)
    with pytest.raises(TrainingError, match=r"prompt \S+ \(.*\): a forward pass of .* raised ValueError: poison"):
        made.step(0)
    hook.remove()
    assert all(torch.equal(weight, old) for weight, old in zip(model.parameters(), before, strict=True))
    made.step(0)
    assert not all(torch.equal(weight, old) for weight, old in zip(model.parameters(), before, strict=True))


def test_stop_texts_do_not_change_the_distribution(workshop: Workshop, tmp_path: Path) -> None:
    """Tokens up to a stop text are those that would be drawn without it: no sequence is rejected or drawn again."""

    def rollout(out: str, *overrides: str) -> list[Chain]:
        made = training(workshop, tmp_path / out, "rollout.rewrites_per_prompt=6", *overrides)
        groups = made.environment.rollout(made.engine, made.stream.batch(0), made.sampling, [1, 2])
        return [chain for group in groups for chain in group]

    cut = rollout("cut", f"rollout.rewrite.stop={[chr(code) for code in range(33, 90)]!r}")
    whole = rollout("whole")
    for one, other in zip(cut, whole, strict=True):
        assert one.sample.tokens == other.sample.tokens[: len(one.sample.tokens)]
    assert any(one.sample.num_text_tokens is not None for one in cut)


def test_a_step_on_a_cpu_keeps_the_targets_prompts_in_any_case(workshop: Workshop, tmp_path: Path) -> None:
    made = training(workshop, tmp_path / "run", "rollout.keep_cache=false")  # which is about an accelerator's memory
    made.step(0)
    (pool,) = made.engine.pools.values()
    assert pool.used["policy"] == 0 < pool.used["target"]
