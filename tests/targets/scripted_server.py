"""A connection without a server: answers follow from a function, at once or when they are released."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from alignpro.endpoints.types import Answer, Query
from alignpro.targets.connection import AskedSoFar

Reply = Callable[[Query], list[Answer] | Exception]


def shout(query: Query) -> list[Answer]:
    """Answer with the last turn in capitals, and the draw."""
    return [Answer(f" {query.messages[-1][1].upper()} {draw % 7}\n", "stop") for draw in query.draws]


@dataclass
class ScriptedConnection:
    """Answers with ``reply``; keeps what was asked."""

    reply: Reply = shout
    queries: list[Query] = field(default_factory=list)
    watch: Callable[[], None] = lambda: None
    """Called at each query."""

    def submit(self, query: Query) -> Future[list[Answer]]:
        self.watch()
        self.queries.append(query)
        future: Future[list[Answer]] = Future()
        answers = self.reply(query)
        if isinstance(answers, Exception):
            future.set_exception(answers)
        else:
            future.set_result(answers)
        return future

    def asked(self) -> AskedSoFar:
        return AskedSoFar(requests=len(self.queries), tokens=10 * len(self.queries), usd=0.5 * len(self.queries))

    def describe_most(self, queries: Sequence[Query]) -> str:
        return f"{len(queries)} requests"
