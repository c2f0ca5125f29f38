"""The answers of a search in a file, in the order in which they came: a search that is repeated asks nothing twice."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from alignpro.errors import TrainingError
from alignpro.training.durability import replace_text

logger = logging.getLogger(__name__)

FILE_NAME = "answers.jsonl"


@dataclass(frozen=True)
class Answer:
    """A text of the target or of the proposer."""

    text: str
    tokens: int
    """That were generated; 0 if it is not known."""
    value: float | None = None
    """Its reward with the penalties of guards, which training maximises; of a response to a prompt as it is, 1 if that refuses,
    else 0; None of the proposer."""


class AnswerFile:
    """Answers by question, in memory and in a file that grows by a line with each.

    A question is asked again when a search is repeated after an interruption: it is answered from the file. The same question
    asked several times in one search is several questions.

    Args:
        path: The file; what is in it is read.
        fingerprint: Of all that answers depend on.

    Raises:
        TrainingError: The file is of a search with another fingerprint, or cannot be written.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, Answer] = {}
        self._times: dict[str, int] = {}
        self._before = 0.0
        self._started = time.monotonic()
        # The last line may be cut off.
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.is_file() else []
        if lines and _object(lines[0]) != {"fingerprint": fingerprint}:
            raise TrainingError(f"{path}: is of a search with another configuration: name another `out`, or remove it")
        kept = lines[:1]
        for line in lines[1:]:
            if self._read(_object(line)):
                kept.append(line)
        if len(kept) < len(lines):
            logger.warning(
                "%s: %d of %d answers cannot be read, and are asked for again",
                path,
                len(lines) - len(kept),
                len(lines) - 1,
            )
        try:
            whole = "".join(f"{line}\n" for line in kept) or json.dumps({"fingerprint": fingerprint}) + "\n"
            replace_text(path, whole)
            self._file: IO[str] = path.open("a", encoding="utf-8")
        except OSError as error:
            raise TrainingError(f"{path}: cannot be written: {error}") from error

    def _read(self, row: dict[str, Any]) -> bool:
        """Take an answer from the file; False if the line is damaged, such as by a power cut."""
        try:
            key, seconds = row.pop("key"), float(row.pop("seconds"))
            self._known[key] = Answer(**row)
        except (KeyError, TypeError, ValueError):
            return False
        self._before = seconds
        return True

    @property
    def seconds(self) -> float:
        """How long the search has taken, its earlier parts up to their last answers included."""
        return self._before + time.monotonic() - self._started

    def question(self, *parts: str) -> str:
        """The key of a question, which counts how often it has been asked."""
        digest = hashlib.sha256("\x00".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:24]
        with self._lock:
            times = self._times[digest] = self._times.get(digest, 0) + 1
        return f"{digest}/{times}"

    def find(self, key: str) -> Answer | None:
        """The answer to a question; None if the file has none."""
        return self._known.get(key)

    def add(self, key: str, answer: Answer) -> None:
        """Keep an answer."""
        with self._lock:
            self._known[key] = answer
            self._file.write(json.dumps({"key": key, **asdict(answer), "seconds": self.seconds}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _object(line: str) -> dict[str, Any]:
    """The JSON object in a line; empty if there is none."""
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
