"""danlu beside other trainers on the same work, in one run: interleaved rounds, medians, ratios.

    PEERS_DIR=… PEERS_HOME=… python bench/peers.py --rounds 3

`PEERS_DIR` holds one script per trainer (`lf_run.py`, `trl_sft.py`, `trl_dpo.py`, …), each of which prints a line
`RESULT {json}` with `tok_s`, `tokens`, `wall_s` and `rss_mib`; `PEERS_HOME` holds their environments (`vp` with TRL and
HF's Trainer, `vlf` with LLaMA-Factory, `trl_1_12` with the last TRL that has PPO), `models/` and `data/`. bench/README.md
says which versions were measured.

Every round runs each contender once, one after the other, so that a slow quarter of an hour hits all of them. What is
reported is the ratio of medians within this run, with the memory settings off and on for both sides: tokens per second,
for preferences pairs per second (shared prompts make tokens incomparable), for PPO updates per second.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
UNITS = {"sft": "tok/s", "pt": "tok/s", "rm": "pairs/s", "dpo": "pairs/s", "ppo": "updates/s"}
PAIRS = 8  # in one step
MEMORY = {"default": {}, "huge-pages": {"THP_MEM_ALLOC_ENABLE": "1"}}


def contenders(home: Path, scripts: Path, model: str, steps: int) -> dict[str, dict[str, list[str]]]:
    """stage → name → command."""
    folder = home / "models" / {"tiny": "tiny-llama", "smollm2": "smollm2-135m"}[model]
    count = ["--steps", str(steps), "--warm", "1"]

    def own(stage: str, data: str) -> list[str]:
        return [sys.executable, str(HERE / "train_speed.py"), "--stage", stage, "--model", str(folder),
                "--data", str(home / "data" / data), *count]

    factory, others = str(home / "vlf/bin/python"), str(home / "vp/bin/python")
    sft = {"danlu": own("sft", "alpaca_en_demo.json"),
           "LLaMA-Factory neat_packing": [factory, str(scripts / "lf_run.py"), "--model", model, "--stage", "sft",
                                          "--mode", "neat", *count]}
    if model == "smollm2":
        return {"sft": sft}

    def aligned(stage: str, data: str) -> list[str]:
        return [sys.executable, str(HERE / "align_speed.py"), "--stage", stage, "--model", str(folder),
                "--data", str(home / "data" / data), *count]

    sft["TRL packed"] = [others, str(scripts / "trl_sft.py"), "--model", model, "--mode", "bfd", *count]
    pt = {"danlu": own("pt", "wiki_demo.txt"),
          "HF Trainer": [others, str(scripts / "hf_pt.py"), "--model", model, *count]}
    dpo = {"danlu": aligned("dpo", "dpo_en_demo.json"),
           "LLaMA-Factory": [factory, str(scripts / "lf_run.py"), "--model", model, "--stage", "dpo", *count],
           "TRL": [others, str(scripts / "trl_dpo.py"), "--model", model, *count]}
    rm = {"danlu": aligned("rm", "dpo_en_demo.json"),
          "TRL": [others, str(scripts / "trl_rm.py"), "--model", model, *count]}
    ppo = {"danlu": aligned("ppo", "alpaca_en_demo.json"),
           "TRL 1.12": ["env", f"PYTHONPATH={home / 'trl_1_12'}", others, str(scripts / "trl_ppo.py"), "--model", model,
                        "--updates", str(steps), "--warm", "1"]}
    return {"sft": sft, "pt": pt, "dpo": dpo, "rm": rm, "ppo": ppo}


def run(command: list[str], extra: dict[str, str], results: Path) -> dict:
    """One measurement: the last RESULT line of a command."""
    environment = os.environ | extra | {"PEERS_RESULTS": str(results), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"{' '.join(command)} gave no result:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    result = json.loads(lines[-1].removeprefix("RESULT "))
    # neat packing pads rows at their end and counts the padding; what is compared is real tokens
    if result.get("tail_pad") and result["tokens"] == result.get("padded_tokens"):
        result["tok_s"] = round((result["tokens"] - result["tail_pad"]) / result["wall_s"], 1)
    return result


def speed(stage: str, result: dict) -> float:
    """In the stage's unit."""
    if stage == "ppo":
        return 1 / result["s_per_update"]
    return result.get("pairs_s", PAIRS / result["s_per_step"]) if UNITS[stage] == "pairs/s" else result["tok_s"]


def main() -> None:
    """Runs the rounds and prints one table per stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--stage", choices=tuple(UNITS))
    parser.add_argument("--memory", choices=tuple(MEMORY), help="one of the two memory settings; default: both")
    parser.add_argument("--out", type=Path, default=Path("bench-results.jsonl"))
    options = parser.parse_args()
    if "PEERS_DIR" not in os.environ or "PEERS_HOME" not in os.environ:
        sys.exit("Set PEERS_DIR and PEERS_HOME; bench/README.md says what they hold.")
    table = contenders(Path(os.environ["PEERS_HOME"]), Path(os.environ["PEERS_DIR"]), options.model, options.steps)
    for stage, commands in table.items():
        if options.stage in (None, stage):
            measure(stage, commands, options)


def measure(stage: str, commands: dict[str, list[str]], options: argparse.Namespace) -> None:
    """All rounds of one stage."""
    for label, extra in MEMORY.items() if options.memory is None else [(options.memory, MEMORY[options.memory])]:
        rows: dict[str, list[dict]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, command in commands.items():
                result = run(command, extra, options.out)
                rows[name].append(result)
                with open(options.out, "a") as file:
                    file.write(json.dumps({"contender": name, "memory": label, **result}) + "\n")
        own = statistics.median(speed(stage, row) for row in rows["danlu"])
        print(f"\n{stage} · {options.model} · {label} memory · {options.rounds} rounds of {options.steps} steps")
        for name, found in rows.items():
            speeds = sorted(speed(stage, row) for row in found)
            middle, memory = statistics.median(speeds), statistics.median(row["rss_mib"] for row in found)
            print(f"  {name:28} {middle:10.4g} {UNITS[stage]}  ({speeds[0]:.3g} to {speeds[-1]:.3g})   "
                  f"danlu ÷ this: {own / middle:5.2f}   {memory:6.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
