"""Web archives: WET texts, pages behind HTTP, damage, and the balance of every byte."""

import gzip
import importlib.util
import json
import zlib
from pathlib import Path

import pytest
from corpus_runs import run
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.core.errors import ConfigError, DataError
from danlu.core.ledger import Ledger
from danlu.core.records import Document
from danlu.text import pages
from danlu.text.corpus import read_corpus
from danlu.text.read import SourceConfig, read_documents
from danlu.text.warc import address_of

PAGE = ("<!DOCTYPE html><html><head><title>T</title></head><body><nav><a href='/'>Home</a></nav><article><h1>Furnace</h1>"
        + "".join(f"<p>Paragraph {n} of the article says that the furnace was lit in the morning and went out late.</p>"
                  for n in range(4)) + "</article><footer>Copyright</footer></body></html>")


def record(kind: str, body: bytes, content_type: str = "text/plain", uri: str = "https://example.org/a") -> bytes:
    lines = [f"WARC-Type: {kind}", f"WARC-Target-URI: {uri}", "WARC-Date: 2026-01-01T00:00:00Z",
             "WARC-Record-ID: <urn:uuid:0>", f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
    return b"WARC/1.0\r\n" + "\r\n".join(lines).encode() + b"\r\n\r\n" + body + b"\r\n\r\n"


def response(content: bytes, head: str = "Content-Type: text/html", status: str = "200 OK") -> bytes:
    return record("response", f"HTTP/1.1 {status}\r\n{head}\r\n\r\n".encode() + content,
                  "application/http; msgtype=response", "https://a.org/")


def read(folder: Path, name: str, data: bytes, ledger: Ledger | None = None) -> tuple[list[Document], dict, Ledger]:
    ledger = ledger or Ledger()
    (folder / name).write_bytes(data)
    documents = list(read_documents(SourceConfig(path=name, max_refused=1), folder, ledger))
    ledger.check()
    station = ledger.station(f"read:{name}").to_json()
    assert station["in"]["bytes"] == len(gzip.decompress(data) if name.endswith(".gz") else data), "every byte is counted"
    return documents, station, ledger


def test_the_texts_of_a_wet_file_of_gzip_members(tmp_path: Path) -> None:
    parts = [record("warcinfo", b"software: x", "application/warc-fields"),
             record("conversion", "第一页\n正文".encode(), uri="https://例.cn/一"),
             record("conversion", b"Second page.", uri="<https://example.org/2>"),
             record("request", b"GET / HTTP/1.1\r\n\r\n", "application/http; msgtype=request"),
             record("odd", b"?"), record("conversion", b"{}", "application/json")]
    documents, station, ledger = read(tmp_path, "a.warc.wet.gz", b"".join(map(gzip.compress, parts)))
    assert documents == [Document("第一页\n正文", "a.warc.wet.gz", "a.warc.wet.gz:2#https://例.cn/一", "text"),
                         Document("Second page.", "a.warc.wet.gz", "a.warc.wet.gz:3#https://example.org/2", "text")]
    assert station["in"]["rows"] == 6 and station["out"] == {"rows": 2, "bytes": 28, "tokens": 0}
    assert {name: count["rows"] for name, count in station["dropped"].items() if count["rows"]} == {
        "record of type warcinfo": 1, "record of type request": 1, "record of another type": 1,
        "neither HTML nor plain text": 1}
    assert not ledger.quarantined


def test_a_page_of_a_blocked_site_is_dropped(tmp_path: Path) -> None:
    """The site of the address counts, whatever the page says; its words do not."""
    pages = {"https://sub.bad.com/a": "First page.", "https://good.org/casino": "Second page.",
             "https://good.org/": "A link to bad.com."}
    (tmp_path / "a.warc.wet").write_bytes(b"".join(
        record("conversion", text.encode(), uri=uri) for uri, text in pages.items()))
    (tmp_path / "sites.txt").write_text("bad.com\n")
    (tmp_path / "words.txt").write_text("casino\n")
    lists = [{"name": "games", "words": "words.txt", "urls": "sites.txt"}]
    run(tmp_path, "made", 1 << 20, sources=[{"path": "a.warc.wet"}], clean={"blocklists": lists}, heldout=[],
        heldout_share=0, near_dedup=None)
    ledger = json.loads((tmp_path / "made" / "ledger.json").read_text())
    [station] = [station for station in ledger["stations"] if station["name"] == "clean"]
    assert station["out"]["rows"] == 1 and station["dropped"]["blocked_games"]["rows"] == 2
    assert [document.text for document in read_corpus(tmp_path / "made", "train")] == ["Second page."]
    assert [address_of(id) for id in ("a.jsonl:7", "a.txt#2", "a.warc:1#https://b.org/#c")] == ["", "", "https://b.org/#c"]


def test_damage_costs_only_its_own_records(tmp_path: Path) -> None:
    good = [record("conversion", f"text {n}".encode()) for n in range(4)]
    endless = b"WARC/1.0\r\nWARC-Type: conversion\r\n\r\nno length\r\n\r\n"
    data = good[0] + b"garbage\nin two lines\r\n" + good[1] + endless + good[2] + good[3][:-7]
    documents, _, ledger = read(tmp_path, "a.wet", data)
    assert [document.text for document in documents] == ["text 0", "text 1", "text 2"]
    assert [item.where.partition("#")[0] for item in ledger.quarantined] == ["a.wet:2", "a.wet:4", "a.wet:5", "a.wet:7"]
    assert [item.reason.partition(" (")[0] for item in ledger.quarantined] == [
        "bytes that belong to no record", "a record without its length", "bytes that belong to no record",
        "the record is cut off"]
    assert f"(byte {len(good[0]):,})" in ledger.quarantined[0].reason


def test_a_cut_off_compressed_file_is_an_error(tmp_path: Path) -> None:
    good = gzip.compress(record("conversion", b"a"))
    with pytest.raises(DataError, match=r"a\.wet\.gz: the compressed file is cut off or damaged"):
        read(tmp_path, "a.wet.gz", good + good[:-9])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([record("conversion", b"text"), b"WARC/1.0\r\n", b"\r\n", b"Content-Length: 3\r\n", b"abc",
                                 b"\n", b"WARC/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
                                 b"Content-Length: -1\r\n",
                                 b" folded\r\n", b"WARC-Type: conversion\r\n", b"\xff\x00"]), max_size=12))
def test_whatever_stands_in_it_balances(tmp_path_factory, parts: list[bytes]) -> None:
    folder = tmp_path_factory.getbasetemp()
    read(folder, "any.wet", b"".join(parts))


def test_pages_need_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("a.warc.gz", "b.html"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ConfigError, match=rf"{name}: web pages .* need trafilatura\n.*danlu\[web\]"):
            list(read_documents(SourceConfig(path=name), tmp_path, Ledger()))
    (tmp_path / "c.wet").write_bytes(record("conversion", b"no extra is needed"))
    assert len(list(read_documents(SourceConfig(path="c.wet"), tmp_path, Ledger()))) == 1


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages as they are, so that what is around them can be tested without the extra."""
    monkeypatch.setattr(pages, "need_web", lambda files: None)
    monkeypatch.setattr("danlu.text.read.need_web", lambda files: None)
    monkeypatch.setattr(pages, "main_text", lambda page: page if "<" in page else None)


def test_answers_of_servers(tmp_path: Path, whole: None) -> None:
    raw = PAGE.encode()
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (raw[:100], raw[100:])) + b"0\r\n\r\n"
    html, packer = "Content-Type: text/html\r\n", zlib.compressobj(wbits=-15)
    deflated = packer.compress(raw) + packer.flush()
    cases = {
        "plain": response(raw), "chunked": response(chunked, "Content-Type: text/html\r\nTransfer-Encoding: chunked"),
        "gzip": response(gzip.compress(raw), "Content-Type: text/html\r\nContent-Encoding: gzip"),
        "deflate": response(deflated, html + "Content-Encoding: deflate"),
        "unpacked already": response(raw, "Content-Type: text/html\r\nContent-Encoding: gzip"),
        "no type": response(raw, "X: y"), "short": response(raw, html + f"Content-Length: {len(raw) + 9}"),
        "xhtml": response(raw, "Content-Type: application/xhtml+xml; charset=UTF-8"),
        "resource": record("resource", raw, "text/html"), "text": response(b"plain < text", "Content-Type: text/plain")}
    documents, station, ledger = read(tmp_path, "a.warc.gz", b"".join(map(gzip.compress, cases.values())))
    assert [document.text for document in documents] == [PAGE] * 9 + ["plain < text"]
    assert documents[0].id == "a.warc.gz:1#https://a.org/" and not ledger.quarantined
    dropped = {"missing": response(raw, status="404 Not Found"), "picture": response(b"\x89PNG", "Content-Type: image/png"),
               "brotli": response(b"\x0b\x02\x80", "Content-Type: text/html\r\nContent-Encoding: br"),
               "dns": record("response", b"a.org", "text/dns"), "empty": response(b"")}
    data = b"".join(dropped.values()) + response(raw, "no colon here", "abc")
    documents, station, ledger = read(tmp_path, "b.warc", data)
    assert not documents and [item.reason for item in ledger.quarantined] == ["bad HTTP: BadStatusLine HTTP/1.1 abc"]
    assert {name: count["rows"] for name, count in station["dropped"].items() if count["rows"]} == {
        "HTTP status other than 200": 1, "neither HTML nor plain text": 2, "in a content encoding that is not read": 1,
        "no main text in the page": 1, "bad HTTP": 1}


def test_a_page_that_is_a_bomb_is_refused(tmp_path: Path, whole: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("danlu.text.warc.MAX_PAGE_BYTES", 10_000)
    monkeypatch.setattr(pages, "MAX_PAGE_BYTES", 10_000)
    bomb = response(gzip.compress(b"<html>" + b"a" * 10_000_000), "Content-Type: text/html\r\nContent-Encoding: gzip")
    documents, station, ledger = read(tmp_path, "a.warc", bomb + response(b"<html>small</html>"))
    assert len(documents) == 1
    assert [item.reason for item in ledger.quarantined] == ["a page of more than 10000 bytes"]
    assert station["added"]["content encoding of HTTP"]["bytes"] < 10_001


@pytest.mark.parametrize("codec,head,meta", [
    ("gb18030", "; charset=GBK", ""), ("gb18030", "", '<meta charset="gb2312">'), ("big5", "", "<meta charset=big5>"),
    ("utf-8", "; charset=GBK", ""), ("gb18030", "", ""), ("gb18030", "; charset=utf-8", '<meta charset="utf-8">'),
    ("utf-16", "", ""), ("utf-8-sig", "", ""), ("shift_jis", "; charset=Shift_JIS", ""), ("utf-8", "; charset=base64", ""),
    ("ascii", "", "<meta charset=utf-16>"), ("iso2022_jp", "; charset=iso-2022-jp", "")])
def test_the_encoding_of_a_page(tmp_path: Path, whole: None, codec: str, head: str, meta: str) -> None:
    content = {"ascii": "words", "shift_jis": "日本語の文章です。", "iso2022_jp": "日本語の文章です。"}.get(
        codec, "中文的網頁，有一些內容，也有標點。" * 4)
    text = f"<html>{meta}<p>{content}</p></html>"
    documents, _, ledger = read(tmp_path, "a.warc", response(text.encode(codec), "Content-Type: text/html" + head))
    assert [document.text for document in documents] == [text] and not ledger.quarantined


def test_bad_bytes_in_a_page(tmp_path: Path, whole: None) -> None:
    text = ("<html>" + "中文的网页" * 200).encode()
    documents, station, _ = read(tmp_path, "a.warc", response(text[:100] + b"\xff" + text[100:]))
    assert documents[0].text.count("\ufffd") in (1, 2, 3, 4) and station["notes"] == {"pages with damaged characters": 1}
    documents, _, ledger = read(tmp_path, "b.warc", response(b"<html>" + bytes(range(128, 256)) * 30))
    assert not documents and [item.reason for item in ledger.quarantined] == ["in no encoding that is known"]


def test_pages_with_trafilatura(tmp_path: Path) -> None:
    pytest.importorskip("trafilatura")
    documents, _, _ = read(tmp_path, "a.warc.gz", gzip.compress(response(PAGE.encode())))
    assert documents[0].text.startswith("Furnace\nParagraph 0 of the article") and "Home" not in documents[0].text
    assert "Copyright" not in documents[0].text
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "a.html").write_text(PAGE)
    (tmp_path / "pages" / "b.htm.gz").write_bytes(gzip.compress(b"<html><body></body></html>"))
    (tmp_path / "pages" / "deep.html").write_text("<div>" * 20_000 + "deep" + "</div>" * 20_000)
    (tmp_path / "pages" / "odd.html").write_text(f'<?xml version="1.0" encoding="utf-8"?>{PAGE}')
    ledger = Ledger()
    found = list(read_documents(SourceConfig(path="pages"), tmp_path, ledger))
    ledger.check()
    assert [item.id for item in found] == ["pages/a.html", "pages/odd.html"]
    assert {item.text for item in found} == {documents[0].text}
    assert ledger.station("read:pages").dropped["no main text in the page"].rows == 2
    json.dumps(ledger.to_json())
