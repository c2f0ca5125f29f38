"""Questions that several threads ask at the same time, answered in one batch.

An optimiser evaluates an instruction on many prompts, with a thread for each. A model of this process runs one batch at a time,
and a batch of 32 takes little longer than one prompt: so the first thread waits a moment for the others and asks for all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

QuestionT = TypeVar("QuestionT")


class Gathering(Generic[QuestionT]):
    """Hands questions to a function in batches, one batch at a time.

    Args:
        answer: Answers a batch in one of the threads that ask; it must not raise, but tell each question what went wrong.
        pause: Seconds without a new question after which a batch is complete.
    """

    def __init__(self, answer: Callable[[Sequence[QuestionT]], None], pause: float = 0.02) -> None:
        self._answer, self._pause = answer, pause
        self._lock, self._turn = threading.Lock(), threading.Lock()
        self._waiting: list[QuestionT] = []

    def ask(self, question: QuestionT) -> None:
        """Return when a question has been answered, by this thread or by another."""
        with self._lock:
            self._waiting.append(question)
        with self._turn:
            seen = 0
            while len(waiting := self._copy()) > seen:
                if all(each is not question for each in waiting):
                    return  # another thread had it in its batch
                seen = len(waiting)
                time.sleep(self._pause)
            with self._lock:
                batch, self._waiting = self._waiting, []
            self._answer(batch)

    def _copy(self) -> list[QuestionT]:
        with self._lock:
            return list(self._waiting)
