"""A trained prompter with what belongs to its run: templates, sampling, and which prompts it can be given.

What rewrites a data set and what rewrites requests as they come both use it, so that a prompt has the same rewrite in both.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

from alignpro.config import (
    ModelConfig,
    RolloutConfig,
    SFTConfig,
    TrainConfig,
    load_config,
    separate_models,
)
from alignpro.data import Prompt
from alignpro.engine import Completion, SamplingParams
from alignpro.environments.base import sampling_params
from alignpro.environments.finished_run import require_finished_run
from alignpro.environments.run_mixture import run_mixture
from alignpro.errors import AlignProError, ConfigError, DataError, ModelError
from alignpro.models.garbage_collection import paused_collection
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import load_language_model, load_mixture
from alignpro.models.progress_bars import without_progress_bars
from alignpro.prompting.memory import Memory, read_memory
from alignpro.prompting.memory_context import MemoryContext
from alignpro.prompting.prompter_prompt import PrompterTemplate


class TrainedPrompter:
    """A prompter, and the settings of its run.

    Args:
        model: The prompter.
        config: The run's configuration, for meta-prompt, templates and sampling. That of `alignpro sft` has no section
            `rollout`; the defaults apply, with rewrites of at most half the prompter's context.
        memory: Past rewrites that the prompter sees, as at the end of its training.
    """

    def __init__(self, model: LanguageModel, config: TrainConfig | SFTConfig, memory: Memory | None = None) -> None:
        self.model, self.config = model, config
        self.rollout = config.rollout if isinstance(config, TrainConfig) else _default_rollout(model)
        room = min(config.prompting.max_prompt_tokens, model.context_length - self.rollout.rewrite.max_tokens)
        self.memory = None if memory is None else MemoryContext(memory, room, config.prompting.form)
        self.template = PrompterTemplate(
            model.tokenizer, config.prompting, stop_token_ids=model.end_token_ids, memory=self.memory
        )

    @classmethod
    @without_progress_bars()
    @paused_collection()
    def load(cls, run: Path, *, trust_remote_code: bool = False) -> TrainedPrompter:
        """Load the prompter that `alignpro train` or `alignpro sft` saved in a run directory.

        Raises:
            ModelError: The directory holds no finished run of a prompter, or it needs ``trust_remote_code``.
        """
        config = read_run(run)
        if not trust_remote_code:
            require_no_code(run, config, with_target=False)
        return cls(load_prompter(run, config), config, read_memory(run / "model"))

    def params(self, n: int = 1, temperature: float = 0.0) -> SamplingParams:
        """How rewrites are sampled: as in training, at another temperature."""
        sampling = self.rollout.rewrite.model_copy(update={"temperature": temperature})
        return replace(sampling_params(sampling, n), stop_token_ids=self.template.stop_token_ids)

    def encode(self, prompt: Prompt, max_tokens: int) -> list[int]:
        """The prompter's input.

        Args:
            prompt: The conversation.
            max_tokens: What the rewrite may take.

        Raises:
            DataError: The prompt is empty, or the chat template refuses the conversation.
            ModelError: It does not fit in the prompter's context.
        """
        if not prompt.text.strip():
            raise DataError(f"prompt {prompt.source or prompt.id}: is empty: there is nothing to rewrite")
        tokens = self.template.encode(prompt)
        context = self.model.context_length
        if len(tokens) + max_tokens > context:
            raise ModelError(
                f"prompt {prompt.source or repr(prompt.text[:60])}: its {len(tokens)} tokens, instruction included, and a "
                f"rewrite of up to {max_tokens} do not fit in the context of {context} tokens of the prompter: shorten the "
                "prompt"
            )
        return tokens

    def refusal(self, prompt: Prompt, max_tokens: int) -> AlignProError | None:
        """The error of `encode`; None if there is none."""
        try:
            self.encode(prompt, max_tokens)
        except AlignProError as error:
            return error
        return None

    def text(self, prompt: Prompt, sample: Completion) -> str:
        """The rewrite that was sampled."""
        return self.template.decode(prompt, sample.text_tokens)


def load_prompter(run: Path, config: TrainConfig | SFTConfig, strength: float = 1.0) -> LanguageModel:
    """The model of a run, at a strength s of ρ_sft^{1−s} ρ^s, token by token.

    Its tokenizer has been saved with it, and the chat template with the tokenizer.

    Raises:
        ConfigError: The strength is not from 0 to 2.
        ModelError: It cannot be loaded, or has no other strength than 1: see `run_mixture`.
    """
    if not 0 <= strength <= 2:
        raise ConfigError(f"strength={strength:g}: expected a number from 0, the prompter before training, to 2")
    model = config.policy.model_copy(update={"path": str(run / "model"), "tokenizer": None, "chat_template": None})
    if strength == 1:
        return load_language_model(model)
    return load_mixture(run_mixture(run, config).at_strength(strength), model)


def read_run(run: Path) -> TrainConfig | SFTConfig:
    """The configuration of a prompter's finished run; its keys tell which command wrote it.

    Raises:
        ModelError: It is no finished run, or one of another kind of model.
    """
    require_finished_run(run)
    file = run / "config.yaml"
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        raw = None  # `load_config` says what is wrong
    keys = raw.keys() if isinstance(raw, dict) else set()
    if "model" in keys:
        raise ModelError(f"run directory {run}: is a run of `alignpro reward`, whose model scores and does not rewrite")
    if "task" in keys:
        config = load_config(SFTConfig, [str(file)])
        if config.task != "rewrite":
            raise ModelError(
                f"run directory {run}: is a run of `alignpro sft` with task={config.task}, not of a prompter"
            )
        return config
    if {"policy", "reward"} <= keys and "target" not in keys:
        raise ModelError(f"run directory {run}: is a run of `alignpro rlhf`, whose model responds and does not rewrite")
    return load_config(TrainConfig, [str(file)])


def require_no_code(run: Path, config: TrainConfig | SFTConfig, *, with_target: bool) -> None:
    """Check that the models to be loaded bring no Python code: neither their own nor attention kernels from the hub.

    Raises:
        ModelError: One does; the message names the key.
    """
    models: dict[str, ModelConfig] = {"policy": config.policy}
    if with_target and isinstance(config, TrainConfig):
        models |= {f"target{i or ''}": model for i, model in enumerate(separate_models(config.target))}
    keys = [f"{name}.trust_remote_code" for name, model in models.items() if model.trust_remote_code]
    keys += [f"{name}.attention={model.attention}" for name, model in models.items() if "/" in model.attention]
    if keys:
        raise ModelError(
            f"run directory {run}: its config.yaml lets code run that comes with a model ({', '.join(keys)}); if you trust "
            "it, repeat that: --trust-remote-code (in Python, trust_remote_code=True)"
        )


def _default_rollout(prompter: LanguageModel) -> RolloutConfig:
    """The defaults, which leave a prompt half of a small context."""
    default = RolloutConfig()
    longest = min(default.rewrite.max_tokens, prompter.context_length // 2)
    return default.model_copy(update={"rewrite": default.rewrite.model_copy(update={"max_tokens": longest})})
