"""JSON values after one another, in the brackets of a list or without, from a file of any size.

The file is read by a window of its text, which grows only as far as the value that is being read; a broken value is
refused alone, and reading goes on at the next object. Places are those in the file, however it was read.

    for value in read_elements(Located(path, "a.json"), gate):
        ...                                     # value.where, value.value, value.bytes; the caller gives or refuses
"""

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import Any

from danlu.core.errors import DataError
from danlu.core.ledger import EXCERPT
from danlu.text.expansion import Expanded
from danlu.text.files import Located
from danlu.text.lines import BOM, MARKUP, UNREADABLE, Gate, Value, give_up, is_unicode, open_text, unreadable

MAX_JSON_BYTES = 1 << 30  # one value is held in memory as text and as what it says
CHUNK = 1 << 20  # bytes that are read at a time, and more where a value is longer
LOOKED_AT = 1 << 20  # characters in which a list of one line is told from one of many
CUT_WORD = 16  # characters at the end of the window that can be a literal, a number or an escape cut in two
CUT_NUMBER = 2  # characters behind a number that may belong to it: the beginning of “e-3”
BLANKS = " \t\r\n"  # JSON's own
UNENDED = "Unterminated string"  # how Python's decoder calls a string whose end it does not see
_GAP = re.compile(r"[\s,]*")
_NEXT_OBJECT = re.compile(r"\}[\s,]*(?=\{)")
_DECODER = json.JSONDecoder()


class _Window:
    """The text of a file from the first character that was not taken yet, as far as it was read."""

    def __init__(self, file: io.BufferedIOBase, label: str) -> None:
        self.file, self.label = file, label
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at = "", 0
        self.line = 1  # of the next character
        self.taken = self.line_begin = 0  # characters before it, and before its line

    def more(self) -> bool:
        """Reads on, at least as much as is held. False where the file has ended, and then nothing has moved."""
        held = len(self.text) - self.at
        if held > MAX_JSON_BYTES:
            raise DataError(f"has more than {MAX_JSON_BYTES} bytes as one JSON value", where=f"{self.label}:{self.line}",
                            hint="Write it as JSON lines, one object a line.")
        data = self.file.read(max(CHUNK, held))
        added = self.decoder.decode(data, final=not data)
        if not data and not added:
            return False
        self.text, self.at = self.text[self.at:] + added, 0
        return True

    def take(self, length: int) -> str:
        """The next characters, which are done with."""
        text = self.text[self.at:self.at + length]
        self.at += length
        self.taken += length
        if lines := text.count("\n"):
            self.line += lines
            self.line_begin = self.taken - (length - text.rfind("\n") - 1)
        return text

    def gap(self) -> str:
        """What stands before the next value or bracket: blanks and commas."""
        while (end := _end_of_gap(self.text, self.at)) == len(self.text) and self.more():
            pass
        return self.take(end - self.at)

    def next(self) -> str:
        """The next character; "" at the end of the file."""
        return self.text[self.at:self.at + 1]

    def value(self) -> tuple[Any, int, str]:
        """(the next value, its length, "") or (None, 0, why it is none)."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except RecursionError:
                return None, 0, "nested too deeply"
            except json.JSONDecodeError as error:
                cut = error.msg.startswith(UNENDED) or error.pos >= len(self.text) - CUT_WORD
                if not (cut and self.more()):
                    return None, 0, f"{error.msg}: {self._place(error.pos)}"
            else:
                if end < len(self.text) - CUT_NUMBER or not self.more():
                    return value, end - self.at, ""

    def _place(self, position: int) -> str:
        """A position of the window's text as one in the file, in the words of the standard library."""
        before = self.text[self.at:position]
        line, taken = self.line + before.count("\n"), self.taken + len(before)
        begin = taken - (len(before) - before.rfind("\n") - 1) if "\n" in before else self.line_begin
        return f"line {line} column {taken - begin + 1} (char {taken})"

    def ends_behind(self, length: int) -> bool:
        """Whether nothing but blanks follows so many characters."""
        while not self.text[self.at + length:].strip(BLANKS):
            if not self.more():
                return True
        return False

    def on_one_line(self) -> bool:
        """Whether all that follows stands on this line, as far as LOOKED_AT characters tell."""
        while not (held := self.text[self.at:self.at + LOOKED_AT]).strip().count("\n"):
            if len(held) == LOOKED_AT or not self.more():
                return True
        return False

    def skip(self) -> int:
        """Takes a broken value, up to the next object or the end of the list; how many bytes that was."""
        size = 0
        while (found := _NEXT_OBJECT.search(self.text, self.at)) is None:
            rest = self.text[self.at:].rstrip(BLANKS + ",")
            keep = len(rest) - 1 if rest.endswith(("}", "]")) else len(self.text) - self.at  # it may end there
            size += _num_bytes(self.take(keep))
            if not self.more():
                rest = self.text[self.at:].rstrip()
                closed = rest.endswith("]") and size + len(rest) > 1
                return size + _num_bytes(self.take(len(rest) - 1 if closed else len(self.text) - self.at))
        return size + _num_bytes(self.take(found.end() - self.at))


def begins_with_value(located: Located) -> bool:
    """Whether the first thing in the file is a JSON value, over however many lines."""
    try:
        with open_text(located) as file:
            window = _opened(_Window(file, located.label))
            window.gap()
            return bool(window.next()) and not window.value()[2]
    except Expanded:
        return False
    except UNREADABLE as error:
        raise unreadable(located, error) from error


def read_elements(located: Located, gate: Gate) -> Iterator[Value]:
    """The elements of a JSON list, objects after one another, or the one value of a file (`whole`).

    Raises DataError where the file cannot be read, or one value has more than MAX_JSON_BYTES.
    """
    try:
        with open_text(located, gate) as file:
            window = _Window(file, located.label)
            try:
                yield from _elements(_opened(window, gate), gate)
            except Expanded as error:
                give_up(gate, f"{located.label}:{window.line}", error)
    except UNREADABLE as error:
        raise unreadable(located, error) from error


def _opened(window: _Window, gate: Gate | None = None) -> _Window:
    """The window at the beginning of the text, behind a byte order mark."""
    window.more()
    if window.text.startswith(BOM.decode()):
        window.text = window.text[1:]
        if gate is not None:
            gate.take(bytes=len(BOM))
            gate.station.drop("byte order mark", bytes=len(BOM))
    return window


def _elements(window: _Window, gate: Gate) -> Iterator[Value]:
    index, last_line, depth, head = 0, 0, 0, ""
    while True:
        gap = window.gap()
        bracket = window.next() == ("]" if depth else "[")
        if bracket:
            gap, depth = gap + window.take(1), 1 - depth
        _markup(gate, gap)
        head += gap if index == 0 else ""
        if bracket:
            continue
        if not window.next():
            break
        index, line = index + 1, window.line
        alone = index == 1 and "\n" not in head.lstrip() and window.on_one_line()
        value, length, reason = window.value()
        whole = index == 1 and not reason and not head.strip() and window.ends_behind(length)
        # elements on one line get numbers
        where = f"{window.label}:{line}" + (f"#{index}" if line == last_line or (alone and not whole) else "")
        last_line = line
        excerpt = window.text[window.at:window.at + EXCERPT]
        size = _num_bytes(window.take(length)) if not reason else window.skip()
        reason = f"bad JSON: {reason}" if reason else "" if is_unicode(value) else "not UTF-8"
        gate.take(rows=1, bytes=size)
        if reason:
            gate.refuse(where, reason, excerpt, size, kind=reason.partition(":")[0])
        else:
            yield Value(where, value, size, whole)
    if depth:
        gate.refuse(f"{window.label}:{window.line}", "the list is not closed: the file may be cut off", rows=0)


def _end_of_gap(text: str, position: int) -> int:
    found = _GAP.match(text, position)
    return found.end() if found else position


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))


def _markup(gate: Gate, text: str) -> None:
    if text:
        gate.take(bytes=_num_bytes(text))
        gate.station.drop(MARKUP, bytes=_num_bytes(text))
