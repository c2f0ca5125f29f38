"""The phrasings of requests in the embedded world: keys, frames around them, openers and closers.

A request is ``opener + core + closer``; a core is a key inserted in a frame of its kind (``flip`` in ``take {a} and {k}
it``). One core in five is held out as a combination: its key and its frame occur in training, but never together. Some
openers and closers are held out as strings.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import Literal

Kind = Literal["verb", "state", "noun"]
Task = Literal["reverse", "sort", "upper", "consonants", "first", "last", "length"]

FRAMES: dict[Kind, tuple[str, ...]] = {
    "verb": (
        "{k} {a}",
        "{k} the word {a}",
        "{k} this: {a}",
        "{k} {a} for me",
        "{a}, {k} it",
        "take {a} and {k} it",
        "i want to {k} {a}",
        "{a}. {k} that",
    ),
    "state": (
        "{a} {k}",
        "{a} but {k}",
        "write {a} {k}",
        "say {a} {k}",
        "make {a} {k}",
        "i want {a} {k}",
        "how is {a} {k}",
        "give me {a} {k}",
    ),
    "noun": (
        "{k} of {a}",
        "the {k} of {a}",
        "what is the {k} of {a}",
        "whats the {k} in {a}",
        "{a}: {k}",
        "tell me the {k} of {a}",
        "in {a}, the {k}",
        "give me the {k} of {a}",
    ),
}
"""Frames by the kind of key they take; ``{a}`` is the argument and ``{k}`` the key."""

KEYS: dict[Task, dict[Kind, tuple[str, ...]]] = {
    "reverse": {"verb": ("flip", "reverse", "turn around", "mirror"), "state": ("backwards", "reversed", "flipped")},
    "sort": {"verb": ("sort", "alphabetize", "reorder"), "state": ("sorted", "in abc order", "alphabetically")},
    "upper": {"verb": ("capitalize", "uppercase", "shout"), "state": ("in caps", "in capitals", "in big letters")},
    "consonants": {
        "verb": ("de-vowel", "unvowel"),
        "state": ("without vowels", "minus the vowels", "with no vowels"),
        "noun": ("consonants",),
    },
    "first": {"noun": ("first letter", "initial", "starting letter", "1st char")},
    "last": {"noun": ("last letter", "final letter", "ending letter", "last char")},
    "length": {"verb": ("count", "measure"), "noun": ("length", "size", "letter count", "number of letters")},
}
"""Words that name a task, by task and kind."""

TASKS: tuple[Task, ...] = tuple(KEYS)

# fmt: off
OPENERS = (
    "hey ", "yo ", "pls ", "ok so ", "um ", "hi, ", "quick: ", "hmm, ", "so ", "dude ", "please ", "help! ", "ok ",
    "eh ", "uh, ", "yes, ", "hey there, ", "sup, ", "ah ", "well, ", "ok now ", "now ", "and ", "also ", "next: ",
    "sorry, ", "btw ", "fyi ", "look, ", "listen, ", "hola ", "q: ", "right, ", "man ", "oh ", "just ",
    "come on, ", "aw ",
)
CLOSERS = (
    " pls", " thx", "??", " please", "!", " ok?", " asap", " lol", "?", " now", " thanks", " :)", ".", " !!",
    " thank you", " k", " xx", " haha", " man", " ok", " right?", " if u can", " yeah", " ;)", " dude", " mate",
    "?!", " pretty pls", " quick", " today", " again", " tyvm", " hm", " :d",
)
# fmt: on
VERB_OPENERS = (
    "can u ",
    "could you ",
    "can you pls ",
    "u should ",
    "will you ",
    "can someone ",
    "lets ",
    "i need u to ",
)
HELDOUT_OPENERS = ("oi ", "hello ", "er, ", "psst ")
HELDOUT_CLOSERS = (" ta", "...", " cheers", " bro")
HELDOUT_VERB_OPENERS = ("would u ", "pls can u ")


@dataclass(frozen=True)
class Core:
    """A key in a frame: the part of a request that states the task."""

    task: Task
    kind: Kind
    key: str
    frame: str

    @property
    def heldout(self) -> bool:
        """Whether the combination is held out from training, decided by a hash of its text."""
        return stable_fraction(f"{self.task}/{self.key}/{self.frame}") < 0.2

    def fill(self, argument: str) -> str:
        """The core's text with the argument inserted."""
        return self.frame.format(k=self.key, a=argument)


def stable_fraction(text: str) -> float:
    """A number in [0, 1) that depends only on ``text`` and is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


@cache
def cores(task: Task, heldout: bool) -> tuple[Core, ...]:
    """The cores that ask for ``task``, either for training or held out."""
    kinds = KEYS[task].items()
    every = (Core(task, kind, key, frame) for kind, keys in kinds for key in keys for frame in FRAMES[kind])
    return tuple(core for core in every if core.heldout == heldout)
