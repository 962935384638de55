"""Sources of running text: what a recipe's `sources:` name, read into Documents with every byte accounted for.

A source is a file, a folder, a glob, `package:NAME/path` (files inside an installed package), a dataset's name
(`danlu.text.registry`) or `docstrings:NAME,NAME` (the documentation in the packages' source). Plain text gives one
document a file, paragraph or line; rows of JSON and of tables give one document each, their `text` or else their
`prompt`, or several where `field` is a path such as `data[].paragraphs[].context`; a JSON list of strings or an object of
title → text works without `field`. Web pages and archives of them, dumps of MediaWiki and the members of tar files are read
as what they hold.

    source = SourceConfig(path="texts/", category="en")
    for document in read_documents(source, base, ledger):
        ...
    ledger.check()
"""

import io
from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from danlu.core.config import Config, FieldPath
from danlu.core.errors import DataError
from danlu.core.ledger import Ledger
from danlu.core.records import Document
from danlu.text.archives import read_members
from danlu.text.corpus import read_corpus
from danlu.text.docstrings import read_module
from danlu.text.fields import BadRow, first_of, text_of
from danlu.text.files import (
    ARCHIVE,
    DATA_SUFFIXES,
    DOCSTRINGS,
    PACKAGE,
    PAGE_SUFFIXES,
    TEXT_SUFFIXES,
    WEB_SUFFIXES,
    Located,
    docstring_names,
    modules,
    resolve,
    suffix_of,
)
from danlu.text.lines import BEHIND, BLANK_LINE, LINE_END, NO_FIELD
from danlu.text.mediawiki import read_dump
from danlu.text.pages import need_web, read_page
from danlu.text.registry import Found, counted, find
from danlu.text.rows import MAX_REFUSED, Gate, Line, Value, kind_of, read_lines, read_rows, read_values, refuse_value
from danlu.text.warc import read_warc

__all__ = ["SourceConfig", "group_of", "read_corpus", "read_documents", "read_rows", "resolve"]

DOCUMENTS = TEXT_SUFFIXES + DATA_SUFFIXES + WEB_SUFFIXES
WEB = {**dict.fromkeys(PAGE_SUFFIXES, read_page), ".warc": read_warc, ".wet": read_warc, ".xml": read_dump}
FIELDS = ("text", "prompt")  # where a row's text is, unless `field` says so
MAX_DOCUMENT_BYTES = 1 << 28  # a document is held in memory several times over


class SourceConfig(Config):
    """One source of running text."""

    path: str = Field(min_length=1, description="file, folder, glob, package:NAME/path or docstrings:NAME,NAME")
    document: Literal["file", "paragraph", "line"] = Field(default="file", description="one document of plain text")
    field: FieldPath | None = Field(default=None, description="path of the text, such as data[].paragraphs[].context")
    category: str = Field(default="text", min_length=1, description="the label by which losses and shares are reported")
    language: Literal["zh", "en"] | None = Field(default=None, description="documents of another language are dropped")
    group: Literal["document", "file", "package"] = Field(default="document", description="what is held out together")
    max_refused: float = Field(default=MAX_REFUSED, ge=0, le=1, description="share of refused rows that is accepted")


def read_documents(source: SourceConfig, base: Path, ledger: Ledger, pairs: bool = False) -> Iterator[Document]:
    """The documents of a source, file after file in sorted order, counted at the station `read:<path>`.

    `pairs`: a row with a `target` and no text is a document, with its `source` as the context and its own `category`.

    Rows that come in are lines, JSON values or modules, in raw bytes; rows that go out are documents, in bytes of text.
    Raises ConfigError if nothing is there, DataError if too many rows are refused.
    """
    gate = Gate(f"read:{source.path}", ledger, source.max_refused)
    if source.path.startswith(DOCSTRINGS):
        yield from read_modules(docstring_names(source.path), source, gate)
    else:
        yield from read_found(find_documents(source, base), source, gate, pairs)
    gate.finish()


def find_documents(source: SourceConfig, base: Path) -> Found:
    """The files of a source that is not `docstrings:`. Raises ConfigError if nothing is there."""
    found = find(source.path, base, DOCUMENTS)
    need_web(found.files)
    return found


def read_modules(names: Iterable[str], source: SourceConfig, gate: Gate) -> Iterator[Document]:
    """The documents of packages' docstrings, or of some of them."""
    for name in names:
        for module, path in modules(name):
            for text in read_module(module, path, gate):
                yield Document(text.text, f"{DOCSTRINGS}{name}", text.id, source.category)


def read_found(found: Found, source: SourceConfig, gate: Gate, pairs: bool = False) -> Iterator[Document]:
    """The documents of the files of a source, or of some of them; `pairs` as in `read_documents`."""
    yield from counted(_read_files(found, source, gate, pairs), found, gate)


def _read_files(found: Found, source: SourceConfig, gate: Gate, pairs: bool) -> Generator[Document, None, None]:
    for located in found.files:
        yield from _read_file(located, found, source, gate, pairs)


def _read_file(located: Located, found: Found, source: SourceConfig, gate: Gate, pairs: bool
               ) -> Generator[Document, None, None]:
    """The documents of one file, by what its name says it holds."""
    suffix = suffix_of(located.path)
    if suffix == ARCHIVE:
        for member in read_members(located, gate, DOCUMENTS):
            yield from _read_file(member, found, source, gate, pairs)
    elif suffix in WEB:
        for value in WEB[suffix](located, gate):
            gate.give(len(value.value.encode()), value.bytes)
            yield Document(value.value, located.label, value.where, source.category)
    elif suffix in DATA_SUFFIXES:
        yield from _read_data(located, found, source, gate, pairs)
    else:
        yield from _read_text(located, source, gate)


def group_of(document: Document, group: str) -> str:
    """What a document is held out together with: itself, its file (a docstring's module) or its package or folder."""
    if group == "document":
        return f"{document.source} {document.id}"
    if document.source.startswith(DOCSTRINGS):
        return document.source if group == "package" else document.id.partition("#")[0]
    if group == "file":
        return document.source
    if document.source.startswith(PACKAGE):
        return document.source.partition("/")[0]
    return document.source.rpartition("/")[0]


def _read_text(located: Located, source: SourceConfig, gate: Gate) -> Iterator[Document]:
    """Plain text: the lines of a file joined into documents. Line ends inside a document stay as they are.

    Raises DataError where a file or a paragraph is too large to be one document.
    """
    held = _Held()
    for line in read_lines(located, gate):
        whole = source.document == "file"
        blank = not whole and not line.text.strip()
        if held.num and not whole and (blank or source.document == "line"):
            try:
                yield _joined(held, located, source, gate)
            except GeneratorExit:  # no more is asked for, and this line was already read
                gate.station.drop(BEHIND, rows=1, bytes=len(line.text.encode()))
                raise
            held = _Held()
        if blank:
            gate.station.drop(BLANK_LINE, rows=1, bytes=len(line.text.encode()))
            continue
        held.add(line)
        if held.bytes > MAX_DOCUMENT_BYTES and source.document != "line":
            raise DataError(f"the {source.document} has more than {MAX_DOCUMENT_BYTES} bytes, too many for one document",
                            where=f"{located.label}:{held.first}",
                            hint=f"Set document: {'paragraph or document: ' if whole else ''}line for this source.")
    if held.num:
        yield _joined(held, located, source, gate)


class _Held:
    """The lines of a document so far, as one text: as objects short lines would take thirty times their bytes."""

    def __init__(self) -> None:
        self.text = io.StringIO(newline="")
        self.first = self.num = self.bytes = 0

    def add(self, line: Line) -> None:
        """Adds the next line; the first one's number is the document's."""
        self.first = self.first or line.number
        self.num += 1
        self.bytes += line.bytes
        self.text.write(line.text)


def _joined(held: _Held, located: Located, source: SourceConfig, gate: Gate) -> Document:
    text = held.text.getvalue()
    size = len(text.encode())
    if held.num > 1:
        gate.station.drop("joined with the line before", rows=held.num - 1)
    if source.document != "file":
        text = text.rstrip("\r\n")
    left = len(text.encode())
    if left < size:
        gate.station.drop(LINE_END, bytes=size - left)
    gate.station.give(rows=1, bytes=left)
    place = located.label if source.document == "file" else f"{located.label}:{held.first}"
    return Document(text, located.label, place, source.category)


def _read_data(located: Located, found: Found, source: SourceConfig, gate: Gate, pairs: bool) -> Iterator[Document]:
    """Rows of JSON and of tables."""
    for value in read_values(located, gate):
        if isinstance(value.value, str) and source.field is None:
            gate.give(len(value.value.encode()), value.bytes)
            yield Document(value.value, located.label, value.where, source.category)
        elif isinstance(value.value, dict) and value.whole and source.field is None and _has_titles(value.value):
            yield from _read_titles(value, located, source, gate)
        elif isinstance(value.value, dict):
            row = replace(value, value=found.row(value.value))
            as_pair = pairs and source.field is None and "target" in row.value and first_of(row.value, FIELDS) is None
            yield from (_read_pair if as_pair else _read_fields)(row, located, source, gate)
        else:
            kind = kind_of(value.value)
            refuse_value(gate, value, f"not an object but {kind}")


def _has_titles(row: dict[str, Any]) -> bool:
    """Whether a file's only object looks like title → text: no field `text`, and most values are texts."""
    texts = sum(isinstance(content, str) or (isinstance(content, list) and all(
        isinstance(part, str) for part in content)) for content in row.values())
    return "text" not in row and 2 * texts > len(row)


def _read_titles(value: Value, located: Located, source: SourceConfig, gate: Gate) -> Iterator[Document]:
    """An object of title → text, or of title → list of paragraphs."""
    entries = list(value.value.items())
    gate.split("texts in one row", len(entries) - 1)
    texts = []
    for title, content in entries:
        try:
            text = _as_text(content)
        except BadField as error:
            gate.refuse(f"{located.label}#{title}", error.reason, str(content))
            continue
        texts.append(Document(text, located.label, f"{located.label}#{title}", source.category))
    yield from _given(texts, value, gate)


def _given(documents: list[Document], value: Value, gate: Gate) -> Iterator[Document]:
    """The documents of one row; where no more of them are asked for, the others are dropped."""
    num, size = 0, 0
    try:
        for document in documents:
            num, size = num + 1, size + document.num_bytes
            yield document
    finally:
        behind = documents[num:]
        left = sum(document.num_bytes for document in behind)
        if behind:
            gate.station.drop(BEHIND, rows=len(behind), bytes=left)
        gate.give(size, value.bytes - left, rows=num)


def _read_fields(value: Value, located: Located, source: SourceConfig, gate: Gate) -> Iterator[Document]:
    """One row, whose texts are at `field`; a path through lists may give many."""
    texts: list[str] = []
    wrong: list[tuple[str, str]] = []
    path = (source.field or first_of(value.value, FIELDS) or FIELDS[0]).split(".")
    _dig(value.value, path, "", texts, wrong)
    if not texts and len(wrong) <= 1:
        if wrong:
            refuse_value(gate, value, wrong[0][1], kind="no text in the field")
        else:
            gate.station.drop("no text in the row", rows=1, bytes=value.bytes)
        return
    gate.split("texts in one row", len(texts) + len(wrong) - 1)
    for place, reason in wrong:
        gate.refuse(f"{value.where} {place}", reason, kind="no text in the field")
    gate.columns(value.value.read(), value.value.unread())
    alone = len(texts) == 1
    yield from _given([Document(text, located.label, value.where if alone else f"{value.where}#{number}", source.category)
                       for number, text in enumerate(texts, 1)], value, gate)


def _read_pair(value: Value, located: Located, source: SourceConfig, gate: Gate) -> Iterator[Document]:
    """One row of a source, which is read, and a target, which is learned; both are texts."""
    row = value.value
    try:
        context, text, own = (text_of(row, name) for name in ("source", "target", "category"))
    except BadRow as error:
        refuse_value(gate, value, error.reason, kind=error.kind)
        return
    if not text.strip():
        refuse_value(gate, value, "empty target")
        return
    gate.columns(row.read(), row.unread())
    yield from _given([Document(text, located.label, value.where, own.strip() or source.category, context)], value, gate)


class BadField(Exception):
    """A row's text is missing or is no text."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def _as_text(content: Any) -> str:
    """A string itself; the strings of a list as lines."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, str) for part in content):
        return "\n".join(content)
    raise BadField(f"not a text but {kind_of(content)}")


def _dig(value: Any, path: list[str], place: str, texts: list[str], wrong: list[tuple[str, str]]) -> None:
    """Follows a path; collects the texts at its end and (place, reason) wherever it cannot be followed."""
    joined = ".".join(path)
    if len(path) > 1 and isinstance(value, dict) and joined in value:  # a column whose name has a dot (answers.text)
        path = [joined]
    if not path:
        try:
            texts.append(_as_text(value))
        except BadField as error:
            wrong.append((place, f"“{place}” is {error.reason}"))
        return
    name = path[0].removesuffix("[]")
    here = f"{place}.{name}" if place else name
    if not isinstance(value, dict):
        wrong.append((place, f"“{place}” is not an object but {kind_of(value)}"))
    elif name not in value:
        keys = ", ".join(str(key)[:40] for key in list(value)[:8]) or "none"
        wrong.append((here, f"{NO_FIELD} “{here}” (fields found: {keys})"))
    elif not path[0].endswith("[]"):
        _dig(value[name], path[1:], here, texts, wrong)
    elif not isinstance(value[name], list):
        wrong.append((here, f"“{here}” is not a list but {kind_of(value[name])}"))
    else:
        for index, item in enumerate(value[name]):
            _dig(item, path[1:], f"{here}[{index}]", texts, wrong)
