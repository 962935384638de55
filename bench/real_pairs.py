"""A pretrained checkpoint on real preferences: `rm` and `dpo` with LoRA, and how many held-out pairs each gets right.

    python bench/real_pairs.py --model FOLDER --preferences pairs.json

A share of the prompts is held out by hash (`--val-size`). After training, the share of held-out pairs whose chosen answer
gets the higher score (rm) or the higher implicit reward β·(log π − log π_ref) (dpo) is printed with its 95 % Wilson
interval; before training both are exactly a half (every pair is a tie). Ends with code 1 where an interval reaches down to
50 %.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from danlu.data.store import ExampleStore
from danlu.evals.statistics import wilson_interval


def train(stage: str, options: argparse.Namespace, folder: Path) -> tuple[Path, float]:
    """One `danlu rm` or `danlu dpo`; the artifact's folder and the minutes that it took."""
    command = [sys.executable, "-m", "danlu.cli", stage, "--model", options.model, "--dataset", options.preferences,
               "--runs", str(folder), "--name", stage]
    for setting in ("finetuning_type=lora", "lora_rank=16", f"cutoff_len={options.cutoff_len}",
                    f"overlong={options.overlong}", f"val_size={options.val_size}",
                    f"num_train_epochs={options.epochs}", "eval_steps=1000",
                    "global_batch_size=8", f"learning_rate={options.learning_rate}", "lr_scheduler_type=cosine",
                    "warmup_ratio=0.1", "micro_batch_tokens=2048", f"precision={options.precision}"):
        command += ["--set", setting]
    if options.max_samples is not None:
        command += ["--set", f"max_samples={options.max_samples}"]
    begin = time.monotonic()
    subprocess.run(command, check=True)
    step = folder / stage / stage
    return step / (step / "current").read_text().strip(), (time.monotonic() - begin) / 60


def main() -> None:
    """Trains and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--preferences", required=True)
    parser.add_argument("--stage", choices=("rm", "dpo"), action="append")
    parser.add_argument("--cutoff-len", type=int, default=256)
    parser.add_argument("--overlong", choices=("turns", "tokens"), default="tokens", help="what longer pairs lose")
    parser.add_argument("--val-size", type=float, default=0.34)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--max-samples", type=int)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--precision", choices=("auto", "float32", "bf16"), default="auto",
                        help="bf16 is several times as fast on a CPU whose matrix units compute in it (amx_bf16)")
    options = parser.parse_args()
    failed = False
    for stage in options.stage or ("rm", "dpo"):
        with tempfile.TemporaryDirectory() as folder:
            artifact, minutes = train(stage, options, Path(folder))
            lines = [json.loads(line) for line in (artifact / "trainer_log.jsonl").read_text().splitlines()]
            key = "eval_accuracy" if stage == "rm" else "eval_rewards/accuracies"
            last = [line for line in lines if key in line][-1]
            count = len(ExampleStore(next(artifact.parent.glob("examples-*")) / "eval"))
            low, high = wilson_interval(last[key] * count, count) or (0.0, 1.0)
            well = low > 0.5
            print(f"{'ok  ' if well else 'FAIL'} {stage}: {100 * last[key]:.1f} % of {count} held-out pairs "
                  f"[{100 * low:.1f} to {100 * high:.1f}], held-out loss {last['eval_loss']:.4f}, {minutes:.1f} min",
                  flush=True)
            failed = failed or not well
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
