"""Dumps of MediaWiki (Wikipedia and its like): the articles of a pages-articles file as plain text, page by page.

The XML is read as a stream and no tree is built. A document type declaration, which a dump never has, is refused, so no
entity can be defined, let alone expanded. Redirects and pages outside the article namespace are counted; of several
revisions of a page the last one is read. What the markup becomes is in `danlu.text.wikitext`.

    for article in read_dump(Located(path, "zhwiki-pages-articles.xml.bz2"), gate):
        ...                                     # article.where: zhwiki-pages-articles.xml.bz2#北京市
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.parsers import expat

from danlu.core.ledger import EXCERPT
from danlu.text.expansion import Expanded
from danlu.text.files import Located
from danlu.text.lines import MARKUP, UNREADABLE, Gate, Value, give_up, open_file, unreadable
from danlu.text.wikitext import plain_text

CHUNK = 1 << 16
MAX_TEXT = 16 << 20  # bytes of one page; MediaWiki's own limit is 2 MiB
MAX_TAG = 32 << 20  # bytes that the parser may hold back
MAX_DEPTH = 20
FIELDS = ("mediawiki/page/title", "mediawiki/page/ns", "mediawiki/page/revision/text", "mediawiki/page/revision/model")
NAMESPACE = "mediawiki/siteinfo/namespaces/namespace"
# of files, categories and media, whose links are no text; a dump adds its language's names
WITHOUT_TEXT = {"-2": ["media"], "6": ["file", "image"], "14": ["category"]}


class _BadDump(Exception):
    """The file is no dump, or goes wrong in the middle."""


@dataclass(slots=True)
class _Page:
    """One page; `end` is the place in the file behind it."""

    title: str = ""
    ns: str = "0"
    text: str = ""
    model: str = "wikitext"
    redirect: bool = False
    size: int = 0  # of the text
    end: int = 0


class _Pages:
    """Collects pages from the events of the parser."""

    def __init__(self) -> None:
        self.parser = expat.ParserCreate()
        self.parser.buffer_text = True
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._data
        self.parser.StartDoctypeDeclHandler = self._doctype
        self.path: list[str] = []
        self.place = ""  # the path as text
        self.page = _Page()
        self.pieces: list[str] = []
        self.ready: list[_Page] = []
        self.key = ""  # of the namespace whose name is being read
        self.namespaces = {name for names in WITHOUT_TEXT.values() for name in names}
        self.fed = 0
        self.wrong = ""  # why nothing more can be read

    def feed(self, data: bytes) -> list[_Page]:
        """The pages that end in the next bytes of the file (no bytes: it is at its end), as far as nothing is `wrong`."""
        self.fed += len(data)
        try:
            self.parser.Parse(data, not data)
        except expat.ExpatError as error:
            self.wrong = f"bad XML: {error}"
        except _BadDump as error:
            self.wrong = str(error)
        if self.fed - self.parser.CurrentByteIndex > MAX_TAG:
            self.wrong = self.wrong or f"a tag of more than {MAX_TAG} bytes"
        ready, self.ready = self.ready, []
        return ready

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if not self.path and name != "mediawiki":
            raise _BadDump("no dump of MediaWiki: the first element is not <mediawiki>")
        if len(self.path) >= MAX_DEPTH:
            raise _BadDump("elements that are nested too deeply")
        self.path.append(name)
        self.place = "/".join(self.path)
        if self.place == "mediawiki/page":
            self.page = _Page()
        elif self.place == "mediawiki/page/redirect":
            self.page.redirect = True
        elif self.place in FIELDS or self.place == NAMESPACE:
            self.pieces, self.key = [], attributes.get("key", "")
            if name == "text":
                self.page.size = 0

    def _data(self, data: str) -> None:
        if self.place not in FIELDS and self.place != NAMESPACE:
            return
        self.page.size += len(data) if self.path[-1] == "text" else 0
        if self.page.size <= MAX_TEXT:
            self.pieces.append(data)

    def _end(self, name: str) -> None:
        if self.place in FIELDS:
            setattr(self.page, name, "".join(self.pieces))
        elif self.place == NAMESPACE and self.key in WITHOUT_TEXT:
            self.namespaces.add("".join(self.pieces).strip().lower())
        elif self.place == "mediawiki/page":
            self.page.end = self.parser.CurrentByteIndex + len("</page>")
            self.ready.append(self.page)
        self.path.pop()
        self.place = "/".join(self.path)

    def _doctype(self, *_: Any) -> None:
        raise _BadDump("a document type declaration, which no dump has")


def read_dump(located: Located, gate: Gate) -> Iterator[Value]:
    """The articles of a dump. Each page is taken as one row with the bytes up to its end.

    What is no XML is one refused row, and nothing behind it is read. Raises DataError where the file cannot be read.
    """
    pages, number, at = _Pages(), 0, 0
    try:
        with open_file(located.path, located.limit) as file:
            data = b" "
            while data and not pages.wrong:
                data = file.read(CHUNK)
                for page in pages.feed(data):
                    number += 1
                    gate.take(rows=1, bytes=page.end - at)
                    size, at = page.end - at, page.end
                    yield from _article(page, size, f"{located.label}#{page.title or number}", pages.namespaces, gate)
    except Expanded as error:
        give_up(gate, f"{located.label}:{number + 1}", error)
    except UNREADABLE as error:
        raise unreadable(located, error) from error
    if pages.wrong:
        place = f"byte {max(pages.parser.CurrentByteIndex, 0):,}"
        gate.take(rows=1)
        gate.refuse(f"{located.label}:{number + 1}", f"{pages.wrong} ({place}); the rest is not read",
                    kind=pages.wrong.partition(":")[0])
    left = pages.fed - at  # what stands behind the last page
    gate.take(bytes=left)
    gate.station.drop(MARKUP, bytes=left)


def _article(page: _Page, size: int, where: str, namespaces: set[str], gate: Gate) -> Iterator[Value]:
    """The page as plain text, or nothing, which is counted."""
    if page.size > MAX_TEXT:
        gate.refuse(where, f"a page of more than {MAX_TEXT} bytes", page.text[:EXCERPT], size)
        return
    reason = "redirect" if page.redirect else "page outside the article namespace" if page.ns.strip() != "0" else \
        "page that is not wikitext" if page.model.strip() != "wikitext" else ""
    text = "" if reason else plain_text(page.text, namespaces)
    if text:
        yield Value(where, text, size)
    else:
        gate.station.drop(reason or "no text in the page", rows=1, bytes=size)
