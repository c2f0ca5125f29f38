"""BM25: how similar texts are to a query, by the words that they share.

    score(q, d) = Σ_t∈q idf(t) · f(t, d) (k₁ + 1) / (f(t, d) + k₁ (1 − b + b |d| / mean |d|))
    idf(t)      = log(1 + (N − n(t) + ½) / (n(t) + ½))

f(t, d) counts a term in a document, |d| its terms, n(t) the documents of N that have it (Robertson and Zaragoza, The
Probabilistic Relevance Framework, 2009, equation 3.15; this idf is never negative). A term counts once in a query.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

K1 = 1.2
"""How soon further occurrences of a term count for less."""
B = 0.75
"""How far long documents are discounted: 0 is not at all."""

_WITHOUT_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese letters: there are no spaces between words, so each letter is a term."""
_TERM = re.compile(rf"[{_WITHOUT_SPACES}]|[^\W_{_WITHOUT_SPACES}]+")


def terms(text: str) -> list[str]:
    """The words of a text, in lower case, in their order."""
    return _TERM.findall(text.casefold())


class BM25:
    """An index of documents.

    Args:
        documents: The terms of each.
    """

    def __init__(self, documents: Sequence[Sequence[str]]) -> None:
        counts = [Counter(document) for document in documents]
        frequency = Counter(term for count in counts for term in count)
        mean = sum(map(len, documents)) / len(documents) if documents else 0.0
        self._weights: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for index, count in enumerate(counts):
            length = K1 * (1 - B + B * len(documents[index]) / mean) if mean else 0.0
            for term, times in count.items():
                idf = math.log(1 + (len(documents) - frequency[term] + 0.5) / (frequency[term] + 0.5))
                self._weights[term].append((index, idf * times * (K1 + 1) / (times + length)))

    def scores(self, query: Sequence[str]) -> dict[int, float]:
        """Index → score, of the documents that share a term with the query.

        Sums run in the order of the query's terms, so that equal inputs give equal bits.
        """
        found: dict[int, float] = {}
        for term in dict.fromkeys(query):
            for index, weight in self._weights.get(term, ()):
                found[index] = found.get(index, 0.0) + weight
        return found
