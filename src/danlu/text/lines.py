"""From the bytes of a file to lines with a place for each, and the Gate that counts what is read and refused.

Lines are decoded one by one, so that one bad byte costs one line; compressed files (`.gz`, `.bz2`, `.xz`, `.zst`) are
read as what they hold, and counted in its bytes. What is read goes in at the Gate as raw bytes, what is refused is
dropped and kept in the quarantine, and too many refusals end the reading.

    gate = Gate("read:a.jsonl", ledger)
    for line in read_lines(Located(path, "a.jsonl"), gate):
        ...                                     # line.number, line.text, line.bytes; the caller gives or refuses
    gate.finish()
"""

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from danlu.core.errors import DataError
from danlu.core.ledger import EXCERPT, Ledger, Station
from danlu.text.encodings import RECODED, SAMPLE, as_utf8, decode_line, encoding_of
from danlu.text.expansion import TOO_LARGE, Bounded, Expanded, limit_of
from danlu.text.files import Located, compression_of

PACKED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
MAX_LINE_BYTES = 32 << 20  # a longer line is refused: it would be held in memory several times over
MAX_REFUSED = 0.2  # the share of refused rows at which a source is taken for something else than it claims
MIN_ROWS = 20  # below this many rows a share says nothing
NAMED = 3  # refused places that an error names
MAX_NOTES = 100  # of what is read, and of columns that are not; rows that are objects of many keys could have any number
NO_FIELD = "no field"  # how the reason begins where a row has no text under the name that is asked for
BOM = b"\xef\xbb\xbf"
MARKUP = "markup around the text"
BLANK_LINE, LINE_END = "blank line", "line end after the text"
BEHIND = "behind the records asked for"  # of what was read before it was known that it is not needed
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what a damaged compressed file raises while it is read


class Gate:
    """The counter at one station: takes rows in, drops with reasons, and stops where too much is refused.

    max_refused  the share of refused rows that is accepted: `finish` raises DataError where more of at least MIN_ROWS
                 rows were refused; 0: the first refusal raises it
    """

    def __init__(self, name: str, ledger: Ledger, max_refused: float = MAX_REFUSED) -> None:
        self.station: Station = ledger.station(name)
        self.ledger = ledger
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
        if self.max_refused == 0:
            raise DataError(reason, where=where, hint="max_refused: 0 makes the first refused row an error.")
        self.station.drop(kind or reason, rows=rows, bytes=bytes)
        self.ledger.quarantine(where, reason, excerpt)
        self.refused += rows
        if len(self.first) < NAMED:
            self.first.append(f"{where}: {reason}")

    def columns(self, read: str, unread: Iterable[str]) -> None:
        """Notes by which columns a row that goes on was read, and which of the others hold something."""
        for what, name in [("read", read), *(("not read", name) for name in unread)]:
            note, notes = f"{what}: {name[:EXCERPT]}", self.station.notes
            full = note not in notes and sum(known.startswith(f"{what}: ") for known in notes) >= MAX_NOTES
            self.station.note(f"{what}: other columns" if full else note)

    def finish(self) -> None:
        """Raises DataError if too many of the rows were refused."""
        if self.rows >= MIN_ROWS and self.refused > self.max_refused * self.rows:
            misnamed = all(NO_FIELD in first for first in self.first)
            raise DataError(
                f"{self.refused} of {self.rows} rows were refused, more than the {self.max_refused:.0%} allowed:\n  "
                + "\n  ".join(self.first), where=self.station.name.removeprefix("read:"),
                hint="Name the field that holds the text: field, in a corpus's source or a filter's; text_field, in a step."
                if misnamed else
                "Is it another format, or not UTF-8? Mend or remove the rows; max_refused allows a larger share.")


@dataclass(frozen=True, slots=True)
class Line:
    """A decoded line with its line end, its number from 1 and its length in bytes of UTF-8."""

    number: int
    text: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Value:
    """One JSON value or row of a table; `bytes` is its raw length. `whole`: it is all there is in the file."""

    where: str
    value: Any
    bytes: int
    whole: bool = False


def open_file(path: Path, limit: int | None = None) -> io.BufferedReader:
    """The file's bytes, without the compression that its name says. Raises one of UNREADABLE, while reading too.

    limit  bytes to which compressed ones may expand (None: as many as their number allows); more raise Expanded
    """
    suffix = compression_of(path)
    if not suffix:
        return io.BufferedReader(open(path, "rb", buffering=0), SAMPLE)
    allowed = limit_of(path.stat().st_size, limit)
    file = pa.input_stream(str(path), compression="zstd") if suffix == ".zst" else PACKED[suffix](path, "rb")
    return io.BufferedReader(Bounded(file, allowed), SAMPLE)


def open_text(located: Located, gate: Gate | None = None) -> io.BufferedReader:
    """As `open_file`, in UTF-8, whatever encoding the file is in."""
    return as_utf8(open_file(located.path, located.limit), gate)


def encoding(path: Path) -> str:
    """The name of the encoding that a file is in, as its beginning tells."""
    with open_file(path) as file:
        return encoding_of(file.peek(SAMPLE)[:SAMPLE])


def unreadable(located: Located, error: Exception, line: int = 0) -> DataError:
    """The error for one of UNREADABLE; `line` is the last one that could be read."""
    if isinstance(error, Expanded):
        return DataError(str(error), where=located.label, hint="Unpack it beforehand, if it is meant to be so large.")
    if isinstance(error, OSError) and error.errno is not None:
        return DataError(f"cannot be read: {error.strerror}", where=str(located.path))
    after = f" after line {line}" if line else ""
    return DataError(f"the compressed file is cut off or damaged{after}: {error}", where=located.label,
                     hint="Fetch or make the file again; nothing behind that place can be read.")


def give_up(gate: Gate, where: str, error: Expanded) -> None:
    """Counts as one refused row that the rest of a compressed file is not read."""
    gate.take(rows=1)
    gate.refuse(where, f"{error}; the rest is not read", kind=TOO_LARGE)


def read_lines(located: Located, gate: Gate, errors: str = "strict") -> Iterator[Line]:
    """The lines of a file. Each is taken as one row; a byte order mark, bad bytes and endless lines are dropped.

    What lies behind the bound of a compressed file is one refused row. Raises DataError where the file cannot be read, or
    where compressed data end too early.
    """
    number, at = located.line - 1, located.begin
    try:
        with open_text(located, gate) as file:
            beginning = file.peek(SAMPLE)[:SAMPLE]
            if at:
                file.seek(at)
            while (located.end is None or at < located.end) and (raw := file.readline(MAX_LINE_BYTES + 1)):
                number, at = number + 1, at + len(raw)
                gate.take(rows=1, bytes=len(raw))
                if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
                    rest = _skip_line(file)
                    at += rest
                    gate.take(bytes=rest)
                    gate.refuse(f"{located.label}:{number}", f"a line of more than {MAX_LINE_BYTES} bytes",
                                raw[:EXCERPT].decode("utf-8", "replace"), len(raw) + rest)
                    continue
                if number == 1 and raw.startswith(BOM):
                    raw = raw[len(BOM):]
                    gate.station.drop("byte order mark", bytes=len(BOM))
                    if not raw:
                        gate.station.drop(BLANK_LINE, rows=1)
                        continue
                line = _decoded(raw, beginning, errors, number, located, gate)
                if line is not None:
                    yield line
    except Expanded as error:
        give_up(gate, f"{located.label}:{number + 1}", error)
    except UNREADABLE as error:
        raise unreadable(located, error, number) from error


def _decoded(raw: bytes, beginning: bytes, errors: str, number: int, located: Located, gate: Gate) -> Line | None:
    """The line, recoded where it is in another encoding than the file, of which the beginning is given; None if refused."""
    try:
        return Line(number, raw.decode("utf-8", errors), len(raw))
    except UnicodeDecodeError as error:
        text, name = decode_line(raw, beginning)
        if text is None:
            gate.refuse(f"{located.label}:{number}", f"not UTF-8 (byte {error.start + 1} of the line)",
                        raw[:EXCERPT].decode("utf-8", "replace"), len(raw), kind="not UTF-8")
            return None
    gate.station.note(f"lines decoded as {name}")
    size = len(text.encode())
    gate.station.add(RECODED, bytes=size - len(raw))
    return Line(number, text, size)


def _skip_line(file: Any) -> int:
    """Reads to the end of the line in bounded pieces; how many bytes that was."""
    total = 0
    while piece := file.readline(1 << 20):
        total += len(piece)
        if piece.endswith(b"\n"):
            break
    return total


def refuse_value(gate: Gate, value: Value, reason: str, kind: str | None = None) -> None:
    """Refuses a whole value, with the beginning of its JSON as the excerpt."""
    gate.refuse(value.where, reason, as_json(value.value), value.bytes, kind=kind)


def kind_of(value: object) -> str:
    """A JSON value's type in words."""
    if isinstance(value, bool):
        return "a truth value"
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names.get(type(value), "nothing" if value is None else type(value).__name__)


def is_unicode(value: object) -> bool:
    """False where a string holds half a surrogate pair: a bad byte let through, or a broken escape in the JSON."""
    try:
        as_json(value).encode()
    except UnicodeEncodeError:
        return False
    return True


def as_json(value: object) -> str:
    """The value as JSON; what JSON does not know (a date in a Parquet file) as its text."""
    return json.dumps(value, ensure_ascii=False, default=str)
