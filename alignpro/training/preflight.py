"""Cheap checks of a job's inputs before any model is loaded: models, data, rewards, classes of the user's own, disk space."""

from __future__ import annotations

import shutil
from pathlib import Path

from alignpro.config import (
    ComparisonConfig,
    DataConfig,
    FunctionRewardConfig,
    HeadroomConfig,
    HTTPRewardConfig,
    JudgeRewardConfig,
    JudgingConfig,
    ModelConfig,
    PolicyConfig,
    PromptingConfig,
    RewardConfig,
    RewardModelConfig,
    RLHFConfig,
    RunSection,
    Section,
    SFTConfig,
    TargetEndpointConfig,
    TrainConfig,
)
from alignpro.data import cluster_labels
from alignpro.data.loading import check_source
from alignpro.endpoints.client import HttpClient
from alignpro.environments.build import environment_kind
from alignpro.environments.prompt import PromptEnvironment
from alignpro.environments.response import ResponseEnvironment
from alignpro.errors import TrainingError
from alignpro.models.input_room import check_room
from alignpro.prompting.chat_template import ChatTemplate
from alignpro.prompting.memory import read_memory
from alignpro.prompting.memory_template import MemoryTemplate
from alignpro.prompting.meta_prompt import MetaPrompt
from alignpro.prompting.moves import load_moves
from alignpro.prompting.pretrained import require_pretrained
from alignpro.prompting.tokenization import load_tokenizer
from alignpro.rewards.function import FunctionReward
from alignpro.rewards.http import JSONMapping
from alignpro.rewards.judge import Questions
from alignpro.rewards.preflight import check_servers
from alignpro.rewards.rubric import Rubric
from alignpro.rewards.servers import Session
from alignpro.targets.remote import compile_wrapper
from alignpro.training.input_files import model_paths, sections
from alignpro.training.objective import build_objective
from alignpro.training.run_directory import refuse_other_files


def check_inputs(config: Section) -> None:
    """Check what a command would read, and that a checkpoint fits on the disk, without loading a model.

    Nothing is sent to a server. Tokenizers are loaded; data is read up to the first prompt, or to its end if a reward or the
    intervals ask for columns; the files of rewards and classes of the user's own are imported.

    Raises:
        AlignProError: The first problem found.
    """
    rewards: list[FunctionReward | Questions | JSONMapping] = []
    for key, section in sections(config):
        match section:
            case ModelConfig():
                _check_model(key, section)
            case FunctionRewardConfig():
                rewards.append(FunctionReward(section))
            case JudgeRewardConfig():
                rewards.append(Questions(section))
            case HTTPRewardConfig():
                rewards.append(JSONMapping(section))
            case PromptingConfig():
                MetaPrompt(section.meta_prompt)
            case JudgingConfig():
                Rubric("pairwise", section.rubric, "judge", criteria=section.criteria)
            case TargetEndpointConfig():
                compile_wrapper(section.wrapper)
                HttpClient(section)  # reads the key and the certificates
    if isinstance(data := getattr(config, "data", None), DataConfig):
        by_column = [reward for reward in rewards if reward.needs_columns]
        clustered = isinstance(config, ComparisonConfig) and data.cluster is not None
        prompts = check_source(data, _required_fields(config), whole=bool(by_column) or clustered)
        for reward in rewards if prompts else []:
            reward.check_columns(prompts)
        if clustered and all(data.cluster not in prompt.metadata for prompt in prompts):
            cluster_labels(prompts, data.cluster)
    match config:
        case SFTConfig() if config.data.moves is not None:
            load_moves(config.data.moves).of_form(config.prompting.form)
        case HeadroomConfig():
            load_moves(config.moves)
        case TrainConfig():
            environment_kind(config.environment, config.environment_params, PromptEnvironment)
            build_objective(config.objective, config.rollout.rewrites_per_prompt, config.rollout.ahead == 1)
            check_room(config.policy, config.rollout.rewrite, "the policy", "rollout.rewrite")
            if isinstance(config.target, ModelConfig):
                check_room(config.target, config.rollout.respond, "the target", "rollout.respond")
            if config.memory is not None:
                MemoryTemplate.read(config.memory.template)
        case RLHFConfig():
            environment_kind(config.environment, config.environment_params, ResponseEnvironment)
            build_objective(config.objective, config.rollout.responses_per_prompt)
            check_room(config.policy, config.rollout.respond, "the policy", "rollout.respond")
        case RewardModelConfig():
            ChatTemplate(load_tokenizer(config.model))
    if isinstance(config, RunSection):
        refuse_other_files(config.run.out)
        _check_disk(config)


def check_reward_servers(config: Section, servers: Session) -> None:
    """Check that the servers of a reward can be asked, with a few small requests, which are paid for.

    Raises:
        AlignProError: See `alignpro.rewards.preflight.check_servers`.
    """
    reward, data = getattr(config, "reward", None), getattr(config, "data", None)
    if isinstance(reward, RewardConfig) and reward.endpoints and isinstance(data, DataConfig):
        check_servers(reward, check_source(data, ()), servers)


def _check_model(key: str, model: ModelConfig) -> None:
    """Check that a model is there, and that the template of one that converses can be used."""
    for name, path in model_paths(key, model):
        require_pretrained(path, name)
    if key in ("prompter", "reference"):
        read_memory(model.path)
    if key in ("policy", "target", "prompter", "oracle") or key.startswith("target.mixture."):
        ChatTemplate(load_tokenizer(model), model.chat_template)


def _required_fields(config: Section) -> tuple[str, ...]:
    """The fields that every row of the job's data must have, besides the prompt."""
    match config:
        case SFTConfig():
            return config.required_fields
        case RewardModelConfig():
            return ("chosen", "rejected")
        case _:
            return ()


def _check_disk(config: RunSection) -> None:
    """Refuse a run whose first checkpoint cannot fit: weights of full fine-tuning and AdamW's two moments."""
    model = config.model if isinstance(config, RewardModelConfig) else getattr(config, "policy", None)
    if model is None or (isinstance(model, PolicyConfig) and model.adapter.kind in ("lora", "soft_prompt")):
        return
    weights = sum(file.stat().st_size for file in Path(model.path).glob("*.safetensors"))
    existing = next(parent for parent in (config.run.out, *config.run.out.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if free < 3 * weights:
        raise TrainingError(
            f"run.out={config.run.out}: a checkpoint takes at least {3 * weights / 2**30:.1f} GiB, and the disk has "
            f"{free / 2**30:.1f} GiB free: make room, or write elsewhere"
        )
