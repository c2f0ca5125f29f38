"""A JSON server as a reward: a sample or a batch is put into the body that it expects, and its answer holds the scores."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from alignpro.config import HTTPRewardConfig
from alignpro.data import Prompt
from alignpro.errors import ConfigError, RewardError
from alignpro.rewards.component import ConcurrentReward, Measurement, describe_prompt, server_errors_named
from alignpro.rewards.json_mapping import BodyTemplate, Sample, ScorePath
from alignpro.rewards.servers import Server, Session, gather


class JSONMapping:
    """What is sent to a server, and where its scores are, without anybody to ask: enough to check the configuration and the data.

    Raises:
        ConfigError: The body or the path cannot be used.
    """

    def __init__(self, config: HTTPRewardConfig) -> None:
        self.name = config.name or "http"
        self.what = f"reward {self.name!r}"
        batched = config.batch_size is not None
        self.body = BodyTemplate(config.body, batched=batched, what=self.what)
        self.score = ScorePath(config.score, batched=batched, abstains=config.on_error == "abstain")

    @property
    def needs_columns(self) -> bool:
        """Whether the body takes columns of the data."""
        return bool(self.body.columns)

    def check_columns(self, prompts: Sequence[Prompt]) -> None:
        """Check that the data have the columns that the body takes, and that the first prompt fits in it.

        Raises:
            ConfigError: No prompt has one of them.
            RewardError: The metadata of the first prompt cannot be written as JSON.
        """
        columns = dict.fromkeys(name for prompt in prompts for name in prompt.metadata)
        if prompts and (absent := [name for name in self.body.columns if name not in columns]):
            raise ConfigError(
                f"{self.what}: body: $metadata.{absent[0]} is no column of the data (columns: "
                f"{', '.join(columns) or 'none'}); map one with data.columns.metadata.{absent[0]}"
            )
        for prompt in prompts[:1]:
            self.write([Sample(prompt, "a response", "a rewrite")])

    def write(self, samples: Sequence[Sample]) -> str:
        """The canonical JSON of a request: equal samples have equal ones."""
        return json.dumps(
            self.body.fill(samples), ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")
        )


class HTTPReward(ConcurrentReward):
    """Reward component: the score that a JSON server gives.

    Args:
        config: The server and the mapping.
        session: Connects to it.

    Raises:
        ConfigError: The body or the path cannot be used.
        EndpointError: The server cannot be used as configured.
    """

    def __init__(self, config: HTTPRewardConfig, session: Session) -> None:
        self._mapping = JSONMapping(config)
        self.name = self._mapping.name
        self._what = f"{self._mapping.what}, {config.server.url}"
        self._batch_size = config.batch_size or 1
        self.by_row = config.batch_size is None  # what is in a batch must not depend on the order of responses
        self._abstains = config.on_error == "abstain"
        endpoint, path = config.server.endpoint()
        with server_errors_named(self._mapping.what):
            self._server: Server = session.endpoint(endpoint, path)

    def scorable(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """All prompts; see `JSONMapping.check_columns`."""
        self._mapping.check_columns(prompts)
        return list(prompts)

    async def measure(
        self, prompts: Sequence[Prompt], responses: Sequence[str], rewrites: Sequence[str] | None
    ) -> Measurement:
        """Score (N,) responses; a sample that occurs repeatedly is sent once.

        Raises:
            RewardError: The server refuses a text, or gives no finite score, and the component may not abstain; or its answer
                has no score at its place.
        """
        rewritten: Sequence[str | None] = rewrites if rewrites is not None else [None] * len(prompts)
        samples = [Sample(*row) for row in zip(prompts, responses, rewritten, strict=True)]
        keys = [self._mapping.write([sample]) for sample in samples]
        distinct = dict(zip(keys, samples, strict=True))
        order = list(distinct.values())
        batches = [order[start : start + self._batch_size] for start in range(0, len(order), self._batch_size)]
        scores = [score for batch in await gather(map(self._ask, batches)) for score in batch]
        by_key = dict(zip(distinct, scores, strict=True))
        return Measurement([by_key[key] for key in keys])

    def preflight(self, prompts: Sequence[Prompt]) -> None:
        """Check that the server answers with a score; takes one request, about a response to the first prompt.

        Raises:
            EndpointError: It cannot be asked.
            BudgetError: The request could exceed the budget.
            RewardError: Its answer holds no score.
        """
        with server_errors_named(self._mapping.what):
            for prompt in prompts[:1]:
                asyncio.run(self._ask([Sample(prompt, "a response", "a rewrite")]))

    async def _ask(self, samples: Sequence[Sample]) -> list[float | None]:
        read = partial(self._mapping.score.read, samples=samples, what=self._what)
        answer = await asyncio.wrap_future(self._server.post(self._mapping.write(samples), read))
        if answer.finish_reason != "stop" and self._abstains:
            return [None] * len(samples)
        if answer.finish_reason != "stop":
            why = "its content filter" if answer.finish_reason == "filtered" else "its length"
            raise RewardError(
                f"{self._what}: the server refused a text for {why}; set on_error: abstain to leave such responses out\n"
                f"  for {describe_prompt(samples[0].prompt)}"
            )
        parsed: Any = json.loads(answer.text)
        return read(parsed)
