"""The corpus engine's speed and memory, beside datatrove on the same files with the same rules.

    python bench/corpus.py make --texts FOLDER --size 200e6 --out bench.jsonl     varied documents from real texts
    python bench/corpus.py run --input bench.jsonl --workers 2                    danlu: documents a second, peak memory
    python bench/corpus.py run --input bench.jsonl --workers 2 --datatrove PYTHON and datatrove, in that interpreter
    python bench/corpus.py ray --input bench.jsonl                                the same ids on a local Ray cluster

datatrove is no dependency: install it into an environment of its own and name that one's python. Both sides read JSON
lines, apply Gopher's repetition and quality rules, and drop near duplicates by MinHash with 14 bands of 8 rows over
5-grams; both write what stays.
"""

import argparse
import gzip
import hashlib
import io
import json
import random
import shutil
import subprocess
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
from rich.console import Console

from danlu.pipeline.recipe import Recipe
from danlu.pipeline.run import run as run_recipe
from danlu.text.corpus import read_corpus

PARAGRAPHS = 6  # of a document that is made, on average
CHANGED = 0.02  # share of words that are changed in a copy
COPIES = 0.2  # share of documents that are near copies of an earlier one
RECIPE = """
name: bench
steps:
  corpus:
    stage: corpus
    sources: [{{path: "{path}"}}]
    clean: {{gopher_repetition: {{}}, gopher_quality: {{}}}}
    near_dedup: {{}}
    workers: {workers}
    engine: {engine}
"""
DATATROVE = '''
import sys
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

if __name__ == "__main__":
    folder, out, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
    config = MinhashConfig(num_buckets=14, hashes_per_bucket=8, n_grams=5)
    def go(pipeline, tasks, name):
        LocalPipelineExecutor(pipeline=pipeline, tasks=tasks, workers=workers, logging_dir=f"{out}/logs/{name}").run()
    go([JsonlReader(folder), GopherRepetitionFilter(), GopherQualityFilter(), JsonlWriter(f"{out}/clean"),
        MinhashDedupSignature(output_folder=f"{out}/sigs", config=config)], workers, "sign")
    go([MinhashDedupBuckets(input_folder=f"{out}/sigs", output_folder=f"{out}/buckets", config=config)], 14, "buckets")
    go([MinhashDedupCluster(input_folder=f"{out}/buckets", output_folder=f"{out}/ids", config=config)], 1, "cluster")
    go([JsonlReader(f"{out}/clean"), MinhashDedupFilter(input_folder=f"{out}/ids"), JsonlWriter(f"{out}/kept")],
       workers, "filter")
'''


def make(texts: Path, size: float, out: Path) -> None:
    """Documents of some paragraphs of the texts, words changed here and there; a fifth are near copies."""
    draw = random.Random(0)
    paragraphs = []
    for path in sorted(texts.rglob("*.txt")) + sorted(texts.rglob("*.md")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        paragraphs += [part for part in text.split("\n\n") if len(part) > 80]
    words = [word for part in paragraphs[:2000] for word in part.split()]
    earlier: list[str] = []
    written = 0
    with open(out, "w", encoding="utf-8") as file:
        while written < size:
            is_copy = bool(earlier) and draw.random() < COPIES
            text = draw.choice(earlier) if is_copy else "\n\n".join(
                draw.choices(paragraphs, k=draw.randint(1, 2 * PARAGRAPHS)))
            text = " ".join(draw.choice(words) if draw.random() < (CHANGED if is_copy else 0.1) else word
                            for word in text.split(" "))
            earlier = [*earlier[-2000:], text]
            line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
            file.write(line)
            written += len(line.encode())


class Peak:
    """The most memory that this process and all below it held at once, in bytes (resident, looked at 5 times a second)."""

    def __init__(self) -> None:
        self.bytes = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        own = psutil.Process()
        while not self._end.wait(0.2):
            total = 0
            for process in [own, *own.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.bytes = max(self.bytes, total)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def danlu_side(path: Path, runs: Path, workers: int, engine: str) -> tuple[float, float, list[str]]:
    """(seconds, peak bytes, ids that stay)."""
    recipe = Recipe.from_text(RECIPE.format(path=path.resolve(), workers=workers, engine=engine), base=runs)
    started = time.monotonic()
    with Peak() as peak:
        folder = run_recipe(recipe, runs, console=Console(file=io.StringIO()))["corpus"].folder
    seconds = time.monotonic() - started
    return seconds, peak.bytes, [document.id for split in ("train", "heldout") for document in read_corpus(folder, split)]


def datatrove_side(path: Path, place: Path, workers: int, python: str) -> tuple[float, float, int]:
    """(seconds, peak bytes, how many documents stay); the input in as many files as workers, for it shares out files."""
    (place / "in").mkdir()
    with ExitStack() as stack, open(path, "rb") as file:
        parts = [stack.enter_context(open(place / "in" / f"{number}.jsonl", "wb")) for number in range(workers)]
        for number, line in enumerate(file):
            parts[number % workers].write(line)
    (place / "side.py").write_text(DATATROVE)
    started = time.monotonic()
    with Peak() as peak:
        subprocess.run([python, place / "side.py", place / "in", place / "out", str(workers)],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    stay = 0
    for kept in (place / "out" / "kept").iterdir():
        with gzip.open(kept) as lines:
            stay += sum(1 for _ in lines)
    return seconds, peak.bytes, stay


def main() -> None:
    """One of make, run and ray."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("make", "run", "ray"))
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--size", type=float, default=200e6)
    parser.add_argument("--out", type=Path, default=Path("bench.jsonl"))
    parser.add_argument("--input", type=Path, default=Path("bench.jsonl"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--datatrove", help="the python of an environment with datatrove[processing]")
    arguments = parser.parse_args()
    if arguments.what == "make":
        make(arguments.texts, arguments.size, arguments.out)
        return
    with open(arguments.input, "rb") as file:
        documents = sum(1 for _ in file)
    place = Path(tempfile.mkdtemp(dir=arguments.input.resolve().parent))
    try:
        seconds, peak, ids = danlu_side(arguments.input, place / "native", arguments.workers, "native")
        print(f"danlu: {documents:,} documents, {arguments.input.stat().st_size / 1e6:,.0f} MB in {seconds:.1f} s: "
              f"{documents / seconds:,.0f} documents/s, peak {peak / 2**20:,.0f} MiB, {len(ids):,} stay")
        if arguments.what == "ray":
            seconds, peak, others = danlu_side(arguments.input, place / "ray", arguments.workers, "ray")
            print(f"on Ray: {seconds:.1f} s; the same ids: {ids == others} "
                  f"({hashlib.sha256(chr(10).join(others).encode()).hexdigest()[:12]})")
            raise SystemExit(ids != others)
        if arguments.datatrove:
            theirs, peak, stay = datatrove_side(arguments.input, place, arguments.workers, arguments.datatrove)
            print(f"datatrove: {theirs:.1f} s: {documents / theirs:,.0f} documents/s, peak {peak / 2**20:,.0f} MiB, "
                  f"{stay:,} stay; danlu's documents/s are {theirs / seconds:.1f} times as many")
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
