"""The loss on held-out examples, the same number on every rank and for every micro-batch size."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from danlu.core.errors import DataError
from danlu.data.pack import cut_store
from danlu.data.store import ExampleStore
from danlu.train.parallel import World
from danlu.train.step import Objective, is_out_of_memory, means


def held_out_loss(store: ExampleStore, objective: Objective, world: World, micro_batch_tokens: int
                  ) -> Callable[[Any], Mapping[str, float]]:
    """An evaluation for the Trainer: `eval_loss`, per unit of the objective, and its metrics as `eval_<name>`.

    The examples are read as they are needed. Where memory runs out, a micro-batch is taken again in halves.
    """
    def evaluate(root: Any) -> Mapping[str, float]:
        sums: dict[str, float] = {}
        groups = cut_store(store, range(len(store)), micro_batch_tokens, padded=not root.packs)
        for group, counts in world.deal(groups):
            found = _sums(root, store, group, objective, world)
            if counts:
                sums = _added(sums, found)
        sums = world.sum_each(sums)
        count = sums.pop("units")
        return {"eval_loss": sums["total"] / count} | {f"eval_{name}": value for name, value in means(sums, count).items()}

    return evaluate


def _added(left: Mapping[str, float], right: Mapping[str, float]) -> dict[str, float]:
    return {name: left.get(name, 0.0) + right.get(name, 0.0) for name in {**left, **right}}


def _sums(root: Any, store: ExampleStore, group: Sequence[int], objective: Objective, world: World) -> dict[str, float]:
    """Of some examples: the objective's `total`, its metrics and their counts, and the `units` it counts."""
    try:
        batch = root.batch([store[index] for index in group]).to(world.device)
        loss = objective(root(batch, coefficients_S=objective.coefficients(batch)), batch)
        values = {"total": loss.metrics.get("loss", loss.total), **loss.metrics}
        sums = {name: float(value) for name, value in values.items()}
        return sums | {"units": objective.count(batch)}
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if len(group) == 1 or world.size > 1:  # the other ranks are in the middle of this micro-batch
            raise DataError("memory ran out while evaluating", where=store.id(group[0]) or None,
                            hint="Set a lower micro_batch_tokens or cutoff_len.") from error
    # outside of the handler, whose traceback keeps tensors alive
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    half = len(group) // 2
    return _added(_sums(root, store, group[:half], objective, world), _sums(root, store, group[half:], objective, world))
