"""Language modelling: −Σ w·log p(token) over the sites, with Σ w as its count. Pre-training and SFT differ in w alone.

With w ∈ {0, 1} the trainer's quotient is the mean cross entropy per learned token over the whole optimizer step, the
same number for any micro-batch, packing and number of ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from danlu.data.batch import Batch


@dataclass(frozen=True, slots=True)
class LossSum:
    """A loss summed, not averaged, over its units, so that micro-batches and ranks add up without bias."""

    total: Tensor  # scalar, carries the graph
    metrics: Mapping[str, Tensor]  # detached sums; a pair `x` and `count/x` is logged as their quotient


class Reading(Protocol):
    """What a root module read at the sites of a batch. Which fields are set follows from what was asked."""

    total: Tensor | None  # scalar Σ c·logp, differentiable
    logprobs_S: Tensor


class Language:
    """The objective of pre-training and supervised fine-tuning."""

    def count(self, batch: Batch) -> float:
        """Σ w: how many units this micro-batch brings to the step's denominator."""
        return float(batch.site_weight_S.double().sum())

    def coefficients(self, batch: Batch) -> Tensor:
        """The factor of each site's log-probability in the loss, [S]."""
        return -batch.site_weight_S

    def __call__(self, reading: Reading, batch: Batch) -> LossSum:
        """−Σ w·logp, and the same sum for each category of data."""
        assert reading.total is not None
        loss_S = (-batch.site_weight_S * reading.logprobs_S.detach()).double()
        category_S = batch.branch_category_N[batch.site_branch_S]
        zeros = torch.zeros(len(batch.categories), dtype=torch.float64, device=loss_S.device)
        losses = zeros.index_add(0, category_S, loss_S)
        counts = zeros.index_add(0, category_S, batch.site_weight_S.double())
        metrics = {"loss": loss_S.sum()}
        for number, category in enumerate(batch.categories):
            metrics[f"loss/{category}"] = losses[number]
            metrics[f"count/loss/{category}"] = counts[number]
        return LossSum(reading.total, metrics)
