"""Which documents of the spool stay: exact duplicates, near duplicates and repeated paragraphs go, each for its reason.

Everything is decided by the order of documents (source, file, place in the file; before all others those that `heldout`
names) and counted in the ledger, at the stations `dedup`, `near` and `paragraphs`.

    chosen = select(spool, near=NearConfig(), paragraphs=True, ledger=ledger)
    chosen.stays, chosen.sizes
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from danlu.core.ledger import Ledger
from danlu.text.dedup import FIRST, repeats, size_left
from danlu.text.lines import Gate
from danlu.text.minhash import NearConfig
from danlu.text.near import near_repeats
from danlu.text.read import SourceConfig
from danlu.text.spool import SHOWN, Removed, Spool


@dataclass(slots=True)
class Chosen:
    """What stays.

    stays       bool [documents]
    sizes       int64 [documents]: bytes of text, without the paragraphs that go
    chars       int64 [documents]: characters of it
    paragraphs  bool [paragraphs]: which stay; None where none is dropped
    removed     some of what goes, to be shown
    """

    stays: np.ndarray
    sizes: np.ndarray
    chars: np.ndarray
    paragraphs: np.ndarray | None
    removed: list[Removed]


def road(sources: Sequence[SourceConfig], near: bool, paragraphs: bool, decontaminate: bool) -> list[str]:
    """The stations in the order of the road, up to the splits."""
    return [*dict.fromkeys(f"read:{source.path}" for source in sources), "clean",
            *(["decontaminate"] if decontaminate else []), "dedup", *(["near"] if near else []),
            *(["paragraphs"] if paragraphs else [])]


def merge(spool: Spool, sources: Sequence[SourceConfig], ledger: Ledger) -> list[Removed]:
    """Puts the ledgers of all splits together; some of what cleaning removed. DataError if too many rows were refused."""
    removed: list[Removed] = []
    kept: list[Removed] = []
    gates = [Gate(f"read:{source.path}", ledger, source.max_refused) for source in sources]
    for job, state in zip(spool.jobs, spool.states, strict=True):
        ledger.merge(Ledger.of_state(state["ledger"]))
        gate = gates[job.split.source]
        gate.rows += state["rows"]
        gate.refused += state["refused"]
        gate.first = (gate.first + state["first"])[:3]
        removed += [Removed(*item) for item in state["removed"]]
    for gate in gates:
        gate.finish()
    shown: Counter[str] = Counter()
    for item in removed:
        shown[item.reason] += 1
        if shown[item.reason] <= SHOWN:
            kept.append(item)
    return kept


def select(spool: Spool, near: NearConfig | None, paragraphs: bool, ledger: Ledger) -> Chosen:
    """Decides for every document, and every paragraph of those that stay."""
    marks = spool.marks
    sizes = marks["bytes"].astype(np.int64)
    named = marks["named"] != spool.named.index(())
    of = repeats(marks, named)
    chosen = Chosen(of == FIRST, sizes, spool.marks["chars"].astype(np.int64), None, [])
    _count(ledger, "dedup", "duplicate", np.ones(len(spool), np.bool_), chosen.stays, sizes)
    chosen.removed += _shown(spool, "dedup", "duplicate", of)
    if near is not None:
        of = near_repeats(spool, chosen.stays, near, named)
        stays = chosen.stays & (of == FIRST)
        _count(ledger, "near", "near duplicate", chosen.stays, stays, sizes)
        chosen.removed += _shown(spool, "near", "near duplicate", of)
        chosen.stays = stays
    if paragraphs:
        _drop_paragraphs(spool, chosen, ledger, named)
    return chosen


def _count(ledger: Ledger, name: str, reason: str, came: np.ndarray, went: np.ndarray, sizes: np.ndarray) -> None:
    station = ledger.station(name)
    station.take(rows=int(came.sum()), bytes=int(sizes[came].sum()))
    station.give(rows=int(went.sum()), bytes=int(sizes[went].sum()))
    goes = came & ~went
    if goes.any():
        station.drop(reason, rows=int(goes.sum()), bytes=int(sizes[goes].sum()))


def _shown(spool: Spool, station: str, reason: str, of: np.ndarray) -> list[Removed]:
    places = np.flatnonzero(of != FIRST)[:SHOWN]
    like = spool.documents(of[places].tolist())
    return [Removed.of(station, reason, document, other.id)
            for document, other in zip(spool.documents(places.tolist()), like, strict=True)]


def _drop_paragraphs(spool: Spool, chosen: Chosen, ledger: Ledger, named: np.ndarray) -> None:
    """Drops paragraphs that stood earlier in the corpus, and documents that hold no others."""
    counts = spool.marks["paragraphs"].astype(np.int64)
    paragraphs = spool.paragraphs()
    alive = np.flatnonzero(np.repeat(chosen.stays, counts))
    new = np.zeros(len(paragraphs), np.bool_)
    new[alive] = repeats(paragraphs[alive], np.repeat(named, counts)[alive]) == FIRST
    left, chars = (size_left(paragraphs[unit], paragraphs[f"blank_{unit}"], new, counts) for unit in ("bytes", "chars"))
    has_any = np.bincount(np.repeat(np.arange(len(counts)), counts), new, len(counts)) > 0
    stays = chosen.stays & has_any
    station = ledger.station("paragraphs")
    came = int(chosen.sizes[chosen.stays].sum())
    went = int(left[stays].sum())
    station.take(rows=int(chosen.stays.sum()), bytes=came)
    station.drop("repeated paragraph", bytes=came - went)
    if (chosen.stays & ~has_any).any():
        station.drop("nothing but repeated paragraphs", rows=int((chosen.stays & ~has_any).sum()))
    station.give(rows=int(stays.sum()), bytes=went)
    gone = [Removed.of("paragraphs", "nothing but repeated paragraphs", document)
            for document in spool.documents(np.flatnonzero(chosen.stays & ~has_any)[:SHOWN].tolist())]
    chosen.removed += gone
    chosen.stays, chosen.sizes, chosen.chars, chosen.paragraphs = stays, left, chars, new
