"""The vocabulary head, computed for sites only, in row chunks, with its gradients in the same pass where possible.

log p(y) = z_y − logsumexp(z), z = f(h·Wᵀ + b), where f is the identity for most models, a scale (Granite, Cohere) or a
soft cap c·tanh(z/c) (Gemma 2), and for a policy that samples with a temperature a division by it. Two ways in:

- `weighted_sum`: Σ c_s·log p(y_s) with coefficients known beforehand, as in language modelling. The gradients are
  computed in the forward pass while a chunk's probabilities are at hand: 6·S·V·D operations, and no logits are kept.
- `logprobs`: a differentiable log p for each site, for objectives whose coefficients follow from the log-probabilities.
  The backward pass goes on from the probabilities where they fit into `KEPT_ELEMENTS`, else it computes each chunk
  again: 6 or 8·S·V·D operations.

One chunk is four sweeps over a buffer that is reused (a fresh buffer costs as much in page faults as the arithmetic):
the product, torch's fused softmax, and the two products of the gradient. The target's own term c·W[y] is added apart.

Legend: S sites, V vocabulary, D width.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 25  # of the logits buffer: 128 MiB in float32
KEPT_ELEMENTS = 1 << 28  # of probabilities kept for a backward pass: 1 GiB in float32
MENDED_AT_ONCE = 256  # sites
FAINT = 1e-30  # below this a float32 probability loses digits, and its logarithm is taken from the logits


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model does to its logits after the projection."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0  # of a policy that samples with it: its log-probabilities are those of z / temperature


@dataclass(frozen=True, slots=True, eq=False)
class SiteStatistics:
    """Per site: log p of the target; on request the entropy of the distribution (nats), its most likely token, log Σ p²."""

    logprobs_S: Tensor
    entropy_S: Tensor | None = None
    argmax_S: Tensor | None = None
    log_squares_S: Tensor | None = None


class Workspace:
    """The logits buffer, kept between calls. `uses` tells whether somebody has written into it since."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self.uses = 0

    def take(self, rows: int, like: Tensor, width: int) -> Tensor:
        """A [rows, width] tensor of undefined content with the dtype and device of `like`."""
        self.uses += 1
        buffer = self._buffer
        if buffer is None or buffer.dtype != like.dtype or buffer.device != like.device or buffer.numel() < rows * width:
            self._buffer = buffer = torch.empty(rows * width, dtype=like.dtype, device=like.device)
        return buffer[:rows * width].view(rows, width)


@dataclass(slots=True, eq=False)
class _Pass:
    """One sweep over the sites: what is known of the head, and what is gathered."""

    weight_VD: Tensor
    bias_V: Tensor | None
    shape: Shape
    workspace: Workspace
    statistics: bool = False
    grad: bool = True  # whether anybody will ask for gradients

    def can_keep(self, h_SD: Tensor) -> bool:
        """Whether the probabilities of all sites fit into the workspace as they are needed for the gradients."""
        plain = self.shape.softcap is None and h_SD.dtype == torch.promote_types(h_SD.dtype, torch.float32)
        return plain and 0 < len(h_SD) * len(self.weight_VD) <= KEPT_ELEMENTS

    def run(self, h_SD: Tensor, y_S: Tensor, c_S: Tensor | None, weight_grad: bool, *, kept_SV: Tensor | None = None,
            known: bool = False) -> tuple[SiteStatistics, Tensor | None, Tensor | None, Tensor | None]:
        """Statistics, and with coefficients the gradients of Σ c·logp by h, W and b.

        kept_SV  where the probabilities are to be kept, or (`known`) where they are since an earlier call
        """
        num_sites, vocab = len(h_SD), len(self.weight_VD)
        weight = self.weight_VD.to(h_SD.dtype)
        wide = torch.promote_types(h_SD.dtype, torch.float32)  # softmax and sums are never in half precision
        logp = torch.empty(num_sites, dtype=wide, device=h_SD.device)
        entropy = torch.empty_like(logp) if self.statistics else None
        argmax = torch.empty_like(y_S) if self.statistics else None
        squares = torch.empty_like(logp) if self.statistics else None
        grad_h = torch.zeros_like(h_SD) if c_S is not None else None
        grad_w = torch.zeros_like(self.weight_VD) if c_S is not None and weight_grad else None
        grad_b = torch.zeros_like(self.bias_V) if grad_w is not None and self.bias_V is not None else None
        rows = max(16, min(512, CHUNK_ELEMENTS // vocab))
        for start in range(0, num_sites, rows):
            part = slice(start, start + rows)
            x, y = h_SD[part], y_S[part]
            slope = None
            if known and kept_SV is not None:
                p = kept_SV[part]
            else:
                z = self.workspace.take(len(x), x, vocab) if kept_SV is None else kept_SV[part]
                p, slope = self._probabilities(x, weight, y, logp[part], wide, z)
            if entropy is not None and argmax is not None and squares is not None:
                entropy[part] = torch.special.entr(p).sum(1)
                argmax[part] = p.argmax(1)
                squares[part] = 2 * torch.linalg.vector_norm(p, dim=1).log()
            if c_S is None or grad_h is None:
                continue
            # d(c·logp)/dz = c·(onehot − p), through the soft cap's slope and the scale
            at_y = torch.ones_like(logp[part]) if slope is None else slope.gather(1, y[:, None])[:, 0]
            if slope is not None:
                p.mul_(slope)
            c = (c_S[part].to(wide) * (self.shape.scale / self.shape.temperature))[:, None].to(h_SD.dtype)
            own = at_y[:, None].to(h_SD.dtype) * c
            p = p.to(h_SD.dtype)
            grad_h[part] = own * weight[y] - c * (p @ weight)
            if grad_w is not None:
                _accumulate(grad_w, p.t(), x * -c)
                grad_w.index_add_(0, y, (x * own).to(grad_w.dtype))
            if grad_b is not None:
                grad_b.sub_((p * c).sum(0)).index_add_(0, y, own[:, 0].to(grad_b.dtype))
        if not known:
            self._mend(h_SD, weight, y_S, logp)
        return SiteStatistics(logp, entropy, argmax, squares), grad_h, grad_w, grad_b

    def _probabilities(self, x: Tensor, weight: Tensor, y: Tensor, logp: Tensor, wide: torch.dtype, z: Tensor
                       ) -> tuple[Tensor, Tensor | None]:
        """softmax(z) in the buffer z [rows, V], and the slope of the soft cap; fills in log p(y)."""
        z, slope = self._logits(x, weight, wide, z)
        torch.softmax(z, 1, out=z)
        torch.log(z.gather(1, y[:, None])[:, 0], out=logp)
        if z.device.type == "cpu":  # whose kernel adds up term after term and loses some 3e-6 of the sum
            logp.sub_(z.sum(1).log_())
        return z, slope

    def _mend(self, h_SD: Tensor, weight: Tensor, y_S: Tensor, logp_S: Tensor) -> None:
        """Takes the logarithms of very small probabilities from the logits."""
        faint = torch.nonzero(logp_S < math.log(FAINT))[:, 0]  # one look at the device for all chunks
        for rows in faint.split(MENDED_AT_ONCE):
            room = torch.empty(len(rows), len(weight), dtype=h_SD.dtype, device=h_SD.device)
            z = self._logits(h_SD[rows], weight, logp_S.dtype, room)[0]
            logp_S[rows] = z.log_softmax(1).gather(1, y_S[rows, None])[:, 0]

    def _logits(self, x: Tensor, weight: Tensor, wide: torch.dtype, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """z = f(x·Wᵀ + b) in the buffer z [rows, V], and the slope of the soft cap."""
        torch.mm(x, weight.t(), out=z)
        z = z.to(wide)
        if self.bias_V is not None:
            z.add_(self.bias_V)
        if self.shape.scale != 1.0:
            z.mul_(self.shape.scale)
        slope = None
        if self.shape.softcap is not None:
            tanh = torch.tanh(z.div_(self.shape.softcap))
            slope = 1 - tanh.square()
            torch.mul(tanh, self.shape.softcap, out=z)
        if self.shape.temperature != 1.0:
            z.div_(self.shape.temperature)
        return z, slope


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, with the sum kept in total's own precision."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


class _WeightedSum(torch.autograd.Function):
    """Σ c·logp with both gradients ready when the forward pass ends."""

    @staticmethod
    def forward(ctx: Any, h_SD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, y_S: Tensor, c_S: Tensor,
                head: _Pass) -> tuple[Tensor, Tensor]:
        needs_h, needs_w = (head.grad and needs for needs in ctx.needs_input_grad[:2])
        found, *grads = head.run(h_SD, y_S, c_S if needs_h or needs_w else None, needs_w)
        ctx.grads = grads
        ctx.mark_non_differentiable(found.logprobs_S)
        return (found.logprobs_S.double() * c_S.double()).sum().to(found.logprobs_S.dtype), found.logprobs_S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # Each buffer is used up here, so it can be scaled in place instead of copied.
        scaled = [None if g is None else g.mul_(grad.to(g.dtype)) for g in ctx.grads]
        return (*scaled, None, None, None)


class _Logprobs(torch.autograd.Function):
    """log p of each site; the backward pass takes the probabilities from the workspace if they are still there."""

    @staticmethod
    def forward(ctx: Any, h_SD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, y_S: Tensor, head: _Pass
                ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        ctx.save_for_backward(h_SD, y_S)
        ctx.head, ctx.kept = head, None
        if head.grad and any(ctx.needs_input_grad) and head.can_keep(h_SD):
            ctx.kept = head.workspace.take(len(h_SD), h_SD, len(weight_VD))
            ctx.uses = head.workspace.uses
        found = head.run(h_SD, y_S, None, False, kept_SV=ctx.kept)[0]
        rest = (found.entropy_S, found.argmax_S, found.log_squares_S)
        ctx.mark_non_differentiable(*(item for item in rest if item is not None))
        return found.logprobs_S, *rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_S: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        h_SD, y_S = ctx.saved_tensors
        head, needs_w = ctx.head, ctx.needs_input_grad[1]
        again = _Pass(head.weight_VD, head.bias_V, head.shape, head.workspace)
        kept = ctx.kept if ctx.kept is not None and ctx.uses == head.workspace.uses else None
        return (*again.run(h_SD, y_S, grad_S, needs_w, kept_SV=kept, known=kept is not None)[1:], None, None)


def weighted_sum(h_SD: Tensor, weight_VD: Tensor, y_S: Tensor, c_S: Tensor, *, workspace: Workspace,
                 bias_V: Tensor | None = None, shape: Shape = Shape()) -> tuple[Tensor, Tensor]:
    """(Σ c_s·log p(y_s), differentiable; log p(y_s) [S], detached). h [S, D], weight [V, D], y int64 [S], c [S]."""
    # inside an autograd function nothing tells that gradients are off
    head = _Pass(weight_VD, bias_V, shape, workspace, grad=torch.is_grad_enabled())
    return _WeightedSum.apply(h_SD, weight_VD, bias_V, y_S, c_S, head)


def logprobs(h_SD: Tensor, weight_VD: Tensor, y_S: Tensor, *, workspace: Workspace, bias_V: Tensor | None = None,
             shape: Shape = Shape(), statistics: bool = False) -> SiteStatistics:
    """log p(y_s) for each site in nats, differentiable; with `statistics` also entropy, arg max and log Σp²."""
    head = _Pass(weight_VD, bias_V, shape, workspace, statistics, torch.is_grad_enabled())
    return SiteStatistics(*_Logprobs.apply(h_SD, weight_VD, bias_V, y_S, head))
