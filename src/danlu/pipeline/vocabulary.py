"""Before and after a vocabulary has grown: how much shorter texts become, and whose tokens change.

Every text is encoded by both tokenizers. New tokens are counted with the old ones that they stand for; a text in which they
are put back for the new ones must be the old one, else its words are cut in another way and it counts as `recut`: then the
stretches between borders that both have are compared, and the tokens of those that differ are noted.

    change = Change(old, new, growth)
    change.read(document)
    change.summary(), change.used["zh"].most_common(10)
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from danlu.core.records import Document
from danlu.core.terminal import visible
from danlu.text.clean import language
from danlu.tokens.codec import Codec, Encoded, Segment
from danlu.tokens.expand import Growth

if TYPE_CHECKING:
    from rich.table import Table

MAX_MEASURED = 1_000_000  # characters of a category that are measured
ROWS, ROW = 8, 128  # texts whose logits are compared, and their tokens


@dataclass(slots=True)
class Count:
    """Sums over texts. `joined`: old tokens that became parts of new ones; `recut`: texts that are cut in another way, and
    `recut_tokens` how many old tokens of theirs that concerns."""

    texts: int = 0
    characters: int = 0
    before: int = 0
    after: int = 0
    same: int = 0
    joined: int = 0
    recut: int = 0
    recut_tokens: int = 0

    def to_json(self) -> dict[str, float]:
        """The sums, and tokens for each 1,000 characters before and after."""
        per_thousand = 1000 / max(1, self.characters)
        return {"texts": self.texts, "characters": self.characters, "tokens_before": self.before,
                "tokens_after": self.after, "per_1000_before": round(self.before * per_thousand, 2),
                "per_1000_after": round(self.after * per_thousand, 2), "texts_unchanged": self.same,
                "tokens_joined": self.joined, "texts_recut": self.recut,
                "tokens_recut": self.recut_tokens}


@dataclass(slots=True)
class Change:
    """What a grown vocabulary does to texts, by category and by language, and rows of ids that stay as they were."""

    old: Codec
    new: Codec
    growth: Growth
    by_category: dict[str, Count] = field(default_factory=dict)
    by_language: dict[str, Count] = field(default_factory=dict)
    used: dict[str, Counter[int]] = field(default_factory=dict)  # category to how often each new id is used
    recut: Counter[int] = field(default_factory=Counter)  # new id to the old tokens of the stretches that it is in
    rows: list[list[int]] = field(default_factory=list)
    parts: dict[int, tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self.parts = {token.id: token.parts for token in self.growth.tokens}

    def read(self, document: Document) -> None:
        """Counts one text, as far as its category has not been measured enough."""
        category = self.by_category.setdefault(document.category, Count())
        text = document.text[:max(0, MAX_MEASURED - category.characters)]
        if not text:
            return
        spoken = self.by_language.setdefault(language(text), Count())
        before, after = self.old.encode_plain([text])[0].tolist(), self.new.encode_plain([text])[0].tolist()
        count = self._compare(before, after)
        count.characters = len(text)
        if count.recut:
            count.recut_tokens = self._recut(text)
        self.used.setdefault(document.category, Counter()).update(id for id in after if id >= self.growth.first_id)
        for total in (category, spoken):
            for name in Count.__dataclass_fields__:
                setattr(total, name, getattr(total, name) + getattr(count, name))
        self._keep(before, after)

    def compare_also(self, texts: Iterable[str]) -> None:
        """Texts that are not measured, for the rows whose logits are compared where the others gave too few."""
        for text in texts:
            self._keep(*(codec.encode_plain([text])[0].tolist() for codec in (self.old, self.new)))

    def _keep(self, before: list[int], after: list[int]) -> None:
        if self.growth.kept is None and before[:ROW] == after[:ROW] and len(self.rows) < ROWS and len(before) > 1:
            self.rows.append(before[:ROW])

    def _compare(self, before: list[int], after: list[int]) -> Count:
        if self.growth.kept is not None:  # every id is another one
            return Count(1, 0, len(before), len(after))
        parts = self.parts
        back = [old for id in after for old in parts.get(id, (id,))]
        joined = sum(len(parts[id]) for id in after if id in parts)
        return Count(1, 0, len(before), len(after), int(before == after), joined, int(back != before))

    def _recut(self, text: str) -> int:
        """How many old tokens of a text are cut in another way, which new tokens are there, too."""
        [before], [after] = (codec.encode([[Segment(0, text, plain=True)]]) for codec in (self.old, self.new))
        borders = np.intersect1d(before.offsets[:, 1], after.offsets[:, 1])
        was, is_now = (_stretches(row, borders) for row in (before, after))
        found = 0
        for place, old in was.items():
            new = is_now.get(place, [])
            if old != [part for id in new for part in self.parts.get(id, (id,))]:
                found += len(old)
                self.recut.update(dict.fromkeys((id for id in new if id in self.parts), len(old)))
        return found

    def summary(self) -> dict[str, Any]:
        """The counts as plain values."""
        return {"categories": {name: count.to_json() for name, count in sorted(self.by_category.items())},
                "languages": {name: count.to_json() for name, count in sorted(self.by_language.items())}}

    def used_pieces(self) -> dict[str, dict[str, int]]:
        """Of each category every new token that its texts use, and how often, the most frequent first."""
        return {category: self._named(found) for category, found in sorted(self.used.items())}

    def recut_pieces(self) -> dict[str, int]:
        """Every new token where texts are cut in another way, and of how many old tokens, the most first."""
        return self._named(self.recut)

    def _named(self, counts: Counter[int]) -> dict[str, int]:
        names = {token.id: token.token if (text := self.growth.old.text(token.token)) is None else text
                 for token in self.growth.tokens}
        return {names[id]: count for id, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))}


def _stretches(row: Encoded, borders: np.ndarray) -> dict[int, list[int]]:
    """The ids between each two neighbours among these borders, by the number of the latter."""
    found: dict[int, list[int]] = {}
    for place, id in zip(np.searchsorted(borders, row.offsets[:, 1]).tolist(), row.ids.tolist(), strict=True):
        found.setdefault(place, []).append(id)
    return found


def measure(change: Change, documents: Iterable[Document]) -> None:
    """Reads documents into the counts."""
    for document in documents:
        change.read(document)


def change_tables(metrics: Mapping[str, Any]) -> "list[Table]":
    """The tables of a step's metrics: texts before and after, and the model before and after."""
    from rich.table import Table
    from rich.text import Text

    texts = Table(title="tokens per 1,000 characters", title_justify="left", header_style="bold")
    for name in ("text", "characters", "before", "after", "change", "texts unchanged", "old tokens joined"):
        texts.add_column(name, justify="left" if name == "text" else "right", no_wrap=True)
    replaced = metrics["mode"] == "replace"
    for group, found in (("category", metrics["categories"]), ("language", metrics["languages"])):
        for name, count in found.items():
            before, after = count["per_1000_before"], count["per_1000_after"]
            share = f"{100 * (after / before - 1):+.1f} %" if before else ""
            kept = "" if replaced else f"{count['texts_unchanged']:,} of {count['texts']:,}"
            texts.add_row(Text(visible(f"{group} {name}")), f"{count['characters']:,}", f"{before:,.1f}", f"{after:,.1f}",
                          share, kept, "" if replaced else f"{count['tokens_joined']:,}")
    model = Table(title="the model", title_justify="left", header_style="bold")
    for name in ("", "before", "after"):
        model.add_column(name, justify="right" if name else "left", no_wrap=True)
    for label, name in (("ids", "num_ids"), ("embedding rows", "rows"), ("parameters", "parameters")):
        model.add_row(label, f"{metrics[name + '_before']:,}", f"{metrics[name]:,}")
    return [texts, model]


def change_notes(metrics: Mapping[str, Any]) -> list[str]:
    """What a step's metrics say of texts whose old tokens are not just joined, and of pieces that do not come back."""
    counts = metrics["categories"].values()
    texts, tokens = (sum(count[name] for count in counts) for name in ("texts_recut", "tokens_recut"))
    notes = []
    if texts:
        notes.append(f"{texts:,} texts are cut in another way, {tokens:,} old tokens of theirs, at "
                     + ", ".join(f"“{visible(piece)}”" for piece in metrics["most_recut"])
                     + " (all of them and how many tokens each: growth.json, recut)")
    if metrics["unreached"]:
        notes.append(f"{metrics['unreached']:,} pieces do not come back when they are read alone (growth.json, unreached)")
    return notes
