"""The loss on held-out examples, the same number on every rank and for every micro-batch size."""

from collections.abc import Callable, Mapping, Sequence

import torch

from danlu.core.errors import DataError
from danlu.data.pack import cut, cut_padded, rows_of
from danlu.data.store import ExampleStore
from danlu.models.root import Root
from danlu.train.parallel import World
from danlu.train.step import is_out_of_memory


def held_out_loss(store: ExampleStore, world: World, micro_batch_tokens: int) -> Callable[[Root], Mapping[str, float]]:
    """An evaluation for the Trainer: `eval_loss`, the mean of −log p over learned tokens, and the same by category.

    The examples are read as they are needed. Where memory runs out, a micro-batch is taken again in halves.
    """
    def evaluate(root: Root) -> Mapping[str, float]:
        sums: dict[str, float] = {}
        groups = (cut(store.lengths.tolist(), micro_batch_tokens) if root.packs else
                  cut_padded([rows_of(example) for example in store], micro_batch_tokens))
        for group, counts in world.deal(groups):
            found = _sums(root, store, group, world)
            if counts:
                for name, value in found.items():
                    sums[name] = sums.get(name, 0.0) + value
        sums = world.sum_each(sums)
        names = sorted(name.removeprefix("loss/") for name in sums if name.startswith("loss/"))
        count = sum(sums[f"count/{name}"] for name in names)
        found = {"eval_loss": sum(sums[f"loss/{name}"] for name in names) / count}
        return found | {f"eval_loss/{name}": sums[f"loss/{name}"] / sums[f"count/{name}"]
                        for name in names if sums[f"count/{name}"]}

    return evaluate


def _sums(root: Root, store: ExampleStore, group: Sequence[int], world: World) -> dict[str, float]:
    """Of some examples: `loss/<category>`, the weighted sum of −log p, and `count/<category>`, the sum of weights."""
    try:
        batch = root.batch([store[index] for index in group]).to(world.device)
        loss_S = (-batch.site_weight_S * root(batch).logprobs_S).double()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if len(group) == 1 or world.size > 1:  # the other ranks are in the middle of this micro-batch
            raise DataError("memory ran out while evaluating", where=store.id(group[0]) or None,
                            hint="Set a lower micro_batch_tokens or cutoff_len.") from error
        loss_S = None
    if loss_S is None:  # outside of the handler, whose traceback keeps tensors alive
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(group) // 2
        first, second = _sums(root, store, group[:half], world), _sums(root, store, group[half:], world)
        return {name: first.get(name, 0.0) + second.get(name, 0.0) for name in {**first, **second}}
    category_S = batch.branch_category_N[batch.site_branch_S]
    found = {}
    for number, category in enumerate(batch.categories):
        own = category_S == number
        found[f"loss/{category}"] = float(loss_S[own].sum())
        found[f"count/{category}"] = float(batch.site_weight_S[own].sum())
    return found
