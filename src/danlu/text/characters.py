"""What kind each character is, and texts as arrays of hashed units: the counting that cleaning and deduplication share.

A kind is BLANK, SYMBOL, LETTER, NUMBER, MARK (combines with the letter before it) or SINGLE (Han and kana: a word is not
parted from the next by a blank, so each character counts alone). A *unit* is a word of letters, numbers and marks, or one
single character; case, width, punctuation and line breaks make no difference to it. Everything runs over whole arrays.

    counts = kind_counts("你好 a1")            # [blank, symbol, letter, number, mark, single]
    grams = ngrams(units("to be or not to be"), 2)      # uint64 [5]; the first and the last are equal
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Literal

import numpy as np
import regex

BLANK, SYMBOL, LETTER, NUMBER, MARK, SINGLE = range(6)
NUM_KINDS = 6
TOP = 0x33480  # no letter has a code point beyond the extensions of Han
SINGLES = ((0x3040, 0x30ff), (0x3400, 0x4dbf), (0x4e00, 0x9fff), (0xf900, 0xfaff), (0x20000, 0x33479))
MARKS = 30  # combining marks in a row that stay: no word has as many (Unicode's annex 15, stream-safe text)
BLOCK = 1 << 20  # characters of a text whose units are found together
_BLANK = re.compile(r"[ \n]")
_EMPTY_LINES = re.compile("\n{3,}")
HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U00033479"  # for a class in a regular expression


def kind_of(code: int) -> int:
    """The kind of one code point, as `str.isspace`, `str.isalpha` and `str.isalnum` see it."""
    character = chr(code)
    if character.isspace():
        return BLANK
    if character.isalpha():
        return SINGLE if any(first <= code <= last for first, last in SINGLES) else LETTER
    if character.isalnum():
        return NUMBER
    return MARK if unicodedata.category(character)[0] == "M" else SYMBOL


@cache
def _ascii_kinds() -> np.ndarray:
    return np.array([kind_of(code) for code in range(128)], np.uint8)


@cache
def _all_kinds() -> np.ndarray:
    return np.array([kind_of(code) for code in range(TOP)] + [SYMBOL], np.uint8)


def codes_of(text: str) -> np.ndarray:
    """uint8 or uint32 [characters]: the code points."""
    if text.isascii():
        return np.frombuffer(text.encode(), np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.dtype("<u4"))


def kinds_of(codes: np.ndarray) -> np.ndarray:
    """uint8 [characters]: the kind of each code point."""
    if codes.dtype == np.uint8:
        return _ascii_kinds()[codes]
    return _all_kinds()[np.minimum(codes, TOP)]


def kind_counts(text: str) -> list[int]:
    """How many characters of each kind a text has."""
    return np.bincount(kinds_of(codes_of(text)), minlength=NUM_KINDS).tolist()


_MULTIPLIERS = np.array([0xbf58476d1ce4e5b9, 0x94d049bb133111eb], np.uint64)


def mix64(values: np.ndarray) -> np.ndarray:
    """uint64 to uint64, one to one, every input bit reaching every output bit: the finaliser of splitmix64.

    Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators (2014), figure 16.
    """
    values = values + np.uint64(0x9e3779b97f4a7c15)
    values ^= values >> np.uint64(30)
    values *= _MULTIPLIERS[0]
    values ^= values >> np.uint64(27)
    values *= _MULTIPLIERS[1]
    values ^= values >> np.uint64(31)
    return values


def units(text: str) -> np.ndarray:
    """uint64 [units]: a hash of each word or single character, the same in any case, width and composition."""
    return units_and_singles(text)[0]


_MANY_MARKS = regex.compile(rf"(\P{{ccc=0}}{{{MARKS}}})\P{{ccc=0}}+")


def compose(text: str, form: Literal["NFC", "NFKC"]) -> str:
    """The text in that form; of combining marks in a row it keeps MARKS: to order n of them takes n² steps."""
    if text.isascii():
        return text
    return _MANY_MARKS.sub(r"\1", unicodedata.normalize(form, _MANY_MARKS.sub(r"\1", text)))


def joined(lines: Iterable[str]) -> str:
    """The lines as one text: at most one empty line in a row, and none at its ends."""
    return _EMPTY_LINES.sub("\n\n", "\n".join(lines)).strip("\n")


def units_and_singles(text: str) -> tuple[np.ndarray, np.ndarray]:
    """uint64 [units] as `units` gives them, and bool [units]: which of them are single characters."""
    found = [_units_and_singles(block) for block in _blocks(text)]
    return np.concatenate([hashes for hashes, _ in found]), np.concatenate([single for _, single in found])


def _blocks(text: str) -> Iterator[str]:
    """The text in pieces that end before a blank, so that the arrays of a large one need not be there at once."""
    start = 0
    while len(text) - start > BLOCK and (blank := _BLANK.search(text, start + BLOCK)) is not None:
        yield text[start:blank.start()]
        start = blank.start()
    yield text[start:]


def _units_and_singles(text: str) -> tuple[np.ndarray, np.ndarray]:
    plain = text.lower() if text.isascii() else compose(compose(text, "NFKC").casefold(), "NFKC")
    codes = codes_of(plain)
    kinds = kinds_of(codes)
    solid = kinds >= LETTER
    places = np.flatnonzero(solid)
    if not len(places):
        return np.zeros(0, np.uint64), np.zeros(0, np.bool_)
    single = kinds[places] == SINGLE
    starts = np.empty(len(places), np.bool_)
    starts[0] = True
    starts[1:] = (np.diff(places) > 1) | single[1:] | single[:-1]
    first = np.flatnonzero(starts)
    lengths = np.diff(first, append=len(places))
    offsets = np.arange(len(places)) - np.repeat(first, lengths)
    values = mix64(codes[places].astype(np.uint64) | (offsets.astype(np.uint64) << np.uint64(32)))
    return np.add.reduceat(values, first), single[first]


def ngrams(items: np.ndarray, n: int) -> np.ndarray:
    """uint64 [max(items − n + 1, 1)]: a hash of each run of n items, in order; fewer than n items are one run."""
    if not len(items):
        return items
    n = min(n, len(items))
    total = np.zeros(len(items) - n + 1, np.uint64)
    factor = 1
    for offset in range(n):
        total += items[offset:offset + len(total)] * np.uint64(factor)
        factor = factor * 0x9fb21c651e98df25 % 2**64
    return mix64(total)
