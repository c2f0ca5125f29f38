"""The embedded world: word tasks that a small target solves reliably only if they are asked in a canonical form.

A request consists of a task and an argument (a made-up word). The canonical form is ``reverse: stone``; people write
``can u flip the word stone pls``. The target first learns all phrasings. Then, from careless data, it learns to answer
canonical requests always correctly but casual ones only sometimes, less often the more clutter they have. So it knows the
tasks, and the wording determines how well it performs them.

All records are pure functions of a seed. One argument in five and one phrasing in five are held out from all training.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignpro.data import Prompt
from alignpro.demo.phrases import (
    CLOSERS,
    HELDOUT_CLOSERS,
    HELDOUT_OPENERS,
    HELDOUT_VERB_OPENERS,
    OPENERS,
    TASKS,
    VERB_OPENERS,
    Task,
    cores,
    stable_fraction,
)
from alignpro.errors import RewardError

VOWELS = "aeiou"
CONSONANTS = "bcdfghjklmnpqrstvwxyz"

ARGUMENT_HOLDOUT = 0.2
TYPO_RATE = 0.15
"""Share of requests with a typo in the SFT data."""
PROMPT_TYPO_RATE = 0.05
"""Share of requests with a typo among the prompts of reinforcement learning and evaluation."""
MAX_CHARACTERS = 40
"""Maximum length of a casual request with opener and closer, in characters; longer ones lose both."""

TASK_WEIGHTS: dict[Task, float] = {
    "reverse": 1.5,
    "sort": 2.5,
    "upper": 1.0,
    "consonants": 1.5,
    "first": 0.7,
    "last": 0.7,
    "length": 0.7,
}
"""Relative frequency of the tasks in the target's training data; harder tasks are more frequent."""
CANONICAL_SHARE = 0.4
"""Share of canonical requests in the target's training data."""
RIGHT_SHARE = (0.6, 0.5, 0.4, 0.3)
"""Share of correct answers to casual requests in the target's last stage, by amount of clutter."""

REWRITE_SHARES = {"verbatim": 0.25, "paraphrase": 0.3, "wrong_task": 0.2, "canonical": 0.25}
"""The kinds of rewrites that ρ_sft learns: mostly not the form that the target understands best."""

_SOLVERS: dict[Task, Callable[[str], str]] = {
    "reverse": lambda word: word[::-1],
    "sort": lambda word: "".join(sorted(word)),
    "upper": str.upper,
    "consonants": lambda word: "".join(letter for letter in word if letter not in VOWELS),
    "first": lambda word: word[0],
    "last": lambda word: word[-1],
    "length": lambda word: str(len(word)),
}


@dataclass(frozen=True)
class Request:
    """A casually worded request."""

    task: Task
    argument: str
    text: str
    clutter: int
    """How many of opener, closer and typo it has: 0 to 3."""
    phrasing: str
    """Its core: the key and the frame, without the argument."""

    @property
    def answer(self) -> str:
        """The correct answer."""
        return solve(self.task, self.argument)


def solve(task: Task, argument: str) -> str:
    """The correct answer: ``solve("reverse", "stone") == "enots"``."""
    return _SOLVERS[task](argument)


def canonical(task: Task, argument: str) -> str:
    """The form of a request that the target answers well: ``reverse: stone``."""
    return f"{task}: {argument}"


def is_heldout_argument(word: str) -> bool:
    """Whether ``word`` is held out from training, decided by a hash of its letters."""
    return stable_fraction(word) < ARGUMENT_HOLDOUT


def draw_argument(rng: random.Random, *, heldout: bool) -> str:
    """Draw a pronounceable made-up word of 4 to 6 letters, either for training or held out."""
    while True:
        length = rng.choice((4, 5, 6))
        vowel = rng.random() < 0.35
        word = ""
        while len(word) < length:
            word += rng.choice(VOWELS if vowel else CONSONANTS)
            # Occasionally two vowels or two consonants in a row ("steam"), never three.
            doubled = len(word) >= 2 and (word[-2] in VOWELS) == vowel
            vowel = vowel if not doubled and rng.random() < 0.2 else not vowel
        if is_heldout_argument(word) == heldout:
            return word


def draw_request(
    rng: random.Random, task: Task, argument: str, *, heldout: bool, typo_rate: float = TYPO_RATE
) -> Request:
    """Draw a casual request. A held-out one has a held-out core; its opener and closer may be held out or not."""
    core = rng.choice(cores(task, heldout))
    phrasing = core.frame.replace("{k}", core.key)
    words, typo = _with_typo(rng, phrasing, rate=typo_rate)
    text = words.replace("{a}", argument)
    openers = [*OPENERS, *(HELDOUT_OPENERS if heldout else ())]
    closers = [*CLOSERS, *(HELDOUT_CLOSERS if heldout else ())]
    if core.kind == "verb" and core.frame.startswith("{k}"):
        openers += [*VERB_OPENERS, *(HELDOUT_VERB_OPENERS if heldout else ())]
    opener = rng.choice(openers) if rng.random() < 0.5 else ""
    closer = rng.choice(closers) if rng.random() < 0.5 else ""
    if len(opener + text + closer) > MAX_CHARACTERS:
        opener, closer = "", ""
    return Request(task, argument, opener + text + closer, bool(opener) + bool(closer) + typo, phrasing)


def target_records(
    count: int, seed: int, *, careless: bool = True, canonical_share: float = CANONICAL_SHARE
) -> list[dict[str, Any]]:
    """The target's training data, ``{"prompt", "response"}``.

    Args:
        count: Number of records.
        seed: The records depend only on the seed and the settings below.
        canonical_share: Share of canonical requests.
        careless: False for the first stages, in which every request is answered correctly. True for the last stage, in
            which only the shares `RIGHT_SHARE` of casual requests are answered correctly; this makes the wording matter.
    """
    rng = random.Random(f"target/{careless}/{seed}")
    records = []
    for _ in range(count):
        task = rng.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()))[0]
        argument = draw_argument(rng, heldout=False)
        if rng.random() < canonical_share:
            records.append({"prompt": canonical(task, argument), "response": solve(task, argument)})
            continue
        request = draw_request(rng, task, argument, heldout=False)
        right = not careless or rng.random() < RIGHT_SHARE[request.clutter]
        records.append({"prompt": request.text, "response": request.answer if right else _misunderstand(rng, request)})
    return records


def prompter_records(count: int, seed: int, *, mixed: bool = True) -> list[dict[str, Any]]:
    """Pairs for the prompter's SFT, ``{"prompt", "rewrite"}``.

    Args:
        count: Number of records.
        seed: The records depend only on the seed and on ``mixed``.
        mixed: False for the first stage, which has only copies and canonical requests and teaches reading and copying.
            True for the second stage, the mixture of `REWRITE_SHARES`, which makes ρ_sft a poor prompter.
    """
    rng = random.Random(f"prompter/{mixed}/{seed}")
    mixture = REWRITE_SHARES if mixed else {"verbatim": 0.5, "canonical": 0.5}
    kinds, shares = list(mixture), list(mixture.values())
    records = []
    for _ in range(count):
        task, argument = rng.choice(TASKS), draw_argument(rng, heldout=False)
        request = draw_request(rng, task, argument, heldout=False)
        kind = rng.choices(kinds, shares)[0]
        if kind == "verbatim":
            rewrite = request.text
        elif kind == "paraphrase":
            rewrite = draw_request(rng, task, argument, heldout=False).text
        elif kind == "wrong_task":
            rewrite = canonical(_other_task(rng, task), argument)
        else:
            rewrite = canonical(task, argument)
        records.append({"prompt": request.text, "rewrite": rewrite})
    return records


def prompt_records(count: int, seed: int, *, heldout: bool) -> list[dict[str, Any]]:
    """Prompts for reinforcement learning or evaluation, ``{"prompt", "metadata"}``, all different.

    ``metadata`` holds ``answer``, ``task``, ``argument`` and ``phrasing``, by which requests cluster. Held-out prompts share
    neither arguments nor cores with training.
    """
    rng = random.Random(f"prompts/{'heldout' if heldout else 'train'}/{seed}")
    records: dict[str, dict[str, Any]] = {}
    while len(records) < count:
        task = TASKS[len(records) % len(TASKS)]
        argument = draw_argument(rng, heldout=heldout)
        request = draw_request(rng, task, argument, heldout=heldout, typo_rate=PROMPT_TYPO_RATE)
        metadata = {
            "answer": request.answer,
            "task": request.task,
            "argument": request.argument,
            "phrasing": request.phrasing,
        }
        records.setdefault(request.text, {"prompt": request.text, "metadata": metadata})
    return list(records.values())


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records as JSON Lines, which the project's commands read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_lines(records), encoding="utf-8")


def as_lines(records: Iterable[Mapping[str, Any]]) -> str:
    """Records as JSON Lines."""
    return "".join(json.dumps(record) + "\n" for record in records)


def reward(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """r*(x, y): 1 if the response is the correct answer to the ORIGINAL prompt, else 0.

    Raises:
        RewardError: A prompt has no ``answer`` in its metadata.
    """
    scores = []
    for prompt, response in zip(prompts, responses, strict=True):
        if "answer" not in prompt.metadata:
            raise RewardError(f"{prompt.source or prompt.id}: no `answer` in the prompt's metadata: map a column to it")
        scores.append(float(response.strip() == prompt.metadata["answer"]))
    return scores


def _misunderstand(rng: random.Random, request: Request) -> str:
    """A wrong response to a casual request: a question back, an echo, or the answer to another task."""
    kind = rng.random()
    if kind < 0.75:
        return rng.choice(("what?", "huh?"))
    if kind < 0.85:
        return request.argument
    return solve(_other_task(rng, request.task), request.argument)


def _other_task(rng: random.Random, task: Task) -> Task:
    return rng.choice([other for other in TASKS if other != task])


def _with_typo(rng: random.Random, frame: str, rate: float) -> tuple[str, bool]:
    """With probability ``rate``, drop a letter of a long word of the frame or swap two; placeholders are not changed."""
    words = frame.split(" ")
    long = [index for index, word in enumerate(words) if len(word) >= 5 and word.isalpha()]
    if not long or rng.random() >= rate:
        return frame, False
    index = rng.choice(long)
    word = words[index]
    at = rng.randrange(1, len(word) - 2)
    swapped = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    words[index] = word[:at] + word[at + 1 :] if rng.random() < 0.5 else swapped
    return " ".join(words), words[index] != word
