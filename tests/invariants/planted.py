"""Bugs that are put into a training on purpose, each of which the comparison of a killed run has to notice.

Each is a function that is called in the child before the program, and changes what it finds there.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import trainings
from torch import Tensor, nn

from danlu.core import artifact
from danlu.data.loader import Loader, StepBatch
from danlu.rollout import source as rollouts
from danlu.rollout.source import RolloutSource
from danlu.train import checkpoint, log, step, trainer


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


class AnyStep:
    """Rollouts that claim to be taken up again at any step, and are then made with the weights of that step."""

    stride = 1

    def __init__(self, *args: Any) -> None:
        self.source = RolloutSource(*args)

    def batch(self, place: int) -> StepBatch:
        number = place // self.source.stride
        if self.source._made is None or self.source._made[0] != number:
            self.source._made = (number, self.source.make(number))
        return self.source.batch(place)


def ignore_stride() -> None:
    """The bug: checkpoints are saved in the middle of a rollout."""
    trainings.RolloutSource = AnyStep


def run_on() -> Callable[..., np.random.Generator]:
    """One generator for whatever is drawn, which every process starts anew."""
    running = np.random.default_rng(0)
    return lambda *parts: running


def order_by_process() -> None:
    """The bug: the order of the mini-batches is drawn from a generator that runs on from rollout to rollout."""
    rollouts._generator = run_on()


def seeds_by_process() -> None:
    """The bug: so are the seeds of the answers."""
    running = run_on()
    rollouts.key = lambda *parts: int(running().integers(1 << 62))


def drop_critic() -> None:
    """The bug: checkpoints hold the policy alone."""
    stored = checkpoint.stored_tensors

    def policy_alone(root: nn.Module) -> dict[str, Tensor]:
        return {name: value for name, value in stored(root).items() if not name.startswith("critic.")}

    checkpoint.stored_tensors = policy_alone


CONTROLS: dict[str, dict[str, Callable[[], None]]] = {
    "language": {
        "reseeding dropped": drop_reseeding,
        "optimizer not restored": drop_optimizer,
        "data one step too late": shift_cursor(+1),
        "data one step too early": shift_cursor(-1),
        "schedule begun again": drop_schedule,
        "log not cut back": keep_log,
    },
    "rm": {"reseeding dropped": drop_reseeding},
    "dpo": {"optimizer not restored": drop_optimizer},
    "ppo": {
        "checkpoint within a rollout": ignore_stride,
        "order of mini-batches not keyed by the rollout": order_by_process,
        "seeds of answers not keyed by the rollout": seeds_by_process,
        "critic not in the checkpoint": drop_critic,
    },
}
