"""Places where a text can be cut without changing one of its ids, so that what was encoded once need not be again.

A byte-level BPE tokenizer splits a text into words by a pattern, and merges inside each word. Of a cut, the kinds of the
two or three characters around it tell one of two things:

    boundary   each of `SPLIT_PATTERNS`, with or without splitting digits before, begins a word there, and finds the same
               words in both parts alone, for they look ahead only for what is not blank, and only behind blanks
    inside     it may be within a word, whose two parts would be words alone; no merge may reach over it

A merge makes a token of the vocabulary. Where no token holds the two characters side by side, no merge reaches over the
cut, and those of the two sides do not know of each other. A tokenizer without a splitter (SentencePiece's BPE) has no
boundaries: every cut is one inside. Only kinds of characters count of which all versions of Unicode think alike: ASCII,
Han and its marks.

    cuts = cuts_of(tokenizer.to_str())                   # None for a tokenizer of another make
    units, places = cuts.units(["Some text, 一些汉字"])     # ["Some", " text", ",", " 一", "些", …], [slice(0, …)]
"""

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from danlu.tokens.spelling import BLANK, BYTES, LETTERS
from danlu.tokens.splitting import SPLIT_PATTERNS

NOTHING, SPACE, LINE, LETTER, HAN, DIGIT, MARK, OTHER = range(8)  # NOTHING: blanks, and what some take for blanks
BLANKS = (*range(0x09, 0x0E), *range(0x1C, 0x20), 0x85, 0xA0, 0x1680, 0x180E, *range(0x2000, 0x200C), 0x2028, 0x2029,
          0x202F, 0x205F, 0x3000, 0xFEFF)
MARKS = '!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~，。、；：？！“”‘’（）《》…—'  # without ', which begins contractions
BOUNDARIES = ((LETTER, DIGIT), (LETTER, MARK), (LETTER, LINE), (HAN, DIGIT), (HAN, MARK), (HAN, LINE), (DIGIT, LETTER),
              (DIGIT, HAN), (DIGIT, MARK), (DIGIT, LINE), (MARK, DIGIT))
INSIDE = ((HAN, HAN), (MARK, HAN), (MARK, LETTER))
NEAR_CUTS = (0x0A, *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xE2, 0xF0))  # bytes of characters beside cuts
PAIR_BITS = 22  # of the hash of two characters; a collision costs a cut and changes nothing


def _kinds() -> np.ndarray:
    """The kind of every character, uint8 [0x110000]."""
    kinds = np.full(0x110000, OTHER, np.uint8)
    kinds[list(BLANKS)] = NOTHING
    kinds[ord(" ")], kinds[ord("\n")] = SPACE, LINE
    kinds[0x4E00:0xA000] = HAN
    kinds[ord("0"):ord("9") + 1] = DIGIT
    kinds[ord("a"):ord("z") + 1] = kinds[ord("A"):ord("Z") + 1] = LETTER
    kinds[[ord(mark) for mark in MARKS]] = MARK
    return kinds


KINDS = _kinds()


class Cuts:
    """Cuts texts for one tokenizer.

    tokens      all that merges can make, as text; a part of a character as surrogates, as `surrogateescape` writes it
    boundaries  whether there is a splitter, which cuts there itself
    inside      pairs of kinds between which is a cut where no token holds the characters
    """

    def __init__(self, tokens: Iterable[str], boundaries: bool, inside: Sequence[tuple[int, int]]) -> None:
        self.boundaries = boundaries
        self._boundary, self._inside = _table(BOUNDARIES), _table(inside)
        self._joined = np.zeros(1 << PAIR_BITS, bool)  # by the hash of two characters
        self._torn = np.zeros((256, 256), bool)  # by the last byte of one and the first of the next, of parts of characters
        tokens = list(tokens)
        self.line_ends_alone = boundaries or not any("\n" in token for token in tokens if len(token) > 1)
        codes = _codes("\0".join(tokens))
        left, right = codes[:-1], codes[1:]
        torn = (left >> 8 == 0xDC) | (right >> 8 == 0xDC)
        self._torn[_last_byte(left[torn]), _first_byte(right[torn])] = True
        self._joined[_hash(left[~torn], right[~torn])] = True

    def units(self, texts: Sequence[str]) -> tuple[list[str], list[slice]]:
        """Parts whose ids, one after the other, are those of the texts, and where the parts of each text are."""
        whole = "\t".join(texts)
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        ends = np.cumsum(lengths + 1) - 1
        starts = ends - lengths
        cut = self._cuts(_codes(whole))
        cut[starts] = cut[ends] = True
        at = np.flatnonzero(cut)
        units = [whole[start:end] for start, end in pairwise(at.tolist())]
        places = zip(np.searchsorted(at, starts).tolist(), np.searchsorted(at, ends).tolist(), strict=True)
        return units, [slice(first, last) for first, last in places]

    def fit_in_lines(self, parts: Sequence[str]) -> list[bool]:
        """Whether each part (none is empty) may be written into one text with others, a line each, and keep its ids.

        Before and behind each line end is a cut, whatever the neighbours, if they end in letters or digits and begin with
        something visible or with a blank and a letter.
        """
        kinds = KINDS[_codes("".join(parts))]
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        ends = np.cumsum(lengths)
        starts = ends - lengths
        first, second, last = kinds[starts], kinds[np.minimum(starts + 1, ends - 1)], kinds[ends - 1]
        fit = (first > LINE) | (first == SPACE) & _begins_word(second)
        fit &= (last == LETTER) | (last == HAN) | (last == DIGIT)
        return (fit & self.line_ends_alone & ~np.logical_or.reduceat(kinds == LINE, starts)).tolist()

    def _cuts(self, codes: np.ndarray) -> np.ndarray:
        """bool [n + 1]: whether a cut is before each character."""
        if not self.boundaries:
            codes = np.where(codes == ord(BLANK), np.uint32(ord(" ")), codes)
        kinds = KINDS[codes]
        known, asked = np.zeros((2, len(codes) + 1), bool)
        pairs = kinds[:-1] * np.uint8(8) + kinds[1:]
        known[1:-1], asked[1:-1] = self._boundary[pairs], self._inside[pairs]
        before, here, behind = kinds[:-2], kinds[1:-1], kinds[2:]
        # a blank goes with what follows it; behind other blanks only where that is no digit, which some split off before
        known[1:-2] |= (here == SPACE) & (_begins_word(behind) | (before > LINE) & (behind > LINE))
        known[2:-1] |= (here == LINE) & (before > LINE) & (behind > LINE)
        if not self.boundaries:
            asked |= known
            known[:] = False
        places = np.flatnonzero(asked)
        left, right = codes[places - 1], codes[places]
        joined = self._joined[_hash(left, right)] | self._torn[_last_byte(left), _first_byte(right)]
        known[places[~joined]] = True
        return known


def cuts_of(source: str) -> Cuts | None:
    """The cuts for a tokenizer, given as its JSON and used without a post-processor; None where nothing is known of it."""
    state = json.loads(source)
    model, normalizer = state["model"], state["normalizer"]
    unlike = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or any(model.get(key) for key in unlike):
        return None
    vocabulary = model["vocab"]
    inside: Sequence[tuple[int, int]] = () if model.get("ignore_merges") else INSIDE
    if state["pre_tokenizer"] is None:
        bytes_known = model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
        if normalizer != {"type": "Replace", "pattern": {"String": " "}, "content": BLANK} or not bytes_known or not inside:
            return None
        return Cuts((token.replace(BLANK, " ") for token in vocabulary), False, inside)
    if normalizer not in (None, {"type": "NFC"}) or not _splits(state["pre_tokenizer"]):
        return None
    # a byte that the vocabulary lacks is left out, and its neighbours come together: never those of a cut
    needed = NEAR_CUTS if model.get("unk_token") is None else range(256)
    if any(LETTERS[byte] not in vocabulary for byte in needed):
        return None
    if normalizer is not None:  # a letter may be composed with the accent behind it
        inside = tuple(pair for pair in inside if pair != (MARK, LETTER))
    byte_of = {ord(letter): chr(byte) for letter, byte in BYTES.items()}
    spelled = (token.translate(byte_of).encode("latin-1", "replace") for token in vocabulary)
    return Cuts((token.decode("utf-8", "surrogateescape") for token in spelled), True, inside)


def _splits(splitter: dict[str, Any]) -> bool:
    """Whether a splitter is a byte-level one that is known: its own pattern or one of ours, digits split off or not."""
    parts = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    if parts and parts[0]["type"] == "Digits":
        parts = parts[1:]
    *patterns, last = parts or [{"type": None}]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return False
    if last["use_regex"]:
        return not patterns
    return len(patterns) == 1 and patterns[0]["type"] == "Split" and patterns[0]["behavior"] == "Isolated" and not \
        patterns[0]["invert"] and patterns[0]["pattern"].get("Regex") in SPLIT_PATTERNS


def _table(pairs: Iterable[tuple[int, int]]) -> np.ndarray:
    """bool [64]: whether 8 · left kind + right kind is among the pairs."""
    table = np.zeros(64, bool)
    table[[8 * left + right for left, right in pairs]] = True
    return table


def _begins_word(kinds: np.ndarray) -> np.ndarray:
    return (kinds == LETTER) | (kinds == HAN) | (kinds == MARK)


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _hash(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    mixed: np.ndarray = left * np.uint32(0x9E3779B1) + right * np.uint32(0x85EBCA6B)
    return mixed >> (32 - PAIR_BITS)


def _last_byte(codes: np.ndarray) -> np.ndarray:
    """Of UTF-8; of a surrogate that stands for a byte, that byte."""
    return np.where(codes < 0x80, codes, np.where(codes >> 8 == 0xDC, codes & 0xFF, codes & 0x3F | 0x80))


def _first_byte(codes: np.ndarray) -> np.ndarray:
    """Of UTF-8, up to U+FFFF; of a surrogate that stands for a byte, that byte."""
    return np.where(codes < 0x80, codes, np.where(codes >> 8 == 0xDC, codes & 0xFF, np.where(
        codes < 0x800, codes >> 6 | 0xC0, codes >> 12 & 0xF | 0xE0)))
