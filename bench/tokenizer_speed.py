"""Time and peak memory of training a tokenizer of each kind, each in a process of its own.

    python bench/tokenizer_speed.py texts/*.txt --made big.txt --bytes 1e9 --vocab-size 64000 --kinds byte_bpe unigram

First the text is made, or taken as it is where the file `--made` is there: the files are read again and again until there
are so many bytes; in every pass but the first a tenth of the words, drawn by their place, are written with their letters in
another order, so that passes are not the same text. Reading it is part of the time that is measured, making it is not.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from danlu.tokens.train import Options, train_tokenizer

KINDS = ["byte_bpe", "wordpiece", "unigram", "sentencepiece_bpe"]
CHANGED = 0.1  # share of the words that a later pass writes otherwise


def texts(files: list[Path], size: float) -> Iterator[str]:
    """Lines until they are so many bytes."""
    done, number = 0, 0
    while done < size:
        draw = random.Random(number)
        for path in files:
            for line in path.open(encoding="utf-8", errors="replace"):
                text = line if number == 0 else " ".join(vary(word, draw) for word in line.split(" "))
                done += len(text.encode())
                yield text
                if done >= size:
                    return
        number += 1


def vary(word: str, draw: random.Random) -> str:
    """The word, or its letters in another order; of text without blanks each stretch of ten letters is a word."""
    parts = [word[i:i + 10] for i in range(0, len(word), 10)]
    return "".join("".join(draw.sample(part, len(part))) if draw.random() < CHANGED else part for part in parts)


def measure(kind: str, path: Path, vocab_size: int) -> dict[str, float | int | str]:
    """Trains once in this process."""
    chinese = "characters" if kind == "wordpiece" else "free"
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, path.open(encoding="utf-8", newline="") as file:
        made = train_tokenizer(file, Options(kind, vocab_size, chinese=chinese), Path(folder))
    return {"kind": kind, "bytes": path.stat().st_size, "vocab_size": made.get_vocab_size(),
            "seconds": round(time.perf_counter() - started, 1),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


def main() -> None:
    """Makes the text and starts a process for each kind; with `--measure` it is that process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--made", type=Path, required=True, help="the text that is trained on; kept for another time")
    parser.add_argument("--bytes", type=float, default=1e9)
    parser.add_argument("--vocab-size", type=int, default=64_000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        print(json.dumps(measure(chosen.measure, chosen.made, chosen.vocab_size)), flush=True)
        return
    if not chosen.made.exists():
        with chosen.made.open("w", encoding="utf-8", newline="") as out:
            out.writelines(texts(chosen.files, chosen.bytes))
    for kind in chosen.kinds:
        subprocess.run([sys.executable, __file__, "--made", str(chosen.made), "--vocab-size", str(chosen.vocab_size),
                        "--measure", kind], check=False)


if __name__ == "__main__":
    main()
