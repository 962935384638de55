"""danlu's speed on preferences and rollouts: pairs per second, or seconds per PPO update, and peak memory.

    python bench/align_speed.py --stage dpo --model FOLDER --data dpo.json --steps 4 --warm 1
    python bench/align_speed.py --stage ppo --model FOLDER --data alpaca.json --steps 4 --warm 1

What is measured is the trainer's own step. For DPO the reference's pass over the measured pairs is counted, once; RM takes
the pairs that fit whole into --cutoff-len, DPO cuts the answers there. A PPO update is 8 answers of 64 tokens (sampling,
scoring by reward model, reference and critic) and 4 passes over them by policy and critic. The last line is
`RESULT {json}`, the form that `bench/peers.py` collects from every trainer.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ANSWERS, NEW_TOKENS, PASSES = 8, 64, 4


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("rm", "dpo", "ppo"), required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps; for ppo: rollouts")
    parser.add_argument("--warm", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=8, help="pairs in one optimizer step")
    parser.add_argument("--cutoff-len", type=int, default=512)
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    return parser.parse_args()


def prepare(options: argparse.Namespace, tokenizer: Any, folder: Path) -> Any:
    """The store of pairs, or for ppo of prompts of at most 192 tokens."""
    from danlu.core.ledger import Ledger
    from danlu.data.store import ExampleStore, write_examples
    from danlu.text.preferences import read_preferences, read_prompts
    from danlu.tokens.codec import num_ids
    from danlu.tokens.encode import Encoder
    from danlu.tokens.pairs import PairEncoder

    ledger = Ledger()
    if options.stage == "ppo":
        encoder = PairEncoder(Encoder(tokenizer, 192), "drop")
        examples = encoder.prompts(read_prompts(options.data, Path(), ledger), ledger)
    else:
        encoder = PairEncoder(Encoder(tokenizer, options.cutoff_len), "drop" if options.stage == "rm" else "tokens",
                              reference=options.stage == "dpo")
        examples = encoder.preferences(read_preferences(options.data, Path(), ledger), ledger)
    write_examples(folder, examples, num_ids(tokenizer))
    ledger.check()
    return ExampleStore(folder)


def job(options: argparse.Namespace, folder: Path) -> tuple[Any, Any, Any, float]:
    """(root, objective, batches, seconds of the reference per pair)"""
    from danlu.data.loader import Loader
    from danlu.models.load import load_model, load_tokenizer
    from danlu.models.scorer import load_scorer
    from danlu.objectives.preference import DPO
    from danlu.objectives.reward import Pairwise
    from danlu.rollout.scoring import reference_column
    from danlu.tokens.pairs import REFERENCE
    from danlu.train.parallel import World

    tokenizer = load_tokenizer(options.model)
    store = prepare(options, tokenizer, folder)
    if options.stage == "ppo":
        return (*rollouts(options, tokenizer, store), 0.0)
    loader = Loader(store, seed=42, global_batch_size=options.pairs)
    if options.stage == "rm":
        return load_scorer(options.model, tokenizer=tokenizer, new_head=True).root, Pairwise(), loader, 0.0
    root = load_model(options.model, tokenizer=tokenizer).root
    chosen = [int(index) for step in range(options.warm + options.steps) for index in loader.batch(step).indices]
    some = Subset(store, chosen)
    begin = time.perf_counter()
    column = reference_column(root, some, World(), 4096)
    seconds = (time.perf_counter() - begin) / len(chosen)
    column.tofile(folder / "reference.bin")
    return root, DPO(), Loader(store.with_column(REFERENCE, folder / "reference.bin"), seed=42,
                               global_batch_size=options.pairs), seconds


class Subset:
    """The part of a store that is trained on, for the reference: a bench does not go through all of it."""

    def __init__(self, store: Any, indices: list[int]) -> None:
        self.store, self.indices = store, sorted(set(indices))
        self.lengths = store.lengths[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.store[self.indices[index]]

    def place(self, index: int) -> Any:
        """Where an example lies among the tokens of the whole store."""
        return self.store.place(self.indices[index])

    def column(self, name: str) -> Any:
        """A column of the whole store."""
        return self.store.column(name)


def rollouts(options: argparse.Namespace, tokenizer: Any, store: Any) -> tuple[Any, Any, Any]:
    """Policy and critic, the objective, and the source of rollouts; reward model and critic with new heads."""
    import torch

    from danlu.data.loader import Loader
    from danlu.models.load import load_model
    from danlu.models.root import ActorCritic
    from danlu.models.scorer import load_scorer
    from danlu.objectives.policy import PPO
    from danlu.rollout.source import Estimator, RolloutSource, Sampler
    from danlu.tokens.chat import Chat
    from danlu.tokens.codec import num_ids

    policy, reference = (load_model(options.model, tokenizer=tokenizer).root for _ in range(2))
    reward, critic = (load_scorer(options.model, tokenizer=tokenizer, new_head=True).root for _ in range(2))
    trained = ActorCritic(policy, critic)
    sampler = Sampler(trained, reward, lambda: nullcontext(reference), Chat(tokenizer).stop_ids, num_ids(tokenizer),
                      NEW_TOKENS, 1.0, torch.device("cpu"), 4096, ANSWERS, 1.0)
    prompts = Loader(store, seed=42, global_batch_size=ANSWERS)
    return trained, PPO(), RolloutSource(prompts, sampler, Estimator(), 42, PASSES, 1)


def measure(options: argparse.Namespace) -> dict:
    """Trains and returns the figures."""
    import torch

    from danlu.train.parallel import World
    from danlu.train.trainer import Trainer, TrainSettings

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root, objective, batches, reference = job(options, folder)
        stride = batches.stride
        settings = TrainSettings(max_steps=(options.warm + options.steps) * stride, learning_rate=1e-4, plot_loss=False,
                                 lr_scheduler_type="constant", save_steps=10**6)
        trainer = Trainer(root, objective, batches, settings, folder / "run", World.current("cpu"), 42, "bench")
        (folder / "run").mkdir()
        infos, start = [], time.perf_counter()
        for info in trainer.fit():
            if info.step == options.warm * stride:
                start = time.perf_counter()
            infos.append(info)
        wall = time.perf_counter() - start
    counted = infos[options.warm * stride:]
    pairs = options.steps * options.pairs
    wall += reference * pairs
    result = {"peer": "danlu", "stage": options.stage, "model": Path(options.model).name, "steps": options.steps,
              "tokens": sum(info.num_tokens for info in counted), "loss_tokens": sum(info.num_targets for info in counted),
              "wall_s": round(wall, 3), "s_per_step": round(wall / options.steps, 3),
              "rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
              "final_loss": round(counted[-1].loss, 4), "thp": os.environ.get("THP_MEM_ALLOC_ENABLE", "0")}
    if options.stage == "ppo":
        return result | {"s_per_update": round(wall / options.steps, 3)}
    return result | {"pairs_s": round(pairs / wall, 4), "reference_s": round(reference * pairs, 3)}


def main() -> None:
    """Measures and prints."""
    options = arguments()
    if options.profile:
        from torch.profiler import profile

        with profile() as found:
            result = measure(options)
        print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))
    else:
        result = measure(options)
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
