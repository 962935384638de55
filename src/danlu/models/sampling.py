"""The choice of the next token from the logits, and how probable it was.

The log-probabilities are those of the distribution that is sampled from before top_k and top_p: log_softmax(z / T). They
belong to what a policy is compared with: a ratio π_new(a) / π_old(a) weighs a sample rightly only where π_old is the
behaviour policy, the one that a was drawn from, and at temperature T that is not the model's own softmax(z). Whoever
learns from the samples divides the logits by the same T.

Legend: B rows, V vocabulary, K candidates or blocks, C ids of a block.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from danlu.core.errors import DataError

CANDIDATES = 1024  # that a nucleus is looked for among before the whole vocabulary is sorted
BLOCK = 256  # ids whose probabilities are summed up before a token is looked for among them


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen: temperature 0 takes the most probable one; top_k 0 and top_p 1 cut nothing off.

    num_ids  ids at or beyond it do not exist for the choice (a vocabulary may be padded beyond its tokenizer); None: all do

    Raises DataError for values that cannot be meant.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    num_ids: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise DataError(f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p} cannot be meant",
                            hint="temperature ≥ 0, top_k ≥ 0 (0: all tokens), 0 < top_p ≤ 1.")
        if self.num_ids is not None and self.num_ids < 1:
            raise DataError(f"num_ids {self.num_ids} cannot be meant", hint="At least one id has to be left.")


def choose(logits_BV: Tensor, sampling: Sampling, drawn_B: np.ndarray | None) -> tuple[Tensor, Tensor]:
    """The next token of each row, int64 [B], and its log-probability before any cutting-off in nats, [B].

    `drawn_B` are uniform numbers in [0, 1), float64, not needed at temperature 0. Sampling inverts the distribution
    function in the order of the vocabulary: rounding noise in the logits then moves a border a little instead of swapping
    two tokens.
    """
    scores_BV = logits_BV[:, :sampling.num_ids]
    if sampling.temperature not in (0, 1):
        scores_BV = scores_BV / max(sampling.temperature, 1e-30)  # float32 has no room for what is colder
    probs_BV = torch.softmax(scores_BV, dim=-1)
    if sampling.temperature == 0:
        tokens_B = scores_BV.max(dim=-1).indices  # the first of equal ones like argmax, but faster on a CPU
    else:
        assert drawn_B is not None, "sampling needs one uniform number per row"
        tokens_B = _draw(cut_off(probs_BV, scores_BV, sampling), torch.as_tensor(drawn_B, device=probs_BV.device))
    # No token is drawn that is so improbable that float32 cannot hold it, so a log_softmax would bring nothing.
    return tokens_B, probs_BV.gather(1, tokens_B[:, None])[:, 0].log()


def cut_off(probs_BV: Tensor, scores_BV: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities, with 0 for what top_k and, among the rest, top_p cut off; not scaled up to 1 again, [B, V].

    `probs_BV` is the softmax of `scores_BV`.
    """
    if 0 < sampling.top_k < scores_BV.shape[1]:
        least_B1 = scores_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        probs_BV = probs_BV.masked_fill(scores_BV < least_B1, 0.0)
    return probs_BV if sampling.top_p == 1 else _nucleus(probs_BV, sampling.top_p)


def _nucleus(probs_BV: Tensor, top_p: float) -> Tensor:
    """The most probable tokens that together reach the share `top_p`, the one that reaches it included; the others are 0.

    Of equal ones the first in the vocabulary are taken. Nearly always few candidates are enough, and sorting the whole
    vocabulary, which costs more than a small model's forward pass, is not needed.
    """
    aim_B1 = top_p * probs_BV.sum(dim=-1, keepdim=True, dtype=torch.float64)
    vocabulary = probs_BV.shape[1]
    for num_candidates in (min(CANDIDATES, vocabulary), vocabulary):
        top_BK = probs_BV.topk(num_candidates, dim=-1).values
        before_BK = top_BK.cumsum(dim=-1, dtype=torch.float64) - top_BK
        num_kept_B1 = (before_BK < aim_B1).sum(dim=-1, keepdim=True)
        if int(num_kept_B1.max()) < num_candidates:
            break
    least_B1 = top_BK.gather(1, (num_kept_B1 - 1).clamp(min=0))
    above_BV, level_BV = probs_BV > least_B1, probs_BV == least_B1
    num_level_B1 = num_kept_B1 - above_BV.sum(dim=-1, keepdim=True)
    return probs_BV.masked_fill(~(above_BV | (level_BV & (level_BV.cumsum(dim=-1) <= num_level_B1))), 0.0)


def _draw(weights_BV: Tensor, drawn_B: Tensor) -> Tensor:
    """The id in which each row's weights, laid end to end, reach the share `drawn_B` of their sum; int64 [B].

    First the block is found and then the id in it, which spares a running sum over the whole vocabulary. Each id is drawn
    with its own weight's share of its block, so a block's sum in float32 changes no id's odds by more than its rounding.
    """
    vocabulary = weights_BV.shape[1]
    whole = vocabulary // BLOCK
    sums_BK = weights_BV[:, :whole * BLOCK].unflatten(1, (whole, BLOCK)).sum(dim=-1)
    if whole * BLOCK < vocabulary:
        sums_BK = torch.cat([sums_BK, weights_BV[:, whole * BLOCK:].sum(dim=-1, keepdim=True)], dim=1)
    block_B, share_B = _reach(sums_BK, drawn_B)
    ids_BC = block_B[:, None] * BLOCK + torch.arange(BLOCK, device=block_B.device)
    inside_BC = weights_BV.gather(1, ids_BC.clamp(max=vocabulary - 1)).masked_fill(ids_BC >= vocabulary, 0.0)
    return (block_B * BLOCK + _reach(inside_BC, share_B)[0]).clamp(max=vocabulary - 1)


def _reach(weights_BK: Tensor, share_B: Tensor) -> tuple[Tensor, Tensor]:
    """Where the running sum of the weights passes the share of their sum, int64 [B], and the share of that weight which
    is used up there, float64 [B]. A weight of 0 is never found."""
    reached_BK = weights_BK.cumsum(dim=-1, dtype=torch.float64)
    aim_B1 = share_B[:, None] * reached_BK[:, -1:]  # rounded too, it is less than the sum, as the share is less than 1
    found_B1 = torch.searchsorted(reached_BK, aim_B1, right=True)
    found_B1 = found_B1.clamp(max=reached_BK.shape[1] - 1)  # a broken model's NaNs are passed by no share
    before_B1 = torch.where(found_B1 > 0, reached_BK.gather(1, (found_B1 - 1).clamp(min=0)), 0.0)
    share_B1 = (aim_B1 - before_B1) / (reached_BK.gather(1, found_B1) - before_B1)
    return found_B1[:, 0], share_B1[:, 0]
