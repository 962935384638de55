"""A small training for the tests of this package: a tiny Llama with tied embeddings on ragged, weighted examples."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from danlu.core.examples import Branch, Example
from danlu.data.batch import Batch
from danlu.data.loader import Loader
from danlu.data.store import ExampleStore, write_examples
from danlu.models import attention
from danlu.models.root import Root
from danlu.objectives.language import Language, LossSum
from danlu.train.parallel import World
from danlu.train.trainer import Trainer, TrainSettings

VOCAB = 50
SETTINGS = TrainSettings(max_steps=8, global_batch_size=5, micro_batch_tokens=40, learning_rate=5e-3,
                         weight_decay=0.1, max_grad_norm=0.5, warmup_steps=2, save_steps=100, plot_loss=False)


def tiny_root(seed: int = 1, dropout: float = 0.0, tied: bool = True) -> Root:
    """Two layers of width 32, float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, attention_dropout=dropout,
                         tie_word_embeddings=tied)
    return Root(LlamaForCausalLM._from_config(config, attn_implementation=attention.NAME))


def ragged_examples(count: int = 33, seed: int = 0) -> list[Example]:
    """Stems and branches of different lengths; some tokens weigh nothing, some a half."""
    rng = np.random.default_rng(seed)
    examples = []
    for number in range(count):
        tokens = rng.integers(1, VOCAB, rng.integers(3, 24))
        weights = rng.choice([0.0, 0.5, 1.0], len(tokens), p=[0.3, 0.2, 0.5])
        stem = rng.integers(1, VOCAB, rng.integers(0, 6))
        examples.append(Example(stem, (Branch(tokens, weights),), "source", "ab"[number % 2], f"e{number}"))
    return examples


def compared_examples(count: int = 21, seed: int = 3, judged: bool = False) -> list[Example]:
    """Pairs of answers, or single ones with a label and an answer to another prompt, with what a reference says of them."""
    rng = np.random.default_rng(seed)
    examples = []
    for number in range(count):
        branches = []
        for label in ([1.0, -1.0, -1.0][number % 3], 0.0):
            length = rng.integers(1, 12)
            columns = {"ref_logprobs": -rng.exponential(4.0, length)}
            columns |= {"label": np.full(length, label)} if judged else {}
            branches.append(Branch(rng.integers(1, VOCAB, length), None, columns))
        stem = rng.integers(1, VOCAB, rng.integers(1, 6))
        examples.append(Example(stem, tuple(branches), "source", "ab"[number % 2], f"e{number}"))
    return examples


def make_trainer(folder: Path, settings: TrainSettings = SETTINGS, world: World | None = None, *,
                 root: Root | None = None, examples: list[Example] | None = None,
                 distribute: Callable[[Root], Root] = lambda root: root, objective: Any = None,
                 **more: Any) -> Trainer:
    """A trainer on a store that is written beside its folder when it is not there yet."""
    world = world or World()
    store = folder.with_name(folder.name + "-store")
    if world.is_main and not store.exists():
        store.mkdir(parents=True)
        write_examples(store, examples or ragged_examples(), VOCAB)
    world.barrier()
    loader = Loader(ExampleStore(store), seed=9, **settings.batch_size())
    return Trainer(distribute(root or tiny_root()), objective or Language(), loader, settings, folder, world, seed=9,
                   fingerprint="f" * 64, **more)


class Poisoned(Language):
    """The language objective whose loss is not a number in some steps (the count of `count` calls tells which)."""

    def __init__(self, steps: set[int], active: bool = True) -> None:
        self.steps, self.active, self.step, self.fresh = steps, active, 0, True

    def count(self, batch: Batch) -> float:
        self.step += self.fresh
        self.fresh = False
        return super().count(batch)

    def __call__(self, reading: Any, batch: Batch) -> LossSum:
        self.fresh = True
        loss = super().__call__(reading, batch)
        return LossSum(loss.total * float("nan"), loss.metrics) if self.active and self.step in self.steps else loss


def freeze_some(root: Root) -> Root:
    """Everything frozen but the matrices of the second block, as adapters would have it."""
    for name, parameter in root.named_parameters():
        parameter.requires_grad_("layers.1" in name and parameter.ndim == 2)
    return root


def weights(root: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter."""
    return {name: parameter.detach().clone() for name, parameter in root.named_parameters()}
