"""Every text of the proposer, the model that writes instructions for a rival."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from alignpro.config import SamplingConfig
from alignpro.data import Prompt
from alignpro.engine import Engine, derive_seed
from alignpro.environments.base import sampling_params
from alignpro.errors import TrainingError
from alignpro.experiments.rivals.answers import Answer, AnswerFile
from alignpro.targets.base import Target


class ProposerAsker:
    """Asks the proposer and counts.

    Args:
        proposer: The model, in this process or behind a server.
        engine: Has its models.
        propose: How it is sampled.
        answers: The file of answers.
        seed: Of all samples.
    """

    def __init__(
        self, proposer: Target, engine: Engine, propose: SamplingConfig, answers: AnswerFile, *, seed: int
    ) -> None:
        self._proposer, self._engine, self._answers, self._seed = proposer, engine, answers, seed
        self._params = sampling_params(propose, 1)
        self._lock = threading.Lock()
        self._one_by_one: AbstractContextManager[object] = nullcontext() if proposer.remote else threading.Lock()
        self.calls = 0
        """Texts so far."""
        self.tokens = 0
        """Of these texts."""

    def ask(self, turns: Sequence[tuple[str, str]]) -> str:
        """A text of the proposer.

        Args:
            turns: (role, content) of the conversation. It is given as one turn of a user, of which a model with a short
                context gets the beginning.

        Raises:
            TrainingError: The proposer gave no answer.
        """
        text = "\n\n".join(content for _, content in turns)
        key = self._answers.question("proposer", json.dumps(turns))
        answer = self._answers.find(key)
        if answer is None:
            sent = self._proposer.encode(Prompt.from_text(text[:1] or " "), text)
            with self._one_by_one:
                ((completion,),) = self._proposer.respond(
                    self._engine, [sent], self._params, [derive_seed(self._seed, "proposer", key)]
                )
            if completion.error:
                raise TrainingError(f"the proposer: {completion.error}")
            answer = Answer(self._proposer.text(completion), len(completion.tokens))
            self._answers.add(key, answer)
        with self._lock:
            self.calls += 1
            self.tokens += answer.tokens
        return answer.text
