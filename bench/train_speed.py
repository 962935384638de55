"""danlu's training speed on one file of data: tokens per second over some optimizer steps, and peak memory.

    python bench/train_speed.py --stage sft --model FOLDER --data alpaca.json --steps 6 --warm 2

Preparing the data is timed apart. What is measured is the trainer's own step: packing, tensors, forward, backward,
clipping, AdamW. The last line is `RESULT {json}`, the form that `bench/peers.py` collects from every trainer.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("pt", "sft"), default="sft")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens in one optimizer step")
    parser.add_argument("--cutoff-len", type=int, default=512)
    parser.add_argument("--micro-batch-tokens", type=int)
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    return parser.parse_args()


def prepare(options: argparse.Namespace, folder: Path) -> tuple[object, object]:
    """(the loaded model, the store of its examples)"""
    from danlu.core.ledger import Ledger
    from danlu.data.store import ExampleStore, write_examples
    from danlu.models.load import load_model
    from danlu.text.formats import read_dialogues
    from danlu.text.read import SourceConfig, read_documents
    from danlu.tokens.codec import num_ids
    from danlu.tokens.encode import Encoder

    loaded = load_model(options.model)
    encoder, ledger = Encoder(loaded.tokenizer, options.cutoff_len), Ledger()
    if options.stage == "sft":
        examples = encoder.dialogues(read_dialogues(options.data, Path(), ledger), ledger)
    else:
        documents = read_documents(SourceConfig(path=options.data, document="line"), Path(), ledger)
        examples = encoder.documents(documents, ledger)
    write_examples(folder, examples, num_ids(loaded.tokenizer))
    ledger.check()
    return loaded, ExampleStore(folder)


def measure(options: argparse.Namespace) -> dict:
    """Trains and returns the figures."""
    import torch

    from danlu.data.loader import Loader
    from danlu.objectives.language import Language
    from danlu.train.parallel import World
    from danlu.train.trainer import Trainer, TrainSettings

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begin = time.perf_counter()
        loaded, store = prepare(options, folder)
        prepared = time.perf_counter() - begin
        settings = TrainSettings(max_steps=options.warm + options.steps, global_batch_tokens=options.tokens,
                                 learning_rate=1e-4, lr_scheduler_type="constant", plot_loss=False, save_steps=10**6,
                                 micro_batch_tokens=options.micro_batch_tokens)
        (folder / "run").mkdir()
        trainer = Trainer(loaded.root, Language(), Loader(store, seed=42, global_batch_tokens=options.tokens), settings,
                          folder / "run", World.current("cpu"), 42, "bench")
        infos = []
        start = time.perf_counter()  # set again after the warm-up
        for info in trainer.fit():
            if info.step == options.warm:
                start = time.perf_counter()
            infos.append(info)
        wall = time.perf_counter() - start
    counted = infos[options.warm:]
    tokens = sum(info.num_tokens for info in counted)
    return {"peer": "danlu", "stage": options.stage, "model": Path(options.model).name, "steps": len(counted),
            "tokens": tokens, "loss_tokens": sum(info.num_targets for info in counted), "wall_s": round(wall, 3),
            "tok_s": round(tokens / wall, 1), "s_per_step": round(wall / len(counted), 3),
            "rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024), "prep_s": round(prepared, 2),
            "final_loss": round(counted[-1].loss, 4), "thp": os.environ.get("THP_MEM_ALLOC_ENABLE", "0")}


def main() -> None:
    """Measures and prints."""
    options = arguments()
    if options.profile:
        import cProfile
        import pstats
        profile = cProfile.Profile()
        result = profile.runcall(measure, options)
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(25)
    else:
        result = measure(options)
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
