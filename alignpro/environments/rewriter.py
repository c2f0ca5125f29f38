"""Use a trained prompter: rewrite prompts, and optionally let the target respond."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from alignpro.config import (
    RolloutConfig,
    SamplingConfig,
    SFTConfig,
    TargetMixtureConfig,
    TrainConfig,
    target_endpoints,
)
from alignpro.data import Prompt
from alignpro.engine import Chain, Completion, Engine, SamplingParams, derive_seed
from alignpro.environments.base import refuse_errors
from alignpro.environments.build import prompt_environment
from alignpro.environments.exact_mixture import correct_draws, describe_correction, resample
from alignpro.environments.prompt import PromptEnvironment
from alignpro.environments.trained_prompter import TrainedPrompter, load_prompter, read_run, require_no_code
from alignpro.errors import AlignProError, ConfigError, ModelError
from alignpro.models.garbage_collection import paused_collection
from alignpro.models.language_model import LanguageModel
from alignpro.models.mixed_model import MixedModel
from alignpro.models.progress_bars import without_progress_bars
from alignpro.prompting.memory import Memory, read_memory
from alignpro.rewards import RewardStack
from alignpro.targets.base import Target
from alignpro.targets.build import build_target
from alignpro.targets.servers import open_servers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rewritten:
    """A rewrite x', and the target's response to it, or None without a target."""

    rewrite: str
    response: str | None


class Rewriter:
    """A trained prompter, with its run's templates; optionally the target.

    Args:
        prompter: The prompter.
        target: The target, or None.
        config: The run's configuration, for meta-prompt, templates and sampling. That of `alignpro sft` has neither a
            target nor a section `rollout`; the defaults apply, with rewrites of at most half the prompter's context.
        resources: What is closed by `close`.
        strength: That at which the prompter has been loaded.
        memory: Past rewrites that the prompter sees.
    """

    def __init__(
        self,
        prompter: LanguageModel,
        target: Target | None,
        config: TrainConfig | SFTConfig,
        resources: ExitStack | None = None,
        strength: float = 1.0,
        memory: Memory | None = None,
    ) -> None:
        self.config, self.strength = config, strength
        self._trained = TrainedPrompter(prompter, config, memory)
        self.rollout, self.prompter = self._trained.rollout, self._trained.template
        self.environment: PromptEnvironment | None = None
        models = {"policy": prompter}
        if target is not None:
            models |= target.models
            self.environment = prompt_environment(
                prompter,
                target,
                RewardStack([], []),
                config.prompting,
                _greedy(self.rollout),
                responses=1,
                memory=self._trained.memory,
            )
        self.engine = Engine(models, **self.rollout.engine.model_dump())
        self._resources = resources or ExitStack()

    def close(self) -> None:
        """Disconnect from the target's server, if it has one."""
        self._resources.close()

    def __enter__(self) -> Rewriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @classmethod
    @without_progress_bars()
    @paused_collection()
    def load(
        cls,
        run: str | os.PathLike[str],
        *,
        with_target: bool = False,
        strength: float = 1.0,
        trust_remote_code: bool = False,
        trust_endpoint: bool = False,
    ) -> Rewriter:
        """Load the prompter that `alignpro train` or `alignpro sft` saved in a run directory, or a mixture of `alignpro mix`.

        Args:
            run: The run directory, or the finished run.
            strength: s of ρ_sft^{1−s} ρ^s, token by token: 0 is the prompter before training, 1 the trained one.
            with_target: Whether to load the target too, which then responds to the rewrites. For one behind a server this
                uses the run's ledger, counts against its budget, and needs `close` (or ``with``) at the end.
            trust_remote_code: Whether Python code that comes with the models may run, if the run's configuration says
                so. The directory may come from someone else, so its word alone is not enough.
            trust_endpoint: Likewise, whether variables of the environment, such as a key, may be sent to the target's server,
                if the run's configuration says so.

        Raises:
            ConfigError: The strength is not from 0 to 2.
            ModelError: The directory holds no finished run of a prompter, or none with one target, or it needs
                ``trust_remote_code`` or ``trust_endpoint``.
            EndpointError: The target's server cannot be used.
        """
        run = Path(run)
        config = read_run(run)
        if with_target and not isinstance(config, TrainConfig):
            raise ModelError(
                f"run directory {run}: is a run of `alignpro sft`, which has no target to answer; leave out --answer (in "
                "Python, with_target=True), or give a run of `alignpro train`"
            )
        if with_target and isinstance(config, TrainConfig) and isinstance(config.target, TargetMixtureConfig):
            raise ModelError(
                f"run directory {run}: its prompter was trained for several targets, so there is not one to answer; leave out "
                "--answer (in Python, with_target=True)"
            )
        if not trust_remote_code:
            require_no_code(run, config, with_target=with_target)
        if not with_target or not isinstance(config, TrainConfig):
            return cls(
                load_prompter(run, config, strength),
                None,
                config,
                strength=strength,
                memory=read_memory(run / "model"),
            )
        endpoints = target_endpoints(config.target)
        for endpoint in endpoints:
            if endpoint.variables and not trust_endpoint:
                raise ModelError(
                    f"run directory {run}: its config.yaml sends {', '.join(f'${name}' for name in endpoint.variables)} to "
                    f"{endpoint.base_url}; if you trust it, say so: --trust-endpoint (in Python, trust_endpoint=True)"
                )
            logger.warning("answers come from %s at %s", endpoint.model, endpoint.base_url)
        with ExitStack() as stack:
            servers = stack.enter_context(open_servers(config, endpoints, run, _greedy(config.rollout)))
            prompter = load_prompter(run, config, strength)
            target = build_target(
                config.target,
                (prompter, config.policy),
                config.prompting,
                _greedy(config.rollout),
                connect=servers.connect,
            )
            memory = read_memory(run / "model")
            return cls(prompter, target, config, stack.pop_all(), strength, memory)

    def rewrite(
        self,
        texts: Sequence[str | Prompt],
        *,
        n: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
        candidates: int | None = None,
    ) -> list[list[Rewritten]]:
        """Sample ``n`` rewrites of each prompt; the target decodes greedily.

        Args:
            texts: The prompts.
            n: Rewrites of each.
            temperature: 0 is greedy.
            seed: Of all samples.
            candidates: For a mixture: draw this many token by token, and keep ``n`` by the weights that correct for it.

        Raises:
            ConfigError: ``candidates`` are given, but samples are greedy or filtered, the prompter is not a mixture, or they are
                fewer than ``n``.
            ModelError: A prompt does not fit in the prompter's context, or a rewrite cannot be given to the target.
            DataError: A prompt is empty, or the prompter's chat template refuses a conversation.
        """
        prompts = [text if isinstance(text, Prompt) else Prompt.from_text(text) for text in texts]
        seeds = [derive_seed(seed, i) for i in range(len(prompts))]
        groups = []
        for group in self.rewrite_each(prompts, seeds, n=n, temperature=temperature, candidates=candidates):
            if isinstance(group, AlignProError):
                raise group
            groups.append(group)
        return groups

    def rewrite_each(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        n: int = 1,
        temperature: float = 0.0,
        candidates: int | None = None,
    ) -> list[list[Rewritten] | AlignProError]:
        """Sample ``n`` rewrites of each prompt, or return the error of `rewrite` in their place."""
        params = self._trained.params(n, temperature)
        results: list[list[Rewritten] | AlignProError] = [
            self._trained.refusal(prompt, params.max_tokens) or [] for prompt in prompts
        ]
        usable = [i for i, result in enumerate(results) if not isinstance(result, AlignProError)]
        chosen = [prompts[i] for i in usable]
        chains = self._rollout(chosen, params, [seeds[i] for i in usable], candidates)
        for i, prompt, group in zip(usable, chosen, chains, strict=True):
            try:
                refuse_errors([prompt], [group], ModelError)
                results[i] = [self._decode(prompt, chain) for chain in group]
            except ModelError as error:
                results[i] = error
        return results

    def _rollout(
        self, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int], candidates: int | None
    ) -> Sequence[Sequence[Chain]]:
        drawn = None if candidates is None else self._corrected(prompts, params, seeds, candidates)
        if self.environment is not None:
            return self.environment.begin_rollout(self.engine, prompts, params, seeds, drawn)()
        if drawn is None:
            drawn = self.engine.generate("policy", [self.prompter.encode(p) for p in prompts], params, seeds)
        return [[Chain(sample) for sample in group] for group in drawn]

    def _corrected(
        self, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int], candidates: int
    ) -> list[list[Completion]]:
        """Rewrites of the mixture over whole sequences, [P][n], with a word on how far the token-wise one is from it."""
        model = self.engine.models["policy"]
        if not isinstance(model, MixedModel):
            raise ConfigError(
                f"rewrite: {candidates} candidates correct a mixture of models, and {model.name} is a single one, whose samples "
                "are exact: leave them out"
            )
        if candidates < params.n:
            raise ConfigError(
                f"rewrite: {params.n} rewrites of {candidates} candidates: some would be given twice: draw more candidates"
            )
        if params.temperature == 0 or params.top_k or params.top_p < 1 or params.min_p:
            raise ConfigError(
                "rewrite: candidates are weighed by the probabilities of whole samples: set a temperature above 0, and no top_k, "
                "top_p or min_p in the run's rollout.rewrite"
            )
        inputs = [self.prompter.encode(prompt) for prompt in prompts]
        groups = self.engine.generate("policy", inputs, replace(params, n=candidates), seeds)
        refuse_errors(prompts, [[Chain(sample) for sample in group] for group in groups], ModelError)
        found = correct_draws(model, inputs, groups, params.temperature)
        logger.warning("%s", describe_correction(found))
        places = resample(found, params.n, [derive_seed(seed, "resample") for seed in seeds])
        return [[group[j] for j in row] for group, row in zip(groups, places, strict=True)]

    def _decode(self, prompt: Prompt, chain: Chain) -> Rewritten:
        response: str | None = None
        if self.environment is not None:
            response = self.environment.target.text(chain.responses[0])
        return Rewritten(self._trained.text(prompt, chain.sample), response)


def _greedy(rollout: RolloutConfig) -> SamplingConfig:
    """How the target responds."""
    return rollout.respond.model_copy(update={"temperature": 0.0})
