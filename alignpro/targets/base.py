"""What the frozen target is asked, wherever it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from alignpro.data import Prompt
from alignpro.engine import Chain, Completion, Engine, SamplingParams
from alignpro.models.language_model import LanguageModel
from alignpro.prompting.target_prompt import SentRewrite

Answered = Callable[[int, str | None, Sequence[Completion]], None]
"""(prompt index, rewrite, the responses to it, whose text `Responder.text` gives); it is called once for each rewrite, as soon as
the responses are there, possibly in another thread, and before they are returned. Without a rewrite, None."""


OnAnswers = Callable[[int, Sequence[Completion]], None]
"""Likewise, (index of what was sent, the responses to it)."""


@dataclass(frozen=True)
class BegunRollout:
    """A rollout whose rewrites are there, and whose responses may still be awaited."""

    samples: Sequence[Sequence[Completion]]
    """[P][K]: the prompter's samples."""
    finish: Callable[[], list[list[Chain]]]
    """Waits for the responses, and returns the chains."""

    def __call__(self) -> list[list[Chain]]:
        """Wait for the responses, and return the chains, [P][K]."""
        return self.finish()


class Responder(Protocol):
    """Responds to rewrites: one target, or several of which each prompt gets one."""

    remote: bool
    """Whether any of it is behind a server."""

    @property
    def models(self) -> Mapping[str, LanguageModel]:
        """The models that the engine must have under these names."""

    def answerable(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts whose earlier turns leave room for a rewrite; the others are counted in the log.

        Raises:
            DataError: None is left.
        """

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
        """Sample x → K rewrites, and M responses to each; returns what awaits those that are not there yet.

        Response m to rewrite k of a prompt draws from (the prompt's seed, "respond", k, m).

        Args:
            engine: Has the prompter as ``policy``, and `models`.
            prompts: P prompts.
            inputs: [P]: the prompter's tokens for each.
            decode: A prompt and a sample of the prompter → the rewrite.
            rewrite: How the prompter is sampled; ``n`` is K.
            respond: How the target is sampled; ``n`` is M.
            seeds: [P].
            drawn: [P][K]: the prompter's samples, if they have been drawn before; the same responses are drawn to them.
            on_answered: Told of the responses to each rewrite as soon as they are there.
        """

    def text(self, completion: Completion) -> str:
        """The text of a response, stripped and without reasoning."""

    def metrics(self) -> dict[str, float]:
        """What responding took since the last call, for the metrics of a step; empty for models in this process."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, serializable as JSON."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class Target(Responder, Protocol):
    """One frozen target."""

    def encode(self, prompt: Prompt, rewrite: str | None) -> SentRewrite:
        """What the target gets for a rewrite of a prompt, or for the prompt as it is.

        Raises:
            DataError: The turns before the last one leave no room, or a chat template refuses the conversation.
        """

    def respond(
        self,
        engine: Engine,
        sent: Sequence[SentRewrite],
        params: SamplingParams,
        seeds: Sequence[int],
        on_answered: OnAnswers | None = None,
    ) -> list[list[Completion]]:
        """Draw ``params.n`` responses to each of what `encode` returned; response m draws from (its seed, m).

        ``on_answered`` is told of the responses to each as soon as they are there.
        """
