"""Judge, DPO and PPO of the quickstart with three seeds: does each beat the chat model on what it optimises?

    python bench/rl_check.py --runs runs --seeds 0 1 2

Takes the steps judge, preferred, aligned and report of recipes/quickstart.yaml, lets each seed make them anew from the
base and chat models that the quickstart has left, and prints one table. What must hold for every seed: the judge is
right on at least 80 % of held-out pairs; the margin by which `preferred` finds chosen answers more probable than rejected
ones (what DPO widens), and the judge's score of what `aligned` samples (what PPO raises), lie above those of `chat` with
disjoint 95 % intervals. Ends with code 1 where one does not.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from danlu import Recipe, run
from danlu.evals.figures import ALL_PAIRS
from danlu.pipeline.recipe import CURRENT

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "quickstart.yaml"
STEPS = ("judge", "preferred", "aligned", "report")
READY = ("base", "chat")
LEAST_ACCURACY = 0.8


def recipe_of(seed: int, runs: Path) -> Recipe:
    """The aligned half of the quickstart, on the models of its first half."""
    steps: dict[str, Any] = Recipe.load(RECIPE).source.values["steps"]
    folders = {}
    for name in READY:
        folder = runs / "quickstart" / name
        if not (folder / CURRENT).is_file():
            sys.exit(f"{folder} is not there: run `make demo` first.")
        folders[name] = str(folder.absolute())
    chosen = {name: dict(steps[name]) for name in STEPS}
    for step in chosen.values():
        for key in ("model", "reference"):
            step.update({key: folders[step[key]]} if step.get(key) in folders else {})
        if "models" in step:
            step["models"] = [folders.get(name, name) for name in step["models"]]
    for name in ("corpus", "max_bytes"):
        chosen["report"].pop(name, None)
    return Recipe.from_dict({"name": f"rl-check-{seed}", "seed": seed, "steps": chosen}, base=RECIPE.parent)


def main() -> None:
    """Runs the seeds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    console = Console(width=130)
    table = Table(title="judge, preferred and aligned beside chat; in brackets 95 % intervals")
    for title in ("seed", "judge, pairs", "margin: chat", "preferred", "judge's score: chat", "aligned", "KL aligned", ""):
        table.add_column(title, justify="right")
    failed = False
    for seed in options.seeds:
        artifact = run(recipe_of(seed, options.runs), options.runs, console=console)["report"]
        well, cells = judged(json.loads((artifact.folder / "report.json").read_text(encoding="utf-8")))
        failed = failed or not well
        table.add_row(str(seed), *cells, "ok" if well else "FAIL")
    console.print(table)
    sys.exit(int(failed))


def judged(report: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether everything holds, and the figures as the table shows them."""
    pairs = {row["system"]: row for row in report["preferences"] if row["category"] == ALL_PAIRS}
    rewards = {row["model"]: row for row in report["rewards"]}
    judge, before, after = pairs["judge"], pairs["chat"], pairs["preferred"]
    sampled, aligned = rewards["chat"], rewards["aligned"]
    well = [judge["value"] >= LEAST_ACCURACY, after["margin_low"] > before["margin_high"], aligned["low"] > sampled["high"]]
    return all(well), [
        f"{100 * judge['value']:.1f} % [{100 * judge['low']:.1f}, {100 * judge['high']:.1f}]",
        *(f"{row['margin']:.2f} [{row['margin_low']:.2f}, {row['margin_high']:.2f}]" for row in (before, after)),
        *(f"{row['score']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" for row in (sampled, aligned)),
        f"{aligned['kl']:.2f} [{aligned['kl_low']:.2f}, {aligned['kl_high']:.2f}]"]


if __name__ == "__main__":
    main()
