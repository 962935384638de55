"""From files to rows: JSON in every dress, and tables, with a place for each row and a reason for everything refused.

JSON is recognised by its content, not by the file's name: a list, one object, one object a line, or objects after one
another; a broken element of a list is refused alone and reading goes on at the next. Nothing is read whole but a single
value. Files may be compressed (`danlu.text.lines`).

    gate = Gate("read:a.jsonl", ledger)
    for value in read_values(Located(path, "a.jsonl"), gate):
        ...                                     # value.where, value.value, value.bytes; the caller gives or refuses
    gate.finish()
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from danlu.text.elements import begins_with_value, read_elements
from danlu.text.expansion import Expanded
from danlu.text.files import Located, suffix_of
from danlu.text.lines import (
    BLANK_LINE,
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
    open_text,
    read_lines,
    refuse_value,
    unreadable,
)
from danlu.text.tables import read_arrow_rows, read_csv, read_parquet_rows, read_tsv

__all__ = ["MARKUP", "MAX_REFUSED", "Gate", "Line", "Value", "kind_of", "read_lines", "read_rows", "read_values",
           "refuse_value"]

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
    yield from (_read_json_lines if is_json_lines(located) else read_elements)(located, gate)


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


def is_json_lines(located: Located) -> bool:
    """Whether each line is a value, as far as the beginning tells."""
    try:
        with open_text(located) as file:
            first = file.readline(MAX_LINE_BYTES).removeprefix(BOM).strip()
            while not first and (line := file.readline(MAX_LINE_BYTES)):
                first = line.strip()
            if not first.startswith(b"{"):
                return not first.startswith(b"[")
            whole = _loads(first) is not None
            following = [line for _ in range(LOOKED_AT) if (line := file.readline(MAX_LINE_BYTES).strip())]
    except Expanded:
        return True  # it is given up where it is read
    except UNREADABLE as error:
        raise unreadable(located, error) from error
    if whole:
        return bool(following) or suffix_of(located.path) != ".json"
    if any(line.startswith(b"{") and _loads(line) is not None for line in following):
        return True  # of which the first is broken
    return first != b"{" and not begins_with_value(located)


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
            gate.station.drop(BLANK_LINE, rows=1, bytes=line.bytes)
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


def _why(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
