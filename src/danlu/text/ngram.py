"""A small language model that tells prose from noise: n-grams of characters, trained on good text, asked for perplexity.

Probabilities are interpolated Witten–Bell (Chen and Goodman, An Empirical Study of Smoothing Techniques for Language
Modeling, 1998, section 2.5): p(c | h) = (count(hc) + distinct(h)·p(c | h′)) / (count(h) + distinct(h)), where h′ is h
without its first character, and below one character 1/V. The perplexity of a text is 2 to the mean of −log₂ p over its
characters (as CCNet filters by: Wenzek et al., arXiv:1911.00359, with a model of words).

N-grams of three characters and more count from the second time on, which takes most of them away and moves the perplexity
of good and of bad texts alike. Four characters of 16 bits are one number of 64, so an n-gram is known exactly, its context
is the number without the last 16 bits, and counting is sorting. Characters above 16 bits (emoji, rare Han) are taken for
one. p of every n-gram that was seen is computed in training; where one was not, p(c | h) is p(c | h′) times
distinct(h) / (count(h) + distinct(h)).

    model = CharNgram.train(good_texts)
    model.perplexity("The lamp had to be lit.")       # small; a table of numbers, a wrong encoding: large
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from danlu.core.config import Config, FieldPath
from danlu.text.characters import codes_of, mix64

ORDER = 4
NUM_CHARACTERS = 0x10000  # what an unseen character is one of
PRUNED = 3  # characters of an n-gram, from which those seen once are forgotten
SORTED_AT_ONCE = 1 << 23  # n-grams that are counted together, so that memory is bounded
SCORED_AT_ONCE = 1 << 16  # characters


class PerplexityConfig(Config):
    """What good text a model learns, which documents it judges, and from where on it drops them."""

    language: str | None = Field(default=None, description="what it judges; default: languages without an own")
    train: str = Field(min_length=1, description="file, folder or glob of good text that the model learns")
    document: Literal["file", "paragraph", "line"] = Field(default="file", description="of that, as in a corpus's sources")
    field: FieldPath | None = Field(default=None, description="of that, as in a corpus's sources")
    max_perplexity: float | None = Field(default=None, gt=1, description="largest perplexity per character; default: any")
    max_chars: int = Field(default=20_000_000, ge=1000, description="characters of the good text that are read")


@dataclass(frozen=True, slots=True)
class _Table:
    """Numbers to values. The mixed numbers are sorted; `starts` tells where those with the same first bits begin."""

    mixed: np.ndarray
    starts: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, values: np.ndarray) -> "_Table":
        mixed = mix64(keys)
        order = np.argsort(mixed)
        mixed = mixed[order]
        first_bits = max(len(keys).bit_length() - 1, 1)
        firsts = (mixed >> np.uint64(64 - first_bits)).astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(np.bincount(firsts, minlength=1 << first_bits))])
        return cls(mixed, starts.astype(np.uint32), values[order])

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float64 [keys] the values, 0 for numbers that are not there, and bool [keys]: which are."""
        mixed = mix64(keys)
        buckets = (mixed >> np.uint64(65 - len(self.starts).bit_length())).astype(np.int64)
        places, ends = self.starts[buckets], self.starts[buckets + 1]
        values, found = np.zeros(len(keys)), np.zeros(len(keys), np.bool_)
        left = np.flatnonzero(places < ends)
        while len(left):
            at = places[left]
            same = self.mixed[at] == mixed[left]
            values[left[same]], found[left[same]] = self.values[at[same]], True
            left = left[~same]
            places[left] += 1
            left = left[places[left] < ends[left]]
        return values, found


@dataclass(frozen=True, slots=True)
class CharNgram:
    """The model.

    first     float64 [NUM_CHARACTERS]: log₂ p of each character with nothing before it
    grams     for 2, 3, … characters: log₂ p of the last one
    contexts  for 1, 2, … characters: log₂ of the weight of the shorter context for what was not seen behind them
    """

    first: np.ndarray
    grams: tuple[_Table, ...]
    contexts: tuple[_Table, ...]

    @classmethod
    def train(cls, texts: Iterable[str], order: int = ORDER) -> "CharNgram":
        """Counts every text on its own. Raises ValueError where there is none."""
        before = " " * (order - 1)
        parts = [_codes(before + text) for text in texts if text]
        if not parts:
            raise ValueError("an n-gram model needs a text")
        codes = np.concatenate(parts)
        inside = np.ones(len(codes), np.bool_)  # False: the blanks before a text
        begins = np.cumsum([0, *(len(part) for part in parts[:-1])])
        del parts
        for offset in range(order - 1):
            inside[begins + offset] = False
        counts = np.bincount(codes[inside], minlength=NUM_CHARACTERS)
        distinct = np.count_nonzero(counts)
        model = cls(np.log2((counts + distinct / NUM_CHARACTERS) / (counts.sum() + distinct)), (), ())
        for length in range(2, order + 1):
            model = model._longer(list(_counted(codes, inside, length)), length)
        return model

    def _longer(self, counted: list[tuple[np.ndarray, np.ndarray]], length: int) -> "CharNgram":
        """The model with n-grams of one more character, whose counts come in parts that share no context."""
        grams, contexts = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
        logs, weights = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
        for numbers, counts in counted:
            before = numbers >> np.uint64(16)
            starts = np.flatnonzero(np.append(True, before[1:] != before[:-1]))
            distinct = np.diff(starts, append=len(before))
            total = np.add.reduceat(counts, starts) + distinct
            of = np.repeat(np.arange(len(starts)), distinct)
            shorter = 2 ** self._log(numbers, length - 1)
            grams.append(numbers)
            logs.append(np.log2((counts + distinct[of] * shorter) / total[of]).astype(np.float32))
            contexts.append(before[starts])
            weights.append(np.log2(distinct / total).astype(np.float32))
        return CharNgram(self.first,
                         (*self.grams, _Table.of(np.concatenate(grams), np.concatenate(logs))),
                         (*self.contexts, _Table.of(np.concatenate(contexts), np.concatenate(weights))))

    def _log(self, grams: np.ndarray, length: int) -> np.ndarray:
        """float64 [grams]: log₂ p of the last character of each number, given the length − 1 before it."""
        result = np.zeros(len(grams))
        left = np.arange(len(grams))
        for size in range(length, 1, -1):
            own = grams[left] & np.uint64(2 ** (16 * size) - 1)
            values, found = self.grams[size - 2].find(own)
            result[left] += values
            left = left[~found]
            result[left] += self.contexts[size - 2].find(own[~found] >> np.uint64(16))[0]
        result[left] += self.first[grams[left] & np.uint64(0xffff)]
        return result

    def bits(self, text: str) -> np.ndarray:
        """float64 [characters]: −log₂ of each character's probability given those before it."""
        return np.concatenate([np.zeros(0), *self._pieces(text)])

    def _pieces(self, text: str) -> Iterator[np.ndarray]:
        order = len(self.grams) + 1
        before = " " * (order - 1)
        for start in range(0, len(text), SCORED_AT_ONCE):
            piece = text[start:start + SCORED_AT_ONCE]
            yield -self._log(_packed(_codes(before + piece), order), order)
            before = (before + piece)[1 - order:]

    def perplexity(self, text: str) -> float:
        """Per character; of an empty text 1."""
        return float(2 ** (sum(float(piece.sum()) for piece in self._pieces(text)) / max(len(text), 1)))

    def save(self, folder: Path) -> list[Path]:
        """As arrays of numpy, the same bytes for the same texts; the files that were written."""
        folder.mkdir(exist_ok=True)
        arrays = {"first": self.first}
        for kind, tables in (("grams", self.grams), ("contexts", self.contexts)):
            for number, table in enumerate(tables):
                arrays |= {f"{kind}{number}-{name}": getattr(table, name) for name in _Table.__slots__}
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
        return [folder / f"{name}.npy" for name in arrays]

    @classmethod
    def load(cls, folder: Path, order: int = ORDER) -> "CharNgram":
        """What `save` wrote, not read but mapped: processes share one copy of it in memory."""
        grams, contexts = (tuple(
            _Table(*(np.load(folder / f"{kind}{number}-{name}.npy", mmap_mode="r") for name in _Table.__slots__))
            for number in range(order - 1)) for kind in ("grams", "contexts"))
        return cls(np.load(folder / "first.npy"), grams, contexts)


def _codes(text: str) -> np.ndarray:
    """uint16 [characters]"""
    return np.minimum(codes_of(text), np.uint32(NUM_CHARACTERS - 1)).astype(np.uint16)


def _packed(codes: np.ndarray, length: int, starts: np.ndarray | None = None) -> np.ndarray:
    """uint64 [n-grams]: each run of `length` characters as one number, or those alone that begin at the given places."""
    result = np.zeros(len(codes) - length + 1 if starts is None else len(starts), np.uint64)
    for offset in range(length):
        part = codes[offset:offset + len(result)] if starts is None else codes[starts + offset]
        result = (result << np.uint64(16)) | part
    return result


def _counted(codes: np.ndarray, inside: np.ndarray, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """uint64 the n-grams that end inside a text, sorted, and int64 how often each is there.

    They come in parts; those of one first character are in one part, so that memory holds one part at a time.
    """
    begins = codes[:len(codes) - length + 1]
    ends_inside = inside[length - 1:]
    sizes = np.cumsum(np.bincount(begins[ends_inside], minlength=NUM_CHARACTERS))
    low = 0
    while low < NUM_CHARACTERS:
        done = sizes[low - 1] if low else 0
        high = max(int(np.searchsorted(sizes, done + SORTED_AT_ONCE, "right")), low + 1)
        starts = np.flatnonzero(ends_inside & (begins >= low) & (begins < high))
        if len(starts):
            grams = _packed(codes, length, starts)
            grams.sort()
            places = np.flatnonzero(np.append(True, grams[1:] != grams[:-1]))
            counts = np.diff(places, append=len(grams))
            seen = counts >= (2 if length >= PRUNED else 1)
            if seen.any():
                yield grams[places[seen]], counts[seen]
        low = high
