"""Windows of a document, and tier 1's features: words and pairs of neighbours, each with a weight for every head."""

import itertools
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

WINDOW_WORDS = 200  # of a window; the labelled passages have 100 to 250 and are one window each
WINDOW_CHARACTERS = 2400  # at most, so that text without spaces has windows too
PARTS = 3  # of a window, for the arc
TOKEN = re.compile(r"[a-z]+(?:'[a-z]+)?|[0-9]|[!?.\"]")
SPACE = re.compile(r"\s")
MIN_DOCUMENTS = 3  # in which a word or pair stands in the labelled passages, or it has no weight


def windows(text: str) -> list[tuple[int, int]]:
    """Consecutive windows of about `WINDOW_WORDS` words that cover the text, as (start, end) characters."""
    count = max(1, round(len(text.split()) / WINDOW_WORDS), -(-len(text) // WINDOW_CHARACTERS))
    return cut(text, 0, len(text), count)


def cut(text: str, start: int, end: int, count: int) -> list[tuple[int, int]]:
    """`count` parts of like length of text[start:end], cut before a space where one is near; a part may be empty."""
    edges = [start]
    for part in range(1, count):
        aim = max(edges[-1], start + (end - start) * part // count)
        space = SPACE.search(text, aim, min(end, aim + 100))
        edges.append(space.start() if space else aim)
    edges.append(end)
    return list(itertools.pairwise(edges))


def tokens(text: str) -> list[str]:
    """Lower-case words, digits one by one, and the marks . ! ? and the double quote."""
    return TOKEN.findall(text.lower().replace("\u2019", "'"))


class Vocabulary(NamedTuple):
    """Words, and pairs of neighbouring words as sorted keys `first * (len(words) + 1) + second`.

    Feature i is word i, then pair i - len(words), then the empty feature of whatever is unknown.
    """

    words: dict[str, int]
    pairs: np.ndarray  # int64

    @property
    def size(self) -> int:
        """Number of features, the empty one counted."""
        return len(self.words) + len(self.pairs) + 1

    def features(self, text: str) -> np.ndarray:
        """Feature numbers of the words of a text and then of its pairs, int64 [2 * words - 1] or [0]."""
        unknown = len(self.words)
        get = self.words.get
        single = np.array([get(token, unknown) for token in tokens(text)], np.int64)
        key = single[:-1] * (unknown + 1) + single[1:]
        at = np.searchsorted(self.pairs, key)
        known = self.pairs[np.minimum(at, len(self.pairs) - 1)] == key if len(self.pairs) else np.zeros(len(key), bool)
        empty = self.size - 1
        return np.concatenate([np.where(single == unknown, empty, single), np.where(known, unknown + at, empty)])


def build(texts: list[str]) -> tuple[Vocabulary, np.ndarray]:
    """The words and pairs that stand in `MIN_DOCUMENTS` of the texts or more, and their idf, float32 [features].

    idf is log(texts / texts that have the feature); 0 for the empty feature.
    """
    lists = [tokens(text) for text in texts]
    single = Counter(word for words in lists for word in set(words))
    kept = sorted(word for word, count in single.items() if count >= MIN_DOCUMENTS)
    index = {word: row for row, word in enumerate(kept)}
    double = Counter(pair for words in lists for pair in set(itertools.pairwise(words)))
    keys = {
        index[a] * (len(kept) + 1) + index[b]: count
        for (a, b), count in double.items()
        if count >= MIN_DOCUMENTS and a in index and b in index
    }
    pairs = np.array(sorted(keys), np.int64)
    counts = np.array([single[word] for word in kept] + [keys[key] for key in pairs.tolist()], float)
    idf = np.append(np.log(len(texts) / counts), 0) if len(counts) else np.zeros(1)
    return Vocabulary(index, pairs), idf.astype(np.float32)


def matrix(vocabulary: Vocabulary, idf: np.ndarray, texts: list[str]) -> np.ndarray:
    """Feature counts times idf over the root of the summed squared idf of all tokens, float32 [texts, features].

    Linear in the counts but for that root, so that a text's score is a sum over its tokens.
    """
    result = np.zeros((len(texts), vocabulary.size), np.float32)
    for row, text in enumerate(texts):
        rows = np.concatenate([vocabulary.features(text[a:b]) for a, b in cut(text, 0, len(text), PARTS)])
        np.add.at(result[row], rows, idf[rows])
        result[row] /= max(float(np.sqrt((idf[rows].astype(float) ** 2).sum())), 1e-9)
    return result


def sums(vocabulary: Vocabulary, table: np.ndarray, text: str, spans: list[tuple[int, int]]) -> np.ndarray:
    """Sums of the rows of `table` [features, columns] over the tokens of every third of every window of a text.

    Returns:
        float32 [windows, PARTS, columns].
    """
    result = np.zeros((len(spans) * PARTS, table.shape[1]), np.float32)
    parts = [part for start, end in spans for part in cut(text, start, end, PARTS)]
    for row, (start, end) in enumerate(parts):
        result[row] = table[vocabulary.features(text[start:end])].sum(0)
    return result.reshape(len(spans), PARTS, -1)
