"""What a model has to beat: general compressors, and an n-gram model of bytes trained on the same text.

gzip and xz see nothing but the held-out text itself. The n-gram model is interpolated modified Kneser–Ney of order 8
over bytes: a probability for each of the 256 next bytes given the seven before, which sums to one. Contexts are
integers in sorted arrays, so that a few megabytes are counted in seconds.

    model = ByteNgram.train(text for text in training_texts)
    bits_per_document = [model.bits(text).sum() for text in heldout_texts]
"""

import gzip
import lzma
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

ORDER = 8  # the longest n-gram in bytes; eight fit into one uint64
DISTINCT_COUNTS = 3  # modified Kneser–Ney discounts counts of 1, 2 and 3-or-more differently


def gzip_bits(data: bytes) -> int:
    """The size under `gzip -9`, in bits."""
    return 8 * len(gzip.compress(data, compresslevel=9, mtime=0))


def xz_bits(data: bytes) -> int:
    """The size under `xz -9`, in bits."""
    return 8 * len(lzma.compress(data, preset=9))


@dataclass(frozen=True, slots=True)
class _Level:
    """The n-grams of one length n: each context's and each n-gram's counts, looked up in sorted arrays.

    An n-gram of bytes b1…bn is the integer with b1 highest; its context is the integer of b1…b(n−1).
    """

    grams: np.ndarray
    gram_counts: np.ndarray
    contexts: np.ndarray
    context_counts: np.ndarray
    context_discounts: np.ndarray  # how much was taken from the context's n-grams together
    discounts: np.ndarray  # by count 0, 1, 2, 3-or-more

    @classmethod
    def count(cls, grams: np.ndarray, counts: np.ndarray) -> "_Level":
        """From sorted distinct n-grams and their counts."""
        of_gram = grams >> np.uint64(8)
        starts = np.flatnonzero(np.concatenate([[True], of_gram[1:] != of_gram[:-1]]))
        discounts = kneser_ney_discounts(counts)
        taken = discounts[np.minimum(counts, DISTINCT_COUNTS)]
        return cls(grams, counts, of_gram[starts], np.add.reduceat(counts, starts), np.add.reduceat(taken, starts),
                   discounts)

    def interpolate(self, grams: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """Probabilities of n-grams' last bytes, given those under the shorter contexts."""
        counts = _look_up(self.grams, self.gram_counts, grams)
        contexts = grams >> np.uint64(8)
        totals = _look_up(self.contexts, self.context_counts, contexts)
        taken = _look_up(self.contexts, self.context_discounts, contexts)
        left = counts - self.discounts[np.minimum(counts, DISTINCT_COUNTS)]
        return np.where(totals > 0, (left + taken * shorter) / np.maximum(totals, 1), shorter)


@dataclass(frozen=True, slots=True)
class ByteNgram:
    """An interpolated modified Kneser–Ney model of bytes; documents begin after a context of zero bytes."""

    levels: tuple[_Level, ...]  # for n = 1, 2, …

    @classmethod
    def train(cls, texts: Iterable[bytes], order: int = ORDER) -> "ByteNgram":
        """Counts every document on its own; nothing runs across their borders."""
        assert 1 <= order <= ORDER, "an n-gram has to fit into 64 bits"
        parts = [_grams(text, order) for text in texts if text]
        assert parts, "an n-gram model needs a text"
        grams, counts = np.unique(np.concatenate(parts), return_counts=True)
        levels = [_Level.count(grams, counts)]
        for length in range(order - 1, 0, -1):
            # a shorter n-gram counts once for every byte that was ever seen before it
            grams, counts = np.unique(grams & _mask(length), return_counts=True)
            levels.append(_Level.count(grams, counts))
        return cls(tuple(reversed(levels)))

    def probabilities(self, text: bytes) -> np.ndarray:
        """float64 [bytes]: each byte's probability given the ones before it."""
        grams = _grams(text, len(self.levels))
        probabilities = np.full(len(grams), 1 / 256)
        for length, level in enumerate(self.levels, 1):
            probabilities = level.interpolate(grams & _mask(length), probabilities)
        return probabilities

    def distribution(self, context: bytes) -> np.ndarray:
        """float64 [256]: the probabilities of all bytes that may follow a beginning of a document."""
        return np.array([self.probabilities(context + bytes([byte]))[-1] for byte in range(256)])

    def bits(self, text: bytes) -> np.ndarray:
        """float64 [bytes]: −log₂ of each byte's probability; their sum is that of a whole document's."""
        return -np.log2(self.probabilities(text))


def kneser_ney_discounts(counts: np.ndarray) -> np.ndarray:
    """float64 [4]: what is taken from a count of 0, 1, 2, 3-or-more, as Chen and Goodman estimate it."""
    ones, twos, threes, fours = (int(np.count_nonzero(counts == count)) for count in (1, 2, 3, 4))
    base = ones / max(ones + 2 * twos, 1)
    estimates = [0.0] + [count - (count + 1) * base * more / max(same, 1)
                         for count, same, more in ((1, ones, twos), (2, twos, threes), (3, threes, fours))]
    # something must stay for unseen bytes, and no count may become negative
    return np.clip(estimates, [0.0, 0.05, 0.05, 0.05], [0.0, 1.0, 2.0, 3.0])


def _grams(text: bytes, order: int) -> np.ndarray:
    """uint64 [bytes]: the n-gram that ends at each byte."""
    padded = np.frombuffer(bytes(order - 1) + text, np.uint8).astype(np.uint64)
    grams = np.zeros(len(text), np.uint64)
    for offset in range(order):
        grams = (grams << np.uint64(8)) | padded[offset:offset + len(text)]
    return grams


def _mask(length: int) -> np.uint64:
    """Keeps the last `length` bytes of an n-gram."""
    return np.uint64((1 << (8 * length)) - 1)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 where it is not among the sorted keys."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
