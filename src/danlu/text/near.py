"""Near duplicates across a whole corpus, from the signatures in the spool: who is compared, and who goes.

One band after the other is sorted, so that memory holds one key a document; only documents that share a key with another
one are looked at again, in the corpus's order. Such a document goes where its signature is similar enough to that of one
that *stays*; the most similar one is named. Of the documents that stay only the first MAX_MEMBERS with a key are compared:
where thousands share a template and are not alike, work would grow with their square.

    of = near_repeats(spool, stays, NearConfig(), named)       # int64: −1, or the document that stays and is alike
"""

import os
from collections import OrderedDict

import numpy as np

from danlu.text.minhash import KEPT, NearConfig, is_empty, similarity
from danlu.text.spool import Spool, path_of

MAX_MEMBERS = 100  # documents that stay, of those with one key, with which a later one is compared
CACHED = 1 << 16  # signatures


def near_repeats(spool: Spool, stays: np.ndarray, near: NearConfig, before: np.ndarray) -> np.ndarray:
    """int64 [documents]: for each document the one that stays and that it repeats, or −1; those not in `stays` get −1.

    before  bool [documents]: these come before all others
    """
    found = np.full(len(spool), KEPT, np.int64)
    documents, buckets = _collisions(spool, stays, near, before)
    if not len(documents):
        return found
    signatures = _Signatures(spool, near)
    members: dict[int, list[int]] = {}
    begins = np.flatnonzero(np.append(True, documents[1:] != documents[:-1]))
    ends = np.append(begins[1:], len(documents))
    for begin, end in zip(begins.tolist(), ends.tolist()):
        document, keys = int(documents[begin]), buckets[begin:end].tolist()
        own = signatures[document]
        if is_empty(own):
            continue
        candidates = sorted({other for key in keys for other in members.get(key, ())})
        if candidates:
            similar = similarity(own, np.stack([signatures[other] for other in candidates]))
            best = int(similar.argmax())
            if similar[best] >= near.threshold:
                found[document] = candidates[best]
                continue
        for key in keys:
            with_key = members.setdefault(key, [])
            if len(with_key) < MAX_MEMBERS:
                with_key.append(document)
    signatures.close()
    return found


def _collisions(spool: Spool, stays: np.ndarray, near: NearConfig, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(documents, buckets): a pair for each key of a document that another one has, too; sorted by document, those that
    come before the others first."""
    alive = np.flatnonzero(stays)
    documents, buckets, used = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for band in range(near.bands):
        keys = spool.band(band, near)[alive]
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        begins = np.append(True, ordered[1:] != ordered[:-1]) if len(ordered) else np.zeros(0, np.bool_)
        shared = ~begins | np.append(~begins[1:], False) if len(ordered) else begins
        runs = np.cumsum(begins)[shared]
        documents.append(alive[order[shared]])
        buckets.append(runs + used)
        used += int(begins.sum()) + 1
    all_documents, all_buckets = np.concatenate(documents), np.concatenate(buckets)
    by_document = np.lexsort((all_documents, ~before[all_documents]))
    return all_documents[by_document], all_buckets[by_document]


class _Signatures:
    """Signatures by the document's number, read from the spool; the ones used last are kept."""

    def __init__(self, spool: Spool, near: NearConfig) -> None:
        self.size = near.num_perm * 4
        self.begins = spool.begins
        self.files = [path_of(spool.folder, job.number, "signatures") for job in spool.jobs]
        self.open: OrderedDict[int, int] = OrderedDict()
        self.known: OrderedDict[int, np.ndarray] = OrderedDict()

    def __getitem__(self, document: int) -> np.ndarray:
        if document in self.known:
            self.known.move_to_end(document)
            return self.known[document]
        split = int(np.searchsorted(self.begins, document, "right")) - 1
        data = os.pread(self._handle(split), self.size, (document - int(self.begins[split])) * self.size)
        self.known[document] = found = np.frombuffer(data, "<u4")
        if len(self.known) > CACHED:
            self.known.popitem(last=False)
        return found

    def _handle(self, split: int) -> int:
        if split not in self.open:
            if len(self.open) >= 256:
                os.close(self.open.popitem(last=False)[1])
            self.open[split] = os.open(self.files[split], os.O_RDONLY)
        return self.open[split]

    def close(self) -> None:
        """Closes the files."""
        for handle in self.open.values():
            os.close(handle)
