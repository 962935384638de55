"""What a person waits for: `danlu --help`, and from typing `danlu sft` to the first loss of a ten-example fine-tuning.

    python bench/startup.py --model FOLDER --data ten.jsonl --runs 3
"""

import argparse
import json
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
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None:
            for log in Path(folder).glob("startup/*/.work-*/trainer_log.jsonl"):
                lines = log.read_text().splitlines()
                if any("loss" in json.loads(line) for line in lines):
                    seconds = time.perf_counter() - begin
                    process.wait()
                    return seconds
            time.sleep(0.02)
        sys.exit(process.stderr.read().decode() if process.stderr else "no loss was written")


def main() -> None:
    """Measures and prints medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
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
