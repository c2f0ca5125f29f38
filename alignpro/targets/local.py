"""The target as a model of this process, on the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from alignpro.config import ModelConfig, PromptingConfig, SamplingConfig
from alignpro.data import Prompt
from alignpro.engine import Chain, Completion, Engine, SamplingParams, derive_seed
from alignpro.models.input_room import max_input_tokens
from alignpro.models.language_model import LanguageModel
from alignpro.prompting.length_filter import filter_overlong_prompts
from alignpro.prompting.target_prompt import SentRewrite, TargetPrompt, TargetTemplate
from alignpro.targets.base import Answered, BegunRollout, OnAnswers


class LocalTarget:
    """A target whose weights are in this process.

    Args:
        model: The frozen model.
        template: x' → its tokens, its tokens → y.
        name: Its name in the engine.
    """

    remote = False

    def __init__(self, model: LanguageModel, template: TargetTemplate, name: str = "target") -> None:
        self.model, self.template, self.name = model, template, name

    @classmethod
    def build(
        cls,
        model: LanguageModel,
        config: ModelConfig,
        prompting: PromptingConfig,
        respond: SamplingConfig,
        name: str = "target",
    ) -> LocalTarget:
        """Build a target.

        Args:
            model: The frozen model.
            config: Its configuration, for its chat template.
            prompting: How empty rewrites are treated.
            respond: How it will be sampled.
            name: Its name in the engine.

        Raises:
            ConfigError: Its context has no room for a prompt in addition to the response.
        """
        template = TargetTemplate(
            model.tokenizer,
            config.chat_template,
            max_tokens=max_input_tokens(model, respond, "the target", "respond"),
            on_empty=prompting.on_empty,
            stop_token_ids=model.end_token_ids,
        )
        return cls(model, template, name)

    @property
    def models(self) -> Mapping[str, LanguageModel]:
        """The model under its name."""
        return {self.name: self.model}

    def answerable(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts whose earlier turns fit in the context."""
        return filter_overlong_prompts(
            prompts, self.template.encode_context, self.template.max_tokens, input_name="the target's context"
        )

    def encode(self, prompt: Prompt, rewrite: str | None) -> TargetPrompt:
        """Encode what the target gets; a rewrite that does not fit in its context is cut."""
        return self.template.encode(prompt, rewrite)

    def begin_rollout(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        inputs: Sequence[Sequence[int]],
        *,
        decode: Callable[[Prompt, Completion], str],
        rewrite: SamplingParams,
        respond: SamplingParams,
        seeds: Sequence[int],
        drawn: Sequence[Sequence[Completion]] | None = None,
        on_answered: Answered | None = None,
    ) -> BegunRollout:
        """Sample chains; a rewrite becomes a request of the engine as soon as it ends."""

        def tell(i: int, chain: Chain) -> None:
            if on_answered is not None:
                on_answered(i, decode(prompts[i], chain.sample), chain.responses)

        told = None if on_answered is None else tell
        if drawn is not None:
            chains = self._respond_to(engine, prompts, drawn, decode, respond, seeds, told)
            return BegunRollout(drawn, lambda: chains)
        chains = engine.run_chains(
            inputs,
            rewrite=rewrite,
            to_target=lambda i, sample: self.encode(prompts[i], decode(prompts[i], sample)),
            respond=self._with_ends(respond),
            seeds=seeds,
            target=self.name,
            on_chain=told,
        )
        return BegunRollout([[chain.sample for chain in group] for group in chains], lambda: chains)

    def respond(
        self,
        engine: Engine,
        sent: Sequence[SentRewrite],
        params: SamplingParams,
        seeds: Sequence[int],
        on_answered: OnAnswers | None = None,
    ) -> list[list[Completion]]:
        """Draw responses to encoded prompts."""
        tokens = [each.tokens for each in sent if isinstance(each, TargetPrompt)]
        told = None if on_answered is None else _once_all_are_there(params.n, on_answered)
        return engine.generate(self.name, tokens, self._with_ends(params), seeds, told)

    def text(self, completion: Completion) -> str:
        """Decode a response."""
        return self.template.decode(completion.text_tokens)

    def metrics(self) -> dict[str, float]:
        """Nothing: the engine's statistics tell."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing."""

    def _respond_to(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        drawn: Sequence[Sequence[Completion]],
        decode: Callable[[Prompt, Completion], str],
        params: SamplingParams,
        seeds: Sequence[int],
        on_chain: Callable[[int, Chain], None] | None,
    ) -> list[list[Chain]]:
        """Draw the responses to samples that are there, as in a rollout that samples them."""
        groups = [
            [Chain(sample, self.encode(prompt, decode(prompt, sample))) for sample in group]
            for prompt, group in zip(prompts, drawn, strict=True)
        ]
        chains = [chain for group in groups for chain in group]
        prompt_of = [i for i, group in enumerate(groups) for _ in group]

        def tell(number: int, responses: Sequence[Completion]) -> None:
            if on_chain is not None:
                on_chain(prompt_of[number], replace(chains[number], responses=list(responses)))

        told = None if on_chain is None else _once_all_are_there(params.n, tell)
        each = [
            derive_seed(seed, "respond", k)
            for seed, group in zip(seeds, groups, strict=True)
            for k in range(len(group))
        ]
        tokens = [chain.target_tokens for chain in chains]
        responses = engine.generate(self.name, tokens, self._with_ends(params), each, told)
        for chain, own in zip(chains, responses, strict=True):
            chain.responses = own
        return groups

    def _with_ends(self, params: SamplingParams) -> SamplingParams:
        return replace(params, stop_token_ids=self.template.stop_token_ids)


def _once_all_are_there(n: int, tell: OnAnswers) -> Callable[[int, int, Completion], None]:
    """What the engine calls with each completion; it tells of the n completions of a prompt together, in their order."""
    ended: dict[int, dict[int, Completion]] = {}

    def on_completion(i: int, m: int, completion: Completion) -> None:
        own = ended.setdefault(i, {})
        own[m] = completion
        if len(own) == n:
            tell(i, [own[each] for each in range(n)])

    return on_completion
