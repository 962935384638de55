"""What a person waits for: `danlu --help`, and from typing `danlu sft` to the first loss of a ten-example fine-tuning.

    python bench/startup.py --model FOLDER --data ten.jsonl --runs 3

Without a model and data: the tiny model and the first ten rows of the SFT data in PEERS_HOME (bench/README.md).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def first_loss(model: str, data: str) -> float:
    """Seconds until the trainer has written its first loss."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "danlu.cli", "sft", "--model", model, "--dataset", data, "--runs", folder,
                   "--name", "startup", "--set", "max_steps=2", "--set", "global_batch_size=5",
                   "--set", "cutoff_len=512"]
        begin = time.perf_counter()
        said = Path(folder) / "stderr.txt"
        with open(said, "wb") as errors:  # a pipe that nobody reads would stop the process once it is full
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            for log in Path(folder).glob("startup/*/.work-*/trainer_log.jsonl"):
                lines = log.read_text().splitlines()
                if any("loss" in json.loads(line) for line in lines):
                    seconds = time.perf_counter() - begin
                    process.wait()
                    return seconds
            time.sleep(0.02)
        sys.exit(said.read_text() or "no loss was written")


def main() -> None:
    """Reads the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = Path(os.environ.get("PEERS_HOME", "."))
    parser.add_argument("--model", default=str(home / "models/tiny-llama"))
    parser.add_argument("--data")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            options.data = f"{folder}/ten.json"
            rows = json.loads((home / "data/alpaca_en_demo.json").read_text(encoding="utf-8"))[:10]
            Path(options.data).write_text(json.dumps(rows), encoding="utf-8")
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """Prints the medians."""
    helps = []
    for _ in range(options.runs):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "danlu.cli", "--help"], check=True, stdout=subprocess.DEVNULL)
        helps.append(time.perf_counter() - begin)
    losses = [first_loss(options.model, options.data) for _ in range(options.runs)]
    print(f"danlu --help: {statistics.median(helps):.2f} s; first loss: {statistics.median(losses):.1f} s "
          f"(medians of {options.runs}; {min(losses):.1f} to {max(losses):.1f})")


if __name__ == "__main__":
    main()
