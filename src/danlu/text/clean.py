"""Cleaning: one text in, its normal form out, or the reason why it is dropped. Pure functions, no state.

Normalising takes away what carries no meaning (line ends of three kinds, control and zero-width characters, blanks at
line ends, runs of empty lines) and composes letters (NFC). The quality rules are thresholds over plain counts, the same
for every language, and each has its own reason.

    result = clean(text, CleanConfig())
    result.text, result.reason              # text, or None and "too_short" | "too_few_letters" | …
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from danlu.core.config import Config
from danlu.core.ledger import Ledger
from danlu.core.records import Document

Reason = Literal["empty", "too_short", "too_few_letters", "repeated_lines", "too_many_symbols", "other_language"]
MIN_LINES = 10  # below this many lines, repetition says nothing
ZH_SHARE = 0.15  # of Han among letters from which a text counts as Chinese: quotations of Latin words are long


class CleanConfig(Config):
    """How texts are normalised and which are dropped. Shares are of the characters that are not blank."""

    unicode: Literal["NFC", "NFKC"] = Field(default="NFC", description="NFKC also makes full-width letters plain")
    min_chars: int = Field(default=1, ge=0, description="shorter documents are dropped")
    min_letters: float = Field(default=0.3, ge=0, le=1, description="least share of letters and Han characters")
    max_symbols: float = Field(default=0.5, ge=0, le=1, description="largest share of neither letters nor digits")
    max_repeated_lines: float = Field(default=0.5, ge=0, le=1, description="largest share in repeated lines")


@dataclass(frozen=True, slots=True)
class Cleaned:
    """The text in its normal form, or None and the reason."""

    text: str | None
    reason: Reason | None = None


_LINE_ENDS = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
_CONTROL = "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f"
_ZERO_WIDTH = "\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff"
_INVISIBLE = re.compile(f"[{_CONTROL}{_ZERO_WIDTH}]")
_EMPTY_LINES = re.compile("\n{3,}")
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def normalize(text: str, form: Literal["NFC", "NFKC"] = "NFC") -> str:
    """The normal form; doing it twice changes nothing. Joiners inside emoji and Indic or Persian words are kept."""
    text = _INVISIBLE.sub("", _LINE_ENDS.sub("\n", text))
    if not unicodedata.is_normalized(form, text):
        text = unicodedata.normalize(form, text)
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return _EMPTY_LINES.sub("\n\n", text).strip("\n")


def clean(text: str, config: CleanConfig) -> Cleaned:
    """Normalises a text and applies the quality rules; the first rule that fails names the reason."""
    text = normalize(text, config.unicode)
    solid = len(text) - sum(map(str.isspace, text))
    if solid == 0:
        return Cleaned(None, "empty")
    if len(text) < config.min_chars:
        return Cleaned(None, "too_short")
    if sum(map(str.isalpha, text)) < config.min_letters * solid:
        return Cleaned(None, "too_few_letters")
    if solid - sum(map(str.isalnum, text)) > config.max_symbols * solid:
        return Cleaned(None, "too_many_symbols")
    if repeated_share(text) > config.max_repeated_lines:
        return Cleaned(None, "repeated_lines")
    return Cleaned(text)


def repeated_share(text: str) -> float:
    """The share of characters in lines that were there before; 0 for texts of fewer than MIN_LINES lines."""
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    if len(lines) < MIN_LINES:
        return 0.0
    seen: set[str] = set()
    repeated = total = 0
    for line in lines:
        total += len(line)
        if line in seen:
            repeated += len(line)
        seen.add(line)
    return repeated / total


def language(text: str) -> Literal["zh", "en", "other"]:
    """Chinese or English (any text in Latin letters), guessed from the share of Han characters among letters."""
    letters = sum(map(str.isalpha, text))
    if not letters:
        return "other"
    if sum(1 for _ in _HAN.finditer(text)) >= ZH_SHARE * letters:
        return "zh"
    latin = sum(1 for character in text if character.isalpha() and character < "\u0250")
    return "en" if latin >= 0.5 * letters else "other"


def clean_documents(documents: Iterator[Document], config: CleanConfig, ledger: Ledger,
                    only: Literal["zh", "en"] | None = None) -> Iterator[Document]:
    """The cleaned documents, counted at the station `clean`; with `only`, those of one language."""
    station = ledger.station("clean")
    for document in documents:
        came = len(document.text.encode())
        station.take(rows=1, bytes=came)
        result = clean(document.text, config)
        reason = result.reason
        if result.text is not None and only is not None and language(result.text) != only:
            reason = "other_language"
        if reason is not None or result.text is None:
            assert reason is not None
            station.drop(reason, rows=1, bytes=came)
            continue
        went = len(result.text.encode())
        if came > went:
            station.drop("normalised", bytes=came - went)
        elif went > came:
            station.add("normalised", bytes=went - came)
        station.give(rows=1, bytes=went)
        yield Document(result.text, document.source, document.id, document.category)
