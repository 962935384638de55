"""The loss on held-out examples, the same number on every rank and for every micro-batch size."""

from collections.abc import Callable, Mapping

from danlu.data.pack import micro_batches
from danlu.data.store import ExampleStore
from danlu.models.root import Root
from danlu.train.parallel import World


def held_out_loss(store: ExampleStore, world: World, micro_batch_tokens: int) -> Callable[[Root], Mapping[str, float]]:
    """An evaluation for the Trainer: `eval_loss`, the mean of −log p over learned tokens, and the same by category."""

    def evaluate(root: Root) -> Mapping[str, float]:
        sums: dict[str, float] = {}
        for group, counts in world.deal(micro_batches(list(store), micro_batch_tokens)):
            batch = root.batch(group)
            batch = (batch if counts else batch.without_targets()).to(world.device)
            loss_S = (-batch.site_weight_S * root(batch).logprobs_S).double()
            category_S = batch.branch_category_N[batch.site_branch_S]
            for number, category in enumerate(batch.categories):
                own = category_S == number
                sums[f"loss/{category}"] = sums.get(f"loss/{category}", 0.0) + float(loss_S[own].sum())
                sums[f"count/{category}"] = sums.get(f"count/{category}", 0.0) + float(batch.site_weight_S[own].sum())
        sums = world.sum_each(sums)
        names = sorted(name.removeprefix("loss/") for name in sums if name.startswith("loss/"))
        count = sum(sums[f"count/{name}"] for name in names)
        found = {"eval_loss": sum(sums[f"loss/{name}"] for name in names) / count}
        return found | {f"eval_loss/{name}": sums[f"loss/{name}"] / sums[f"count/{name}"]
                        for name in names if sums[f"count/{name}"]}

    return evaluate
