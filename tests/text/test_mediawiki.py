"""Dumps of MediaWiki: pages, their markup, and files that are no dump."""

import bz2
import time
from html import escape
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.core.ledger import Ledger
from danlu.core.records import Document
from danlu.text import mediawiki, wikitext
from danlu.text.read import SourceConfig, read_documents
from danlu.text.wikitext import plain_text

HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="zh">
  <siteinfo><sitename>W</sitename><namespaces><namespace key="0" case="first-letter" />
    <namespace key="6" case="first-letter">文件</namespace><namespace key="14">分类</namespace></namespaces></siteinfo>
"""


def page(title: str, text: str, ns: int = 0, redirect: str = "", model: str = "wikitext") -> str:
    target = f'<redirect title="{redirect}" />' if redirect else ""
    return (f"  <page>\n    <title>{title}</title><ns>{ns}</ns><id>1</id>{target}\n    <revision><id>2</id>"
            f'<model>{model}</model><format>text/x-wiki</format><text bytes="9" xml:space="preserve">{escape(text)}</text>'
            "</revision>\n  </page>\n")


def read(folder: Path, name: str, data: bytes) -> tuple[list[Document], dict, Ledger]:
    ledger = Ledger()
    (folder / name).write_bytes(bz2.compress(data) if name.endswith(".bz2") else data)
    documents = list(read_documents(SourceConfig(path=name, max_refused=1), folder, ledger))
    ledger.check()
    return documents, ledger.station(f"read:{name}").to_json(), ledger


@pytest.mark.parametrize("chunk", [1, 100, 1 << 16])
def test_a_dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(mediawiki, "CHUNK", chunk)
    data = (HEAD + page("北京", "'''北京'''是[[中国|中国]]的首都。[[文件:a.jpg|缩略图]][[分类:城市]]")
            + page("京", "#重定向 [[北京]]", redirect="北京")
            + page("Talk:北京", "说", ns=1) + page("a.json", "{}", model="json") + page("空", "{{空}}")
            + page("A &amp; B", "x < y &amp; z") + "</mediawiki>\n").encode()
    documents, station, ledger = read(tmp_path, "w.xml.bz2", data)
    assert documents == [Document("北京是中国的首都。", "w.xml.bz2", "w.xml.bz2#北京", "text"),
                         Document("x < y & z", "w.xml.bz2", "w.xml.bz2#A & B", "text")]
    assert station["in"] == {"rows": 6, "bytes": len(data), "tokens": 0}
    assert {name: count["rows"] for name, count in station["dropped"].items() if count["rows"]} == {
        "redirect": 1, "page outside the article namespace": 1, "page that is not wikitext": 1, "no text in the page": 1}
    assert not ledger.quarantined


def test_only_the_first_articles(tmp_path: Path) -> None:
    (tmp_path / "w.xml").write_text(HEAD + "".join(page(f"t{n}", f"text {n}") for n in range(9)) + "</mediawiki>")
    ledger = Ledger()
    assert [item.text for item in read_documents(SourceConfig(path="w.xml#2"), tmp_path, ledger)] == ["text 0", "text 1"]
    ledger.check()


ENTITIES = "".join(f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 10}">' for n in range(12))
BOMB = f'<?xml version="1.0"?><!DOCTYPE m [<!ENTITY a "aaaaaaaaaa">{ENTITIES}]>' \
       "<mediawiki><page><title>&m;</title></page></mediawiki>"


@pytest.mark.parametrize("data,reason,documents", [
    (BOMB, "a document type declaration, which no dump has", 0),
    ('<!DOCTYPE m SYSTEM "file:///etc/passwd"><mediawiki/>', "a document type declaration, which no dump has", 0),
    ("<html><body/></html>", "no dump of MediaWiki: the first element is not <mediawiki>", 0),
    ("", "bad XML: no element found", 0), ("no xml", "bad XML: syntax error", 0),
    (HEAD + page("a", "text") + "<page><title>b", "bad XML: no element found", 1),
    (HEAD + page("a", "text") + "<page><a></b></page>", "bad XML: mismatched tag", 1),
    (HEAD + page("a", "text") + "<a>" * 1000, "elements that are nested too deeply", 1)])
def test_what_is_no_dump_is_one_refused_row(tmp_path: Path, data: str, reason: str, documents: int) -> None:
    began = time.process_time()
    found, _, ledger = read(tmp_path, "w.xml", data.encode())
    assert len(found) == documents and time.process_time() - began < 2
    assert [item.where for item in ledger.quarantined] == [f"w.xml:{documents + 1}"]
    assert ledger.quarantined[0].reason.startswith(reason) and "byte " in ledger.quarantined[0].reason


def test_pages_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mediawiki, "MAX_TEXT", 1000)
    data = HEAD + page("a", "x" * 999) + page("b", "y\n" * 501) + page("c", "z") + "</mediawiki>"
    found, _, ledger = read(tmp_path, "w.xml", data.encode())
    assert [item.id for item in found] == ["w.xml#a", "w.xml#c"]
    assert [(item.where, item.reason) for item in ledger.quarantined] == [("w.xml#b", "a page of more than 1000 bytes")]
    held = mediawiki._Pages().feed((HEAD + page("b", "y\n" * 100_000)).encode())[0]
    assert len(held.text) <= 1000 and held.size == 200_000, "it is not held, only counted"


ARTICLE = """{{Infobox city
| name = 北京 {{nowrap|x}}
| map = [[File:m.png]]
|}}
'''北京市'''（[[英语|英語]]：{{lang|en|Beijing}}；{{IPA|x}}），简称“'''[[京 (简称)|京]]'''”，是[[中华人民共和国]]的\
-{zh-hans:首都; zh-hant:首都市}-。<ref name="a">书</ref><ref name="b" /><!-- 注 -->
[[File:a.jpg|thumb|图 [[链接]] 说明]]
== 历史 ==
=== 空的 ===
{{main|x}}
=== 古代 ===
面积{{convert|16410|km2|sqmi}}，见[http://a.cn 官网]和[http://b.cn]。<br/>公式<math>x^{2} < y</math>\
与<nowiki>[[不是链接]]</nowiki>。
* 第一
** 第二
# ''斜体''
; 词
: 缩进
{| class="wikitable"
! a !! b
|-
| 1 || {{x|}}
|}
== 参考文献 ==
{{reflist}}
[[Category:城市]][[en:Beijing]][[:en:Peking|Peking]]__NOTOC__ &nbsp;&lt;b&gt;
"""


def test_an_article_with_all_its_markup() -> None:
    assert plain_text(ARTICLE) == """北京市（英語：Beijing），简称“京”，是中华人民共和国的首都。

历史

古代

面积16410 km2，见官网和。
公式$x^{2} < y$与[[不是链接]]。
- 第一
- 第二
- 斜体
词
缩进

参考文献

Peking  <b>"""


@pytest.mark.parametrize("markup,text", [
    ("a{{b|{{c}}|[[d|e]]}}f", "af"), ("{{nowrap|a {{nowrap|b}} [[c|d]]}}", "a b d"),
    ("x {{unclosed | y", "x {{unclosed | y"), ("{|\n|a\n{|\n|b\n|}\n|c\n|}\nend", "end"),
    ("{{a\n{| never closed\n}}end", "end"), ("a [[b", "a b"), ("[[a|b]]s", "bs"),
    ("[[:File:a.jpg]]", "File:a.jpg"), ("[[a#b]]", "a#b"), ("[[fr:Page]]x", "x"), ("[[Re:Zero|Re]]", "Re"),
    ("<ref>never closed text", "never closed text"), ("<REF>a</REF>b", "b"), ("<code>x = [[1]]</code>", "x = [[1]]"),
    ("<gallery>\na.jpg|b\n</gallery>c", "c"), ("a<!-- never closed", "a"), ("<b>a</b> < 3 > 2", "a < 3 > 2"),
    ("（）a（；b）()", "a（b）"), ("-{a}- -{H|zh-cn:b;zh-tw:c}- -{zh-tw:丙;zh-cn:乙}-", "a  乙"),
    ("== h ==\ntext", "h\n\ntext"), ("== h ==\n=== i ===\n== j ==\n", ""), ("====== 6 ======\nx", "6\n\nx"),
    ("a\n\n\n\nb", "a\n\nb"),
    ("----\na", "a"), ("{{lang|en|}}", ""), ("{{val|5|u=m}}", "5"), ("\x00a\x01", "a"), ("&amp;lt;", "&lt;")])
def test_pieces_of_markup(markup: str, text: str) -> None:
    assert plain_text(markup) == text


PIECES = ["{{", "}}", "{|", "\n{|", "\n|}", "[[", "]]", "|", "<ref>", "</ref>", "<ref/>", "<div>", "'''", "==", "\n",
          "-{", "}-", "<!--", "-->", "[http://a ", "]", "(", "（", "<math>", "</math>", "lang|", "a", ":", "<",
          "\n* ", "&lt;"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=40))
def test_any_markup_gives_a_text(parts: list[str]) -> None:
    text = plain_text("".join(parts))
    assert text == text.strip() and "\x00" not in text and "\x01" not in text and "\n\n\n\n" not in text


@pytest.mark.parametrize("unit", [*PIECES, "{{a|", "{{nowrap|", "[[a|", "<br", "-{{", "((", "（，", "<ref name=", "<!",
                                  "{{x}}{{", "[//a", " ", ",", "=", "= ", ": "])
def test_time_grows_with_the_length_alone(unit: str) -> None:
    many = unit * (100_000 // len(unit))
    began = time.process_time()
    for text in (many, "\n" + many, "(" + many, "[http://" + many, "<a" + many, "<ref>" + many, "-{" + many, "== " + many,
                 "{{lang|" + many + "}}", "[[" + many + "]]"):
        plain_text(text)
    assert time.process_time() - began < 6, "1 MB of anything"


def test_links_in_links_are_not_copied_at_every_level() -> None:
    began = time.process_time()
    wikitext._cut_links("[[" * 100_000 + "text " * 100_000 + "]]" * 100_000, ())
    assert time.process_time() - began < 3


@pytest.mark.parametrize("begin,end", [("[[", "]]"), ("[[a|", "]]"), ("{{", "}}"), ("{{nowrap|", "}}"), ("\n{|", "\n|}"),
                                       ("<ref>", "</ref>"), ("-{", "}-"), ("<code>", "</code>"), ("（", "）")])
def test_time_does_not_grow_with_the_depth(begin: str, end: str) -> None:
    began = time.process_time()
    plain_text(begin * 20_000 + "text " * 40_000 + end * 20_000)
    assert time.process_time() - began < 3
