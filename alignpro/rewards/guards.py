"""Drift guards: measures of how far a rewrite x' has drifted from the prompt x, row by row.

Each is always reported as a metric; if configured, values outside [low, high] are penalised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from alignpro.config import GuardConfig
from alignpro.data import Prompt
from alignpro.rewards.component import Measurement, checked_values, guarded_call
from alignpro.rewards.embedding import EmbeddingSimilarity
from alignpro.rewards.kept import code_kept, names_kept, numbers_kept
from alignpro.rewards.words import words

Measure = Callable[[Sequence[str], Sequence[str]], list[float]]
"""(originals (N,), rewrites (N,)) -> (N,)."""

NGRAM = 3
"""Number of consecutive words that count as copied: texts on the same subject share words and pairs, but rarely triples."""

LANGUAGE_CONFIDENCE = 0.8
LANGUAGE_MIN_BYTES = 20
"""Below either threshold, the detected language is a guess: it is random for single words, code and names."""


class Guard:
    """A configured guard."""

    def __init__(self, config: GuardConfig) -> None:
        self.name = f"guard/{config.kind}"
        self._config = config
        self._measure = _measure(config)

    def __call__(self, prompts: Sequence[Prompt], rewrites: Sequence[str]) -> Measurement:
        """Compute the penalties (N,), ≥ 0; the measure itself is reported as the metric of the guard's name.

        Raises:
            RewardError: The guard raised or returned something that is not a number; the message names it and the prompt.
        """
        measured = self.measure(prompts, rewrites)
        penalties = [self._config.penalty * self._excess(value) for value in measured]
        metrics = {self.name: measured}
        if self._config.penalty > 0:
            metrics[f"{self.name}/penalty"] = penalties
        return Measurement([*penalties], metrics)

    def measure(self, prompts: Sequence[Prompt], rewrites: Sequence[str]) -> list[float]:
        """Compute the measures (N,).

        Raises:
            RewardError: As for calling it.
        """
        called = guarded_call(
            self.name, prompts, lambda: Measurement([*self._measure([prompt.text for prompt in prompts], rewrites)])
        )
        return checked_values(self.name, prompts, called.values)

    def allows(self, value: float) -> bool:
        """Whether a measure is within [low, high]."""
        return self._excess(value) == 0

    def _excess(self, value: float) -> float:
        """Distance from [low, high]."""
        low, high = self._config.low, self._config.high
        below = low - value if low is not None else 0.0
        above = value - high if high is not None else 0.0
        return max(below, above, 0.0)


def length_ratio(originals: Sequence[str], rewrites: Sequence[str]) -> list[float]:
    """Ratio of the rewrite's number of characters to the original's (at least 1), without surrounding white space."""
    return [len(x2.strip()) / max(1, len(x.strip())) for x, x2 in zip(originals, rewrites, strict=True)]


def copy_rate(originals: Sequence[str], rewrites: Sequence[str]) -> list[float]:
    """Share of the rewrite's word n-grams that occur in the original, in [0, 1]; 1 is a verbatim excerpt.

    Case, punctuation and the encoding of accents are ignored. n is `NGRAM`, or the number of words of the shorter text if
    that is less. A rewrite without words has a copy rate of 0.
    """
    return [_copied(words(x), words(x2)) for x, x2 in zip(originals, rewrites, strict=True)]


LANGUAGES_KEPT = 256
"""Number of texts whose language is remembered."""


class LanguageChange:
    """1.0 if the languages of both texts are detected with confidence (by py3langid) and differ, else 0.0.

    A detection is confident if the text has at least `LANGUAGE_MIN_BYTES` bytes of UTF-8 and the language a probability of
    at least `LANGUAGE_CONFIDENCE`. So empty and very short texts, code and names never count as a change.
    """

    def __init__(self) -> None:
        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        # A prompt has several rewrites, of which some are the prompt itself; a detection takes half a millisecond.
        self._language = lru_cache(LANGUAGES_KEPT)(self._detected)

    def __call__(self, originals: Sequence[str], rewrites: Sequence[str]) -> list[float]:
        changed = []
        for x, x2 in zip(originals, rewrites, strict=True):
            before, after = self._language(x), self._language(x2)
            changed.append(float(before is not None and after is not None and before != after))
        return changed

    def _detected(self, text: str) -> str | None:
        stripped = text.strip()
        if len(stripped.encode("utf-8", "surrogatepass")) < LANGUAGE_MIN_BYTES:
            return None
        language, confidence = self._identifier.classify(stripped)
        return str(language) if confidence >= LANGUAGE_CONFIDENCE else None


def _measure(config: GuardConfig) -> Measure:
    if config.kind == "embedding_similarity":
        assert config.model is not None  # the configuration checks it
        return EmbeddingSimilarity(config.model)
    if config.kind == "language_change":
        return LanguageChange()
    return _MEASURES[config.kind]


def _copied(original: list[str], rewrite: list[str]) -> float:
    n = min(NGRAM, len(original), len(rewrite))
    if n == 0:
        return 0.0
    seen = set(_ngrams(original, n))
    grams = _ngrams(rewrite, n)
    return sum(gram in seen for gram in grams) / len(grams)


def _ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


_MEASURES: dict[str, Measure] = {
    "length_ratio": length_ratio,
    "copy_rate": copy_rate,
    "numbers_kept": numbers_kept,
    "names_kept": names_kept,
    "code_kept": code_kept,
}
