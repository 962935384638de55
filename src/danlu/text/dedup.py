"""Exact duplicates: texts that are equal but for case, width and blanks. The first one stays, wherever it came from.

Whole documents always; paragraphs, which boilerplate and inherited help texts repeat, where asked. Only a 16-byte hash of
each is kept, so a corpus of ten million documents needs about a gigabyte.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import replace

from danlu.core.ledger import Ledger
from danlu.core.records import Document

BLANK_LINES = re.compile(r"(\n[^\S\n]*\n\s*)")


def fingerprint(text: str) -> bytes:
    """16 bytes that are equal for texts that differ only in case, Unicode width and blanks."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.blake2b(plain.encode(), digest_size=16).digest()


def deduplicate(documents: Iterable[Document], ledger: Ledger) -> Iterator[Document]:
    """The documents that were not seen before, across all sources; counted at the station `dedup`."""
    station = ledger.station("dedup")
    seen: set[bytes] = set()
    for document in documents:
        size = len(document.text.encode())
        station.take(rows=1, bytes=size)
        key = fingerprint(document.text)
        if key in seen:
            station.drop("duplicate", rows=1, bytes=size)
            continue
        seen.add(key)
        station.give(rows=1, bytes=size)
        yield document


def drop_repeated_paragraphs(documents: Iterable[Document], ledger: Ledger) -> Iterator[Document]:
    """The documents without the paragraphs that stood earlier in the corpus; counted at the station `paragraphs`.

    Paragraphs are what blank lines part; a document that has no other ones is dropped.
    """
    station = ledger.station("paragraphs")
    seen: set[bytes] = set()
    for document in documents:
        size = len(document.text.encode())
        station.take(rows=1, bytes=size)
        pieces = BLANK_LINES.split(document.text)  # paragraph, blank lines, paragraph, …
        kept: list[str] = []
        for paragraph, blank in zip(pieces[::2], [*pieces[1::2], ""]):
            key = fingerprint(paragraph)
            if paragraph.strip() and key not in seen:
                seen.add(key)
                kept += [paragraph, blank]
        text = "".join(kept[:-1])
        left = len(text.encode())
        station.drop("repeated paragraph", bytes=size - left)
        if not text.strip():
            station.drop("nothing but repeated paragraphs", rows=1, bytes=left)
            continue
        station.give(rows=1, bytes=left)
        yield replace(document, text=text)
