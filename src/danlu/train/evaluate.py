"""The loss on held-out examples, the same number on every rank and for every micro-batch size."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from danlu.core.errors import DataError
from danlu.data.pack import cut_store
from danlu.data.store import ExampleStore
from danlu.objectives.branches import Coupled
from danlu.objectives.language import LossSum
from danlu.train.parallel import World
from danlu.train.step import Objective, is_out_of_memory, means

Sums = dict[str, float]
Group = Sequence[int]
T = TypeVar("T")


def held_out_loss(store: ExampleStore, objective: Objective | Coupled, world: World, micro_batch_tokens: int
                  ) -> Callable[[Any], Mapping[str, float]]:
    """An evaluation for the Trainer: `eval_loss`, per unit of the objective, and its metrics as `eval_<name>`.

    The examples are read as they are needed. Where memory runs out, a micro-batch is taken again in halves. An objective
    that couples a step takes all held-out examples for one.
    """
    def evaluate(root: Any) -> Mapping[str, float]:
        groups = cut_store(store, range(len(store)), micro_batch_tokens, padded=not root.packs)
        found = _coupled(root, store, groups, objective, world) if isinstance(objective, Coupled) else \
            _plain(root, store, groups, objective, world)
        sums = world.sum_each(found)
        count = sums.pop("units")
        return {"eval_loss": sums["total"] / count} | {f"eval_{name}": value for name, value in means(sums, count).items()}

    return evaluate


def _plain(root: Any, store: ExampleStore, groups: Sequence[Group], objective: Objective, world: World) -> Sums:
    """This rank's sums where every micro-batch has a loss of its own."""

    def read(group: Group) -> Sums:
        batch = root.batch([store[index] for index in group]).to(world.device)
        return _sums(objective(root(batch, coefficients_S=objective.coefficients(batch)), batch), objective.count(batch))

    sums: Sums = {}
    for group, counts in world.deal(groups):
        for _, found in _in_halves(read, group, store, world):
            sums = _added(sums, found) if counts else sums
    return sums


def _coupled(root: Any, store: ExampleStore, groups: Sequence[Group], objective: Coupled, world: World) -> Sums:
    """This rank's sums where the loss is that of all held-out examples together."""

    def read(group: Group) -> list[list[float]]:
        batch = root.batch([store[index] for index in group]).to(world.device)
        return objective.survey(root(batch), batch)

    own = [pair for group, counts in world.deal(groups) for pair in _in_halves(read, group, store, world) if counts]
    everyone = world.gather([table for _, table in own])
    shares = objective.shares([table for tables in everyone for table in tables])
    before = sum(map(len, everyone[:world.rank]))
    sums: Sums = {}
    for (group, _), share in zip(own, shares[before:before + len(own)], strict=True):
        batch = root.batch([store[index] for index in group])
        sums = _added(sums, _sums(share.found(batch), share.count(batch)))
    return sums


def _added(left: Mapping[str, float], right: Mapping[str, float]) -> Sums:
    return {name: left.get(name, 0.0) + right.get(name, 0.0) for name in {**left, **right}}


def _sums(loss: LossSum, units: float) -> Sums:
    """The objective's `total`, its metrics and their counts, and the `units` it counts."""
    values = {"total": loss.metrics.get("loss", loss.total), **loss.metrics}
    return {name: float(value) for name, value in values.items()} | {"units": units}


def _in_halves(read: Callable[[Group], T], group: Group, store: ExampleStore, world: World) -> Iterator[tuple[Group, T]]:
    """What is read of a group, or of its halves where memory runs out, each with the indices that it is of."""
    try:
        found = read(group)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if len(group) == 1 or world.size > 1:  # the other ranks are in the middle of this micro-batch
            raise DataError("memory ran out while evaluating", where=store.id(group[0]) or None,
                            hint="Set a lower micro_batch_tokens or cutoff_len.") from error
    else:
        yield group, found
        return
    # outside of the handler, whose traceback keeps tensors alive
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    half = len(group) // 2
    yield from _in_halves(read, group[:half], store, world)
    yield from _in_halves(read, group[half:], store, world)
