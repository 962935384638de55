"""Kills trainings a few hundred times and prints, by the moment of the kill, whether the bits came out the same.

    python tests/invariants/faults.py --kills language=200 rm=50 dpo=50 ppo=50 --seed 0 --controls

The trainings are those of `trainings.py`: language modelling, a reward model, preferences, and a policy with its critic.
After every kill each checkpoint on the disk must verify; at the end of every run the weights, the optimizer's state and
the log must be those of a run that nobody disturbed, byte for byte. With --controls the same comparison is made with bugs
put in on purpose (`planted.py`), each of which has to be noticed. The exit code is 1 where anything differs or a bug goes
unnoticed.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import trainings
from harness import (
    Failed,
    Kill,
    die,
    die_after,
    die_before,
    differences,
    flip_byte,
    patch,
    run,
    run_until_done,
    seconds,
)
from planted import CONTROLS, drop_hash_check
from trainings import KINDS, MINI_BATCHES, PASSES, WHAT, Kind, fill, train
from transformers import LlamaForCausalLM

from danlu.core import artifact
from danlu.models.root import Root, ScoreRoot
from danlu.rollout import source as rollouts
from danlu.train import checkpoint, log, step

DEFAULT = {"language": 200, "rm": 50, "dpo": 50, "ppo": 50}
FILES = ("model.safetensors", "optimizer.safetensors", "trainer_state.json", "manifest.json")  # of a checkpoint


def half_then_die(nth: int) -> Callable[[], None]:
    """Dies with half of a tensor file written."""
    def make(original: Callable) -> Callable:
        calls = 0

        def wrapped(path: Path, tensors: Any) -> None:
            nonlocal calls
            calls += 1
            original(path, tensors)
            if calls == nth:
                with open(path, "r+b") as file:
                    file.truncate(path.stat().st_size // 2)
                die()
        return wrapped

    return patch(checkpoint, "write_tensors", make)


def half_line_then_die(nth: int) -> Callable[[], None]:
    """Dies with half of a line in the log."""
    def make(original: Callable) -> Callable:
        calls = 0

        def wrapped(self: log.TrainLog, name: str, entry: Any) -> None:
            nonlocal calls
            calls += name == log.LOG
            if calls == nth:
                with open(self.folder / name, "a", encoding="utf-8") as file:
                    file.write(json.dumps(entry)[:20])
                    file.flush()
                    die()
            original(self, name, entry)
        return wrapped

    return patch(log.TrainLog, "write", make)


def renamed_then_die(nth: int) -> Callable[[], None]:
    """Dies in the middle of a removal, when the folder has lost its name and not yet its files."""
    def in_removal(path: Path, *args: Any, **kwargs: Any) -> bool:
        return Path(path).name.startswith(checkpoint.REMOVING) and Path(path).exists()

    return die_before(checkpoint.shutil, "rmtree", nth, in_removal)


def published(source: Any, target: Any, *args: Any, **kwargs: Any) -> bool:
    return Path(source).name.startswith(checkpoint.SAVING)


def while_sampling(*args: Any, **kwargs: Any) -> bool:
    """Whether a model is called to choose the next token of an answer."""
    return kwargs.get("past_key_values") is not None


def while_scoring(*args: Any, **kwargs: Any) -> bool:
    """Whether a model is asked what it says of finished answers."""
    return not torch.is_grad_enabled()


def within_a_rollout(_: Any, place: int) -> bool:
    """Whether a mini-batch is not the first one of its rollout."""
    return place % (PASSES * MINI_BATCHES) != 0


# The moments: each draws which of its occurrences to strike. The second argument tells how long a whole run takes.
Phase = Callable[[random.Random, Kind, float], Kill]
PHASES: dict[str, Phase] = {
    "any time": lambda draw, kind, whole: draw.uniform(0.0, whole),
    "step: in the forward pass": lambda draw, kind, _: die_before(kind.objective, "__call__", draw.randint(1, 40)),
    "step: before the update": lambda draw, kind, _: die_before(step, "update", draw.randint(1, kind.steps - 4)),
    "step: after the update": lambda draw, kind, _: die_after(step, "update", draw.randint(1, kind.steps - 4)),
    "step: late": lambda draw, kind, _: die_before(step, "update", draw.randint(kind.first_save + 1, kind.steps - 1)),
    "log: within a line": lambda draw, kind, _: half_line_then_die(draw.randint(1, 20)),
    "evaluation": lambda draw, kind, _: die_before(trainings, "evaluate", draw.randint(1, kind.evaluations)),
    "checkpoint: within a file": lambda draw, kind, _: half_then_die(draw.randint(1, 2 * kind.saves)),
    "checkpoint: between files": lambda draw, kind, _: die_after(checkpoint, "write_tensors",
                                                                 draw.randint(1, 2 * kind.saves)),
    "checkpoint: before the manifest": lambda draw, kind, _: die_before(artifact, "write_atomic",
                                                                        draw.randint(1, kind.publications)),
    "checkpoint: before the rename": lambda draw, kind, _: die_before(artifact.os, "rename",
                                                                      draw.randint(1, kind.publications), published),
    "checkpoint: after the rename": lambda draw, kind, _: die_after(artifact.os, "rename",
                                                                    draw.randint(1, kind.publications), published),
    "retention: between rename and removal": lambda draw, kind, _: renamed_then_die(draw.randint(1, kind.removals)),
    "restore: between weights and optimizer": lambda draw, kind, _: die_before(checkpoint, "read_optimizer"),
    "restore: before the log is cut": lambda draw, kind, _: die_before(log.TrainLog, "truncate"),
}
# Moments that only one kind of training has; they are struck first.
OWN_PHASES: dict[str, dict[str, Phase]] = {"ppo": {
    "rollout: while sampling": lambda draw, *_: die_before(LlamaForCausalLM, "forward", draw.randint(1, 60),
                                                           while_sampling),
    "rollout: between sampling and scoring": lambda draw, *_: die_after(rollouts, "generate", draw.randint(1, 6)),
    "rollout: while scoring": lambda draw, *_: die_before(draw.choice([Root, ScoreRoot]), "forward", draw.randint(1, 20),
                                                          while_scoring),
    "rollout: between mini-batches": lambda draw, *_: die_before(rollouts.RolloutSource, "batch", draw.randint(1, 12),
                                                                 within_a_rollout),
}}


class Bench:
    """One folder of trials of one kind of training: the data, the undisturbed run and the counts."""

    def __init__(self, name: str, folder: Path, draw: random.Random) -> None:
        self.kind, self.draw = KINDS[name], draw
        self.own, self.controls = OWN_PHASES.get(name, {}), CONTROLS[name]
        self.phases = {**self.own, **PHASES}
        self.folder, self.store = folder, folder / "store"
        self.kills: Counter[str] = Counter()
        self.runs = self.trials = 0
        self.differing: Counter[str] = Counter()
        self.problems: list[str] = []
        fill(self.kind, self.store)
        with seconds() as passed:
            self.reference = self.undisturbed()
            self.whole = passed()

    def train(self, folder: Path) -> Callable[[], None]:
        """The program under test, working in a folder."""
        return lambda: train(self.kind, self.store, folder)

    def undisturbed(self, arm: Callable[[], None] | None = None) -> Path:
        self.trials += 1
        folder = self.folder / f"whole-{self.trials}"
        assert not run(self.train(folder), None, [arm] if arm else [])
        return folder

    def disturbed(self, kills: Sequence[Kill], arm: Callable[[], None] | None = None) -> tuple[Path, list[bool]]:
        self.trials += 1
        folder = self.folder / f"killed-{self.trials}"
        struck = run_until_done(self.train(folder), kills, [arm] if arm else [],
                                check=lambda: every_checkpoint_verifies(folder))
        return folder, struck

    def trial(self, phases: Sequence[str]) -> None:
        """One training with a kill in each of these phases, compared with the undisturbed one."""
        try:
            folder, struck = self.disturbed([self.phases[phase](self.draw, self.kind, self.whole) for phase in phases])
        except (Failed, artifact.DataError) as error:
            self.problems.append(f"{' → '.join(phases)}: {error}")
            self.differing.update(phases)
            return
        self.runs += 1
        hit = [phase for phase, yes in zip(phases, struck, strict=False) if yes]
        self.kills.update(hit)
        wrong = differences(self.reference, folder, WHAT) + [
            path.name for path in folder.iterdir() if path.name.startswith(".")]
        if wrong:
            self.problems.append(f"{' → '.join(hit)}: {', '.join(wrong)}")
            self.differing.update(hit)
        shutil.rmtree(folder)

    def kill_many(self, kills: int) -> None:
        """Trials of one to three kills each until so many have struck, the phases with fewest kills first."""
        while sum(self.kills.values()) < kills and not self.problems:
            by_need = sorted(self.phases, key=lambda phase: (self.kills[phase], phase not in self.own, self.draw.random()))
            phases = by_need[:self.draw.randint(1, 3)]
            if phases[0].startswith("restore"):  # there is nothing to restore before the first save
                phases.insert(0, "step: late")
            self.trial(phases)

    def killed_after_save(self, arm: Callable[[], None] | None = None) -> Path:
        """A folder in which a training was killed with two checkpoints saved."""
        self.trials += 1
        folder = self.folder / f"stopped-{self.trials}"
        assert run(self.train(folder), die_before(step, "update", self.kind.killed_at), [arm] if arm else [])
        return folder

    def control(self, arm: Callable[[], None]) -> list[str]:
        """What differs when the program has this bug, disturbed against undisturbed; nothing means it was missed."""
        whole, folder = self.undisturbed(arm), self.killed_after_save(arm)
        assert not run(self.train(folder), None, [arm])
        return differences(whole, folder, WHAT)

    def flipped(self, name: str, arm: Callable[[], None] | None = None) -> str:
        """What a training says or leaves when a byte of its newest checkpoint has changed."""
        folder = self.killed_after_save()
        flip_byte(folder / self.kind.newest / name)
        try:
            run(self.train(folder), None, [arm] if arm else [])
        except Failed as error:
            return str(error).strip().splitlines()[-2]
        return "differs: " + ", ".join(differences(self.reference, folder, WHAT))

    def plant(self, flips: bool) -> dict[str, str]:
        """Bugs put in on purpose, and what was noticed of each. `flips`: also bytes changed on the disk."""
        found = {name: ", ".join(self.control(arm)) for name, arm in self.controls.items()}
        for name in FILES if flips else ():
            said = self.flipped(name)
            found[f"byte flipped in {name}"] = said if f"{self.kind.newest}/{name}" in said else ""
        if flips:
            found["hash check skipped"] = self.flipped("model.safetensors", drop_hash_check).removeprefix("differs: ")
        return found


def every_checkpoint_verifies(folder: Path) -> None:
    """Nothing under a checkpoint's name may be half written, ever."""
    for _, path in checkpoint.checkpoints(folder):
        artifact.open_artifact(path, kind="checkpoint", deep=True)


def examine(name: str, kills: int, seed: int, with_controls: bool) -> dict[str, Any]:
    """Kills trainings of one kind, plants its bugs, prints both and returns the figures."""
    with tempfile.TemporaryDirectory() as folder, seconds() as passed:
        bench = Bench(name, Path(folder), random.Random(f"{name} {seed}"))
        bench.kill_many(kills)
        # what a changed byte does is the same in every kind
        planted = bench.plant(flips=name == "language") if with_controls else {}
        report = {"kills": dict(sorted(bench.kills.items())), "runs": bench.runs, "problems": bench.problems,
                  "controls": planted, "seconds": round(passed(), 1)}
    width = max(map(len, [*bench.phases, *planted])) + 2
    print(f"{f'{name}: killed in':{width}} kills  runs that differ")
    for phase in bench.phases:
        print(f"{phase:{width}} {bench.kills[phase]:5}  {bench.differing[phase]:5}")
    print(f"{'together':{width}} {sum(bench.kills.values()):5}  {len(bench.problems):5}   ({bench.runs} runs, "
          f"{report['seconds']} s)")
    for bug, noticed in planted.items():
        print(f"{bug:{width}} {'noticed: ' + noticed if noticed else 'NOT NOTICED'}")
    print(*bench.problems, sep="\n", flush=True)
    return report


def main() -> int:
    """Runs the trials of every kind and says by the exit code whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", nargs="+", metavar="KIND=N", default=[f"{name}={n}" for name, n in DEFAULT.items()])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--controls", action="store_true", help="also put in bugs and see that they are noticed")
    parser.add_argument("--report", type=Path, help="write the figures into this JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = {}
    for name, _, kills in (item.partition("=") for item in options.kills):
        report[name] = examine(name, int(kills), options.seed, options.controls)
    if options.report:
        options.report.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return int(any(part["problems"] or not all(part["controls"].values()) for part in report.values()))


if __name__ == "__main__":
    sys.exit(main())
