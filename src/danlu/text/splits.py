"""A corpus cut into splits: pieces that are read and cleaned apart, in any order, by any number of processes.

A split is a run of small files, one file, whole lines of a large one (JSON lines, and plain text whose lines are
documents), row groups of a large Parquet file, or modules of packages. Where the cuts lie depends on the files alone, so
that the outcome does not depend on who works; line numbers are counted when cutting, so that a document's id is its place
in the file. The order of splits is the order of documents: by source, file and place in the file.

    for split in plan_splits(sources, base):
        for document in read_split(split, sources[split.source], gate): ...
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from danlu.core.records import Document
from danlu.text.encodings import UTF_8
from danlu.text.files import COMPRESSED, DOCSTRINGS, TEXT_SUFFIXES, Located, docstring_names, modules, suffix_of
from danlu.text.lines import Gate, encoding, unreadable
from danlu.text.read import SourceConfig, find_documents, read_found, read_modules
from danlu.text.registry import Found
from danlu.text.rows import is_json_lines
from danlu.text.tables import parquet_pieces

SPLIT_BYTES = 16 << 20
CHUNK = 1 << 20  # bytes that are read at a time to find the ends of lines
LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class Split:
    """A piece of the source of that number: files, or lines or row groups of one (`found`), or packages (`modules`)."""

    source: int
    found: Found | None = None
    modules: tuple[str, ...] = ()
    bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """What it is, in plain values: work that was done for another split is not taken for this one's."""
        files = () if self.found is None else self.found.files
        return {"source": self.source, "modules": list(self.modules), "bytes": self.bytes,
                "files": [[file.label, file.begin, file.end, file.line] for file in files]}


def plan_splits(sources: Sequence[SourceConfig], base: Path, size: int = SPLIT_BYTES) -> list[Split]:
    """The splits of all sources, in order. Raises ConfigError where nothing is there, DataError for unreadable files."""
    return [split for number, source in enumerate(sources) for split in _splits(number, source, base, size)]


def read_split(split: Split, source: SourceConfig, gate: Gate) -> Iterator[Document]:
    """The documents of one split; the gate is not finished, for it may be one of several."""
    if split.found is None:
        yield from read_modules(split.modules, source, gate)
    else:
        yield from read_found(split.found, source, gate)


def _splits(number: int, source: SourceConfig, base: Path, size: int) -> Iterator[Split]:
    if source.path.startswith(DOCSTRINGS):
        sized = [(name, sum(path.stat().st_size for _, path in modules(name))) for name in docstring_names(source.path)]
        for run, total in _runs(sized, size):
            yield Split(number, modules=tuple(run), bytes=total)
        return
    found = find_documents(source, base)
    if found.count is not None:  # which of them are the first is known only when they are read one after the other
        yield Split(number, found, bytes=sum(file.path.stat().st_size for file in found.files))
        return
    pieces = [piece for file in found.files for piece in _pieces(file, source, size)]
    for run, total in _runs(pieces, size):
        yield Split(number, replace(found, files=tuple(run)), bytes=total)


def _runs(sized: Sequence[tuple[Any, int]], size: int) -> Iterator[tuple[list[Any], int]]:
    """Runs of items whose sizes together stay below `size`; a larger one is alone."""
    run: list[Any] = []
    total = 0
    for item, length in sized:
        if run and total + length > size:
            yield run, total
            run, total = [], 0
        run.append(item)
        total += length
    if run:
        yield run, total


def _pieces(file: Located, source: SourceConfig, size: int) -> list[tuple[Located, int]]:
    """The file whole, or cut where it is large: at row groups, or at ends of lines where lines stand for themselves."""
    try:
        length = file.path.stat().st_size
        suffix = suffix_of(file.path)
        if length > size and suffix == ".parquet":
            return list(parquet_pieces(file, size)) or [(file, length)]
        by_line = suffix in LINES or (suffix in TEXT_SUFFIXES and source.document == "line")
        if length <= size or not by_line or file.path.suffix.lower() in COMPRESSED or encoding(file.path) != UTF_8:
            return [(file, length)]
        if suffix in LINES and not is_json_lines(file):
            return [(file, length)]
        return list(_cut(file, size))
    except OSError as error:
        raise unreadable(file, error) from error


def _cut(file: Located, size: int) -> Iterator[tuple[Located, int]]:
    """Pieces of at least `size` bytes, each to the end of a line, but for the last one."""
    begin = at = 0
    line = number = 1  # of the piece's first line, and of the line at `at`
    with open(file.path, "rb") as data:
        while chunk := data.read(CHUNK):
            due = begin + size - 1 - at  # the first place in the chunk whose line end closes the piece
            end = chunk.find(b"\n", max(due, 0)) + 1 if due < len(chunk) else 0
            if end:
                number += chunk.count(b"\n", 0, end)
                yield replace(file, begin=begin, end=at + end, line=line), at + end - begin
                begin, line = at + end, number
                data.seek(begin)
                at = begin
            else:
                number += chunk.count(b"\n")
                at += len(chunk)
    if at > begin:
        yield replace(file, begin=begin, end=None, line=line), at - begin
