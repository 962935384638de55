"""From files to rows: JSON in every dress, and tables, with a place for each row and a reason for everything refused.

JSON is recognised by its content, not by the file's name: a list, one object, one object a line, or objects after one
another; a broken element of a list is refused alone and reading goes on at the next. JSON lines, CSV, TSV, Parquet and
Arrow are streamed; a JSON list is read whole. Files may be compressed (`danlu.text.lines`).

    gate = Gate("read:a.jsonl", ledger)
    for value in read_values(Located(path, "a.jsonl"), gate):
        ...                                     # value.where, value.value, value.bytes; the caller gives or refuses
    gate.finish()
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from danlu.core.errors import DataError
from danlu.core.ledger import EXCERPT
from danlu.text.files import Located, suffix_of
from danlu.text.lines import (
    BOM,
    MARKUP,
    MAX_LINE_BYTES,
    MAX_REFUSED,
    UNREADABLE,
    Gate,
    Line,
    Value,
    is_unicode,
    kind_of,
    open_file,
    read_lines,
    refuse_value,
    unreadable,
)
from danlu.text.tables import read_arrow_rows, read_csv, read_parquet_rows, read_tsv

__all__ = ["MARKUP", "MAX_REFUSED", "Gate", "Line", "Value", "kind_of", "read_lines", "read_rows", "read_values",
           "refuse_value"]

MAX_JSON_BYTES = 1 << 30  # a JSON file that is no JSON lines is read whole
LOOKED_AT = 8  # lines by which JSON lines with a broken first one are told from JSON over many lines
TABLES = {".csv": read_csv, ".tsv": read_tsv, ".txt": read_tsv, ".parquet": read_parquet_rows, ".arrow": read_arrow_rows}


def read_values(located: Located, gate: Gate) -> Iterator[Value]:
    """Every JSON value of a file of JSON, or every row of a table; each is taken as one row with its raw bytes.

    The caller balances: for every value it calls `gate.give` or `gate.refuse` with the value's bytes.
    """
    table = TABLES.get(suffix_of(located.path))
    if table is not None:
        yield from table(located, gate)
        return
    shape = _shape(located)
    if shape == "lines":
        yield from _read_json_lines(located, gate)
    else:
        yield from _read_json_whole(located, gate, shape)


def read_rows(path: Path, gate: Gate, label: str | None = None) -> Iterator[tuple[str, dict]]:
    """(“file:line”, row) for every object of a file of JSON, or row of a table; anything else is refused.

    The station balances in raw bytes: a row goes out with the bytes it came in with.
    """
    for value in read_values(Located(path, label or path.name), gate):
        if isinstance(value.value, dict):
            gate.give(value.bytes, value.bytes)
            yield value.where, value.value
        else:
            refuse_value(gate, value, f"not an object but {kind_of(value.value)}")


def _shape(located: Located) -> str:
    """"lines", "list" (elements in brackets, or objects after one another) or "object"."""
    try:
        with open_file(located.path) as file:
            first = file.readline(MAX_LINE_BYTES).removeprefix(BOM).strip()
            while not first and (line := file.readline(MAX_LINE_BYTES)):
                first = line.strip()
            if first.startswith(b"["):
                return "list"
            if not first.startswith(b"{"):
                return "lines"
            whole = _loads(first) is not None
            following = [line for _ in range(LOOKED_AT) if (line := file.readline(MAX_LINE_BYTES).strip())]
    except UNREADABLE as error:
        raise unreadable(located, error) from error
    if whole:
        return "object" if not following and suffix_of(located.path) == ".json" else "lines"
    if any(line.startswith(b"{") and _loads(line) is not None for line in following):
        return "lines"  # of which the first is broken: a file of any size
    data = _read_whole(located)
    if data is not None and _loads(data.removeprefix(BOM)) is not None:
        return "object"
    return "list" if first == b"{" else "lines"


def _read_whole(located: Located) -> bytes | None:
    """The file's bytes, or None where they are more than MAX_JSON_BYTES."""
    try:
        with open_file(located.path) as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except UNREADABLE as error:
        raise unreadable(located, error) from error
    return data if len(data) <= MAX_JSON_BYTES else None


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
        if "\\u" in line.text and not is_unicode(value):
            gate.refuse(where, "half of a surrogate pair", line.text, line.bytes)
            continue
        yield Value(where, value, line.bytes)


def _read_json_whole(located: Located, gate: Gate, shape: str) -> Iterator[Value]:
    data = _read_whole(located)
    if data is None:
        raise DataError(f"has more than {MAX_JSON_BYTES} bytes as one JSON value", where=located.label,
                        hint="Write it as JSON lines, one object a line.")
    if data.startswith(BOM):
        gate.take(bytes=len(BOM))
        gate.station.drop("byte order mark", bytes=len(BOM))
        data = data[len(BOM):]
    text = data.decode("utf-8", "surrogateescape")
    if shape == "list":
        yield from _read_elements(text, located.label, gate)
        return
    gate.take(rows=1, bytes=len(data))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # blanks that are none of JSON's, behind what looked like one value
        gate.refuse(f"{located.label}:1", f"bad JSON: {_why(error)}", text, len(data), kind="bad JSON")
        return
    if is_unicode(value):
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
            reason = "" if is_unicode(value) else "not UTF-8"
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


def _why(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
