"""Reward modelling from comparisons: −log σ(r_chosen − r_rejected), summed over pairs of answers to one prompt.

An example is a prompt (the stem) and exactly two branches, the chosen answer and the rejected one. What any objective
on such pairs shares (their count, their metrics) is here too.

Legend: N branches, P pairs; branches 2p and 2p + 1 are the chosen and the rejected answer of pair p.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.data.batch import Batch
from danlu.objectives.language import LossSum


class Scores(Protocol):
    """What a reward model read: one number for each branch as a whole."""

    scores_N: Tensor  # differentiable


class Pairwise:
    """The comparison loss of a reward model.

        Σ_p −log σ(r_chosen − r_rejected) + c·(r_chosen + r_rejected)²

    The first term is eq. 1 of InstructGPT (arXiv:2203.02155, section 3.5) without its mean over comparisons, the second
    eq. 2 of Eisenstein et al. (arXiv:2312.09244): scores are otherwise free to shift by any number per prompt, and it
    keeps their mean near 0. Scores [N] are in units of log-odds of being preferred; the loss is in nats.

    center_rewards_coefficient  c; 0 leaves the term out
    """

    def __init__(self, center_rewards_coefficient: float = 0.0) -> None:
        self.center_rewards_coefficient = center_rewards_coefficient

    def count(self, batch: Batch) -> float:
        """How many pairs this micro-batch brings to the step's denominator."""
        return float(count_pairs(batch))

    def coefficients(self, batch: Batch) -> None:
        """Nothing: the loss is read off the scores, not off the log-probabilities."""

    def __call__(self, reading: Scores, batch: Batch) -> LossSum:
        """The loss of every pair, its graph running through the scores."""
        chosen_P, rejected_P = sides(reading.scores_N.double(), batch)
        loss_P = -F.logsigmoid(chosen_P - rejected_P)
        if self.center_rewards_coefficient:
            loss_P = loss_P + self.center_rewards_coefficient * (chosen_P + rejected_P).square()
        return LossSum(loss_P.sum(), pair_metrics(loss_P, chosen_P, rejected_P, batch))


def count_pairs(batch: Batch) -> int:
    """P, the number of pairs: N / 2, once it is certain that every example has exactly two branches.

    It looks at the tensors' content. Called where the batch still is in the host's memory it makes no device wait, and
    `count` is called there before every step.
    """
    pairs = len(batch.branch_example_N) // 2
    expected_N = torch.arange(pairs, device=batch.branch_example_N.device).repeat_interleave(2)
    assert torch.equal(batch.branch_example_N, expected_N), "every example has a chosen and a rejected branch"
    return pairs


def sides(values_N: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The values of the chosen and of the rejected branches, [P] each: every other one of [N]."""
    assert len(values_N) == len(batch.branch_example_N) and len(values_N) % 2 == 0, "two branches a pair"
    return values_N[0::2], values_N[1::2]


def pair_metrics(loss_P: Tensor, chosen_P: Tensor, rejected_P: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Detached sums over pairs of losses and rewards: accuracy = (1 + sign(r_chosen − r_rejected)) / 2, margin, rewards.

    A tie counts one half, so a model that knows nothing has an accuracy of 0.5 however it rounds. By category of data
    there are `loss/<category>` and `accuracy/<category>` with counts of their own.
    """
    loss_P, chosen_P, rejected_P = loss_P.detach(), chosen_P.detach(), rejected_P.detach()
    accuracy_P = (1 + torch.sign(chosen_P - rejected_P)) / 2
    metrics = {"accuracy": accuracy_P.sum(), "margin": (chosen_P - rejected_P).sum(),
               "rewards/chosen": chosen_P.sum(), "rewards/rejected": rejected_P.sum()}
    category_P = batch.branch_category_N[0::2]
    zeros = torch.zeros(len(batch.categories), dtype=torch.float64, device=loss_P.device)
    counts = zeros.index_add(0, category_P, torch.ones_like(loss_P))
    for name, values_P in (("loss", loss_P), ("accuracy", accuracy_P)):
        sums = zeros.index_add(0, category_P, values_P)
        for number, category in enumerate(batch.categories):
            metrics[f"{name}/{category}"] = sums[number]
            metrics[f"count/{name}/{category}"] = counts[number]
    return metrics
