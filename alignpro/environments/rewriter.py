"""Use a trained prompter: rewrite prompts or whole data sets, and optionally let the target respond."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignpro.config import DataConfig, ModelConfig, TrainConfig, load_config
from alignpro.data import Prompt, load_prompts
from alignpro.engine import Chain, Engine, derive_seed
from alignpro.environments.base import refuse_errors, sampling_params
from alignpro.environments.build import prompt_environment
from alignpro.environments.prompt import PromptEnvironment
from alignpro.errors import DataError, ModelError
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import load_language_model, load_target
from alignpro.prompting.prompter_prompt import PrompterTemplate
from alignpro.rewards import RewardStack

logger = logging.getLogger(__name__)

CHUNK = 1024
"""Number of prompts of a data set that are rewritten and saved at a time, so that an error does not lose everything."""


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
        config: The run's configuration, for meta-prompt, templates and sampling.
    """

    def __init__(self, prompter: LanguageModel, target: LanguageModel | None, config: TrainConfig) -> None:
        self.config = config
        self.prompter = PrompterTemplate(prompter.tokenizer, config.prompting)
        self.environment: PromptEnvironment | None = None
        models = {"policy": prompter}
        if target is not None:
            models["target"] = target
            greedy = config.rollout.respond.model_copy(update={"temperature": 0.0})
            self.environment = prompt_environment(
                prompter, target, config.target_model, RewardStack([], []), config.prompting, greedy, responses=1
            )
        self.engine = Engine(models, **config.rollout.engine.model_dump())

    @classmethod
    def load(
        cls, run: str | os.PathLike[str], *, with_target: bool = False, trust_remote_code: bool = False
    ) -> Rewriter:
        """Load the prompter that `alignpro train` saved in a run directory.

        Args:
            run: The run directory, or the finished run.
            with_target: Whether to load the target too, which then responds to the rewrites.
            trust_remote_code: Whether Python code that comes with the models may run, if the run's configuration says
                so. The directory may come from someone else, so its word alone is not enough.

        Raises:
            ModelError: The directory holds no finished run, or its models need ``trust_remote_code``.
        """
        run = Path(run)
        if not (run / "config.yaml").is_file() or not (run / "model").is_dir():
            raise ModelError(
                f"run directory {run}: has no config.yaml and model/: it is not a finished run of `alignpro train`"
            )
        config = load_config(TrainConfig, [str(run / "config.yaml")])
        if not trust_remote_code:
            _require_no_code(run, config, with_target)
        prompter = load_language_model(config.policy.model_copy(update={"path": str(run / "model"), "tokenizer": None}))
        return cls(prompter, load_target(config.target, prompter) if with_target else None, config)

    def rewrite(
        self, texts: Sequence[str | Prompt], *, n: int = 1, temperature: float = 0.0, seed: int = 0
    ) -> list[list[Rewritten]]:
        """Sample ``n`` rewrites of each prompt; the target decodes greedily.

        Raises:
            ModelError: A prompt does not fit in the prompter's context, or a rewrite cannot be given to the target.
            DataError: The prompter's chat template refuses a conversation.
        """
        prompts = [text if isinstance(text, Prompt) else Prompt.from_text(text) for text in texts]
        sampling = self.config.rollout.rewrite.model_copy(update={"temperature": temperature})
        params = replace(sampling_params(sampling, n), stop_token_ids=self.prompter.stop_token_ids)
        seeds = [derive_seed(seed, i) for i in range(len(prompts))]
        if self.environment is None:
            groups = self.engine.generate("policy", [self.prompter.encode(p) for p in prompts], params, seeds)
            chains = [[Chain(sample) for sample in group] for group in groups]
        else:
            chains = self.environment.rollout(self.engine, prompts, params, seeds)
        refuse_errors(prompts, chains, ModelError)
        return [[self._decode(chain) for chain in group] for group in chains]

    def _decode(self, chain: Chain) -> Rewritten:
        response: str | None = None
        if self.environment is not None:
            response = self.environment.target.decode(chain.responses[0].text_tokens)
        return Rewritten(self.prompter.decode(chain.sample.text_tokens), response)


def _require_no_code(run: Path, config: TrainConfig, with_target: bool) -> None:
    """Check that the models to be loaded bring no Python code: neither their own nor attention kernels from the hub."""
    models: dict[str, ModelConfig] = {"policy": config.policy}
    if with_target and not isinstance(config.target, str):
        models["target"] = config.target
    keys = [f"{name}.trust_remote_code" for name, model in models.items() if model.trust_remote_code]
    keys += [f"{name}.attention={model.attention}" for name, model in models.items() if "/" in model.attention]
    if keys:
        raise ModelError(
            f"run directory {run}: its config.yaml lets code run that comes with a model ({', '.join(keys)}); if you trust "
            "it, repeat that: --trust-remote-code (in Python, trust_remote_code=True)"
        )


def rewrite_data(
    rewriter: Rewriter, source: str, out: Path, *, n: int = 1, temperature: float = 0.0, seed: int = 0
) -> None:
    """Rewrite all prompts of a data source and write JSON Lines, `CHUNK` prompts at a time.

    A line has the prompt's ``id``, its text (``prompt``), the ``rewrites`` and, with a target, their ``responses``.
    Duplicates are rewritten once.

    Args:
        rewriter: The prompter, with or without the target.
        source: As ``data.source``: a preset, or files.
        out: The output file; lines written before an error are kept.
        n: Rewrites per prompt.
        temperature: Sampling temperature of the rewrites; the target decodes greedily.
        seed: Seed of the rewrites.

    Raises:
        DataError: The data cannot be read, or ``out`` exists.
        ModelError: As `Rewriter.rewrite`.
    """
    prompts = load_prompts(DataConfig(source=source, holdout=0)).prompts
    try:
        file = out.open("x", encoding="utf-8", errors="surrogatepass")
    except FileExistsError as error:
        raise DataError(f"{out}: already exists; choose another file, or remove it") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{out}: cannot be written: {error}") from error
    with file:
        for start in range(0, len(prompts), CHUNK):
            chunk = prompts[start : start + CHUNK]
            groups = rewriter.rewrite(chunk, n=n, temperature=temperature, seed=derive_seed(seed, start))
            for prompt, group in zip(chunk, groups, strict=True):
                row: dict[str, Any] = {"id": prompt.id, "prompt": prompt.text, "rewrites": [x.rewrite for x in group]}
                if rewriter.environment is not None:
                    row["responses"] = [x.response for x in group]
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            logger.info("%d of %d prompts rewritten", start + len(chunk), len(prompts))
