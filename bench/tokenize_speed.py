"""Documents to token ids on disk: danlu's road into its store, beside `datasets.map` with the same tokenizer.

    python bench/tokenize_speed.py --texts FOLDER --model FOLDER [--size 60e6] [--rounds 3] [--vocab-size 32000]

Reads .txt, .md and .jsonl files (field `text`), cuts them at line ends into documents of some 3,000 characters and takes
them in an order drawn once. Two tokenizers: the model's, and a byte_bpe trained on these texts. In every round each side
runs in a process of its own, one after the other; measured is from opened documents to files that are closed:

    danlu            read_corpus → Encoder.documents with a worker a core, as a pre-training step does it → write_examples
    datasets, N      Dataset.map(batched=True, num_proc=N) + save_to_disk, as TRL's users write it

The ids of all sides must be the same, without the ends of documents that danlu adds. Seconds are medians over the rounds,
ratios are medians of the rounds' ratios: other work on the machine disturbs both.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

CHARACTERS = 3000  # of a document
CUTOFF_LEN = 4096


def documents_of(folder: Path) -> Iterator[str]:
    """Every text of the folder in pieces of some length, cut at line ends."""
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".txt", ".md", ".jsonl")):
        whole = path.read_text(encoding="utf-8", errors="replace")
        texts = [json.loads(line).get("text", "") for line in whole.splitlines()] if path.suffix == ".jsonl" else [whole]
        for text in texts:
            lines: list[str] = []
            for line in text.splitlines(keepends=True):
                lines.append(line)
                if sum(map(len, lines)) >= CHARACTERS:
                    yield "".join(lines)
                    lines = []
            if lines:
                yield "".join(lines)


def prepare(texts: Path, size: float, vocab_size: int, place: Path) -> tuple[int, int]:
    """Writes the documents as a corpus, and trains a tokenizer on them; (documents, bytes)."""
    from danlu.core.records import Document
    from danlu.text.corpus import CorpusWriter, Row, shard_path
    from danlu.tokens.train import Options, train_tokenizer

    everything = list(dict.fromkeys(documents_of(texts)))
    random.Random(0).shuffle(everything)
    chosen, total = [], 0
    for text in everything:
        if total >= size:
            break
        chosen.append(text)
        total += len(text.encode())
    (place / "corpus").mkdir()
    with CorpusWriter(shard_path(place / "corpus", "train", 0)) as writer:
        for number, text in enumerate(chosen):
            writer.write(Row(Document(text, "bench", f"bench:{number}")))
    train_tokenizer(chosen, Options("byte_bpe", vocab_size), place / "own")
    return len(chosen), total


def fingerprint(rows: Iterable[Any]) -> str:
    """A hash of the ids of all documents and of where each ends."""
    found = hashlib.sha256()
    for row in rows:
        ids = np.asarray(row, np.int64)
        found.update(np.int64(len(ids)).tobytes())
        found.update(ids.tobytes())
    return found.hexdigest()[:16]


def danlu_side(place: Path, model: str, out: Path) -> tuple[float, float, str]:
    """(seconds, processor seconds, fingerprint)."""
    from transformers import AutoTokenizer

    from danlu.core.ledger import Ledger
    from danlu.core.processes import num_cores
    from danlu.data.store import ExampleStore, write_examples
    from danlu.text.corpus import read_corpus
    from danlu.tokens.codec import num_ids
    from danlu.tokens.encode import Encoder

    tokenizer = AutoTokenizer.from_pretrained(model)
    encoder, ledger = Encoder(tokenizer, CUTOFF_LEN, workers=num_cores()), Ledger()
    out.mkdir()
    started = time.perf_counter(), processor_seconds()
    write_examples(out, encoder.documents(read_corpus(place / "corpus", "train"), ledger), num_ids(tokenizer))
    seconds, processor = time.perf_counter() - started[0], processor_seconds() - started[1]
    ledger.check()

    def rows() -> Iterator[np.ndarray]:
        parts: list[np.ndarray] = []
        store = ExampleStore(out)
        for example, following in zip(range(len(store)), [*range(1, len(store)), None], strict=True):
            tokens = store[example].branches[0].tokens
            parts.append(tokens[1:])  # bos, or the last token of the piece before
            if following is None or "#" not in store.id(following):
                yield np.concatenate(parts)[:-1]
                parts = []

    return seconds, processor, fingerprint(rows())


def datasets_side(place: Path, model: str, out: Path, processes: int) -> tuple[float, float, str]:
    """The same of `datasets`."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    data = datasets.Dataset.from_parquet(str(place / "corpus" / "train-00000.parquet"), columns=["text"],
                                         cache_dir=str(out.with_suffix(".cache")))
    tokenizer = AutoTokenizer.from_pretrained(model)
    started = time.perf_counter(), processor_seconds()
    data.map(lambda batch: tokenizer(batch["text"]), batched=True, remove_columns=["text"], load_from_cache_file=False,
             num_proc=None if processes == 1 else processes).save_to_disk(out)
    seconds, processor = time.perf_counter() - started[0], processor_seconds() - started[1]
    ids = datasets.load_from_disk(out).with_format("arrow")
    return seconds, processor, fingerprint(row.values.to_numpy() for batch in ids.iter(1000) for row in batch["input_ids"])


def processor_seconds() -> float:
    """Of this process and those that it waited for."""
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, (
        resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def compare(place: Path, model: str, rounds: int, processes: list[int], size: int) -> bool:
    """Prints the table of one tokenizer; whether all ids were the same."""
    sides = ["danlu", *(f"datasets, {number}" for number in processes)]
    measured: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            out = place / "out"
            result = subprocess.run([sys.executable, __file__, "--side", side, "--model", model, "--place", str(place)],
                                    check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                                    env={**os.environ, "HF_HOME": str(place / "home")})
            measured[side].append(json.loads(result.stdout.splitlines()[-1]))
            for path in (out, out.with_suffix(".cache")):
                shutil.rmtree(path, ignore_errors=True)
    print(f"{model}: {size / 1e6:.1f} MB")
    for side in sides:
        for what in ("seconds", "processor"):
            values = [found[what] for found in measured[side]]
            ratios = [found[what] / own[what] for found, own in zip(measured[side], measured["danlu"], strict=True)]
            speed = size / 1e6 / statistics.median(values)
            print(f"  {side:12} {what:9} {statistics.median(values):7.2f} {speed:6.1f} MB/s   "
                  f"danlu {statistics.median(ratios):5.2f} times as fast ({min(ratios):.2f}–{max(ratios):.2f})")
    same = len({found["ids"] for runs in measured.values() for found in runs}) == 1
    print(f"  the same ids: {same}", flush=True)
    return same


def main() -> None:
    """Reads the arguments; with `--side` runs one side in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, help="folder of .txt, .md and .jsonl files")
    parser.add_argument("--model", help="folder with a fast tokenizer")
    parser.add_argument("--size", type=float, default=60e6, help="bytes of text at most")
    parser.add_argument("--vocab-size", type=int, default=32_000, help="of the tokenizer that is trained here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="of datasets.map")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.side:
        name, _, number = chosen.side.partition(", ")
        out = chosen.place / "out"
        seconds, processor, ids = danlu_side(chosen.place, chosen.model, out) if name == "danlu" else \
            datasets_side(chosen.place, chosen.model, out, int(number))
        print(json.dumps({"seconds": seconds, "processor": processor, "ids": ids}))
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        number, size = prepare(chosen.texts, chosen.size, chosen.vocab_size, place)
        print(f"{number:,} documents", flush=True)
        models = [*([chosen.model] if chosen.model else []), str(place / "own")]
        same = [compare(place, model, chosen.rounds, chosen.processes, size) for model in models]
        raise SystemExit(not all(same))


if __name__ == "__main__":
    main()
