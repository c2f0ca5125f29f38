"""Use a trained prompter: rewrite prompts, and let the target answer if asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from alignpro.config import SamplingConfig, TrainConfig, load_config
from alignpro.data import Prompt
from alignpro.engine import Completion, Engine, SamplingParams, derive_seed
from alignpro.environment import sampling_params
from alignpro.errors import ModelError
from alignpro.models import LanguageModel, load_language_model, load_target
from alignpro.prompting import PrompterTemplate, TargetTemplate


@dataclass(frozen=True)
class Rewritten:
    """A rewrite x', and what the target answers to it where it was asked."""

    rewrite: str
    response: str | None


class Rewriter:
    """A trained prompter, with its run's templates; optionally the target.

    Args:
        prompter: The model.
        target: The target, or None.
        config: The run's configuration: meta-prompt, templates, sampling.
    """

    def __init__(self, prompter: LanguageModel, target: LanguageModel | None, config: TrainConfig) -> None:
        self.config = config
        self.prompter = PrompterTemplate(prompter.tokenizer, config.prompting)
        self.target: TargetTemplate | None = None
        models = {"policy": prompter}
        if target is not None:
            models["target"] = target
            self.target = TargetTemplate(
                target.tokenizer,
                config.target_model.chat_template,
                max_tokens=target.context_length - config.rollout.respond.max_tokens,
                on_empty=config.prompting.on_empty,
            )
        self.engine = Engine(models, **config.rollout.engine.model_dump())

    @classmethod
    def from_run(cls, run: Path, *, with_target: bool = False) -> Rewriter:
        """Load what `alignpro train` left in a run directory.

        Raises:
            ModelError: There is no finished run.
        """
        if not (run / "config.yaml").is_file() or not (run / "model").is_dir():
            raise ModelError(
                f"run directory {run}: has no config.yaml and model/: it is not a finished `alignpro train`"
            )
        config = load_config(TrainConfig, [str(run / "config.yaml")])
        prompter = load_language_model(config.policy.model_copy(update={"path": str(run / "model"), "tokenizer": None}))
        return cls(prompter, load_target(config.target, prompter) if with_target else None, config)

    def rewrite(
        self, texts: Sequence[str | Prompt], *, n: int = 1, temperature: float = 0.0, seed: int = 0
    ) -> list[list[Rewritten]]:
        """``n`` rewrites of each prompt; the target answers greedily.

        Raises:
            ModelError: A prompt does not fit in the prompter's context, or a rewrite cannot be given to the target.
            DataError: A conversation does not fit in the target's context, or a chat template refuses it.
        """
        prompts = [text if isinstance(text, Prompt) else Prompt.from_text(text) for text in texts]
        sampling = self.config.rollout.rewrite.model_copy(update={"temperature": temperature})
        params = _with_stops(sampling, n, self.prompter.stop_token_ids)
        seeds = [derive_seed(seed, i) for i in range(len(prompts))]
        groups = self.engine.generate("policy", [self.prompter.encode(p) for p in prompts], params, seeds)
        for prompt, group in zip(prompts, groups, strict=True):
            _refuse_errors(prompt, group)
        rewrites = [[self.prompter.decode(sample.text_tokens) for sample in group] for group in groups]
        if self.target is None:
            return [[Rewritten(text, None) for text in group] for group in rewrites]
        target = self.target
        pairs = [(prompt, text) for prompt, group in zip(prompts, rewrites, strict=True) for text in group]
        greedy = self.config.rollout.respond.model_copy(update={"temperature": 0.0})
        answers = self.engine.generate(
            "target",
            [target.encode(prompt, text).tokens for prompt, text in pairs],
            _with_stops(greedy, 1, target.stop_token_ids),
        )
        for (prompt, _), group in zip(pairs, answers, strict=True):
            _refuse_errors(prompt, group)
        responses = iter(target.decode(answer.text_tokens) for (answer,) in answers)
        return [[Rewritten(text, next(responses)) for text in group] for group in rewrites]


def _with_stops(config: SamplingConfig, n: int, stop_token_ids: tuple[int, ...]) -> SamplingParams:
    return replace(sampling_params(config, n), stop_token_ids=stop_token_ids)


def _refuse_errors(prompt: Prompt, completions: Sequence[Completion]) -> None:
    for completion in completions:
        if completion.error:
            raise ModelError(f"prompt {prompt.text[:60]!r}: {completion.error}")
