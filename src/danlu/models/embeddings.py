"""Rows for new tokens: the tables of a model after its vocabulary has grown or was replaced.

A new row of the embeddings, and of the head, begins as the mean of the rows of the old tokens that spelled the piece. Then
the logit of a new token is the mean of the logits of its parts, so it neither drowns the old ones nor is it drowned. Rows
that no token has (padding to a multiple) begin as the mean of all old rows: exp(mean of logits) is at most the mean of
exp(logit) (Jensen's inequality), so such a row has at most one V-th of the mass of V old ones, whatever the model says.

    fill = Fill(first=49152, sources=[(1201, 53), (7,)], num_old=49152, init="mean", seed=0)
    resize(lm, fill, rows=57344)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from danlu.core.errors import ConfigError, DataError
from danlu.models.generate import evaluating

Init = Literal["mean", "norm_matched", "random"]
TOLERANCE = 1e-4  # of the largest logit: what another order of summing may change in float32


@dataclass(frozen=True, slots=True)
class Fill:
    """What the rows of the new tables are to be.

    first    the id of the first new row; of a replaced vocabulary 0
    sources  the old ids that each new row begins from
    num_old  how many old rows belong to tokens; those behind them are padding
    init     mean of the sources' rows; norm_matched: that mean, as long as those rows are on average; random: drawn
             from a normal distribution with mean and deviation of the old rows, each dimension by itself
    seed     of `random`
    """

    first: int
    sources: Sequence[Sequence[int]]
    num_old: int
    init: Init = "mean"
    seed: int = 0


def num_rows(num_ids: int, multiple: int | None, at_least: int = 0) -> int:
    """Rows for so many ids, and not fewer than `at_least`, padded to a multiple."""
    rows = max(num_ids, at_least)
    return rows if multiple is None else -(-rows // multiple) * multiple


@torch.no_grad()
def resize(lm: PreTrainedModel, fill: Fill, rows: int) -> None:
    """Gives embeddings and head `rows` rows, in place, and the config their number; rows before `first` stay.

    A head that shares its weight goes on sharing it; a bias of the head is filled in the same way. Raises ConfigError for a
    model that does not resize as its config says.
    """
    old = [parameter.detach().clone() for parameter in _tables(lm)]
    tied = len(old) == 1 or _is_tied(lm)
    with torch.random.fork_rng(devices=[]):  # transformers fills the rows at random before they are filled here
        lm.resize_token_embeddings(rows, mean_resizing=False)
    tables = _tables(lm)
    if len(tables) != len(old) or any(len(table) != rows for table in tables) or \
            lm.config.get_text_config().vocab_size != rows or (len(tables) > 1 and _is_tied(lm) != tied):
        raise ConfigError(f"the tables of {type(lm).__name__} cannot be given other rows")
    for number, (table, before) in enumerate(zip(tables, old, strict=True)):
        if number == 1 and tied:
            continue
        _fill(table, before, fill, number)


def _fill(table: Tensor, before: Tensor, fill: Fill, number: int) -> None:
    """Fills one table, [V, D] or [V], from its old rows, computed in float32."""
    old_VD = before.float().reshape(len(before), -1)
    kept = min(fill.first, len(before))
    new_VD = old_VD[:fill.num_old].mean(0).expand(len(table), -1).clone()
    new_VD[:min(len(before), len(table))] = old_VD[:len(table)]  # what no new token takes stays as it is
    end = fill.first + len(fill.sources)
    if fill.sources:
        new_VD[fill.first:end] = _INITS[fill.init](old_VD, fill, number)
    if fill.first == 0:
        new_VD[end:] = old_VD[:fill.num_old].mean(0)
        same = [(row, ids[0]) for row, ids in enumerate(fill.sources) if len(ids) == 1]  # both vocabularies have it
        new_VD[[row for row, _ in same]] = old_VD[[id for _, id in same]]
    table.copy_(new_VD.reshape(table.shape))
    table[:kept] = before[:kept]  # bit for bit


def _mean(old_VD: Tensor, fill: Fill, number: int) -> Tensor:
    ids, offsets = _bags(fill.sources)
    return nn.functional.embedding_bag(ids.to(old_VD.device), old_VD, offsets.to(old_VD.device), mode="mean")


def _norm_matched(old_VD: Tensor, fill: Fill, number: int) -> Tensor:
    ids, offsets = _bags(fill.sources)
    norms_V1 = old_VD.norm(dim=-1, keepdim=True)
    wanted_N1 = nn.functional.embedding_bag(ids.to(old_VD.device), norms_V1, offsets.to(old_VD.device), mode="mean")
    mean_ND = _mean(old_VD, fill, number)
    return mean_ND * (wanted_N1 / mean_ND.norm(dim=-1, keepdim=True).clamp(min=1e-12))


def _random(old_VD: Tensor, fill: Fill, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(fill.seed * 3 + number)
    own_VD = old_VD[:fill.num_old]
    drawn_ND = torch.randn(len(fill.sources), own_VD.shape[1], generator=generator).to(old_VD.device)
    return own_VD.mean(0) + drawn_ND * own_VD.std(0)


_INITS: dict[str, Callable[[Tensor, Fill, int], Tensor]] = {"mean": _mean, "norm_matched": _norm_matched, "random": _random}


def _bags(sources: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """All ids one after another, and where each row's own begin."""
    offsets, total = [], 0
    for ids in sources:
        assert ids, "a new token is spelled by at least one old one"
        offsets.append(total)
        total += len(ids)
    return torch.tensor([id for ids in sources for id in ids]), torch.tensor(offsets)


def _tables(lm: PreTrainedModel) -> list[nn.Parameter]:
    """The embeddings, the head's weight (the same tensor where it is tied) and the head's bias if it has one."""
    output = lm.get_output_embeddings()
    found = [lm.get_input_embeddings().get_parameter("weight")]
    if output is not None:
        found += [parameter for _, parameter in sorted(output.named_parameters(recurse=False), reverse=True)]
    return found


def _is_tied(lm: PreTrainedModel) -> bool:
    first, second = _tables(lm)[:2]
    return first.data_ptr() == second.data_ptr()


@torch.no_grad()
def logits_on(lm: PreTrainedModel, rows: Sequence[Sequence[int]], columns: int) -> list[Tensor]:
    """The model's own logits of the first `columns` ids on rows of ids, each [T, columns] in float32."""
    with evaluating(lm):
        return [lm(input_ids=torch.tensor([list(row)], device=lm.device), use_cache=False).logits[0, :, :columns].float()
                for row in rows]


def check_logits(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest difference as a share of the largest logit. Raises DataError where it is beyond TOLERANCE."""
    largest = max(float(logits_TV.abs().max()) for logits_TV in before)
    each = [(a_TV - b_TV).abs().max() for a_TV, b_TV in zip(before, after, strict=True)]
    difference = float(torch.stack(each).max()) / max(largest, 1e-6)  # torch's maximum of a nan is a nan
    if not difference <= TOLERANCE:
        raise DataError(f"the grown model says something else on text whose ids did not change: its logits differ by "
                        f"{difference:.3g} of the largest one, {TOLERANCE:g} is allowed")
    return difference
