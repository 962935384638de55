"""Block lists: what must not be learned. A document with a listed word, or with a link to a listed site, is dropped.

A list is a text file, one entry a line; `#` at the beginning of a line or after a blank begins a comment. Its name is the
reason in the ledger. Words are found in any case and width, a blank in an entry stands for any blanks and line ends;
entries in letters that are parted by blanks only as whole words, Han entries anywhere. A site blocks all of its
subdomains, and an entry with a path only what lies under it.

    lists = load([BlocklistConfig(name="gambling", words="lists/gambling.txt")], base)
    lists[0].find(text)                     # the entry that was found, or None
"""

import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, model_validator

from danlu.core.config import Config
from danlu.core.errors import ConfigError
from danlu.text.characters import compose
from danlu.text.files import locate


class BlocklistConfig(Config):
    """A list of words, of sites, or of both; several files (a folder, a glob) are one list."""

    name: str = Field(pattern=r"^[\w-]+$", description="the reason in the ledger: blocked_NAME")
    words: str | None = Field(default=None, description="a file of words and phrases, one a line")
    urls: str | None = Field(default=None, description="a file of sites (a.com) and pages (a.com/path), one a line")
    min_count: int = Field(default=1, ge=1, description="drops where so many different entries are found")

    @model_validator(mode="after")
    def _blocklist_has_a_file(self) -> "BlocklistConfig":
        if self.words is None and self.urls is None:
            raise ValueError("a block list needs a file of “words” or of “urls”")
        return self


_COMMENT = re.compile(r"(?:^|\s)#")
LONGEST = 200  # characters of an entry
_LATIN_END = re.compile(r"(?<=[^\x00-\x7f])[a-z0-9][a-z0-9-]*$")  # 登录a.com: what stands before it need not be of the name
_LINK = re.compile(r"(?:https?://|//|\bwww\.|(?<![\w@.-]))((?:[\w-]+\.)+[a-z]{2,24})((?:/[^\s<>\"'，。）】]*)?)")


def _plain(text: str) -> str:
    return text.lower() if text.isascii() else compose(text, "NFKC").casefold()


@dataclass(frozen=True)
class Blocklist:
    """One list, ready to search with; its expression shares beginnings, so that its time hardly grows with the list."""

    name: str
    words: re.Pattern[str] | None
    sites: frozenset[str]
    min_count: int = 1

    @property
    def reason(self) -> str:
        """The reason in the ledger."""
        return f"blocked_{self.name}"

    def found(self, text: str, address: str = "") -> list[str]:
        """The different entries that a text has, in order, at most `min_count`; in the address only sites count."""
        entries: dict[str, None] = {}
        plain = _plain(text)
        if self.words is not None:
            for match in self.words.finditer(plain):
                entries.setdefault(" ".join(match[0].split()))
                if len(entries) >= self.min_count:
                    return list(entries)
        if self.sites and "." in (linked := f"{_plain(address)} {plain}"):
            for match in _LINK.finditer(linked):
                entry = self._site(match[1], match[2])
                if entry is not None:
                    entries.setdefault(entry)
                    if len(entries) >= self.min_count:
                        break
        return list(entries)

    def blocks(self, text: str, address: str = "") -> bool:
        """Whether a text, with the address of its page, has as many different entries as it takes."""
        return len(self.found(text, address)) >= self.min_count

    def _site(self, host: str, path: str) -> str | None:
        labels = host.removeprefix("www.").split(".")
        folders = [part for part in path.split("?")[0].split("/") if part]
        names = [".".join(labels[start:]) for start in range(len(labels) - 1)]
        if end := _LATIN_END.search(labels[0]):
            names.append(".".join([end[0], *labels[1:]]))
        for name in names:
            for depth in range(len(folders) + 1):
                entry = "/".join([name, *folders[:depth]])
                if entry in self.sites:
                    return entry
        return None


def compile_words(entries: list[str]) -> re.Pattern[str] | None:
    """One expression that finds every entry: a tree of their letters, so that common beginnings are read once."""
    tree: dict = {}
    for entry in entries:
        node = tree
        for character in " ".join(_plain(entry).split()):
            node = node.setdefault(character, {})
        node[""] = {}
    return re.compile(_branches(tree, "")) if tree else None


def _branches(tree: dict, before: str) -> str:
    """The alternatives of a tree, the longest entry first; a word of letters ends and begins at a word's border."""
    options = []
    for character, node in sorted(tree.items(), key=lambda item: item[0] == ""):
        if character == "":
            options.append(r"(?![a-z0-9_\u00c0-\u024f])" if re.match(r"[a-z0-9_\u00c0-\u024f]", before) else "")
            continue
        border = r"(?<![a-z0-9_\u00c0-\u024f])" if not before and re.match(r"[a-z0-9_\u00c0-\u024f]", character) else ""
        letter = r"\s+" if character == " " else re.escape(character)
        options.append(border + letter + _branches(node, character))
    return options[0] if len(options) == 1 else f"(?:{'|'.join(options)})"


def _entries(path: str, base: Path) -> list[str]:
    """The entries of the files behind a path, which begins where the paths of sources begin."""
    lines: list[str] = []
    for file in locate(path, base):
        try:
            lines += file.path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the block list cannot be read: {error}", where=file.label,
                              hint="It is a text file in UTF-8, one entry a line.") from error
    found = [entry for line in lines if (entry := _COMMENT.split(line)[0].strip())]
    for entry in found:
        if len(entry) > LONGEST:
            raise ConfigError(f"an entry of {len(entry):,} characters is too long: “{entry[:40]}…”", where=path,
                              hint=f"Entries are words, phrases and sites of at most {LONGEST} characters.")
    if not found:
        raise ConfigError("the block list has no entry", where=path, hint="It is a text file, one entry a line.")
    return found


def load(configs: list[BlocklistConfig], base: Path) -> list[Blocklist]:
    """The lists, in the order of the recipe; raises ConfigError with the file's name."""
    result = []
    for config in configs:
        words = compile_words(_entries(config.words, base)) if config.words else None
        sites = _entries(config.urls, base) if config.urls else []
        plain = {re.sub(r"^(?:https?:)?(?://)?(?:www\.)?", "", _plain(site)).partition("#")[0].rstrip("/")
                 for site in sites}
        result.append(Blocklist(config.name, words, frozenset(plain), config.min_count))
    return result
