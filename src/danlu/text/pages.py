"""Web pages: from the bytes of a page to its main text, without menus, headers, footers and comments.

The text is found by trafilatura (extra `web`; Barbaresi, Trafilatura: A Web Scraping Library and Command-Line Tool for Text
Discovery and Extraction, ACL 2021), which was chosen over resiliparse: it is ten times slower, but leaves out more of what
frames a page, keeps tables and lists, and ends in bounded time on pages of elements that are nested without end. It is
given text and fetches nothing.

The encoding is the one that the server or the page names, if the bytes fit it; else it is told as that of other files.

    for page in read_page(Located(path, "a.html"), gate): ...       # page.value: the text, or nothing
"""

import codecs
import importlib.util
import logging
import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from danlu.core.errors import ConfigError
from danlu.core.ledger import EXCERPT
from danlu.text.encodings import CODECS, RECODED, SAMPLE, UTF_8, encoding_of
from danlu.text.expansion import Expanded
from danlu.text.files import PAGE_SUFFIXES, Located, suffix_of
from danlu.text.lines import UNREADABLE, Gate, Value, give_up, open_file, unreadable

MAX_PAGE_BYTES = 16 << 20  # its tree takes many times as much memory
MAX_BAD = 0.01  # the share of characters that may be damaged in a page
NO_TEXT = "no main text in the page"
_NAMED = re.compile(rb"<(?:meta|\?xml)\b[^>]{0,300}?(?:charset|encoding)\s*=\s*[\"']?\s*([A-Za-z0-9_:.-]{2,40})", re.I)
NAMED_WITHIN = 4096  # bytes at the beginning of a page in which its encoding is named
# What pages call by a narrower name than what stands in them (the Encoding Standard of the WHATWG, section 4.2)
WIDER = {"gb2312": "gb18030", "gbk": "gb18030", "iso8859-1": "cp1252", "ascii": "cp1252", "big5": "big5hkscs",
         "shift_jis": "cp932", "euc_kr": "cp949",
         # a page that names one of these in plain letters is not in it, and with a mark it needs no name
         **dict.fromkeys(("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "utf-7"), "utf-8")}


def need_web(files: Iterable[Located]) -> None:
    """Raises ConfigError where files hold pages and what reads them is not installed; nothing is imported for it."""
    for file in files:
        if suffix_of(file.path) in (*PAGE_SUFFIXES, ".warc") and importlib.util.find_spec("trafilatura") is None:
            raise ConfigError("web pages (.html, .warc) need trafilatura", where=file.label,
                              hint='pip install "danlu[web]", or name the other files alone, such as "folder/**/*.txt"')


@cache
def _extract() -> Any:
    try:
        from trafilatura import extract
    except ImportError as error:
        raise ConfigError(f"web pages need trafilatura ({error})", hint='pip install "danlu[web]"') from error
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # what it cannot read is counted, not printed
    return extract


def main_text(page: str) -> str | None:
    """The text of a page without what frames it; None where there is none."""
    if "<" not in page:
        return None
    text = _extract()(page, include_comments=False, include_tables=True, include_links=False, deduplicate=False)
    return str(text) if text else None


def read_page(located: Located, gate: Gate) -> Iterator[Value]:
    """The text of one HTML file, which is one row; a page without text is dropped. DataError where it cannot be read."""
    try:
        with open_file(located.path, located.limit) as file:
            raw = file.read(MAX_PAGE_BYTES + 1)
            size = len(raw)
            while more := file.read(SAMPLE):
                size += len(more)
    except Expanded as error:
        give_up(gate, located.label, error)
        return
    except UNREADABLE as error:
        raise unreadable(located, error) from error
    gate.take(rows=1, bytes=size)
    yield from page_value(raw, size, located.label, gate)


def page_value(raw: bytes, size: int, where: str, gate: Gate, charset: str = "", plain: bool = False) -> Iterator[Value]:
    """The text of a page, or of a plain text (`plain`), that was taken as one row of `size` bytes; or why there is none."""
    if len(raw) > MAX_PAGE_BYTES:
        gate.refuse(where, f"a page of more than {MAX_PAGE_BYTES} bytes", _excerpt(raw), size)
        return
    text = decode(raw, gate, charset)
    if text is None:
        gate.refuse(where, "in no encoding that is known", _excerpt(raw), size)
        return
    longer = len(text.encode()) - len(raw)
    if longer:
        (gate.station.add if longer > 0 else gate.station.drop)(RECODED, bytes=abs(longer))
    main = text if plain else main_text(text)
    if main is None:
        gate.station.drop(NO_TEXT, rows=1, bytes=size + longer)
    else:
        yield Value(where, main, size + longer)


def _excerpt(raw: bytes) -> str:
    return raw[:EXCERPT].decode("utf-8", "replace")


def decode(raw: bytes, gate: Gate, charset: str = "") -> str | None:
    """The page's characters; `charset` is what the server says. None where too many bytes say nothing."""
    named = _NAMED.search(raw[:NAMED_WITHIN])
    guess = encoding_of(raw[:SAMPLE])
    names = ["" if raw.isascii() else "utf-8",  # which other bytes hardly ever form by chance
             charset, named[1].decode("ascii") if named else "", "utf-8"]
    candidates = list(dict.fromkeys(filter(None, [*map(_codec, names), CODECS.get(guess, "")])))
    if guess == "UTF-16":
        candidates.reverse()
    for name in candidates:
        try:
            text = raw.decode(name).removeprefix("\ufeff")
        except UnicodeError:
            continue
        if name != "utf-8":
            gate.station.note(f"pages decoded as {name}")
        return text
    text = raw.decode(candidates[-1] if guess != UTF_8 else "utf-8", "replace").removeprefix("\ufeff")
    if text.count("\ufffd") > MAX_BAD * len(text):
        return None
    gate.station.note("pages with damaged characters")
    return text


def _codec(name: str) -> str:
    """Python's name of an encoding of text; "" where it has none."""
    if not name:
        return ""
    try:
        known = codecs.lookup(name).name
        b"".decode(known)  # fails for what is no encoding of text, such as base64
    except (LookupError, ValueError):
        return ""
    return WIDER.get(known, known)
