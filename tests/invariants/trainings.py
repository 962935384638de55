"""What is killed: one tiny training of each kind through the real Trainer, the same in every process.

    train(KINDS["ppo"], store_folder, folder)       # to the end; leaves what is compared: the files in WHAT

All of them evaluate and have dropout, so that whatever is random has to be keyed by its place. A reward model learns pairs,
direct preference optimisation takes its reference from a column of the data, and the policy of `ppo` samples answers, which
a reward model scores and a reference and a critic read. Rollouts are of several steps, and checkpoints fall between them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from danlu.core.examples import Branch, Example
from danlu.data.loader import Loader
from danlu.data.store import ExampleStore, write_examples
from danlu.models import attention
from danlu.models.root import ActorCritic, Root, ScoreRoot
from danlu.objectives.language import Language
from danlu.objectives.pair_losses import Terms
from danlu.objectives.policy import PPO
from danlu.objectives.preference import DPO
from danlu.objectives.reward import Pairwise
from danlu.rollout.scoring import REFERENCE
from danlu.rollout.source import Estimator, RolloutSource, Sampler, held_out_reward
from danlu.train import checkpoint
from danlu.train.evaluate import held_out_loss
from danlu.train.parallel import World
from danlu.train.trainer import Trainer, TrainSettings

VOCAB, NUM_IDS, STOP = 48, 47, 2
SEED, FINGERPRINT = 11, "f" * 64
WHAT = ("model.safetensors", "optimizer.safetensors", "state.json", "trainer_log.jsonl")
BY_PAIR = TrainSettings(max_steps=24, global_batch_size=5, micro_batch_tokens=48, save_steps=5, eval_steps=6,
                        load_best_model_at_end=True, learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=3,
                        weight_decay=0.1, plot_loss=False)
PASSES, MINI_BATCHES = 2, 2
BY_ROLLOUT = TrainSettings(max_steps=20, global_batch_size=3, micro_batch_tokens=48, save_steps=5, eval_steps=10,
                           learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=3, weight_decay=0.1,
                           plot_loss=False)
Measure = Callable[[Any], Mapping[str, float]]


@dataclass(frozen=True)
class Kind:
    """One kind of training.

    objective     whose call is the forward pass of a micro-batch
    examples      what the store holds
    make          the trainer on an open store
    first_save    the first step after which a checkpoint is saved
    saves         how many checkpoints are saved
    publications  how many folders are published at least: checkpoints and best weights
    removals      how many of them are let go again at least
    evaluations   how many there are at least
    killed_at     the optimizer step in which a training with a bug put in is killed: two checkpoints are there
    newest        the newer one of them
    """

    objective: type
    examples: Callable[[], Iterator[Example]]
    make: Callable[[ExampleStore, Path], Trainer]
    steps: int
    first_save: int
    saves: int
    publications: int
    removals: int
    evaluations: int
    killed_at: int
    newest: str


# Models -----------------------------------------------------------------------------------------------------------


def config() -> LlamaConfig:
    """Two layers of width 32, with dropout."""
    return LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, attention_dropout=0.2, tie_word_embeddings=True,
                       num_labels=1, pad_token_id=0)


def tiny_root(seed: int = 7) -> Root:
    """A language model in float32, the same in every process."""
    torch.manual_seed(seed)
    return Root(LlamaForCausalLM._from_config(config(), attn_implementation=attention.NAME))


def tiny_scorer(seed: int = 8, spread: float = 0.2) -> ScoreRoot:
    """A model with a head of one number, whose scores differ."""
    torch.manual_seed(seed)
    root = ScoreRoot(LlamaForSequenceClassification._from_config(config(), attn_implementation=attention.NAME))
    torch.nn.init.normal_(root.lm.score.weight, std=spread)
    return root


# Data -------------------------------------------------------------------------------------------------------------


def texts() -> Iterator[Example]:
    """37 examples of 4 to 24 tokens (no divisor of the batch), in two categories."""
    rng = np.random.default_rng(3)
    for number in range(37):
        yield Example([], [Branch(rng.integers(1, VOCAB, rng.integers(4, 25)))], "source", "ab"[number % 2], f"e{number}")


def pairs(reference: bool = False) -> Iterator[Example]:
    """37 prompts with two answers each, with what a reference says of them where it is asked for."""
    rng = np.random.default_rng(4)
    for number in range(37):
        answers = [rng.integers(3, VOCAB, rng.integers(2, 9)) for _ in range(2)]
        columns = [{REFERENCE: -rng.gamma(2.0, 2.0, len(answer))} if reference else {} for answer in answers]
        branches = [Branch(answer, None, column) for answer, column in zip(answers, columns)]
        yield Example(rng.integers(3, VOCAB, rng.integers(1, 8)), branches, "source", "ab"[number % 2], f"p{number}")


def prompts() -> Iterator[Example]:
    """17 prompts for a policy to answer."""
    rng = np.random.default_rng(5)
    for number in range(17):
        yield Example(rng.integers(3, NUM_IDS, rng.integers(2, 7)), [Branch([])], "source", "ab"[number % 2], f"q{number}")


# Trainings --------------------------------------------------------------------------------------------------------


def evaluate(measure: Measure, root: Any) -> Mapping[str, float]:
    """What the trainer is given to evaluate with: a name of its own, at which a kill can strike."""
    return measure(root)


def trainer_of(root: Any, objective: Any, batches: Any, settings: TrainSettings, folder: Path, measure: Measure,
               **more: Any) -> Trainer:
    """The trainer, with what is the same in every kind."""
    return Trainer(root, objective, batches, settings, folder, World(), seed=SEED, fingerprint=FINGERPRINT,
                   evaluate=lambda root: evaluate(measure, root), **more)


def language(store: ExampleStore, folder: Path) -> Trainer:
    """Pre-training."""
    held = [store[index] for index in range(6)]

    def measure(root: Root) -> dict[str, float]:
        return {"eval_loss": -float(root(root.batch(held)).logprobs_S.double().mean())}

    return trainer_of(tiny_root(), Language(), loader(store, BY_PAIR), BY_PAIR, folder, measure)


def reward_pairs(store: ExampleStore, folder: Path) -> Trainer:
    """A reward model."""
    return by_pair(tiny_scorer(spread=0.02), Pairwise(0.01), store, folder)


def preference_pairs(store: ExampleStore, folder: Path) -> Trainer:
    """Direct preference optimisation."""
    return by_pair(tiny_root(), DPO(Terms(0.2), rpo_alpha=0.1), store, folder)


def by_pair(root: Any, objective: Any, store: ExampleStore, folder: Path) -> Trainer:
    """A training on pairs, evaluated on all of them."""
    return trainer_of(root, objective, loader(store, BY_PAIR), BY_PAIR, folder,
                      held_out_loss(store, objective, World(), 256))


def loader(store: ExampleStore, settings: TrainSettings) -> Loader:
    """The data in the order that the settings say."""
    return Loader(store, seed=SEED, **settings.batch_size())


def policy(store: ExampleStore, folder: Path) -> Trainer:
    """A policy and its critic on what they answer, evaluated by the reward of held-out answers."""
    trained = ActorCritic(tiny_root(), tiny_scorer())
    judge, frozen = tiny_scorer(), tiny_root()
    trained.policy.num_ids = frozen.num_ids = NUM_IDS

    @contextmanager
    def reference() -> Iterator[Root]:
        yield frozen

    sampler = Sampler(trained, judge, reference, [STOP], NUM_IDS, max_new_tokens=8, temperature=1.0,
                      device=torch.device("cpu"), micro_batch_tokens=48, batch_size=4, missing_eos_penalty=1.0,
                      num_generations=2)
    source = RolloutSource(loader(store, BY_ROLLOUT), sampler, Estimator(), SEED, PASSES, MINI_BATCHES)
    return trainer_of(trained, PPO(), source, BY_ROLLOUT, folder,
                      held_out_reward(sampler, [store[index] for index in range(4)], SEED, 3), rate_scales={"critic.": 2.0})


BY_FIVE = {"steps": 24, "first_save": 5, "saves": 4, "publications": 5, "removals": 3, "evaluations": 4,
           "killed_at": 13, "newest": "checkpoint-10"}
KINDS = {
    "language": Kind(Language, texts, language, **BY_FIVE),
    "rm": Kind(Pairwise, pairs, reward_pairs, **BY_FIVE),
    "dpo": Kind(DPO, lambda: pairs(reference=True), preference_pairs, **BY_FIVE),
    # rollouts of 4 steps: of the steps 5, 10 and 15 the next ends of rollouts are 8, 12 and 16
    "ppo": Kind(PPO, prompts, policy, steps=20, first_save=8, saves=3, publications=3, removals=1, evaluations=2,
                killed_at=15, newest="checkpoint-12"),
}


def fill(kind: Kind, folder: Path) -> None:
    """Writes the store of a kind."""
    folder.mkdir(parents=True)
    write_examples(folder, kind.examples(), VOCAB)


def train(kind: Kind, store: Path, folder: Path) -> None:
    """The program under test: trains to the end and leaves what is compared."""
    torch.set_num_threads(1)
    work = kind.make(ExampleStore(store), folder)
    for _ in work.fit():
        pass
    trained = {name: value for name, value in work.root.named_parameters() if value.requires_grad}
    checkpoint.write_tensors(folder / "model.safetensors", trained)
    checkpoint.write_tensors(folder / "optimizer.safetensors", checkpoint.optimizer_tensors(work.root, work.optimizer))
    (folder / "state.json").write_text(repr(work.state), encoding="utf-8")
