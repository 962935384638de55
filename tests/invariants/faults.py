"""Kills a training a few hundred times and prints, by the moment of the kill, whether the bits came out the same.

    python tests/invariants/faults.py --kills 200 --seed 0 --controls

The training is a tiny Llama with dropout in its attention, with checkpoints, evaluations and best weights. After every
kill each checkpoint on the disk must verify; at the end of every run the weights, the optimizer's state and the log
must be those of a run that nobody disturbed, byte for byte. With --controls the same comparison is made with bugs put
in on purpose, each of which has to be noticed. The exit code is 1 where anything differs or a bug goes unnoticed.
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

import numpy as np
import torch
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
from transformers import LlamaConfig, LlamaForCausalLM

from danlu.core import artifact
from danlu.core.examples import Branch, Example
from danlu.data.loader import Loader
from danlu.data.store import ExampleStore, write_examples
from danlu.models import attention
from danlu.models.root import Root
from danlu.objectives.language import Language
from danlu.train import checkpoint, log, step, trainer
from danlu.train.parallel import World
from danlu.train.trainer import Trainer, TrainSettings

SETTINGS = TrainSettings(max_steps=24, global_batch_size=5, micro_batch_tokens=48, save_steps=5, eval_steps=6,
                         load_best_model_at_end=True, learning_rate=1e-2, lr_scheduler_type="cosine",
                         warmup_steps=3, weight_decay=0.1, plot_loss=False)
WHAT = ("model.safetensors", "optimizer.safetensors", "state.json", "trainer_log.jsonl")
VOCAB = 48
WHOLE_RUN = 0.8  # seconds, about


def tiny_root() -> Root:
    """Two layers of width 32 in float32, the same in every process."""
    torch.manual_seed(7)
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, attention_dropout=0.2,
                         tie_word_embeddings=True)
    return Root(LlamaForCausalLM._from_config(config, attn_implementation=attention.NAME))


def make_store(folder: Path) -> None:
    """37 examples of 4 to 24 tokens (no divisor of the batch), in two categories."""
    rng = np.random.default_rng(3)
    examples = [Example([], [Branch(rng.integers(1, VOCAB, rng.integers(4, 25)))], "source", "ab"[number % 2],
                        f"e{number}") for number in range(37)]
    folder.mkdir(parents=True)
    write_examples(folder, examples, VOCAB)


def evaluate(root: Root, examples: Sequence[Example]) -> dict[str, float]:
    """The mean loss over a few examples."""
    values = root(root.batch(list(examples))).logprobs_S
    return {"eval_loss": -float(values.double().mean())}


def train(store_folder: Path, folder: Path) -> None:
    """The program under test: trains to the end and leaves what is compared."""
    torch.set_num_threads(1)
    store = ExampleStore(store_folder)
    held = [store[index] for index in range(6)]
    work = Trainer(tiny_root(), Language(), Loader(store, seed=11, **SETTINGS.batch_size()), SETTINGS, folder, World(),
                   seed=11, fingerprint="f" * 64, evaluate=lambda root: evaluate(root, held))
    for _ in work.fit():
        pass
    checkpoint.write_tensors(folder / "model.safetensors", checkpoint.stored_tensors(work.root))
    checkpoint.write_tensors(folder / "optimizer.safetensors", checkpoint.optimizer_tensors(work.root, work.optimizer))
    (folder / "state.json").write_text(repr(work.state), encoding="utf-8")


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


# The moments: each draws which of its occurrences to strike.
PHASES: dict[str, Callable[[random.Random], Kill]] = {
    "any time": lambda draw: draw.uniform(0.0, WHOLE_RUN),
    "step: in the forward pass": lambda draw: die_before(Language, "__call__", draw.randint(1, 40)),
    "step: before the update": lambda draw: die_before(step, "update", draw.randint(1, 20)),
    "step: after the update": lambda draw: die_after(step, "update", draw.randint(1, 20)),
    "step: late": lambda draw: die_before(step, "update", draw.randint(6, 23)),
    "log: within a line": lambda draw: half_line_then_die(draw.randint(1, 20)),
    "evaluation": lambda draw: die_before(sys.modules[__name__], "evaluate", draw.randint(1, 4)),
    "checkpoint: within a file": lambda draw: half_then_die(draw.randint(1, 8)),
    "checkpoint: between files": lambda draw: die_after(checkpoint, "write_tensors", draw.randint(1, 8)),
    "checkpoint: before the manifest": lambda draw: die_before(artifact, "write_atomic", draw.randint(1, 6)),
    "checkpoint: before the rename": lambda draw: die_before(artifact.os, "rename", draw.randint(1, 5), published),
    "checkpoint: after the rename": lambda draw: die_after(artifact.os, "rename", draw.randint(1, 5), published),
    "retention: between rename and removal": lambda draw: renamed_then_die(draw.randint(1, 3)),
    "restore: between weights and optimizer": lambda draw: die_before(checkpoint, "read_optimizer"),
    "restore: before the log is cut": lambda draw: die_before(log.TrainLog, "truncate"),
}


def drop_reseeding() -> None:
    """The bug: dropout draws from a generator that a resumed process starts anew."""
    step.reseed = lambda *args: None


def drop_optimizer() -> None:
    """The bug: the optimizer begins again without its moments."""
    checkpoint.read_optimizer = lambda *args: None


def shift_cursor(by: int) -> Callable[[], None]:
    """The bug: a resumed run reads its data a step too early or too late."""
    def arm() -> None:
        resumed = 0
        load, batch = checkpoint.load_checkpoint, Loader.batch

        def loaded(*args: Any, **kwargs: Any) -> Any:
            nonlocal resumed
            state = load(*args, **kwargs)
            resumed = by if state.step else 0
            return state

        checkpoint.load_checkpoint = loaded
        Loader.batch = lambda self, place: batch(self, place + resumed)

    return arm


def drop_schedule() -> None:
    """The bug: a resumed run begins its learning rate schedule again."""
    load, factor = checkpoint.load_checkpoint, trainer.lr_factor
    begin = 0

    def loaded(*args: Any, **kwargs: Any) -> Any:
        nonlocal begin
        state = load(*args, **kwargs)
        begin = state.step
        return state

    checkpoint.load_checkpoint = loaded
    trainer.lr_factor = lambda config, place, total: factor(config, place - begin, total)


def keep_log() -> None:
    """The bug: lines that were logged after the checkpoint stay."""
    log.TrainLog.truncate = lambda self, step: self.folder.mkdir(exist_ok=True)


def drop_hash_check() -> None:
    """The bug: a checkpoint is read without being verified."""
    artifact.verify_hashes = lambda *args: None


CONTROLS: dict[str, Callable[[], None]] = {
    "reseeding dropped": drop_reseeding,
    "optimizer not restored": drop_optimizer,
    "data one step too late": shift_cursor(+1),
    "data one step too early": shift_cursor(-1),
    "schedule begun again": drop_schedule,
    "log not cut back": keep_log,
}


class Bench:
    """One folder of trials: the data, the undisturbed run and the counts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, folder / "store"
        self.kills: Counter[str] = Counter()
        self.runs = self.trials = 0
        self.differing: Counter[str] = Counter()
        self.problems: list[str] = []
        make_store(self.store)
        self.reference = self.undisturbed()

    def undisturbed(self, arm: Callable[[], None] | None = None) -> Path:
        self.trials += 1
        folder = self.folder / f"whole-{self.trials}"
        assert not run(lambda: train(self.store, folder), None, [arm] if arm else [])
        return folder

    def disturbed(self, kills: Sequence[Kill], arm: Callable[[], None] | None = None) -> tuple[Path, list[bool]]:
        self.trials += 1
        folder = self.folder / f"killed-{self.trials}"
        struck = run_until_done(lambda: train(self.store, folder), kills, [arm] if arm else [],
                                check=lambda: every_checkpoint_verifies(folder))
        return folder, struck

    def trial(self, phases: Sequence[str], draw: random.Random) -> None:
        """One training with a kill in each of these phases, compared with the undisturbed one."""
        try:
            folder, struck = self.disturbed([PHASES[phase](draw) for phase in phases])
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

    def killed_after_save(self, arm: Callable[[], None] | None = None) -> Path:
        """A folder in which a training was killed in step 13, with checkpoints of steps 5 and 10."""
        self.trials += 1
        folder = self.folder / f"stopped-{self.trials}"
        assert run(lambda: train(self.store, folder), die_before(step, "update", 13), [arm] if arm else [])
        return folder

    def control(self, arm: Callable[[], None]) -> list[str]:
        """What differs when the program has this bug, disturbed against undisturbed; nothing means it was missed."""
        whole, folder = self.undisturbed(arm), self.killed_after_save(arm)
        assert not run(lambda: train(self.store, folder), None, [arm])
        return differences(whole, folder, WHAT)

    def flipped(self, name: str, arm: Callable[[], None] | None = None) -> str:
        """What a training says or leaves when a byte of its newest checkpoint has changed."""
        folder = self.killed_after_save()
        flip_byte(folder / "checkpoint-10" / name)
        try:
            run(lambda: train(self.store, folder), None, [arm] if arm else [])
        except Failed as error:
            return str(error).strip().splitlines()[-2]
        return "differs: " + ", ".join(differences(self.reference, folder, WHAT))


def every_checkpoint_verifies(folder: Path) -> None:
    """Nothing under a checkpoint's name may be half written, ever."""
    for _, path in checkpoint.checkpoints(folder):
        artifact.open_artifact(path, kind="checkpoint", deep=True)


def kill_many(bench: Bench, kills: int, draw: random.Random) -> None:
    """Trials of one to three kills each until so many have struck, the phases with fewest kills first."""
    while sum(bench.kills.values()) < kills and not bench.problems:
        phases = sorted(PHASES, key=lambda phase: (bench.kills[phase], draw.random()))[:draw.randint(1, 3)]
        if phases[0].startswith("restore"):  # there is nothing to restore before the first save
            phases.insert(0, "step: late")
        bench.trial(phases, draw)


def controls(bench: Bench) -> dict[str, str]:
    """Bugs put in on purpose, and what was noticed of each."""
    found = {name: ", ".join(bench.control(arm)) for name, arm in CONTROLS.items()}
    for name in ("model.safetensors", "optimizer.safetensors", "trainer_state.json", "manifest.json"):
        said = bench.flipped(name)
        found[f"byte flipped in {name}"] = said if f"checkpoint-10/{name}" in said else ""
    found["hash check skipped"] = bench.flipped("model.safetensors", drop_hash_check).removeprefix("differs: ")
    return found


def main() -> int:
    """Runs the trials, prints the tables and says by the exit code whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--controls", action="store_true", help="also put in bugs and see that they are noticed")
    parser.add_argument("--report", type=Path, help="write the figures into this JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, seconds() as passed:
        bench = Bench(Path(folder))
        kill_many(bench, options.kills, random.Random(options.seed))
        planted = controls(bench) if options.controls else {}
        report = {"kills": dict(sorted(bench.kills.items())), "runs": bench.runs, "problems": bench.problems,
                  "controls": planted, "seconds": round(passed(), 1)}
    width = max(map(len, [*PHASES, *planted])) + 2
    print(f"{'killed in':{width}} kills  runs that differ")
    for phase in PHASES:
        print(f"{phase:{width}} {bench.kills[phase]:5}  {bench.differing[phase]:5}")
    print(f"{'together':{width}} {sum(bench.kills.values()):5}  {len(bench.problems):5}   ({bench.runs} runs, "
          f"{report['seconds']} s)")
    for name, noticed in planted.items():
        print(f"{name:{width}} {'noticed: ' + noticed if noticed else 'NOT NOTICED'}")
    print(*bench.problems, sep="\n")
    if options.report:
        options.report.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return int(bool(bench.problems) or not all(planted.values()))


if __name__ == "__main__":
    sys.exit(main())
