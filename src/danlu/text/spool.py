"""The spool: what is known of each split's documents once they are read and cleaned, on disk, until the corpus is written.

For split N: `N.parquet` (the documents, as the corpus has them), `N.marks` (for each a MARK: hash, group, sizes),
`N.signatures` and `N.keys` (MinHash, where near duplicates are looked for), `N.paragraphs` (a PARAGRAPH for each, where
those are), and last `N.json` with the ledger. A split whose `N.json` is there and tells of this very split is done: that is
how an interrupted run goes on. A document's texts are then only read again to be written.

    fill(Job(3, split, source, …), folder)          # by any process
    spool = Spool(folder, splits)
    spool.marks["bytes"].sum()
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from danlu.core.artifact import sync, write_atomic
from danlu.core.ledger import Ledger
from danlu.core.records import Document
from danlu.text.aids import load_aids, shown_lines
from danlu.text.boilerplate import BoilerplateConfig, line_key
from danlu.text.clean import CleanConfig, Cleaned, clean
from danlu.text.corpus import SPOOL_LEVEL, CorpusWriter, Row
from danlu.text.decontaminate import DecontaminateConfig
from danlu.text.dedup import fingerprint, paragraphs_of
from danlu.text.evalsets import index_of
from danlu.text.lines import Gate
from danlu.text.minhash import NearConfig, band_keys, signature
from danlu.text.read import SourceConfig, group_of
from danlu.text.splits import Split, read_split
from danlu.text.warc import address_of

HASH = [("high", "<u8"), ("low", "<u8")]  # a fingerprint
# place: of the group; language, named: numbers in the split's lists
MARK = np.dtype([*HASH, ("place", "<u8"), ("bytes", "<u4"), ("chars", "<u4"), ("paragraphs", "<u4"), ("language", "u1"),
                 ("named", "<u2")])
# blank_…: of the blank lines behind it
PARAGRAPH = np.dtype([*HASH, ("bytes", "<u4"), ("blank_bytes", "<u4"), ("chars", "<u4"), ("blank_chars", "<u4")])
PERPLEXITY_BINS, MAX_BITS = 2, 16  # of the histogram: bins to each power of two, and the last of these
SHOWN = 5  # texts that are kept for each reason for which they go, to show them
EXCERPT = 300
BATCH = 256  # documents whose signatures are computed together


@dataclass(frozen=True, slots=True)
class Job:
    """One split and all that is to be done with it."""

    number: int
    split: Split
    source: SourceConfig
    clean: CleanConfig
    near: NearConfig | None
    paragraphs: bool
    decontaminate: DecontaminateConfig | None
    heldout: tuple[str, ...]
    base: Path


@dataclass(frozen=True, slots=True)
class Removed:
    """A text that does not go on, to be shown in a report; `like` is the document that it repeats."""

    station: str
    reason: str
    where: str
    excerpt: str
    like: str = ""

    @classmethod
    def of(cls, station: str, reason: str, document: Document, like: str = "") -> "Removed":
        """With the beginning of the text."""
        return cls(station, reason, document.id, document.text[:EXCERPT], like)


@dataclass(slots=True)
class _Done:
    """What is collected while a split is read."""

    ledger: Ledger = field(default_factory=Ledger)
    removed: list[Removed] = field(default_factory=list)
    named: dict[tuple[str, ...], int] = field(default_factory=lambda: {(): 0})
    languages: dict[str, int] = field(default_factory=dict)
    perplexities: dict[str, Counter[int]] = field(default_factory=dict)

    def remove(self, station: str, reason: str, document: Document, words: str = "") -> None:
        if sum(item.reason == reason for item in self.removed) < SHOWN:
            removed = Removed.of(station, reason, document)
            self.removed.append(replace(removed, where=removed.where + words))

    def show_lines(self, lines: Sequence[str], wanted: dict[int, int], document: Document,
                   config: BoilerplateConfig) -> None:
        """Shows those lines of boilerplate that are wanted, and wants them no longer."""
        for line in lines if wanted else ():
            key = line_key(line, config.min_chars)
            if key in wanted:
                words = f" and {wanted.pop(key) - 1:,} more documents"
                self.removed.append(Removed("clean", "boilerplate", document.id + words, line.strip()[:EXCERPT]))

    def count_perplexity(self, result: Cleaned) -> None:
        """Counts into the histogram of the text's language."""
        counts = self.perplexities.setdefault(result.language, Counter())
        counts[math.floor(PERPLEXITY_BINS * min(math.log2(result.quality["perplexity"]), MAX_BITS))] += 1


def path_of(folder: Path, number: int, kind: str) -> Path:
    """One of a split's files: kind is parquet, marks, signatures, keys, paragraphs or json, or one of `text/learn.py`'s."""
    return folder / f"{number:05}.{kind}"


def is_done(job: Job, folder: Path, last: str = "json") -> bool:
    """Whether the split was read to its end before, and its files are whole; `last` is the kind of the last one."""
    path = path_of(folder, job.number, last)
    if not path.is_file():
        return False
    done = json.loads(path.read_bytes())
    return done["split"] == job.split.to_json() and all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in done["files"].items())


def fill(job: Job, folder: Path) -> None:
    """Reads and cleans one split into its files. Raises DataError where its files cannot be read."""
    if is_done(job, folder):
        return
    done = _Done()
    gate = Gate(f"read:{job.source.path}", done.ledger, job.source.max_refused)
    kinds = ["marks", *(["signatures", "keys"] if job.near else []), *(["paragraphs"] if job.paragraphs else [])]
    num = 0
    with ExitStack() as stack:
        files = {kind: stack.enter_context(open(path_of(folder, job.number, kind), "wb")) for kind in kinds}
        with CorpusWriter(path_of(folder, job.number, "parquet"), SPOOL_LEVEL) as writer:
            pending: list[Document] = []
            for row in _cleaned(job, folder, gate, done):
                num += 1
                writer.write(row)
                files["marks"].write(_mark(job, row, files, done).tobytes())
                if job.near:
                    pending.append(row.document)
                    if len(pending) >= BATCH:
                        _sign(pending, job.near, files)
            if job.near:
                _sign(pending, job.near, files)
    finish_split(job, folder, [*kinds, "parquet"], "json", _state(num, gate, done))


def finish_split(job: Job, folder: Path, kinds: Sequence[str], last: str, state: Mapping[str, Any]) -> None:
    """Writes the split's file of the kind `last`, which says that all others are there, with what `state` tells."""
    paths = [path_of(folder, job.number, kind) for kind in kinds]
    for path in paths:
        sync(path)
    whole = {"split": job.split.to_json(), "files": {path.name: path.stat().st_size for path in paths}, **state}
    write_atomic(path_of(folder, job.number, last), json.dumps(whole, ensure_ascii=False))


def _state(num: int, gate: Gate, done: _Done) -> dict[str, Any]:
    return {"documents": num, "ledger": done.ledger.state(), "rows": gate.rows, "refused": gate.refused,
            "first": gate.first, "named": list(done.named), "languages": list(done.languages),
            "perplexities": done.perplexities,
            "removed": [[item.station, item.reason, item.where, item.excerpt] for item in done.removed]}


def _cleaned(job: Job, folder: Path, gate: Gate, done: _Done) -> Iterator[Row]:
    """The documents that pass the cleaning and hold no evaluation item, counted at `clean` and `decontaminate`."""
    station = done.ledger.station("clean")
    aids = load_aids(job.clean, job.base, folder)
    wanted = shown_lines(job.clean, folder, job.number, SHOWN)
    for document in read_split(job.split, job.source, gate):
        came = document.num_bytes
        station.take(rows=1, bytes=came)
        result = clean(document.text, job.clean, aids, address_of(document.id))
        if job.clean.boilerplate is not None:
            done.show_lines(result.framed, wanted, document, job.clean.boilerplate)
        if "perplexity" in result.quality:
            done.count_perplexity(result)
        other = result.text is not None and job.source.language not in (None, result.language)
        if result.text is None or other:
            reason = "other_language" if other else str(result.reason)
            station.drop(reason, rows=1, bytes=came)
            high = reason == "high_perplexity"
            done.remove("clean", reason, document, f" (perplexity {result.quality['perplexity']:,.0f})" if high else "")
            continue
        for step, size in result.changes.items():
            (station.add if size > 0 else station.drop)(step, bytes=abs(size))
        for what, count in result.notes.items():
            station.note(what, rows=count)
        cleaned = replace(document, text=result.text)
        station.give(rows=1, bytes=cleaned.num_bytes)
        if job.decontaminate is None or _is_clean_of_items(cleaned, job.decontaminate, job.base, done):
            yield Row(cleaned, result.language, result.quality)


def _is_clean_of_items(document: Document, config: DecontaminateConfig, base: Path, done: _Done) -> bool:
    station, size = done.ledger.station("decontaminate"), document.num_bytes
    station.take(rows=1, bytes=size)
    name = index_of(config, base).found(document.text)
    if name is None:
        station.give(rows=1, bytes=size)
        return True
    station.drop(f"contaminated_{name}", rows=1, bytes=size)
    done.remove("decontaminate", f"contaminated_{name}", document)
    return False


def _mark(job: Job, row: Row, files: Any, done: _Done) -> np.ndarray:
    """The document's MARK; its paragraphs are written on the way."""
    document, paragraphs = row.document, 0
    if job.paragraphs:
        found = [(*halves(fingerprint(text)), len(text.encode()), len(blank.encode()), len(text), len(blank))
                 for text, blank in paragraphs_of(document.text)]
        files["paragraphs"].write(np.array(found, PARAGRAPH).tobytes())
        paragraphs = len(found)
    matching = tuple(pattern for pattern in job.heldout
                     if fnmatchcase(document.source, pattern) or fnmatchcase(document.id, pattern))
    return np.array((*halves(fingerprint(document.text)), place_of(group_of(document, job.source.group)),
                     document.num_bytes, len(document.text), paragraphs,
                     done.languages.setdefault(row.language, len(done.languages)),
                     done.named.setdefault(matching, len(done.named))), MARK)


def place_of(group: str) -> int:
    """Where the hash of a group's name falls, from 0 to 2⁵⁶."""
    return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=7).digest(), "big")


def halves(key: bytes) -> tuple[int, int]:
    """A fingerprint as the values of HASH."""
    return int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big")


def _sign(documents: list[Document], near: NearConfig, files: Any) -> None:
    """Writes the signatures and band keys of some documents, and forgets the documents."""
    if documents:
        signatures = np.stack([signature(document.text, near) for document in documents])
        files["signatures"].write(signatures.astype("<u4").tobytes())
        files["keys"].write(band_keys(signatures, near).astype("<u8").tobytes())
        documents.clear()


class Spool:
    """All splits of a corpus, read and cleaned: their documents are numbered from 0 in the corpus's order."""

    def __init__(self, folder: Path, jobs: Sequence[Job]) -> None:
        self.folder = folder
        self.jobs = jobs
        self.states = [json.loads(path_of(folder, job.number, "json").read_bytes()) for job in jobs]
        self.begins = np.concatenate([[0], np.cumsum([state["documents"] for state in self.states])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.begins[-1])

    @cached_property
    def marks(self) -> np.ndarray:
        """MARK [documents]; `language` and `named` count in `languages` and `named`."""
        marks = self._all("marks", MARK)
        for number, state in enumerate(self.states):
            own = marks[self.begins[number]:self.begins[number + 1]]
            if len(own):
                own["language"] = np.array([self.languages.index(name) for name in state["languages"]])[own["language"]]
                own["named"] = np.array([self.named.index(tuple(names)) for names in state["named"]])[own["named"]]
        return marks

    @cached_property
    def languages(self) -> list[str]:
        """All languages that were told, sorted."""
        return sorted({name for state in self.states for name in state["languages"]})

    @cached_property
    def named(self) -> list[tuple[str, ...]]:
        """By which patterns documents are held out; the first is none."""
        return sorted({(), *(tuple(names) for state in self.states for names in state["named"])})

    @cached_property
    def sources(self) -> np.ndarray:
        """int64 [documents]: the number of the source that each is from."""
        return np.repeat([job.split.source for job in self.jobs], np.diff(self.begins)).astype(np.int64)

    def perplexities(self) -> dict[str, dict[float, int]]:
        """By language, how many texts have at least that perplexity and less than the next one of the histogram's."""
        counts: dict[str, Counter[str]] = {}
        for state in self.states:
            for language, found in state["perplexities"].items():
                counts.setdefault(language, Counter()).update(found)
        return {language: {round(2 ** (place / PERPLEXITY_BINS), 1): found[str(place)]
                           for place in range(min(map(int, found)), max(map(int, found)) + 1)}
                for language, found in sorted(counts.items())}

    def paragraphs(self) -> np.ndarray:
        """PARAGRAPH [paragraphs], of all documents in their order."""
        return self._all("paragraphs", PARAGRAPH)

    def band(self, band: int, near: NearConfig) -> np.ndarray:
        """uint64 [documents]: the keys of one band."""
        return np.concatenate([np.zeros(0, "<u8"), *(
            np.fromfile(path_of(self.folder, job.number, "keys"), "<u8").reshape(-1, near.bands)[:, band]
            for job in self.jobs)])

    def _all(self, kind: str, dtype: np.dtype) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *(np.fromfile(path_of(self.folder, job.number, kind), dtype)
                                                     for job in self.jobs)])

    def documents(self, numbers: Sequence[int]) -> list[Document]:
        """A few documents by their numbers, to show them."""
        found = []
        for number in numbers:
            split = int(np.searchsorted(self.begins, number, "right")) - 1
            with pq.ParquetFile(path_of(self.folder, split, "parquet")) as file:
                row = number - int(self.begins[split])
                for group in range(file.num_row_groups):
                    size = file.metadata.row_group(group).num_rows
                    if row < size:
                        values = file.read_row_group(group, ["text", "source", "id", "category"]).slice(row, 1).to_pylist()
                        found.append(Document(**values[0]))
                        break
                    row -= size
        return found
