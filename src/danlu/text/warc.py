"""Web archives: the pages of WARC files and the texts of WET files, record by record.

WARC 1.0 and 1.1 (ISO 28500): a line with the version, header lines, a blank line, `Content-Length` bytes. In `.warc.gz`
each record is a gzip member of its own, and all are read as one stream. A `response` holds what a server answered
(HTTP/1.x, of which pages and plain texts with status 200 are read), a `resource` a file, a `conversion` the text that
somebody else took from a page (WET). All other records are counted by their type. Bytes that belong to no record are
refused, and reading goes on at the next record; that is why the framing is our own.

    for text in read_warc(Located(path, "crawl.warc.gz"), gate):
        ...                                     # text.where: crawl.warc.gz:7#https://example.org/
"""

import http.client
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from danlu.core.ledger import EXCERPT
from danlu.text.expansion import Expanded
from danlu.text.files import Located
from danlu.text.lines import MARKUP, UNREADABLE, Gate, Value, give_up, open_file, unreadable
from danlu.text.pages import MAX_PAGE_BYTES, page_value

MAX_HEADER_LINE, MAX_HEADER_LINES = 1 << 16, 200
MAX_RECORD_BYTES = MAX_PAGE_BYTES + (1 << 20)  # of which at most MAX_PAGE_BYTES are a page
MAX_URI = 300  # characters of a page's address that stand in an id
PIECE = 1 << 20  # bytes that are read at a time where they are passed over
MARK = b"WARC/"
TYPES = ("warcinfo", "request", "metadata", "revisit", "continuation", "response", "resource", "conversion")
PAGES = ("text/html", "application/xhtml+xml")
OTHER_CONTENT = "neither HTML nor plain text"
DECODED = "content encoding of HTTP"
CUT_OFF = "the record is cut off"


@dataclass(slots=True)
class _Record:
    """One record: its place, its headers in lower case, its body, and the bytes that it takes in the file."""

    number: int
    at: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    size: int = 0
    wrong: str = ""  # why it cannot be read

    def where(self, label: str) -> str:
        uri = self.headers.get("warc-target-uri", "").strip("<>")[:MAX_URI]
        return f"{label}:{self.number}" + (f"#{uri}" if uri else "")


def address_of(id: str) -> str:
    """The address of the page that a document of this id was; "" where it was none of an archive's."""
    _, mark, address = id.partition("#")
    return address if mark and "://" in address else ""


def read_warc(located: Located, gate: Gate) -> Iterator[Value]:
    """The texts of a WARC or WET file. Each record is taken as one row with its header. DataError where it is damaged."""
    number = 0
    try:
        with open_file(located.path, located.limit) as file:
            for record in _records(file, gate):
                number = record.number
                gate.take(rows=1, bytes=record.size)
                where = record.where(located.label)
                if record.wrong:
                    excerpt = record.body[:EXCERPT].decode("utf-8", "replace")
                    gate.refuse(where, f"{record.wrong} (byte {record.at:,})", excerpt, record.size, kind=record.wrong)
                else:
                    yield from _texts(record, where, gate)
    except Expanded as error:
        give_up(gate, f"{located.label}:{number + 1}", error)
    except UNREADABLE as error:
        raise unreadable(located, error) from error


def _records(file: io.BufferedReader, gate: Gate) -> Iterator[_Record]:
    """All records; one that is `wrong` stands for bytes that are none."""
    number = at = 0
    line = file.readline(MAX_HEADER_LINE)
    while line:
        if not line.strip():
            gate.take(bytes=len(line))
            gate.station.drop(MARKUP, bytes=len(line))
            at, line = at + len(line), file.readline(MAX_HEADER_LINE)
            continue
        number += 1
        record = _Record(number, at, size=len(line))
        if line.startswith(MARK):
            _read_record(file, record)
            line = file.readline(MAX_HEADER_LINE)
        else:
            record.wrong, record.body = "bytes that belong to no record", line
            while (line := file.readline(MAX_HEADER_LINE)) and not line.startswith(MARK):
                record.size += len(line)
        at += record.size
        yield record


def _read_record(file: io.BufferedReader, record: _Record) -> None:
    """What follows the line with the version: the headers, then the body."""
    name = ""
    for _ in range(MAX_HEADER_LINES):
        raw = file.readline(MAX_HEADER_LINE)
        record.size += len(raw)
        if not raw.strip():
            break
        line = raw.decode("utf-8", "replace").rstrip("\r\n")
        if line[0] in " \t" and name:  # a folded line goes on with the last one
            record.headers[name] += " " + line.strip()
            continue
        name, _, value = line.partition(":")
        name = name.strip().lower()
        record.headers.setdefault(name, value.strip())
    length = record.headers.get("content-length", "")
    if not (length.isascii() and length.isdigit() and len(length) < 16):
        record.wrong = "a record without its length"
        return
    left = int(length)
    record.body = file.read(min(left, MAX_RECORD_BYTES))
    record.size += len(record.body)
    if left > MAX_RECORD_BYTES:
        record.wrong = f"a record of more than {MAX_RECORD_BYTES} bytes"
    elif len(record.body) < left:
        record.wrong = CUT_OFF
    left -= len(record.body)
    while left > 0 and (piece := file.read(min(left, PIECE))):
        left -= len(piece)
        record.size += len(piece)


def _texts(record: _Record, where: str, gate: Gate) -> Iterator[Value]:
    """The text of a record, or none, which is counted."""
    kind = record.headers.get("warc-type", "").lower()
    if kind not in ("response", "resource", "conversion"):
        reason = f"record of type {kind}" if kind in TYPES else "record of another type"
        gate.station.drop(reason, rows=1, bytes=record.size)
        return
    body, mime, charset = record.body, *_mime(record.headers.get("content-type", ""))
    if kind == "response":
        if mime != "application/http" or not body.startswith(b"HTTP/"):
            gate.station.drop(OTHER_CONTENT, rows=1, bytes=record.size)
            return
        answer = _answer(body, where, record.size, gate)
        if answer is None:
            return
        body, mime, charset = answer
    if mime not in (*PAGES, "text/plain") and not (mime == "" and _looks_like_page(body)):
        gate.station.drop(OTHER_CONTENT, rows=1, bytes=record.size)
        return
    size, longer = record.size, len(body) - len(record.body)
    if longer > 0:  # it was compressed
        gate.station.add(DECODED, bytes=longer)
        size += longer
    yield from page_value(body, size, where, gate, charset, plain=mime == "text/plain")


def _answer(body: bytes, where: str, size: int, gate: Gate) -> tuple[bytes, str, str] | None:
    """(content, its type, its encoding) of a server's answer with status 200; None where it is not read, and counted."""
    response = http.client.HTTPResponse(_Bytes(body))  # type: ignore[arg-type]  # of a socket only makefile is used
    try:
        response.begin()
        if response.status != 200:
            gate.station.drop("HTTP status other than 200", rows=1, bytes=size)
            return None
        try:
            content = response.read()
        except http.client.IncompleteRead as error:
            content = error.partial
    except (http.client.HTTPException, ValueError) as error:
        excerpt = body[:EXCERPT].decode("utf-8", "replace")
        gate.refuse(where, f"bad HTTP: {type(error).__name__} {str(error).strip()}", excerpt, size, kind="bad HTTP")
        return None
    coding = response.headers.get("content-encoding", "identity").strip().lower()
    if coding in ("gzip", "x-gzip", "deflate"):
        content = _inflated(content)
    elif coding not in ("identity", "", "none", "utf-8") and not _looks_like_page(content):
        gate.station.drop("in a content encoding that is not read", rows=1, bytes=size)
        return None
    return content, *_mime(response.headers.get("content-type", ""))


class _Bytes:
    """What HTTPResponse asks of a socket, over bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def makefile(self, *_: Any) -> io.BytesIO:
        return io.BytesIO(self.data)


def _inflated(content: bytes) -> bytes:
    """Unpacked, as far as one byte more than a page may have; as it is where the archive has unpacked it already."""
    for window in (47, -15):  # gzip or zlib by its header; deflate without one
        packed = zlib.decompressobj(window)
        try:
            return packed.decompress(content, MAX_PAGE_BYTES + 1)
        except zlib.error:
            continue
    return content


def _looks_like_page(body: bytes) -> bool:
    return body[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html"))


def _mime(content_type: str) -> tuple[str, str]:
    """(type, charset) of a Content-Type, in lower case."""
    mime, _, rest = content_type.lower().partition(";")
    names = (part.partition("=") for part in rest.split(";"))
    return mime.strip(), next((value.strip(" \"'") for name, _, value in names if name.strip() == "charset"), "")
