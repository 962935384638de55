"""Rows of tables: CSV, tab-separated text, Parquet and Arrow, never the whole file at a time.

CSV follows the quotes of RFC 4180: a quote that does not match costs its own line. In tab-separated text (TSV) a quote is
a character like any other and a line is a row, as the published sets of classified texts are written; where its first row
holds a number and no usual name of a column it is taken for data, and the columns are called `label` and `text`. Of columns
that share a name the first keeps it.
"""

import csv
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from danlu.core.errors import DataError
from danlu.text.files import Located
from danlu.text.lines import BEHIND, BLANK_LINE, MAX_LINE_BYTES, Gate, Line, Value, as_json, is_unicode, read_lines

READ_AGAIN = 10  # times the lines of a CSV file that are read again because of bad rows before them, at most
READ_AHEAD = 1 << 20  # bytes of each column of a Parquet file that are read at a time
Names = Callable[[int], list[str] | None]
# Cells by which a row of names is known although another of them is a number (a year)
COLUMN = re.compile(r"(?:id|idx|index|labels?|prompt|premise|hypothesis|(?:text|sentence)[\d_-]*\w?)", re.IGNORECASE)
NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
BATCH = 256  # rows of a Parquet or Arrow file that are turned into objects at a time


class _CsvLines:
    """The lines under csv.reader: which of them make up the row that is being read, and how to go back to them."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self.lines = lines
        self.ahead: deque[Line] = deque()  # lines that are read again
        self.row: list[Line] = []
        self.num_bytes = self.num_read = self.num_again = 0

    def __iter__(self) -> "_CsvLines":
        return self

    def __next__(self) -> str:
        if self.ahead:
            line = self.ahead.popleft()
        else:
            line = next(self.lines)
            self.num_read += 1
        self.row.append(line)
        self.num_bytes += line.bytes
        if self.num_bytes > MAX_LINE_BYTES and len(self.row) > 1:  # an open quote would collect the file in memory
            raise csv.Error(f"a row of more than {MAX_LINE_BYTES} bytes")
        return line.text

    def take_row(self) -> list[Line]:
        """The lines since the last call."""
        row, self.row, self.num_bytes = self.row, [], 0
        return row

    def give_back(self, lines: list[Line]) -> bool:
        """Has these lines read again. False where so many were already that the work could grow with their square."""
        if self.num_again + len(lines) > READ_AGAIN * self.num_read:
            return False
        self.num_again += len(lines)
        self.ahead.extendleft(reversed(lines))
        return True


def read_csv(located: Located, gate: Gate, names: Names | None = None) -> Iterator[Value]:
    """Rows of a comma-separated file whose first row names the columns.

    A quote that is never closed, or closed in the wrong place, costs its own line: the lines that it swallowed are read
    again. Raises DataError where the names of the columns cannot be read.

    names  of the columns of a row of so many cells, or None where no row has so few; of files without a row of names
    """
    lines = _CsvLines(read_lines(located, gate, errors="surrogateescape"))
    try:
        yield from _read_csv(lines, located, gate, names)
    finally:
        if lines.ahead:  # no more is asked for than stands before lines that were to be read again
            gate.rows -= len(lines.ahead)
            gate.station.drop(BEHIND, rows=len(lines.ahead), bytes=sum(line.bytes for line in lines.ahead))


def _read_csv(lines: _CsvLines, located: Located, gate: Gate, names: Names | None) -> Iterator[Value]:
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(lines, strict=True)
    header: list[str] | None = None
    after_bad = False  # nothing since the last bad row was accepted
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            if header is None and names is None:
                raise DataError(f"the column names cannot be read: {error}", where=f"{located.label}:{lines.row[0].number}",
                                hint="The first row has to name the columns, separated by commas.") from None
            _refuse_csv(lines, error, located.label, gate)
            after_bad = True
            continue
        row = lines.take_row()
        where, size = f"{located.label}:{row[0].number}", sum(line.bytes for line in row)
        if len(row) > 1:
            gate.rows -= len(row) - 1
            gate.station.drop("lines of one row", rows=len(row) - 1)
        if not cells:
            gate.station.drop(BLANK_LINE, rows=1, bytes=size)
            continue
        if names is not None:
            header = names(len(cells))
        elif header is None:
            if not is_unicode(cells):
                raise DataError("the column names are not UTF-8", where=where, hint="Save the file as UTF-8.")
            header = distinct(cells)
            gate.station.drop("column names", rows=1, bytes=size)
            continue
        if after_bad and sum(line.text.count('"') for line in row) % 2:
            # rather the end of a cell of many lines, whose beginning was refused, than a row of its own
            gate.refuse(where, "bad CSV: a stray quote after a bad row", ",".join(cells), size, kind="bad CSV")
        elif header is None:
            gate.refuse(where, f"{len(cells)} cells in a row", ",".join(cells), size, kind="too few cells")
        elif len(cells) != len(header):
            gate.refuse(where, f"{len(cells)} cells in a row of {len(header)} columns", ",".join(cells), size,
                        kind="another number of cells than columns")
        elif not is_unicode(cells):
            gate.refuse(where, "not UTF-8", ",".join(cells), size)
        else:
            after_bad = False
            yield Value(where, dict(zip(header, cells, strict=True)), size)


def _refuse_csv(lines: _CsvLines, error: csv.Error, label: str, gate: Gate) -> None:
    """Refuses the first line of a bad row and has the others read again; all of them where that was done too often."""
    first, *others = lines.take_row()
    reason = f"bad CSV: {error}" + (f" ({len(others)} lines further on)" if others else "")
    refused = [first] if lines.give_back(others) else [first, *others]
    gate.refuse(f"{label}:{first.number}", reason, first.text, sum(line.bytes for line in refused), rows=len(refused),
                kind="bad CSV")


def read_tsv(located: Located, gate: Gate) -> Iterator[Value]:
    """Rows of tab-separated text, one a line; the first row names the columns unless it holds a number and no name.

    Raises DataError where a first row with a number does not hold one label and one or two texts.
    """
    names: list[str] | None = None
    for line in read_lines(located, gate):
        where, cells = f"{located.label}:{line.number}", line.text.rstrip("\r\n").split("\t")
        if not line.text.strip():
            gate.station.drop(BLANK_LINE, rows=1, bytes=line.bytes)
            continue
        if names is None:
            if not any(map(_is_number, cells)) or any(COLUMN.fullmatch(cell.strip()) for cell in cells):
                names = distinct(cells)
                gate.station.drop("column names", rows=1, bytes=line.bytes)
                continue
            names = _names(cells, where)
            gate.station.note(f"no column names; read as {', '.join(names)}")
        if len(cells) != len(names):
            gate.refuse(where, f"{len(cells)} cells in a row of {len(names)} columns", line.text, line.bytes,
                        kind="another number of cells than columns")
        else:
            yield Value(where, dict(zip(names, cells, strict=True)), line.bytes)


def _names(cells: list[str], where: str) -> list[str]:
    """Of a table without column names: `label` for the one number, `text` and `text2` for the others."""
    numbers = [_is_number(cell) for cell in cells]
    if sum(numbers) != 1 or len(cells) not in (2, 3):
        raise DataError(f"the first row of {len(cells)} cells names no columns, and which cell is the label cannot be told",
                        where=where, hint="Put a row with the columns' names before it: label, text and perhaps text2.")
    texts = iter(("text", "text2"))
    return ["label" if number else next(texts) for number in numbers]


def _is_number(cell: str) -> bool:
    return NUMBER.fullmatch(cell.strip()) is not None


def distinct(names: Sequence[str]) -> list[str]:
    """The names of columns, each once: a second “text” is “text (2)”, which nobody asks for and the ledger can name."""
    found: dict[str, None] = {}
    for name in names:
        own, number = name, 1
        while own in found:
            number += 1
            own = f"{name} ({number})"
        found[own] = None
    return list(found)


def read_parquet_rows(located: Located, gate: Gate) -> Iterator[Value]:
    """Rows of a Parquet file, numbered from 1, of as many bytes as they have as JSON lines. DataError if damaged."""
    try:
        with pq.ParquetFile(located.path, buffer_size=READ_AHEAD) as file:  # else a whole row group is in memory
            groups = range(file.num_row_groups)[located.begin:located.end]
            yield from _rows(file.iter_batches(batch_size=BATCH, row_groups=groups), located, gate)
    except pa.ArrowException as error:
        raise DataError(f"is no Parquet file, or damaged: {error}", where=str(located.path)) from error
    except OSError as error:
        raise DataError(f"cannot be read: {error}", where=str(located.path)) from error


def parquet_pieces(located: Located, size: int) -> Iterator[tuple[Located, int]]:
    """Runs of row groups of at least `size` bytes, but for the last one, with their bytes; DataError where damaged."""
    try:
        with pq.ParquetFile(located.path) as file:
            groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    except pa.ArrowException as error:
        raise DataError(f"is no Parquet file, or damaged: {error}", where=str(located.path)) from error
    begin, total, row, line = 0, 0, 1, 1
    for number, group in enumerate(groups, 1):
        row += group.num_rows
        total += sum(group.column(column).total_compressed_size for column in range(group.num_columns))
        if total >= size or number == len(groups):
            yield replace(located, begin=begin, end=number, line=line), total
            begin, total, line = number, 0, row


def read_arrow_rows(located: Located, gate: Gate) -> Iterator[Value]:
    """Rows of an Arrow file or stream (the cache of `datasets`), counted like a Parquet file's. DataError if damaged."""
    try:
        with pa.OSFile(str(located.path)) as source:
            magic = source.read(6)
            source.seek(0)
            if magic == b"ARROW1":
                file = pa.ipc.open_file(source)
                batches = (file.get_batch(number) for number in range(file.num_record_batches))
                yield from _rows(batches, located, gate)
            else:
                yield from _rows(pa.ipc.open_stream(source), located, gate)
    except pa.ArrowException as error:
        raise DataError(f"is no Arrow file, or damaged: {error}", where=str(located.path)) from error
    except OSError as error:
        raise DataError(f"cannot be read: {error}", where=str(located.path)) from error


def _rows(batches: Iterator[pa.RecordBatch], located: Located, gate: Gate) -> Iterator[Value]:
    number = located.line - 1
    for batch in batches:
        batch = batch.rename_columns(distinct(batch.schema.names))
        for start in range(0, batch.num_rows, BATCH):
            for row in _objects(batch.slice(start, BATCH)):
                number += 1
                size = len(as_json(row).encode()) + 1 if row is not None else 0
                gate.take(rows=1, bytes=size)
                if row is None:
                    gate.refuse(f"{located.label}:{number}", "not UTF-8")
                else:
                    yield Value(f"{located.label}:{number}", row, size)


def _objects(batch: pa.RecordBatch) -> list[dict[str, Any] | None]:
    """The rows as objects; None for one with a text that is not UTF-8, which Arrow lets through."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [None]
        half = batch.num_rows // 2
        return _objects(batch.slice(0, half)) + _objects(batch.slice(half))
