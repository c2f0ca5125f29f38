"""Build the trainer of each training command of `alignpro` from its configuration."""

from __future__ import annotations

import logging
from pathlib import Path

from alignpro.config import RLHFConfig, TrainConfig
from alignpro.data import load_prompts, split_for_training
from alignpro.engine import Engine
from alignpro.environments.base import sampling_params
from alignpro.environments.build import environment_kind, prompt_environment
from alignpro.environments.prompt import PromptEnvironment
from alignpro.environments.response import ResponseEnvironment
from alignpro.environments.self_reward import SelfRewardEnvironment
from alignpro.errors import ConfigError
from alignpro.models.input_room import max_input_tokens
from alignpro.models.invocation import with_invocation
from alignpro.models.loading import is_activated_lora, is_adapter, load_language_model
from alignpro.policy.policy import Policy
from alignpro.prompting.chat_template import ChatTemplate
from alignpro.prompting.length_filter import filter_overlong_prompts
from alignpro.prompting.memory import FILE_NAME, Memory
from alignpro.prompting.memory_context import MemoryContext
from alignpro.rewards import build_reward
from alignpro.targets.build import build_responder
from alignpro.targets.servers import NO_SERVERS, Servers
from alignpro.training.distribution import Distribution, SingleProcess
from alignpro.training.reinforcement import RLTrainer
from alignpro.training.rollouts import SamplingAhead

logger = logging.getLogger(__name__)


def prompter_training(
    config: TrainConfig, distribution: Distribution | None = None, servers: Servers = NO_SERVERS
) -> RLTrainer:
    """Build `alignpro train`: the prompter learns rewrites that make the frozen target respond better."""
    distribution = distribution or SingleProcess()
    with distribution.ranks.raise_together():  # a model that one rank cannot load stops all ranks
        if config.target == "policy":
            _refuse_merged(config.policy.path)
        policy = Policy.load(config.policy, seed=config.run.seed, temperature=config.rollout.rewrite.temperature)
        targets, rewards = distribution.frozen("target"), distribution.frozen("reward")
        target = build_responder(
            config.target,
            (policy.model, config.policy),
            config.prompting,
            config.rollout.respond,
            connect=servers.connect,
            load=lambda each: targets.load(each, load_language_model),
        )
        references = [] if policy.reference is None else [policy.reference]
        distribution.hold_once([*target.models.values(), policy.model, *references])
        reward = build_reward(config.reward, rewards.load, servers)
        limit = max_input_tokens(policy.model, config.rollout.rewrite, "the policy", "rollout.rewrite")
        limit = min(config.prompting.max_prompt_tokens, limit)
        memory = _empty_memory(config, limit)
        environment = prompt_environment(
            policy.model,
            target,
            reward,
            config.prompting,
            config.rollout.respond,
            responses=config.rollout.responses_per_rewrite,
            memory=memory,
            kind=environment_kind(config.environment, config.environment_params, PromptEnvironment),
        )
        _tell_of_own_score(environment, PromptEnvironment)
        encode = with_invocation(environment.encode, policy.model.invocation)
        prompts = filter_overlong_prompts(load_prompts(config.data).prompts, encode, limit)
        prompts = reward.scorable(target.answerable(prompts))
        training, heldout = split_for_training(prompts, config.data, config.run.eval_prompts)
    sampled = distribution.sampling_model(policy.model)
    return RLTrainer(
        policy,
        environment if config.self_reward is None else SelfRewardEnvironment(environment, config.self_reward),
        Engine({"policy": sampled.model, **target.models}, **config.rollout.engine.model_dump()),
        training,
        heldout,
        sampling=sampling_params(config.rollout.rewrite, config.rollout.rewrites_per_prompt),
        prompts_per_step=config.rollout.prompts_per_step,
        objective=config.objective,
        optimizer=config.optimizer,
        run=config.run,
        distribution=distribution,
        sampling_model=sampled,
        keep_cached=tuple(target.models) if config.rollout.keep_cache else (),
        targets=targets,
        rewards=rewards,
        responder=target,
        ahead=_sampling_ahead(config, environment),
        servers=servers,
        memory=memory,
        heldout_environment=environment,
    )


def response_training(
    config: RLHFConfig, distribution: Distribution | None = None, servers: Servers = NO_SERVERS
) -> RLTrainer:
    """Build `alignpro rlhf`: the target itself learns from the same reward."""
    distribution = distribution or SingleProcess()
    with distribution.ranks.raise_together():
        policy = Policy.load(config.policy, seed=config.run.seed, temperature=config.rollout.respond.temperature)
        template = ChatTemplate(
            policy.model.tokenizer, config.policy.chat_template, stop_token_ids=policy.model.end_token_ids
        )
        rewards = distribution.frozen("reward")
        kind = environment_kind(config.environment, config.environment_params, ResponseEnvironment)
        reward = build_reward(config.reward, rewards.load, servers)
        environment = kind(template, reward)
        _tell_of_own_score(environment, ResponseEnvironment)
        limit = max_input_tokens(policy.model, config.rollout.respond, "the policy", "rollout.respond")
        encode = with_invocation(environment.encode, policy.model.invocation)
        prompts = filter_overlong_prompts(
            load_prompts(config.data).prompts, encode, min(config.max_prompt_tokens, limit)
        )
        prompts = reward.scorable(prompts)
        training, heldout = split_for_training(prompts, config.data, config.run.eval_prompts)
    sampled = distribution.sampling_model(policy.model)
    return RLTrainer(
        policy,
        environment,
        Engine({"policy": sampled.model}, **config.rollout.engine.model_dump()),
        training,
        heldout,
        sampling=sampling_params(config.rollout.respond, config.rollout.responses_per_prompt),
        prompts_per_step=config.rollout.prompts_per_step,
        objective=config.objective,
        optimizer=config.optimizer,
        run=config.run,
        distribution=distribution,
        sampling_model=sampled,
        rewards=rewards,
        servers=servers,
    )


def _empty_memory(config: TrainConfig, max_input_tokens: int) -> MemoryContext | None:
    """The memory of a new run: what another run remembers may be of prompts that this one holds out."""
    if (Path(config.policy.path) / FILE_NAME).is_file():
        logger.warning(
            "policy.path=%s: was trained with a memory of past rewrites, which is not used: %s",
            config.policy.path,
            "this run begins without any"
            if config.memory
            else "its prompter sees none here; `memory` shows those of this run",
        )
    return (
        None if config.memory is None else MemoryContext(Memory(config.memory), max_input_tokens, config.prompting.form)
    )


def _sampling_ahead(config: TrainConfig, environment: PromptEnvironment) -> SamplingAhead | None:
    """Return how the next step's rewrites are drawn ahead, if they are.

    Raises:
        ConfigError: The environment is one of the user's own whose `rollout` cannot be begun ahead.
    """
    if not config.rollout.ahead:
        return None
    kind = type(environment)
    if kind.rollout is not PromptEnvironment.rollout and kind.begin_rollout is PromptEnvironment.begin_rollout:
        raise ConfigError(
            f"rollout.ahead=1 with environment={config.environment}: it has a rollout of its own, which cannot be begun ahead; "
            "override begin_rollout instead, or use rollout.ahead=0"
        )
    if not environment.target.remote:
        logger.warning(
            "rollout.ahead=1 with a target in this process: there are no answers to await, so that no time is gained, and "
            "rewrites are one update old"
        )
    return SamplingAhead(environment.begin_rollout, config.rollout.max_importance_weight)


def _tell_of_own_score(
    environment: PromptEnvironment | ResponseEnvironment, base: type[PromptEnvironment | ResponseEnvironment]
) -> None:
    """Say that components of the reward that could begin early do not, since only the environment knows what it scores."""
    if type(environment).score is not base.score and environment.reward.begins_early:
        logger.warning(
            "%s has a score of its own: judges and servers of the reward are asked once all responses are there",
            type(environment).__name__,
        )


def _refuse_merged(path: str) -> None:
    """Refuse an adapter that would be merged into the base model when the policy's base model is the target."""
    if is_adapter(path) and not is_activated_lora(path):
        raise ConfigError(
            f"target=policy: {path} is an adapter, which is merged into its base model before training; the merged model "
            "would be the target: name the target's model, or start from an activated LoRA (policy.adapter.activated=true)"
        )
