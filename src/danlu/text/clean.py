"""Cleaning: one text in, its normal form out, or the reason why it is dropped. Pure functions, no state.

Normalising takes away what carries no meaning (line ends of three kinds, control and zero-width characters, blanks at
line ends, runs of empty lines) and composes letters (NFC). Then come, in this order and where the recipe has them: lines
that many documents share, plain counts that are the same for every language, block lists, the language, the rules for words
between blanks (Gopher, C4, FineWeb; `text/rules.py`) or those for Chinese (`text/rules_zh.py`), the perplexity, and the
masking of personal data. The first rule that fails names the reason.

    result = clean(text, CleanConfig(gopher_quality={}, chinese={}))
    result.text, result.reason              # text, or None and "too_short" | "gopher_short_doc" | "zh_too_few_han" | …
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from pydantic import Field, model_validator

from danlu.core.config import Config
from danlu.text.blocklists import Blocklist, BlocklistConfig
from danlu.text.boilerplate import Boilerplate, BoilerplateConfig
from danlu.text.characters import BLANK, HAN, LETTER, NUMBER, SINGLE, compose, joined, kind_counts
from danlu.text.langid import LangidConfig, identify, language
from danlu.text.ngram import CharNgram, PerplexityConfig
from danlu.text.pii import PiiConfig, mask
from danlu.text.rules import (
    C4Config,
    Counted,
    FineWebConfig,
    GopherQualityConfig,
    GopherRepetitionConfig,
    c4,
    fineweb,
    gopher_quality,
    gopher_repetition,
)
from danlu.text.rules_zh import ChineseConfig, chinese
from danlu.text.simplified import simplify

__all__ = ["Aids", "CleanConfig", "Cleaned", "clean", "language", "normal_form", "normalize", "repeated_share"]
MIN_LINES = 10  # below this many lines, repetition says nothing


class CleanConfig(Config):
    """How texts are normalised and which are dropped. Shares are of the characters that are not blank.

    The rules of Gopher, C4 and FineWeb judge what is not Chinese, `chinese` judges what is; `{}` means their defaults.
    """

    unicode: Literal["NFC", "NFKC"] = Field(default="NFC", description="NFKC also makes full-width letters plain")
    half_width: bool = Field(default=False, description="full-width letters and digits become plain, Chinese marks stay")
    simplified: bool = Field(default=False, description="traditional characters become simplified (extra opencc)")
    boilerplate: BoilerplateConfig | None = Field(default=None, description="lines of many documents are taken out")
    min_chars: int = Field(default=1, ge=0, description="shorter documents are dropped")
    min_letters: float = Field(default=0.3, ge=0, le=1, description="least share of letters and Han characters")
    max_symbols: float = Field(default=0.5, ge=0, le=1, description="largest share of neither letters nor digits")
    max_repeated_lines: float = Field(default=0.5, ge=0, le=1, description="largest share in repeated lines")
    langid: LangidConfig = Field(default=LangidConfig(), description="how the language is told, and which stay")
    gopher_repetition: GopherRepetitionConfig | None = Field(default=None, description="Gopher's repetition rules")
    gopher_quality: GopherQualityConfig | None = Field(default=None, description="Gopher's quality rules")
    c4: C4Config | None = Field(default=None, description="C4's rules; they take out lines")
    fineweb: FineWebConfig | None = Field(default=None, description="FineWeb's rules")
    chinese: ChineseConfig | None = Field(default=None, description="rules for Chinese")
    blocklists: list[BlocklistConfig] = Field(default=[], description="words and sites that drop a document")
    perplexity: list[PerplexityConfig] = Field(default=[], description="how unlike good text a text may be")
    pii: PiiConfig | None = Field(default=None, description="personal data that is masked")

    @model_validator(mode="after")
    def _a_language_has_one_model(self) -> "CleanConfig":
        languages = [part.language for part in self.perplexity]
        if len(set(languages)) < len(languages):
            raise ValueError("two entries of “perplexity” are for the same language")
        return self


@dataclass(frozen=True, slots=True)
class Aids:
    """What the rules look things up in: made from the files that a recipe names, or from the corpus itself.

    boilerplate  the lines that many documents share
    models       by language, each with the perplexity up to which a text stays; None: of languages that have no own
    """

    lists: Sequence[Blocklist] = ()
    boilerplate: Boilerplate | None = None
    models: Mapping[str | None, tuple[CharNgram, float | None]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cleaned:
    """The text in its normal form, or None and the reason, and what is known of it.

    changes   by step (normalised, boilerplate, c4_lines, zh_frame_lines, pii): bytes that it put in (> 0) or took out (< 0)
    notes     how many of what: pii_email, boilerplate_lines …
    quality   chars, han_ratio, symbol_ratio, with the model of languages language_score, and with a model of good text
              perplexity; of a text that stays, but for the perplexity
    framed    the lines that were boilerplate
    """

    text: str | None
    reason: str | None = None
    language: str = "other"
    changes: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    quality: dict[str, float] = field(default_factory=dict)
    framed: Sequence[str] = ()


_LINE_ENDS = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
_CONTROL = "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f"
_ZERO_WIDTH = "\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff"
_INVISIBLE = re.compile(f"[{_CONTROL}{_ZERO_WIDTH}]")
_FULL_WIDTH = re.compile("[\uff10-\uff19\uff21-\uff3a\uff41-\uff5a]+")
_HAN = re.compile(f"[{HAN}]+")


def normalize(text: str, form: Literal["NFC", "NFKC"] = "NFC") -> str:
    """The normal form; doing it twice changes nothing. Joiners inside emoji and Indic or Persian words are kept."""
    text = _INVISIBLE.sub("", _LINE_ENDS.sub("\n", text))
    text = compose(text, form)
    return joined(line.rstrip() for line in text.split("\n"))


def half_width(text: str) -> str:
    """Full-width letters and digits as plain ones; punctuation, which is Chinese typography, stays."""
    return _FULL_WIDTH.sub(lambda match: "".join(chr(ord(character) - 0xfee0) for character in match[0]), text)


def normal_form(text: str, config: CleanConfig) -> str:
    """The text before any rule."""
    text = normalize(text, config.unicode)
    if config.half_width:
        text = half_width(text)
    return simplify(text) if config.simplified else text


def clean(text: str, config: CleanConfig, aids: Aids = Aids(), address: str = "") -> Cleaned:
    """Normalises a text, which is that of the page at `address`, and applies the rules of the recipe."""
    came = _size(text)
    text = normal_form(text, config)
    changes = {"normalised": _size(text) - came}
    framed: list[str] = []
    if aids.boilerplate is not None:
        before = text
        text, framed = aids.boilerplate.drop(text)
        changes["boilerplate"] = _size(text) - _size(before)
    if framed and not text.strip():
        return Cleaned(None, "only_boilerplate", framed=framed)
    result = _judged(text, config, aids, address)
    if result.text is None:
        return replace(result, framed=framed)
    changes, notes = {**changes, **result.changes}, {"boilerplate_lines": len(framed), **result.notes}
    return replace(result, framed=framed, changes={step: size for step, size in changes.items() if size},
                   notes={what: count for what, count in notes.items() if count})


def _judged(text: str, config: CleanConfig, aids: Aids, address: str) -> Cleaned:
    """What the rules that look at one text make of it."""
    counts = kind_counts(text)
    solid = len(text) - counts[BLANK]
    reason = _plain_rules(text, counts, solid, config)
    if reason is None:
        reason = next((blocked.reason for blocked in aids.lists if blocked.blocks(text, address)), None)
    if reason is not None:
        return Cleaned(None, reason)
    spoken, score = identify(text, config.langid)
    if config.langid.keep and (spoken not in config.langid.keep or score < config.langid.threshold):
        return Cleaned(None, "other_language", spoken)
    changes: dict[str, int] = {}
    notes: dict[str, int] = {}
    before = text
    if spoken == "zh":
        if config.chinese is not None:
            text, reason, lines = chinese(text, config.chinese)
            notes["zh_frame_lines"] = lines
            changes["zh_frame_lines"] = _size(text) - _size(before) if lines else 0
    else:
        text, reason = _word_rules(text, config)
        changes["c4_lines"] = _size(text) - _size(before) if text is not before else 0
    if reason is None and not text.strip():
        reason = "empty"
    if reason is not None:
        return Cleaned(None, reason, spoken)
    likeness = _likeness(text, aids.models.get(spoken, aids.models.get(None)))
    if likeness.reason is not None:
        return replace(likeness, language=spoken)
    if config.pii is not None:
        before = text
        text, found = mask(text, config.pii)
        text = text.strip("\n")  # a mask can be nothing
        if not text.strip():
            return Cleaned(None, "empty", spoken)
        notes.update({f"pii_{kind}": count for kind, count in found.items()})
        changes["pii"] = _size(text) - _size(before) if found else 0
    told = {} if config.langid.model == "script" else {"language_score": round(score, 4)}
    return Cleaned(text, None, spoken, changes, notes, {**measured(text), **told, **likeness.quality})


def _likeness(text: str, model: tuple[CharNgram, float | None] | None) -> Cleaned:
    """The text with its perplexity, or without a text where that is too high."""
    if model is None:
        return Cleaned(text)
    perplexity = round(model[0].perplexity(text), 2)
    high = model[1] is not None and perplexity > model[1]
    return Cleaned(None if high else text, "high_perplexity" if high else None, quality={"perplexity": perplexity})


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _plain_rules(text: str, counts: Sequence[int], solid: int, config: CleanConfig) -> str | None:
    letters = counts[LETTER] + counts[SINGLE]
    if solid == 0:
        return "empty"
    if len(text) < config.min_chars:
        return "too_short"
    if letters < config.min_letters * solid:
        return "too_few_letters"
    if solid - letters - counts[NUMBER] > config.max_symbols * solid:
        return "too_many_symbols"
    if repeated_share(text) > config.max_repeated_lines:
        return "repeated_lines"
    return None


def _word_rules(text: str, config: CleanConfig) -> tuple[str, str | None]:
    """What the rules for words between blanks leave of a text, and why they drop it, in FineWeb's order."""
    counted = Counted(text)
    reason = None
    if config.gopher_repetition is not None:
        reason = gopher_repetition(counted, config.gopher_repetition)
    if reason is None and config.gopher_quality is not None:
        reason = gopher_quality(counted, config.gopher_quality)
    if reason is None and config.c4 is not None:
        left, reason = c4(text, config.c4)
        if left != text:
            text = left
            counted = Counted(text)
    if reason is None and config.fineweb is not None:
        reason = fineweb(counted, config.fineweb)
    return text, reason


def measured(text: str) -> dict[str, float]:
    """chars, han_ratio and symbol_ratio of a text."""
    counts = kind_counts(text)
    solid = len(text) - counts[BLANK]
    han = 0 if text.isascii() else sum(map(len, _HAN.findall(text)))
    letters = counts[LETTER] + counts[SINGLE] + counts[NUMBER]
    return {"chars": float(len(text)), "han_ratio": round(han / max(solid, 1), 4),
            "symbol_ratio": round((solid - letters) / max(solid, 1), 4)}


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
