"""Proximal policy optimization: a policy and its critic learn from answers that an earlier state of them has given.

What that earlier state said, and what came of it, are columns of the data: `old_logprobs`, `advantages`, `returns` and
`values`, one number for each site. A site's value is the critic's estimate before its token is chosen.

Legend: S sites, the answers' tokens.
"""

from typing import Protocol

import torch
from torch import Tensor

from danlu.data.batch import Batch
from danlu.objectives.language import LossSum

# Where π/π_old is continued by a straight line, in nats. e²⁰ = 4.9·10⁸ is no ratio that training comes by soundly, and
# products with it still fit into float32.
LIMIT = 20.0


class ActorCritic(Protocol):
    """What the policy and its critic read at the sites. Without a critic `values_S` is None."""

    logprobs_S: Tensor  # differentiable
    values_S: Tensor | None  # differentiable


class PPO:
    """The clipped surrogate objective and the clipped value loss, summed over tokens with the sites' weights w.

        Σ_S w·( −min(A·ρ, A·clip(ρ, 1 − ε, 1 + ε)) + c·½·max((v − R)², (clip(v, v_old − ε_v, v_old + ε_v) − R)²) )

    ρ = π/π_old = exp(log p − log p_old). The first term is eq. 7 of arXiv:1707.06347 as a loss, the second the value
    clipping that arXiv:2005.12729, section 3, describes, with the larger of the two as implementations have it: neither
    gains by moving past its bound. log p is in nats, A, v and R in units of the reward; all [S].

    cliprange        ε
    cliprange_value  ε_v, in units of the reward
    vf_coef          c
    """

    def __init__(self, cliprange: float = 0.2, cliprange_value: float = 0.2, vf_coef: float = 0.1) -> None:
        self.cliprange = cliprange
        self.cliprange_value = cliprange_value
        self.vf_coef = vf_coef

    def count(self, batch: Batch) -> float:
        """Σ w: how many tokens this micro-batch brings to the step's denominator."""
        return float(batch.site_weight_S.double().sum())

    def coefficients(self, batch: Batch) -> None:
        """Nothing: how much a site counts follows from its ratio, which only the reading tells."""

    def __call__(self, reading: ActorCritic, batch: Batch) -> LossSum:
        """The loss of every token, its graph running through log-probabilities and values.

        Metrics: policy_loss; value_loss (½·max(…), without c); ratio; approx_kl, the estimate (ρ − 1) − log ρ of
        KL(π_old ‖ π) in nats, which is never negative; clip_fraction and value_clip_fraction, the share of tokens for
        which the clipped term decides and so nothing is learned.
        """
        weight_S = batch.site_weight_S.double()
        shift_S = reading.logprobs_S.double() - batch.columns["old_logprobs"].double()
        ratio_S = likelihood_ratio(shift_S)
        advantage_S = batch.columns["advantages"].double()
        plain_S = -advantage_S * ratio_S
        clipped_S = -advantage_S * ratio_S.clamp(1 - self.cliprange, 1 + self.cliprange)
        policy_S = torch.maximum(plain_S, clipped_S)
        found_S = {"policy_loss": policy_S, "ratio": ratio_S, "clip_fraction": (clipped_S > plain_S).double(),
                   "approx_kl": ratio_S - 1 - shift_S}
        loss_S = policy_S
        if reading.values_S is not None:
            value_S, clips_S = self._value_loss(reading.values_S.double(), batch)
            loss_S = loss_S + self.vf_coef * value_S
            found_S |= {"value_loss": value_S, "value_clip_fraction": clips_S}
        metrics = {name: (weight_S * values_S.detach()).sum() for name, values_S in found_S.items()}
        return LossSum((weight_S * loss_S).sum(), metrics)

    def _value_loss(self, value_S: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """½·max((v − R)², (clip(v, v_old ± ε_v) − R)²) for each site, and where the clipped term decides (1 or 0)."""
        old_S, return_S = batch.columns["values"].double(), batch.columns["returns"].double()
        near_S = torch.clamp(value_S, old_S - self.cliprange_value, old_S + self.cliprange_value)
        plain_S, clipped_S = (value_S - return_S).square(), (near_S - return_S).square()
        return torch.maximum(plain_S, clipped_S) / 2, (clipped_S > plain_S).double()


def likelihood_ratio(shift_S: Tensor) -> Tensor:
    """exp(x) of x = log p − log p_old up to x = LIMIT, and from there its tangent e^LIMIT·(1 + x − LIMIT), [S].

    exp would be inf from x = 710 on, and where the clipped term decides the gradient would then be 0·inf, not a number,
    although the loss is finite. With a positive advantage ρ is clipped long before LIMIT, so loss and gradient stay
    exactly the same. With a negative one the true loss grows beyond all numbers; the tangent goes on to push the token's
    probability down, where a plain cut-off at LIMIT would give no gradient at all. Below, exp only falls to 0: no limit.
    """
    return torch.exp(shift_S.clamp(max=LIMIT)) * (1 + (shift_S - LIMIT).clamp(min=0))
