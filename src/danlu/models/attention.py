"""Attention over packed trees: a token sees its own document's stem and its own branch, never anything else.

transformers lets a function be registered by name as a model's attention and hands it every extra keyword that the base
model is called with. So no model code is changed: `model.model(input_ids=…, position_ids=…, layout=layout)` arrives here
with the batch's layout. Without a layout the function raises, because a mask-less call would silently mix documents.

Each tree is one exact call of torch's fused attention: documents of equal length that lie side by side are one batched
call; a further branch attends to [stem, branch] under a mask. What a model asks for beyond that (logit soft caps, sinks)
raises `UnsupportedAttention`, and the loader falls back to padded rows.

Legend: H heads, T positions, L positions of one tree, D head width.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from danlu.core.errors import DanluError
from danlu.data.batch import Layout, Tree

NAME = "danlu"


class UnsupportedAttention(DanluError):
    """A model's attention asks for something that the packed form does not do."""


def packed_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                     scaling: float | None = None, dropout: float = 0.0, layout: Layout | None = None,
                     sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
                     is_causal: bool | None = None, position_bias: Tensor | None = None,
                     **_: object) -> tuple[Tensor, None]:
    """softmax(q·kᵀ·scaling)·v within each tree of the layout.

    query [1, H, T, D]; key and value [1, H or fewer, T, D]; returns [1, T, H, D].
    Raises UnsupportedAttention for soft caps, sinks, biases and non-causal layers, and where the layout is missing.
    """
    if layout is None:
        raise UnsupportedAttention("packed attention was called without a layout: call the model through its Root")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if softcap is not None or s_aux is not None or position_bias is not None or attention_mask is not None or not causal:
        raise UnsupportedAttention(f"{type(module).__name__} uses a soft cap, sinks, a bias or an attention that is "
                                   "not causal, which packed trees do not have")
    lengths = [count * trees[0].length for count, trees in _runs(layout)]
    outputs = []
    for (count, trees), q, k, v in zip(_runs(layout), query.split(lengths, 2), key.split(lengths, 2),
                                       value.split(lengths, 2), strict=True):
        outputs.append(_run(count, trees[0], q, k, v, scaling, dropout, sliding_window))
    return torch.cat(outputs, 1), None


def _runs(layout: Layout) -> Iterator[tuple[int, list[Tree]]]:
    """Neighbouring plain trees of equal length together, every other tree alone: (how many, the trees)."""
    run: list[Tree] = []
    for tree in layout.trees:
        plain = len(tree.branches) == 1
        if run and not (plain and len(run[0].branches) == 1 and tree.length == run[0].length):
            yield len(run), run
            run = []
        run.append(tree)
    if run:
        yield len(run), run


def _run(count: int, tree: Tree, q: Tensor, k: Tensor, v: Tensor, scaling: float | None, dropout: float,
         window: int | None) -> Tensor:
    """The output [1, count·L, H, D] of `count` plain trees of one length, or of one tree with branches."""
    length = tree.length
    if len(tree.branches) == 1:
        def side_by_side(x: Tensor) -> Tensor:  # [1, H, count·L, D] → [count, H, L, D], a view
            return x[0].unflatten(1, (count, length)).transpose(0, 1)
        out = _attend(side_by_side(q), side_by_side(k), side_by_side(v), 0, scaling, dropout, window)
        return out.transpose(1, 2).reshape(1, count * length, q.shape[1], v.shape[3])
    sizes = [tree.stem + tree.branches[0], *tree.branches[1:]]  # the stem rides with the first branch
    parts = []
    stem_k, stem_v = k[:, :, :tree.stem], v[:, :, :tree.stem]
    for number, (q_part, k_part, v_part) in enumerate(zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2))):
        if number and tree.stem:
            k_part, v_part = torch.cat([stem_k, k_part], 2), torch.cat([stem_v, v_part], 2)
        if q_part.shape[2]:
            parts.append(_attend(q_part, k_part, v_part, tree.stem if number else 0, scaling, dropout, window))
    return torch.cat(parts, 2).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, past: int, scaling: float | None, dropout: float,
            window: int | None) -> Tensor:
    """Causal attention of queries that stand `past` positions after the first key."""
    grouped = q.shape[1] != k.shape[1]
    length = k.shape[2]
    if past == 0 and (window is None or length <= window):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout,
                                              enable_gqa=grouped)
    query_at = torch.arange(past, past + q.shape[2], device=q.device)[:, None]
    key_at = torch.arange(length, device=q.device)[None, :]
    mask = key_at <= query_at
    if window is not None:
        mask &= query_at - key_at < window
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, dropout_p=dropout, enable_gqa=grouped)


AttentionInterface.register(NAME, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *args, **kwargs: None)
