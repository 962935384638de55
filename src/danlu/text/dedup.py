"""Exact duplicates: texts that are equal but for case, width and blanks. The first one stays, wherever it came from.

Only a 16-byte hash of each text is kept, so a corpus of ten million documents needs about a gigabyte.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator

from danlu.core.ledger import Ledger
from danlu.core.records import Document


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
