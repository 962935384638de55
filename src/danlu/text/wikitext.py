"""The markup of MediaWiki as plain text: what a reader reads, without tables, footnotes, boxes and pictures.

Kept: paragraphs, headings that have text under them, list items, the labels of links, formulas as $…$, what stands in
<nowiki>, <pre> and <code>. Taken out: templates (but for a few that only dress a text, KEPT), tables, <ref>, galleries,
comments, links to files and categories and to other languages, and the empty brackets that all this leaves. Of the variants
in -{zh-hans:…; zh-hant:…}- the simplified one is read.

Templates are not expanded, for that needs the whole wiki. Every step takes time in proportion to the length of the text,
whatever stands in it, because anybody may write it; that is why no parser of the full grammar is used, whose time grows
with the square on tags that are never closed.

    plain_text("'''丹炉'''是[[道教|道家]]的{{Lang|en|furnace}}。<ref>书</ref>")        # 丹炉是道家的furnace。
"""

import html
import re
from bisect import bisect_left
from collections.abc import Callable, Collection

# Tags that go with what stands in them, and tags whose content is taken as it is
DROPPED_TAGS = ("ref", "references", "gallery", "timeline", "imagemap", "score", "graph", "mapframe", "maplink", "chem",
                "ce", "templatedata", "templatestyles", "indicator", "hiero", "section", "includeonly", "script", "style")
LITERAL_TAGS = ("nowiki", "pre", "syntaxhighlight", "source", "code", "math")
# Templates that are their own text: the number of the argument that holds it
KEPT = {"lang": 2, "nowrap": 1, "nobr": 1, "nobold": 1, "small": 1, "smaller": 1, "big": 1, "em": 1, "strong": 1, "abbr": 1,
        "tooltip": 1, "val": 1, "le": 1, "tsl": 3, "ruby": 1, "color": 2, "font color": 2, "blockquote": 1, "quote": 1}
LANGUAGE_PREFIXES = ("link-", "lang-")  # of whole families of them, whose first argument it is
UNITS = ("convert", "cvt")  # whose first two arguments are a number and its unit
VARIANTS = ("zh-hans", "zh-cn", "zh-sg", "zh-my", "zh")
MAX_DEPTH = 20  # of links in links, and of templates in the text of kept ones
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.S)
_BRACES = re.compile(r"\{\{|\}\}|(?:^|(?<=\n))[ :]*\{\||(?<=\n)[ :]*\|\}(?!\})")
_LINK = re.compile(r"\[\[|\]\]")
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[a-z]+)*|simple")
_WHOLE_LINK = re.compile(r"\[\[[^\[\]]*\]\]")
_NAMED = re.compile(r"\s*[A-Za-z][\w -]*=")
_EXTERNAL = re.compile(r"\[(?:(?:https?|ftp)://|//|mailto:)[^\s\[\]]*+([^\[\]\n]*+)\]")
_VARIANT = re.compile(r"-\{([^{}]*)\}-")
_BREAK = re.compile(r"<br\b[^<>]{0,99}>", re.I)
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
_SWITCH = re.compile(r"__[A-Z]{3,20}__|__[\u4e00-\u9fff]{2,8}__")
_QUOTES = re.compile(r"'{2,5}")
_HEADING = re.compile(r"(={1,6})(.+?)\1\s*")
_MARKER = re.compile(r"([*#:;]+)[ \t]*")
_EMPTY = re.compile(r"[（(][\s,，;；、:：/]*[)）]|\[[\s,，;；]*\]")
_LEADING = re.compile(r"([（(])[\s,，;；、]+")
_TRAILING = re.compile(r"(?<![\s,，;；、])[\s,，;；、]++(?=[)）])")
_OURS = dict.fromkeys((0, 1, 2))  # characters by which places are marked here
_NUMBERED = re.compile("\x00([0-9]+)\x01")


def plain_text(wikitext: str, namespaces: Collection[str] = ("file", "image", "category", "media")) -> str:
    """The text that a reader reads; "" where there is none. `namespaces`: names, in lower case, whose links are no text."""
    literal: list[str] = []
    text = _COMMENT.sub("", wikitext.translate(_OURS))
    text = _cut_tags(text, LITERAL_TAGS, lambda name, inside: _put_aside(literal, name, inside))
    text = _cut_tags(text, DROPPED_TAGS, lambda name, inside: "")
    text = _cut_braces(text)
    text = _VARIANT.sub(lambda found: _variant(found[1]), text)
    text = _cut_links(text, namespaces)
    text = _EXTERNAL.sub(lambda found: found[1].strip(), text)
    text = _SWITCH.sub("", _QUOTES.sub("", text))
    text = _TAG.sub("", _BREAK.sub("\n", text))
    text = html.unescape(text).replace("\xa0", " ")
    text = _TRAILING.sub("", _LEADING.sub(r"\1", _EMPTY.sub("", text)))
    text = _lines(text)
    return _NUMBERED.sub(lambda found: literal[int(found[1])], text).strip()


def _put_aside(literal: list[str], name: str, inside: str) -> str:
    """The number of a text that is not to be read as markup."""
    text = html.unescape(inside)
    literal.append(f"${' '.join(text.split())}$" if name == "math" else text)
    return f"\x00{len(literal) - 1}\x01"


def _cut_tags(text: str, names: tuple[str, ...], into: Callable[[str, str], str]) -> str:
    """Elements of these names replaced by into(name, inside); one that is not closed is left for `_TAG`."""
    tags = list(re.finditer(rf"<(/?)({'|'.join(names)})\b([^<>]*)>", text, re.I))
    closing: dict[str, list[int]] = {}
    for number, tag in enumerate(tags):
        if tag[1]:
            closing.setdefault(tag[2].lower(), []).append(number)
    parts, at, number = [], 0, 0
    while number < len(tags):
        tag, name = tags[number], tags[number][2].lower()
        number += 1
        if tag[1]:
            continue
        own = closing.get(name, [])
        place = bisect_left(own, number)
        if tag[3].endswith("/"):
            end, inside = tag.end(), ""
        elif place < len(own):
            end, inside = tags[own[place]].end(), text[tag.end():tags[own[place]].start()]
            number = own[place] + 1
        else:
            continue
        parts += [text[at:tag.start()], into(name, inside)]
        at = end
    return "".join([*parts, text[at:]])


def _cut_braces(text: str, depth: int = 0) -> str:
    """Without templates and tables, but for the text of those templates that are KEPT."""
    opened: list[tuple[str, int]] = []
    num_templates = 0  # among them
    spans: list[tuple[int, int, bool]] = []
    for found in _BRACES.finditer(text):
        token = found[0].strip(" :")
        if token in ("{{", "{|"):
            opened.append((token, found.end() - 2))
            num_templates += token == "{{"
        elif token == "}}" and num_templates:
            while opened[-1][0] != "{{":
                opened.pop()  # a table that is not closed in its template
            spans.append((opened.pop()[1], found.end(), True))
            num_templates -= 1
        elif token == "|}" and opened and opened[-1][0] == "{|":
            spans.append((opened.pop()[1], found.end(), False))
    parts, at = [], 0
    for begin, end, is_template in sorted(spans):
        if begin < at:
            continue  # inside the last one
        parts += [text[at:begin], _kept(text[begin + 2:end - 2], depth) if is_template else ""]
        at = end
    return "".join([*parts, text[at:]])


def _kept(inside: str, depth: int) -> str:
    """The text of a template that only dresses a text; of any other one nothing."""
    head = inside[:40].partition("|")[0].strip().lower().replace("_", " ")
    place = 1 if head.startswith(LANGUAGE_PREFIXES) else KEPT.get(head)
    if depth >= MAX_DEPTH or (place is None and head not in UNITS):
        return ""
    hidden = _WHOLE_LINK.sub(lambda link: link[0].replace("|", "\x02"), _cut_braces(inside, depth + 1))  # no border there
    positional = [part.replace("\x02", "|").strip() for part in hidden.split("|")[1:] if not _NAMED.match(part)]
    if place is None:
        return " ".join(positional[:2])
    return re.sub(r"^1=", "", positional[place - 1]) if place <= len(positional) else ""


def _variant(inside: str) -> str:
    """What one reads in simplified Chinese of what stands in -{ }-."""
    flags, bar, rules = inside.rpartition("|")
    if bar and flags.strip() in ("H", "T", "-", "D"):
        return ""  # a rule or a title, which is not shown here
    found = {name.strip().lower(): text.strip() for name, colon, text in
             (rule.partition(":") for rule in rules.split(";")) if colon and name.strip().lower().startswith("zh")}
    if not found:
        return rules
    return next((found[name] for name in VARIANTS if name in found), next(iter(found.values())))


def _cut_links(text: str, namespaces: Collection[str]) -> str:
    """Links replaced by their labels, and those to files, categories and other languages by nothing."""
    stack: list[list[str]] = [[]]
    at = 0
    for found in _LINK.finditer(text):
        stack[-1].append(text[at:found.start()])
        at = found.end()
        if found[0] == "[[":
            if len(stack) <= MAX_DEPTH:
                stack.append([])
        elif len(stack) > 1:
            inside = "".join(stack.pop())
            stack[-1].append(_label(inside, namespaces))
    stack[-1].append(text[at:])
    return "".join("".join(parts) for parts in stack)


def _label(inside: str, namespaces: Collection[str]) -> str:
    target, bar, label = inside.partition("|")
    prefix, colon, _ = target.partition(":")
    name = prefix.strip().lower().replace("_", " ")
    if colon and (name in namespaces or (not bar and _LANGUAGE.fullmatch(name))):
        return ""
    return label if label.strip() else target.strip().lstrip(":").replace("_", " ")


def _lines(text: str) -> str:
    """The lines without their markers, and without headings under which nothing stands."""
    lines: list[str] = []
    headings: list[tuple[int, int]] = []  # (level, place in lines) of those that wait for text
    for line in text.split("\n"):
        line = line.rstrip()
        if line.startswith("=") and (heading := _HEADING.fullmatch(line)):
            level = len(heading[1])
            while headings and headings[-1][0] >= level:
                del lines[headings.pop()[1]:]
            headings.append((level, len(lines)))
            lines += [*([""] if lines and lines[-1] else []), heading[2].strip(), ""]
            continue
        if marker := _MARKER.match(line):
            line = line[marker.end():]
            line = "- " + line if line and marker[1][-1] in "*#" else line
        if line.startswith("----"):
            line = line.lstrip("-")
        if line.strip():
            headings.clear()
        if line.strip() or (lines and lines[-1]):
            lines.append(line.strip())
    if headings:
        del lines[headings[0][1]:]
    return "\n".join(lines)
