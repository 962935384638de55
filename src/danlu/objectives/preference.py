"""Direct preference optimization: a policy learns from pairs of answers, with its own log-probabilities as the reward.

The reference's log-probabilities come with the data, as the column `ref_logprobs`: they are computed once, before the
policy moves, so the reference can neither drift nor have its dropout left on.

Legend: S sites, N branches, P pairs; branches 2p and 2p + 1 are the chosen and the rejected answer of pair p.
"""

from collections.abc import Callable
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.data.batch import Batch
from danlu.objectives.language import LossSum
from danlu.objectives.reward import count_pairs, pair_metrics, sides


class Logprobs(Protocol):
    """What the policy read: log p of each site's target, in nats."""

    logprobs_S: Tensor  # differentiable


def sigmoid(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """−log σ(β·(log-ratio of the chosen − log-ratio of the rejected)), [P] (DPO, arXiv:2305.18290, eq. 7).

    A log-ratio is log π(y|x) − log π_ref(y|x) in nats, summed over the answer's tokens.
    """
    return -F.logsigmoid(beta * (chosen_P - rejected_P))


# By the name that recipes use: (log-ratios of the chosen, of the rejected, β) → the loss of each pair.
LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"sigmoid": sigmoid}


class DPO:
    """Direct preference optimization, summed over pairs.

        Σ_p −log σ(β·[log π(y_c|x) − log π_ref(y_c|x) − log π(y_r|x) + log π_ref(y_r|x)])

    Eq. 7 of arXiv:2305.18290 without its mean. log π(y|x) = Σ_S w·log p over the answer's sites (w: the site's weight),
    never a mean over tokens. Everything is summed in float64; the loss is in nats. With `rpo_alpha` α the chosen
    answer's likelihood is added, NLL = −Σ w·log p / Σ w over its own tokens (Pang et al., arXiv:2404.19733, eq. 1):

        additive   loss + α·NLL     version 3 of the paper and what is usual now
        scaled     α·loss + NLL     version 1

    The column `ref_logprobs` [S] holds the reference's log p of each site's target.
    """

    def __init__(self, beta: float = 0.1, loss: str = "sigmoid", rpo_alpha: float | None = None,
                 rpo_form: Literal["additive", "scaled"] = "additive") -> None:
        assert loss in LOSSES, f"{loss} is none of {', '.join(LOSSES)}"
        assert rpo_form in ("additive", "scaled")
        self.beta = beta
        self.loss = LOSSES[loss]
        self.rpo_alpha = rpo_alpha
        self.rpo_form = rpo_form

    def count(self, batch: Batch) -> float:
        """How many pairs this micro-batch brings to the step's denominator."""
        return float(count_pairs(batch))

    def coefficients(self, batch: Batch) -> None:
        """Nothing: how much a site counts follows from its pair's margin, which only the reading tells."""

    def __call__(self, reading: Logprobs, batch: Batch) -> LossSum:
        """The loss of every pair, its graph running through the log-probabilities; rewards are β·log(π/π_ref)."""
        weight_S = batch.site_weight_S.double()
        # float32 has 7 digits, and a long answer's sum of some thousand nats would leave few for the difference
        logp_N = batch.sum_per_branch(weight_S * reading.logprobs_S.double())
        ref_N = batch.sum_per_branch(weight_S * batch.columns["ref_logprobs"].double())
        chosen_P, rejected_P = sides(logp_N - ref_N, batch)
        loss_P = self.loss(chosen_P, rejected_P, self.beta)
        logp_chosen_P, logp_rejected_P = sides(logp_N, batch)
        if self.rpo_alpha is not None:
            tokens_P, _ = sides(batch.sum_per_branch(weight_S), batch)
            # an answer without a single site has a likelihood of 1, not 0 / 0
            nll_P = -logp_chosen_P / torch.where(tokens_P > 0, tokens_P, 1.0)
            additive = self.rpo_form == "additive"
            loss_P = loss_P + self.rpo_alpha * nll_P if additive else self.rpo_alpha * loss_P + nll_P
        metrics = pair_metrics(loss_P, self.beta * chosen_P, self.beta * rejected_P, batch)
        metrics["logps/chosen"] = logp_chosen_P.detach().sum()
        metrics["logps/rejected"] = logp_rejected_P.detach().sum()
        return LossSum(loss_P.sum(), metrics)
