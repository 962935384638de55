"""Exact duplicates: texts that are equal but for case, width and blanks. The first one stays, wherever it came from; what
a recipe holds out by name comes before all else, so that no copy of it stays to be trained on.

Whole documents always; paragraphs, which boilerplate and inherited help texts repeat, where asked. Of each only a hash of
16 bytes is compared, by sorting, so that a hundred million documents need a few gigabytes and no text.

    repeats(marks, named)   # int64: −1 where a text stands for the first time, else the number of the first
"""

import hashlib
import re
from collections.abc import Iterable

import numpy as np

from danlu.text.characters import compose

BLANK_LINES = re.compile(r"(\n[^\S\n]*\n\s*)")
FIRST = -1


def fingerprint(text: str) -> bytes:
    """16 bytes that are equal for texts that differ only in case, Unicode width and blanks."""
    plain = " ".join(compose(text, "NFKC").casefold().split())
    return hashlib.blake2b(plain.encode(), digest_size=16).digest()


def repeats(hashes: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
    """int64 [N]: for each of the hashes (fields `high` and `low`) the place of the first equal one, FIRST for itself.

    before  bool [N]: these come first; None: all are in their order
    """
    later = np.zeros(len(hashes), np.bool_) if before is None else ~before
    order = np.lexsort((later, hashes["low"], hashes["high"]))  # stable: equal ones stay in their order
    again = np.zeros(len(order), np.bool_)
    again[1:] = (hashes["high"][order[1:]] == hashes["high"][order[:-1]]) & \
        (hashes["low"][order[1:]] == hashes["low"][order[:-1]])
    begins = np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))
    found = np.full(len(order), FIRST, np.int64)
    found[order[again]] = order[begins[again]]
    return found


def paragraphs_of(text: str) -> list[tuple[str, str]]:
    """(paragraph, the blank lines behind it) for each that says something; blank lines part them."""
    pieces = BLANK_LINES.split(text)  # paragraph, blank lines, paragraph, …
    return [(paragraph, blank) for paragraph, blank in zip(pieces[::2], [*pieces[1::2], ""]) if paragraph.strip()]


def keep_paragraphs(text: str, stays: Iterable[bool]) -> str:
    """The text without some of its paragraphs, in the order of `paragraphs_of`, and the blank lines behind them."""
    pieces = BLANK_LINES.split(text)
    flags = iter(stays)
    kept: list[str] = []
    for paragraph, blank in zip(pieces[::2], [*pieces[1::2], ""]):
        if paragraph.strip() and next(flags):
            kept += [paragraph, blank]
    return "".join(kept[:-1])


def size_left(sizes: np.ndarray, blanks: np.ndarray, stays: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """int64 [documents]: the size of `keep_paragraphs` for each, from the sizes of all paragraphs and of the blank lines
    behind them, whether each stays, and how many each document has. The unit is that of the sizes."""
    owner = np.repeat(np.arange(len(counts)), counts)
    left = np.bincount(owner, (sizes.astype(np.int64) + blanks) * stays, len(counts)).astype(np.int64)  # exact below 2⁵³
    kept = np.flatnonzero(stays)
    last = kept[np.append(owner[kept][1:] != owner[kept][:-1], True)] if len(kept) else kept
    left[owner[last]] -= blanks[last]
    return left
