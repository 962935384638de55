"""Quality rules for English and other texts whose words stand between blanks: Gopher's, C4's and FineWeb's.

Gopher   Rae et al., Scaling Language Models: Methods, Analysis & Insights from Training Gopher (arXiv:2112.11446), table A1
         and section A.1.1: repetition and quality
C4       Raffel et al., Exploring the Limits of Transfer Learning (arXiv:1910.10683), section 2.2: lines and pages
FineWeb  Penedo et al., The FineWeb Datasets (arXiv:2406.17557), section 3.6: lines that are short, repeated, unended

The names of the thresholds and of the reasons, and the order of the tests, are datatrove's. A threshold of 0 switches a
test of Gopher's off, an empty table those of n-grams, and the loosest value (1, or 0 for a least share) those of FineWeb.
What several rules need (words, their numbers, lines) is computed once, in `Counted`.

    counted = Counted(text)
    reason = gopher_quality(counted, GopherQualityConfig())      # None: kept
"""

import re
from functools import cached_property

import numpy as np
from pydantic import Field

from danlu.core.config import Config
from danlu.text.characters import mix64, ngrams
from danlu.text.words import num_sentences, words

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
BULLETS = ("•", "-")
TERMINAL = tuple("!.?؟۔।။።‼‽⁇⁈⁉⸮。﹒﹖﹗！．？｡")
_NO_SYMBOL = re.compile(  # what is no punctuation mark to datatrove
    r"[^!/—”:％１〈&(、━\\【#%「」，】；+^\]~“《„';’{|∶´\[=`*．（–？！：$～«〉,><》)?）。…@_.\"}►»\x00-\x20\x7f-\x9f-]")
_ALPHA = re.compile(r"[^\W\d_]")
_PARAGRAPHS = re.compile(r"\n{2,}")
_LINES = re.compile(r"\n+")


class GopherQualityConfig(Config):
    """Gopher's quality rules. Words are spaCy's; punctuation alone is none where words are counted or measured."""

    min_doc_words: int = Field(default=50, ge=0, description="fewest words")
    max_doc_words: int = Field(default=100_000, ge=0, description="most words")
    min_avg_word_length: float = Field(default=3, ge=0, description="smallest mean length of a word, in characters")
    max_avg_word_length: float = Field(default=10, ge=0, description="largest mean length of a word, in characters")
    max_symbol_word_ratio: float = Field(default=0.1, ge=0, description="most # per word, and most ellipses per word")
    max_bullet_lines_ratio: float = Field(default=0.9, ge=0, le=1, description="largest share of lines that begin with •")
    max_ellipsis_lines_ratio: float = Field(default=0.3, ge=0, le=1, description="largest share of lines that end in …")
    max_non_alpha_words_ratio: float = Field(default=0.8, ge=0, le=1, description="least share of words that have a letter")
    min_stop_words: int = Field(default=2, ge=0, description="fewest of: the be to of and that have with")


class GopherRepetitionConfig(Config):
    """Gopher's repetition rules: largest shares of repeated lines and paragraphs, and of characters in n-grams."""

    dup_line_frac: float = Field(default=0.3, ge=0, le=1, description="largest share of lines that stood before")
    dup_para_frac: float = Field(default=0.3, ge=0, le=1, description="largest share of paragraphs that stood before")
    dup_line_char_frac: float = Field(default=0.2, ge=0, le=1, description="their largest share of the characters")
    dup_para_char_frac: float = Field(default=0.2, ge=0, le=1, description="their largest share of the characters")
    top_n_grams: dict[int, float] = Field(default={2: 0.2, 3: 0.18, 4: 0.16},
                                          description="by n: largest share of the characters in the most frequent n-gram")
    dup_n_grams: dict[int, float] = Field(default={5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1},
                                          description="by n: largest share of the characters in n-grams that stood before")


class FineWebConfig(Config):
    """FineWeb's own rules, on lines that are not empty."""

    line_punct_thr: float = Field(default=0.12, ge=0, le=1, description="least share of lines that end a sentence")
    line_punct_exclude_zero: bool = Field(default=False, description="a text without any such line is kept")
    short_line_thr: float = Field(default=0.67, ge=0, le=1, description="largest share of short lines")
    short_line_length: int = Field(default=30, ge=0, description="characters up to which a line is short")
    char_duplicates_ratio: float = Field(default=0.01, ge=0, le=1, description="largest share of characters in repeats")
    new_line_ratio: float = Field(default=0.3, ge=0, description="most line ends per word")


class C4Config(Config):
    """C4's rules; lines are dropped and the text is what is left."""

    remove_citations: bool = Field(default=True, description="takes out [1], [edit] and [citation needed]")
    filter_no_terminal_punct: bool = Field(default=True, description="drops lines that do not end in . ? ! or a quote")
    min_num_sentences: int = Field(default=5, ge=-1, description="fewest sentences in the lines that are left; -1: any")
    min_words_per_line: int = Field(default=3, ge=-1, description="drops lines of fewer words; -1: none")
    max_word_length: int = Field(default=1000, ge=-1, description="drops lines with a longer word; -1: none")
    filter_lorem_ipsum: bool = Field(default=True, description="drops texts with “lorem ipsum”")
    filter_javascript: bool = Field(default=True, description="drops lines with “javascript”")
    filter_curly_bracket: bool = Field(default=True, description="drops texts with {")
    filter_policy: bool = Field(default=True, description="drops lines about cookies, terms of use, privacy policy")


class Counted:
    """A text and what the rules count in it, each computed when it is first asked for."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        """In order, punctuation among them."""
        return words(self.text)

    @cached_property
    def distinct(self) -> dict[str, int]:
        """Each distinct word and its number."""
        return {word: number for number, word in enumerate(dict.fromkeys(self.words))}

    @cached_property
    def numbers(self) -> np.ndarray:
        """int64 [words]: each word's number."""
        return np.fromiter(map(self.distinct.__getitem__, self.words), np.int64, len(self.words))

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [words]: characters of each word."""
        return np.fromiter(map(len, self.distinct), np.int64, len(self.distinct))[self.numbers]

    def share_of(self, pattern: re.Pattern[str]) -> np.ndarray:
        """bool [words]: in which words a pattern is found."""
        found = np.fromiter((pattern.search(word) is not None for word in self.distinct), np.bool_, len(self.distinct))
        return found[self.numbers]

    @cached_property
    def lines(self) -> list[str]:
        """As str.splitlines parts them."""
        return self.text.splitlines()


def duplicates(items: list[str]) -> tuple[int, int]:
    """How many items stood before, and their characters."""
    if len(set(items)) == len(items):
        return 0, 0
    seen: set[str] = set()
    count = size = 0
    for item in items:
        if item in seen:
            count += 1
            size += len(item)
        seen.add(item)
    return count, size


def gopher_quality(counted: Counted, config: GopherQualityConfig) -> str | None:
    """Why Gopher's quality rules drop a text, or None."""
    text, num_words = counted.text, len(counted.words)
    real = counted.share_of(_NO_SYMBOL)
    num_real = int(real.sum())
    if num_real < config.min_doc_words or not num_words:
        return "gopher_short_doc"
    if config.max_doc_words and num_real > config.max_doc_words:
        return "gopher_long_doc"
    mean = counted.lengths[real].sum() / max(num_real, 1)
    if mean < config.min_avg_word_length:
        return "gopher_below_avg_threshold"
    if config.max_avg_word_length and mean > config.max_avg_word_length:
        return "gopher_above_avg_threshold"
    if config.max_symbol_word_ratio and text.count("#") / num_words > config.max_symbol_word_ratio:
        return "gopher_too_many_hashes"
    if config.max_symbol_word_ratio and (text.count("...") + text.count("…")) / num_words > config.max_symbol_word_ratio:
        return "gopher_too_many_ellipsis"
    lines = counted.lines
    bullets = sum(line.lstrip().startswith(BULLETS) for line in lines)
    if config.max_bullet_lines_ratio and bullets / len(lines) > config.max_bullet_lines_ratio:
        return "gopher_too_many_bullets"
    ellipses = sum(line.rstrip().endswith(("...", "…")) for line in lines)
    if config.max_ellipsis_lines_ratio and ellipses / len(lines) > config.max_ellipsis_lines_ratio:
        return "gopher_too_many_end_ellipsis"
    if counted.share_of(_ALPHA).sum() / num_words < config.max_non_alpha_words_ratio:
        return "gopher_below_alpha_threshold"
    stops = [counted.distinct[word] for word in STOP_WORDS if word in counted.distinct]
    if np.isin(counted.numbers, stops).sum() < config.min_stop_words:
        return "gopher_enough_stop_words"
    return None


def gopher_repetition(counted: Counted, config: GopherRepetitionConfig) -> str | None:
    """Why Gopher's repetition rules drop a text, or None."""
    text = counted.text
    if not text:
        return "empty"
    for name, items, most, most_chars in (
            ("para", _PARAGRAPHS.split(text.strip()), config.dup_para_frac, config.dup_para_char_frac),
            ("line", _LINES.split(text), config.dup_line_frac, config.dup_line_char_frac)):
        count, size = duplicates(items)
        if most and count / len(items) > most:
            return f"dup_{name}_frac"
        if most_chars and size / len(text) > most_chars:
            return f"dup_{name}_char_frac"
    hashes = mix64(counted.numbers.astype(np.uint64))
    for n, share in config.top_n_grams.items():
        if len(hashes) >= n and top_ngram_chars(hashes, counted.lengths, n) / len(text) > share:
            return f"top_{n}_gram"
    limits = {n: share * len(text) for n, share in config.dup_n_grams.items() if len(hashes) >= n}
    for n, limit in may_exceed(hashes, counted.lengths, limits):
        if repeated_ngram_chars(hashes, counted.lengths, n) > limit:
            return f"duplicated_{n}_n_grams"
    return None


def top_ngram_chars(hashes: np.ndarray, lengths: np.ndarray, n: int) -> int:
    """Characters of the most frequent n-gram (the first one; with blanks between its words) × its count."""
    grams = ngrams(hashes, n)
    ordered = np.sort(grams)
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    counts = np.diff(starts, append=len(ordered))
    most = int(counts.max())
    place = 0 if most == 1 else int(np.isin(grams, ordered[starts[counts == most]]).argmax())
    return most * (int(lengths[place:place + n].sum()) + n - 1)


def _sizes(lengths: np.ndarray, n: int) -> np.ndarray:
    """int64 [words − n + 1]: characters of each n-gram's words."""
    sums = np.concatenate([[0], np.cumsum(lengths)])
    return sums[n:] - sums[:-n]


def _stood_before(grams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 [R], int64 [R]: the places of n-grams that stood before, in order, and where each stood first."""
    order = np.argsort(grams, kind="stable")
    ordered = grams[order]
    new = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    firsts = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
    places = order[~new]
    back = np.argsort(places)
    return places[back], firsts[~new][back]


def may_exceed(hashes: np.ndarray, lengths: np.ndarray, limits: dict[int, float]) -> list[tuple[int, float]]:
    """The n whose repeated n-grams might exceed the limit: a repeated n-gram begins with a repeated shorter one."""
    if not limits:
        return []
    places, _ = _stood_before(ngrams(hashes, min(limits)))
    found = []
    for n, limit in limits.items():
        sizes = _sizes(lengths, n)
        if sizes[places[places < len(sizes)]].sum() > limit:
            found.append((n, limit))
    return found


def repeated_ngram_chars(hashes: np.ndarray, lengths: np.ndarray, n: int) -> int:
    """Characters in n-grams that stood before, from left to right, none of which overlap."""
    grams, sizes = ngrams(hashes, n), _sizes(lengths, n)
    places, firsts = _stood_before(grams)
    passed = bytearray(len(grams) + n)  # places that lie inside a repetition: no n-gram was seen to begin there
    again: set[int] = set()  # first places that were passed over, and whose n-gram was seen to begin later
    total = behind = 0
    for place, first in zip(places.tolist(), firsts.tolist()):
        if place < behind:
            continue
        if passed[first] and first not in again:
            again.add(first)
            continue
        total += int(sizes[place])
        behind = place + n
        passed[place:behind] = b"\1" * n
    return total


def fineweb(counted: Counted, config: FineWebConfig) -> str | None:
    """Why FineWeb's rules drop a text, or None."""
    text = counted.text
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return "empty"
    ended = sum(line.endswith(TERMINAL) for line in lines) / len(lines)
    if ended < config.line_punct_thr and not (ended == 0 and config.line_punct_exclude_zero):
        return "line_punct_ratio"
    if sum(len(line) <= config.short_line_length for line in lines) / len(lines) > config.short_line_thr:
        return "short_line_ratio"
    line_ends = text.count("\n")
    if duplicates(lines)[1] / (len(text) - line_ends) > config.char_duplicates_ratio:
        return "char_dup_ratio"
    if line_ends / len(counted.words) > config.new_line_ratio:
        return "list_ratio"
    return None


_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


def c4(text: str, config: C4Config) -> tuple[str, str | None]:
    """What C4's rules leave of a text, and why they drop all of it, or None."""
    kept: list[str] = []
    sentences = 0
    for line in map(str.strip, text.splitlines()):
        parts = line.split()
        if config.max_word_length != -1 and len(line) > config.max_word_length < max(map(len, parts), default=0):
            continue
        if config.remove_citations and "[" in line:
            line = _CITATION.sub("", line)
        if config.filter_no_terminal_punct and (not line.endswith((".", "?", "!", '"', "'")) or line.endswith("...")):
            continue
        if len(parts) < config.min_words_per_line:
            continue
        lower = line.lower()
        if config.filter_lorem_ipsum and "lorem ipsum" in lower:
            return text, "lorem_ipsum"
        if config.filter_javascript and "javascript" in lower:
            continue
        if config.filter_curly_bracket and "{" in line:
            return text, "curly_bracket"
        if config.filter_policy and any(phrase in lower for phrase in _POLICY):
            continue
        if sentences < config.min_num_sentences:
            sentences += num_sentences(line) if line else 0
        kept.append(line)
    if sentences < config.min_num_sentences:
        return text, "too_few_sentences"
    return "\n".join(kept).strip(), None
