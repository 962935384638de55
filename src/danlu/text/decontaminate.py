"""Decontamination: documents that hold an item of an evaluation set are dropped, and how surely is measured.

A document is contaminated where it shares a run of `ngram` words with an item (13, as Brown et al., Language Models are
Few-Shot Learners, arXiv:2005.14165, appendix C), or for Chinese items a run of `han_ngram` characters. Runs are of units
(`text/characters.py`), so line breaks, case, width and punctuation make no difference. A shorter item is looked for as a
whole, down to `min_ngram` units; shorter ones would be found by chance, and are counted as not looked for.

`measure_recall` plants items, disguised in each of those ways, in text of another kind, and counts which are found.

    items = {"arc": ["Which of these is …?"]}           # as evalsets.read_items gives them
    index = Contamination(items, config)
    index.found(text)                   # "arc" or None
    measure_recall(items, carriers, config)        # {"arc": Recall(planted=…, found=…, …)}
"""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import Field

from danlu.core.config import Config, FieldPath
from danlu.text.characters import ngrams, units_and_singles

CHINESE_SHARE = 0.5  # of single characters among an item's units, from which its runs are counted in characters


class EvalSetConfig(Config):
    """An evaluation set; each of its fields that is named is an item of its own."""

    name: str = Field(pattern=r"^[\w-]+$", description="the reason in the ledger: contaminated_NAME")
    path: str = Field(min_length=1, description="file, folder or glob, as a source of the corpus")
    fields: list[FieldPath] = Field(default=[], description="columns or paths of the items' texts; of plain text: lines")


class DecontaminateConfig(Config):
    """Against what, and how long a run has to be."""

    sets: list[EvalSetConfig] = Field(min_length=1, description="the evaluation sets")
    ngram: int = Field(default=13, ge=1, description="words in a run that a document and an item share")
    han_ngram: int = Field(default=20, ge=1, description="characters in such a run of a Chinese item")
    min_ngram: int = Field(default=8, ge=1, description="units of a shorter item, from which it is looked for as a whole")
    recall_items: int = Field(default=100, ge=0, description="items of each set that are planted to measure the recall")


class Contamination:
    """The runs of all items, by their length, in sorted arrays.

    num_items     items of each set
    num_too_short items of each set that are too short to be looked for
    """

    def __init__(self, items: Mapping[str, Iterable[str]], config: DecontaminateConfig) -> None:
        self.names = list(items)
        self.num_items = dict.fromkeys(self.names, 0)
        self.num_too_short = dict.fromkeys(self.names, 0)
        parts: dict[int, list[tuple[np.ndarray, int]]] = {}
        for number, (name, texts) in enumerate(items.items()):
            for text in texts:
                self.num_items[name] += 1
                runs = self._runs(text, config)
                if runs is None:
                    self.num_too_short[name] += 1
                else:
                    parts.setdefault(runs[0], []).append((runs[1], number))
        self._tables: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for length, found in sorted(parts.items()):
            grams = np.concatenate([grams for grams, _ in found])
            owners = np.repeat([number for _, number in found], [len(grams) for grams, _ in found])
            grams, first = np.unique(grams, return_index=True)
            self._tables[length] = grams, owners[first]

    @staticmethod
    def _runs(text: str, config: DecontaminateConfig) -> tuple[int, np.ndarray] | None:
        hashes, single = units_and_singles(text)
        if len(hashes) < config.min_ngram:
            return None
        longest = config.han_ngram if single.mean() >= CHINESE_SHARE else config.ngram
        length = min(len(hashes), longest)
        return length, ngrams(hashes, length)

    def found(self, text: str) -> str | None:
        """The name of a set of which a text holds an item (the earliest run of the shortest kind), or None."""
        hashes, _ = units_and_singles(text)
        for length, (table, owners) in self._tables.items():
            if len(hashes) < length:
                break
            grams = ngrams(hashes, length)
            places = np.minimum(np.searchsorted(table, grams), len(table) - 1)
            hits = np.flatnonzero(table[places] == grams)
            if len(hits):
                return self.names[owners[places[hits[0]]]]
        return None


@dataclass(slots=True)
class Recall:
    """What became of a set's planted items.

    too_short  items that are not looked for; they are none of the planted ones
    missed     planted items that were not found, by disguise
    false      carriers in which something was found before anything was planted; they are not planted in
    """

    planted: int = 0
    found: int = 0
    too_short: int = 0
    false: int = 0
    missed: dict[str, int] = field(default_factory=dict)


_PUNCTUATION = re.compile(r"[^\w\s]|_")


def _rewrapped(text: str, random: random.Random) -> str:
    width = random.randrange(20, 60)
    if " " not in text.strip():
        return "\n".join(text[start:start + width] for start in range(0, len(text), width))
    lines, line = [], ""
    for word in text.split():
        if len(line) + len(word) > width:
            lines.append(line)
            line = ""
        line = f"{line}  {word}" if line else word
    return "\n".join([*lines, line])


def _full_width(text: str, random: random.Random) -> str:
    return "".join(chr(ord(character) + 0xfee0) if "!" <= character <= "~" else character for character in text)


DISGUISES = {
    "as it is": lambda text, random: text,
    "other line breaks": _rewrapped,
    "upper case": lambda text, random: text.upper(),
    "full width": _full_width,
    "other punctuation": lambda text, random: _PUNCTUATION.sub(lambda match: random.choice([" ", " ; ", " — "]), text),
}


def measure_recall(items: Mapping[str, Sequence[str]], carriers: Sequence[str], config: DecontaminateConfig,
                   seed: int = 0) -> dict[str, Recall]:
    """By set, how many of `recall_items` items are found when each is planted in a carrier in each disguise."""
    index = Contamination(items, config)
    clean = [carrier for carrier in carriers if index.found(carrier) is None]
    result = {}
    for name, texts in items.items():
        chance = random.Random(f"{seed} {name}")
        recall = result[name] = Recall(too_short=index.num_too_short[name], false=len(carriers) - len(clean))
        long_enough = [text for text in texts if Contamination._runs(text, config) is not None]
        for text in chance.sample(long_enough, min(config.recall_items, len(long_enough))):
            for disguise, change in DISGUISES.items():
                carrier = chance.choice(clean) if clean else ""
                place = chance.randrange(len(carrier) + 1)
                recall.planted += 1
                if index.found(f"{carrier[:place]}\n{change(text, chance)}\n{carrier[place:]}") is not None:
                    recall.found += 1
                else:
                    recall.missed[disguise] = recall.missed.get(disguise, 0) + 1
    return result
