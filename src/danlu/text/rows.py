"""From bytes to lines and JSON values, with a place for each and a reason for everything that is refused.

Lines are decoded one by one, so that one bad byte costs one line. JSON is recognised by its content, not by the file's
name: a list, one object, one object a line, or objects after one another; a broken element of a list is refused alone
and reading goes on at the next, and so it does after a line of CSV whose quotes do not match. A Gate does the counting:
what is read goes in as raw bytes, what is refused is dropped and kept in the quarantine, and too many refusals end the
reading.

    gate = Gate("read:a.jsonl", ledger)
    for value in read_values(Located(path, "a.jsonl"), gate):
        ...                                     # value.where, value.value, value.bytes; the caller gives or refuses
    gate.finish()
"""

import csv
import json
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danlu.core.errors import DataError
from danlu.core.ledger import EXCERPT, Ledger, Station
from danlu.text.files import Located

MAX_LINE_BYTES = 32 << 20  # a longer line is refused: it would be held in memory several times over
MAX_JSON_BYTES = 1 << 30  # a JSON file that is no JSON lines is read whole
MAX_REFUSED = 0.2  # the share of refused rows at which a source is taken for something else than it claims
MIN_ROWS = 20  # below this many rows a share says nothing
READ_AGAIN = 10  # times the lines of a CSV file that are read again because of bad rows before them, at most
NAMED = 3  # refused places that an error names
BOM = b"\xef\xbb\xbf"
MARKUP = "markup around the text"


class Gate:
    """The counter at one station: takes rows in, drops with reasons, and stops where too much is refused.

    `strict`: the first refusal raises DataError. Else `finish` raises where more than `max_refused` of at least
    MIN_ROWS rows were refused.
    """

    def __init__(self, name: str, ledger: Ledger, strict: bool = False, max_refused: float = MAX_REFUSED) -> None:
        self.station: Station = ledger.station(name)
        self.ledger = ledger
        self.strict = strict
        self.max_refused = max_refused
        self.rows = 0
        self.refused = 0
        self.first: list[str] = []

    def take(self, rows: int = 0, bytes: int = 0) -> None:
        """What is read: rows and raw bytes."""
        self.rows += rows
        self.station.take(rows=rows, bytes=bytes)

    def split(self, reason: str, rows: int) -> None:
        """One row turns out to hold more: `rows` further ones are added."""
        if rows:
            self.rows += rows
            self.station.add(reason, rows=rows)

    def give(self, text_bytes: int, raw_bytes: int, rows: int = 1) -> None:
        """Rows go on with `text_bytes`; the rest of their raw bytes was markup."""
        self.station.give(rows=rows, bytes=text_bytes)
        if raw_bytes > text_bytes:
            self.station.drop(MARKUP, bytes=raw_bytes - text_bytes)
        elif text_bytes > raw_bytes:
            self.station.add("line ends between parts", bytes=text_bytes - raw_bytes)

    def refuse(self, where: str, reason: str, excerpt: str = "", bytes: int = 0, rows: int = 1,
               kind: str | None = None) -> None:
        """Drops what cannot be used; `kind` is the form of the reason that is counted, where the reason has details."""
        excerpt = excerpt[:EXCERPT].encode("utf-8", "replace").decode()
        if self.strict:
            raise DataError(reason, where=where, hint="strict: true makes the first bad row an error.")
        self.station.drop(kind or reason, rows=rows, bytes=bytes)
        self.ledger.quarantine(where, reason, excerpt)
        self.refused += rows
        if len(self.first) < NAMED:
            self.first.append(f"{where}: {reason}")

    def finish(self) -> None:
        """Raises DataError if too many of the rows were refused."""
        if self.rows >= MIN_ROWS and self.refused > self.max_refused * self.rows:
            raise DataError(
                f"{self.refused} of {self.rows} rows were refused, more than the {self.max_refused:.0%} allowed:\n  "
                + "\n  ".join(self.first), where=self.station.name.removeprefix("read:"),
                hint="Is it another format, or not UTF-8? max_refused allows a larger share.")


@dataclass(frozen=True, slots=True)
class Line:
    """A decoded line with its line end, its number from 1 and its raw length in bytes."""

    number: int
    text: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Value:
    """One JSON value or CSV row; `bytes` is its raw length. `whole`: it is all there is in the file."""

    where: str
    value: Any
    bytes: int
    whole: bool = False


def read_lines(located: Located, gate: Gate, errors: str = "strict") -> Iterator[Line]:
    """The lines of a file. Each is taken as one row; a byte order mark, bad bytes and endless lines are dropped."""
    number = 0
    try:
        with open(located.path, "rb") as file:
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                gate.take(rows=1, bytes=len(raw))
                if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
                    rest = _skip_line(file)
                    gate.take(bytes=rest)
                    gate.refuse(f"{located.label}:{number}", f"a line of more than {MAX_LINE_BYTES} bytes",
                                raw[:EXCERPT].decode("utf-8", "replace"), len(raw) + rest)
                    continue
                if number == 1 and raw.startswith(BOM):
                    raw = raw[len(BOM):]
                    gate.station.drop("byte order mark", bytes=len(BOM))
                    if not raw:
                        gate.station.drop("blank line", rows=1)
                        continue
                try:
                    text = raw.decode("utf-8", errors)
                except UnicodeDecodeError as error:
                    gate.refuse(f"{located.label}:{number}", f"not UTF-8 (byte {error.start + 1} of the line)",
                                raw[:EXCERPT].decode("utf-8", "replace"), len(raw), kind="not UTF-8")
                    continue
                yield Line(number, text, len(raw))
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(located.path)) from error


def _skip_line(file: Any) -> int:
    """Reads to the end of the line in bounded pieces; how many bytes that was."""
    total = 0
    while piece := file.readline(1 << 20):
        total += len(piece)
        if piece.endswith(b"\n"):
            break
    return total


def read_values(located: Located, gate: Gate) -> Iterator[Value]:
    """Every JSON value of a .json or .jsonl file or every row of a .csv; each is taken as one row with its raw bytes.

    The caller balances: for every value it calls `gate.give` or `gate.refuse` with the value's bytes.
    """
    if located.path.suffix.lower() == ".csv":
        yield from _read_csv(located, gate)
        return
    shape = _shape(located)
    if shape == "lines":
        yield from _read_json_lines(located, gate)
    else:
        yield from _read_json_whole(located, gate, shape)


def read_rows(path: Path, gate: Gate, label: str | None = None) -> Iterator[tuple[str, dict]]:
    """(“file:line”, row) for every object of a .jsonl, .json or .csv file; anything else is refused.

    The station balances in raw bytes: a row goes out with the bytes it came in with.
    """
    for value in read_values(Located(path, label or path.name), gate):
        if isinstance(value.value, dict):
            gate.give(value.bytes, value.bytes)
            yield value.where, value.value
        else:
            refuse_value(gate, value, f"not an object but {kind_of(value.value)}")


def refuse_value(gate: Gate, value: Value, reason: str, kind: str | None = None) -> None:
    """Refuses a whole value, with the beginning of its JSON as the excerpt."""
    gate.refuse(value.where, reason, json.dumps(value.value, ensure_ascii=False), value.bytes, kind=kind)


def kind_of(value: object) -> str:
    """A JSON value's type in words."""
    if isinstance(value, bool):
        return "a truth value"
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names.get(type(value), "nothing" if value is None else type(value).__name__)


def _shape(located: Located) -> str:
    """"lines", "list" (elements in brackets, or objects after one another) or "object"."""
    try:
        with open(located.path, "rb") as file:
            first = file.readline(MAX_LINE_BYTES).removeprefix(BOM).strip()
            while not first and (line := file.readline(MAX_LINE_BYTES)):
                first = line.strip()
            rest = file.read(1 << 10).strip()
            size = located.path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(located.path)) from error
    if first.startswith(b"["):
        return "list"
    if not first.startswith(b"{"):
        return "lines"
    if _loads(first) is not None:
        return "object" if not rest and located.path.suffix.lower() == ".json" else "lines"
    if size <= MAX_JSON_BYTES and _loads(located.path.read_bytes().removeprefix(BOM)) is not None:
        return "object"
    return "list" if first == b"{" else "lines"


def _loads(data: bytes) -> Any:
    """The value, or None where it is no JSON; bad bytes are let through, to be refused at their own row."""
    try:
        return json.loads(data.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return None


def _read_json_lines(located: Located, gate: Gate) -> Iterator[Value]:
    for line in read_lines(located, gate):
        where = f"{located.label}:{line.number}"
        if not line.text.strip():
            gate.station.drop("blank line", rows=1, bytes=line.bytes)
            continue
        try:
            value = json.loads(line.text)
        except (ValueError, RecursionError) as error:
            gate.refuse(where, f"bad JSON: {_why(error)}", line.text, line.bytes, kind="bad JSON")
            continue
        if "\\u" in line.text and not _is_unicode(value):
            gate.refuse(where, "half of a surrogate pair", line.text, line.bytes)
            continue
        yield Value(where, value, line.bytes)


def _read_json_whole(located: Located, gate: Gate, shape: str) -> Iterator[Value]:
    try:
        if located.path.stat().st_size > MAX_JSON_BYTES:
            raise DataError(f"has more than {MAX_JSON_BYTES} bytes as one JSON value", where=located.label,
                            hint="Write it as JSON lines, one object a line.")
        data = located.path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(located.path)) from error
    if data.startswith(BOM):
        gate.take(bytes=len(BOM))
        gate.station.drop("byte order mark", bytes=len(BOM))
        data = data[len(BOM):]
    text = data.decode("utf-8", "surrogateescape")
    if shape == "list":
        yield from _read_elements(text, located.label, gate)
        return
    value = json.loads(text)
    gate.take(rows=1, bytes=len(data))
    if _is_unicode(value):
        yield Value(f"{located.label}:1", value, len(data), whole=True)
    else:
        gate.refuse(f"{located.label}:1", "not UTF-8", text, len(data))


_GAP = re.compile(r"[\s,]*")
_NEXT_OBJECT = re.compile(r"\}[\s,]*(?=\{)")


def _read_elements(text: str, label: str, gate: Gate) -> Iterator[Value]:
    """The elements of a JSON list, or objects after one another; after a broken one, goes on at the next object."""
    decoder = json.JSONDecoder()
    position, line, index, last_line, depth = 0, 1, 0, 0, 0
    while True:
        begin = _end_of(_GAP, text, position)
        if begin < len(text) and text[begin] == ("]" if depth else "["):
            depth, begin = 1 - depth, begin + 1
            _markup(gate, text[position:begin])
            line, position = line + text.count("\n", position, begin), begin
            continue
        _markup(gate, text[position:begin])
        line += text.count("\n", position, begin)
        if begin == len(text):
            break
        index += 1
        shared = line == last_line or (index == 1 and "\n" not in text.strip())  # elements on one line get numbers
        where = f"{label}:{line}#{index}" if shared else f"{label}:{line}"
        last_line = line
        value: Any = None
        try:
            value, end = decoder.raw_decode(text, begin)
            reason = "" if _is_unicode(value) else "not UTF-8"
        except (ValueError, RecursionError) as error:
            end, reason = _end_of(_NEXT_OBJECT, text, begin), f"bad JSON: {_why(error)}"
            end = _after_last(text, begin) if end == begin else end
        size = len(text[begin:end].encode("utf-8", "surrogateescape"))
        gate.take(rows=1, bytes=size)
        if reason:
            gate.refuse(where, reason, text[begin:begin + EXCERPT], size, kind=reason.partition(":")[0])
        else:
            yield Value(where, value, size)
        line, position = line + text.count("\n", begin, end), end
    if depth:
        gate.refuse(f"{label}:{line}", "the list is not closed: the file may be cut off", rows=0)


def _end_of(pattern: re.Pattern[str], text: str, position: int) -> int:
    """Where the pattern's next match ends; `position` itself where there is none."""
    found = pattern.search(text, position)
    return found.end() if found else position


def _after_last(text: str, begin: int) -> int:
    """The end of a broken element that no other object follows: before the list's closing bracket, if it has one."""
    stripped = text.rstrip()
    return len(stripped) - 1 if stripped.endswith("]") and len(stripped) - 1 > begin else len(text)


def _markup(gate: Gate, text: str) -> None:
    if text:
        size = len(text.encode("utf-8", "surrogateescape"))
        gate.take(bytes=size)
        gate.station.drop(MARKUP, bytes=size)


def _is_unicode(value: object) -> bool:
    """False where a string holds half a surrogate pair: a bad byte let through, or a broken escape in the JSON."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _why(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


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


def _read_csv(located: Located, gate: Gate) -> Iterator[Value]:
    """Rows of a comma-separated file whose first row names the columns.

    A quote that is never closed, or closed in the wrong place, costs its own line: the lines that it swallowed are read
    again. Raises DataError where the names of the columns cannot be read.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    lines = _CsvLines(read_lines(located, gate, errors="surrogateescape"))
    reader = csv.reader(lines, strict=True)
    header: list[str] | None = None
    after_bad = False  # nothing since the last bad row was accepted
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            if header is None:
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
            gate.station.drop("blank line", rows=1, bytes=size)
        elif header is None:
            if not _is_unicode(cells):
                raise DataError("the column names are not UTF-8", where=where, hint="Save the file as UTF-8.")
            header = cells
            gate.station.drop("column names", rows=1, bytes=size)
        elif after_bad and sum(line.text.count('"') for line in row) % 2:
            # rather the end of a cell of many lines, whose beginning was refused, than a row of its own
            gate.refuse(where, "bad CSV: a stray quote after a bad row", ",".join(cells), size, kind="bad CSV")
        elif len(cells) != len(header):
            gate.refuse(where, f"{len(cells)} cells in a row of {len(header)} columns", ",".join(cells), size,
                        kind="another number of cells than columns")
        elif not _is_unicode(cells):
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
