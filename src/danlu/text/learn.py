"""What is learned before a corpus is cleaned: which lines are boilerplate, and what good text looks like.

For boilerplate the sources are read once more, ahead: each split leaves the keys of its documents' lines (`N.lines`, in
their normal form) and `N.counted`, and when all are there the lines that are too many are written into one file and the
rest is removed. A model of good text is trained from the files that the recipe names, and leaves a folder and the ledger
of that reading. Everything lies beside the spool and ends with a file that says that it is whole, so that an interrupted
run goes on.

    for job in jobs: count_split(job, folder)           # by any process
    find_boilerplate(jobs, folder, config)
    ledger = train_model(0, clean, base, folder)
"""

import io
import json
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from danlu.core.artifact import digest, sync, write_atomic
from danlu.core.errors import DataError
from danlu.core.ledger import Ledger
from danlu.core.records import Document
from danlu.text.aids import BOILERPLATE, model_folder
from danlu.text.boilerplate import BoilerplateConfig, LineWriter, Part, count, owners_of
from danlu.text.clean import CleanConfig, normal_form
from danlu.text.dedup import FIRST, fingerprint, repeats
from danlu.text.lines import Gate
from danlu.text.ngram import CharNgram
from danlu.text.read import SourceConfig, read_documents
from danlu.text.splits import read_split
from danlu.text.spool import HASH, Job, finish_split, halves, is_done, path_of

COUNTED = "counted"  # the last file of a split whose lines are counted
BEHIND = "behind max_chars"


def count_split(job: Job, folder: Path) -> None:
    """Reads one split and writes its lines and what its documents are known by. DataError where it cannot be read."""
    config = job.clean.boilerplate
    assert config is not None, "there is nothing to count"
    if is_done(job, folder, COUNTED):
        return
    gate = Gate(f"read:{job.source.path}", Ledger(), job.source.max_refused)  # it is counted when it is read to be cleaned
    path = path_of(folder, job.number, "lines")
    with open(path, "wb") as keys, open(owners_of(path), "wb") as owners, \
            open(path_of(folder, job.number, "texts"), "wb") as texts:
        lines = LineWriter(keys, owners, config)
        for document in read_split(job.split, job.source, gate):
            text = normal_form(document.text, job.clean)
            texts.write(np.array(halves(fingerprint(text)), HASH).tobytes())
            lines.add(text)
        runs = lines.finish()
    finish_split(job, folder, ["lines", "lines-owners", "texts"], COUNTED,
                 {"runs": runs, "documents": lines.documents})


def is_boilerplate_known(jobs: Sequence[Job], folder: Path) -> bool:
    """Whether the lines of all splits are counted, and added up."""
    path = folder / "boilerplate.json"
    return path.is_file() and json.loads(path.read_bytes()) == _of(jobs)


def _of(jobs: Sequence[Job]) -> dict[str, str]:
    return {"splits": digest([job.split.to_json() for job in jobs])}


def find_boilerplate(jobs: Sequence[Job], folder: Path, config: BoilerplateConfig) -> None:
    """Adds up what all splits counted, and removes it. Of equal documents the first one counts."""
    states = [json.loads(path_of(folder, job.number, COUNTED).read_bytes()) for job in jobs]
    begins = np.concatenate([[0], np.cumsum([state["documents"] for state in states])]).astype(np.int64)
    texts = np.concatenate([np.zeros(0, HASH), *(np.fromfile(path_of(folder, job.number, "texts"), HASH) for job in jobs)])
    parts = [Part(path_of(folder, job.number, "lines"), state["runs"], int(begin))
             for job, state, begin in zip(jobs, states, begins)]
    lines = count(parts, repeats(texts) == FIRST, config)
    lines["first"] = np.searchsorted(begins, lines["first"], "right") - 1
    data = io.BytesIO()
    np.save(data, lines)
    write_atomic(folder / BOILERPLATE, data.getvalue())
    write_atomic(folder / "boilerplate.json", json.dumps(_of(jobs)))
    for job in jobs:
        lines_path = path_of(folder, job.number, "lines")
        for path in (path_of(folder, job.number, COUNTED), path_of(folder, job.number, "texts"), lines_path,
                     owners_of(lines_path)):
            path.unlink()


def train_model(number: int, config: CleanConfig, base: Path, folder: Path) -> Ledger:
    """Trains the model of one entry of `perplexity`, unless it is there; the ledger of what it read.

    Raises DataError where its files hold no text.
    """
    place = model_folder(folder, number)
    state = place.with_suffix(".json")
    if state.is_file():
        return Ledger.of_state(json.loads(state.read_bytes()))
    ledger = Ledger()
    train = config.perplexity[number].train
    try:
        model = CharNgram.train(_good_texts(number, config, base, ledger))
    except ValueError:
        raise DataError("holds no text for the model of good text", where=train) from None
    for path in model.save(place):
        sync(path)
    sync(place)
    write_atomic(state, json.dumps(ledger.state(), ensure_ascii=False))
    return ledger


def _good_texts(number: int, config: CleanConfig, base: Path, ledger: Ledger) -> Iterator[str]:
    """The first `max_chars` characters of good text in their normal form, counted at the station `train`."""
    part = config.perplexity[number]
    left = part.max_chars
    documents = cast(Generator[Document, None, None], read_documents(
        SourceConfig(path=part.train, document=part.document, field=part.field), base, ledger))
    ledger.station(f"read:{part.train}")  # stands before the next
    station = ledger.station("train")
    for document in documents:
        came = document.num_bytes
        text = normal_form(document.text, config)
        whole = len(text.encode())
        station.take(rows=1, bytes=came)
        if whole != came:
            (station.add if whole > came else station.drop)("normalised", bytes=abs(whole - came))
        text = text[:left]
        left -= len(text)
        given = len(text.encode())
        if given < whole:
            station.drop(BEHIND, bytes=whole - given)
        station.give(rows=1, bytes=given)
        yield text
        if not left:
            station.note("reading ended at max_chars")
            break
    documents.close()  # has every reader balance what it took and did not give
