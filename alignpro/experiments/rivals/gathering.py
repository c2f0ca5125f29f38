"""Questions that several threads ask at the same time, answered in one batch.

An optimiser evaluates an instruction on many prompts, with a thread for each. A model of this process runs one batch at a time,
and a batch of 32 takes little longer than one prompt: so the first thread waits for the others and asks for all. How many come is
announced, since what is counted must not depend on how fast the threads are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

QuestionT = TypeVar("QuestionT")


class Gathering(Generic[QuestionT]):
    """Hands questions to a function in batches, one batch at a time.

    Args:
        answer: Answers a batch in one of the threads that ask; it must not raise, but tell each question what went wrong.
        pause: Seconds without a new question after which a batch is complete, if nothing was announced.
        patience: Likewise while announced questions are missing: a thread that failed asks nothing.
    """

    def __init__(
        self, answer: Callable[[Sequence[QuestionT]], None], pause: float = 0.02, patience: float = 10.0
    ) -> None:
        self._answer, self._pause, self._patience = answer, pause, patience
        self._arrived, self._turn = threading.Condition(), threading.Lock()
        self._waiting: list[QuestionT] = []
        self._announced = 0

    def announce(self, count: int) -> None:
        """Say that so many questions will come at the same time, each in a thread of its own."""
        with self._arrived:
            self._announced = count

    def ask(self, question: QuestionT) -> None:
        """Return when a question has been answered, by this thread or by another."""
        with self._arrived:
            self._waiting.append(question)
            self._arrived.notify_all()
        with self._turn:
            with self._arrived:
                if all(each is not question for each in self._waiting):
                    return  # another thread had it in its batch
                self._wait_for_others()
                batch, self._waiting = self._waiting, []
                self._announced = max(0, self._announced - len(batch))
            self._answer(batch)

    def _wait_for_others(self) -> None:
        """Wait until all that were announced are there, or no further question has come for a while."""
        known = 0
        while len(self._waiting) > known and not 0 < self._announced <= len(self._waiting):
            known = len(self._waiting)
            self._arrived.wait(self._patience if self._announced else self._pause)
