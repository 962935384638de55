"""Lines that many documents share: headers, footers, licences. Two passes: count, then drop.

A line is counted once for each document that has it, known by 8 bytes of the hash of its normal form (case, width, blanks
and digits make no difference: “page 3” and “page 4” are one line). Of documents that are equal only the first one counts:
else a text that was copied often enough would lose all of its lines.

To know that, every line's hash is kept with its document's number until all documents were seen: on disk, as sorted runs.
The runs are then added up one range of hashes after the other, so that memory holds no more than COUNTED_AT_ONCE lines.

    writer = LineWriter(open(path, "wb"), open(owners_of(path), "wb"), config)
    for text in texts: writer.add(text)
    runs = writer.finish()                                     # how many lines are in each run
    found = count([Part(path, runs, begin=0)], is_first, config)          # LINE [lines], by their key
    text, dropped = Boilerplate.of(found, config).drop(text)
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from pydantic import Field

from danlu.core.config import Config
from danlu.text.characters import compose, joined

LINE = np.dtype([("key", "<u8"), ("documents", "<u4"), ("first", "<i8")])  # first: the first document that has the line
RUN = 1 << 20  # lines of documents that are sorted together
COUNTED_AT_ONCE = 1 << 22  # lines of documents that are added up together
_DIGITS = re.compile(r"\d+")


class BoilerplateConfig(Config):
    """From how many documents on a line is boilerplate."""

    min_documents: int = Field(default=100, ge=2, description="a line of so many documents is taken out of all of them")
    min_chars: int = Field(default=6, ge=1, description="shorter lines are left alone")


def line_key(line: str, min_chars: int) -> int | None:
    """64 bits that are equal for lines that differ only in case, width, blanks and digits; None for a short line."""
    plain = line.strip()
    if len(plain) < min_chars:
        return None
    plain = plain.lower() if plain.isascii() else compose(plain, "NFKC").casefold()
    plain = _DIGITS.sub("0", " ".join(plain.split()))
    return int.from_bytes(hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class LineWriter:
    """Writes the keys of documents' lines into one file and the documents' numbers from 0 into another, in sorted runs."""

    def __init__(self, keys: BinaryIO, owners: BinaryIO, config: BoilerplateConfig) -> None:
        self.config = config
        self.files = keys, owners
        self.keys: list[int] = []
        self.sizes: list[int] = []  # of the documents in `keys`
        self.documents = 0
        self.runs: list[int] = []

    def add(self, text: str) -> None:
        """The lines of the next document."""
        keys = {key for line in text.split("\n") if (key := line_key(line, self.config.min_chars)) is not None}
        self.keys += keys
        self.sizes.append(len(keys))
        self.documents += 1
        if len(self.keys) >= RUN:
            self._flush()

    def _flush(self) -> None:
        keys = np.array(self.keys, np.uint64)
        owners = np.repeat(np.arange(self.documents - len(self.sizes), self.documents, dtype=np.uint32), self.sizes)
        order = np.lexsort((owners, keys))
        self.files[0].write(keys[order].tobytes())
        self.files[1].write(owners[order].tobytes())
        self.runs.append(len(keys))
        self.keys, self.sizes = [], []

    def finish(self) -> list[int]:
        """Writes what is left; how many lines are in each run."""
        self._flush()
        return self.runs


def owners_of(path: Path) -> Path:
    """The file of documents' numbers that belongs to a file of keys."""
    return path.with_name(f"{path.name}-owners")


@dataclass(frozen=True, slots=True)
class Part:
    """What a LineWriter wrote; its documents are numbered from `begin` in the corpus."""

    path: Path
    runs: Sequence[int]
    begin: int


def count(parts: Sequence[Part], counts: np.ndarray, config: BoilerplateConfig) -> np.ndarray:
    """LINE [lines], sorted by key: the lines that stand in `min_documents` documents of those for which `counts`
    [documents] is True."""
    total = sum(sum(part.runs) for part in parts)
    num_ranges = max(-(-total // COUNTED_AT_ONCE), 1)
    found = [np.zeros(0, LINE)]
    for number in range(num_ranges):
        low, high = (2**64 * place // num_ranges for place in (number, number + 1))
        pieces = [piece for part in parts for piece in _range(part, low, high)]
        keys = np.concatenate([np.zeros(0, np.uint64), *(keys for keys, _ in pieces)])
        owners = np.concatenate([np.zeros(0, np.int64), *(owners for _, owners in pieces)])
        keys, owners = keys[counts[owners]], owners[counts[owners]]
        order = np.argsort(keys, kind="stable")  # documents stay in their order
        keys, owners = keys[order], owners[order]
        begins = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[:len(keys)])
        documents = np.diff(begins, append=len(keys))
        often = documents >= config.min_documents
        lines = np.zeros(int(often.sum()), LINE)
        lines["key"], lines["documents"], lines["first"] = keys[begins[often]], documents[often], owners[begins[often]]
        found.append(lines)
    return np.concatenate(found)


def _range(part: Part, low: int, high: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(keys, numbers in the corpus) of each run's lines whose keys are from `low` to below `high`."""
    pieces, at = [], 0
    for size in part.runs:
        if size:
            keys = np.memmap(part.path, np.uint64, "r", 8 * at, size)
            begin = int(np.searchsorted(keys, np.uint64(low)))
            end = size if high == 2**64 else int(np.searchsorted(keys, np.uint64(high)))
            owners = np.fromfile(owners_of(part.path), np.uint32, end - begin, offset=4 * (at + begin))
            pieces.append((np.array(keys[begin:end]), owners.astype(np.int64) + part.begin))
        at += size
    return pieces


@dataclass(frozen=True, slots=True)
class Boilerplate:
    """The lines that go: by key, in how many documents each stands."""

    config: BoilerplateConfig
    documents: Mapping[int, int]

    @classmethod
    def of(cls, lines: np.ndarray, config: BoilerplateConfig) -> "Boilerplate":
        """From what `count` found."""
        return cls(config, dict(zip(lines["key"].tolist(), lines["documents"].tolist(), strict=True)))

    def drop(self, text: str) -> tuple[str, list[str]]:
        """The text without boilerplate, and the lines that went."""
        if not self.documents:
            return text, []
        lines = text.split("\n")
        goes = [line_key(line, self.config.min_chars) in self.documents for line in lines]
        if not any(goes):
            return text, []
        kept = joined(line for line, go in zip(lines, goes, strict=True) if not go)
        return kept, [line for line, go in zip(lines, goes, strict=True) if go]
