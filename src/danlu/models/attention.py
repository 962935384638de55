"""Attention over packed trees: a token sees its own document's stem and its own branch, never anything else.

transformers lets a function be registered by name as a model's attention and hands it every extra keyword that the base
model is called with. So no model code is changed: `model.model(input_ids=…, position_ids=…, layout=layout)` arrives here
with the batch's layout. Without a layout the function raises, because a mask-less call would silently mix documents.

Sequences of similar length are laid side by side, filled up at their ends, and attended to in one causal call: the filling
comes after every real token, so no real query sees it and its gradient is zero. A plain document is one sequence; a short
tree with several branches is one for each, [stem, branch], where the stem's own attention is computed once too often but in
few calls. A long tree is attended to branch by branch under a mask, its stem once. What a model asks for beyond that
(logit soft caps, sinks) raises `UnsupportedAttention`, and the loader falls back to padded rows.

Legend: H heads, T positions, L positions of one tree, D head width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from danlu.core.errors import DanluError
from danlu.data.batch import Layout, Tree

NAME = "danlu"
ALIKE = "danlu_alike"
QUERIES = 4  # of them at a time, a CPU's attention treats all rows alike
FILL = 0.6  # a sequence this much shorter than a group's longest begins a group of its own
SHORT = 256  # tokens of [stem, longest branch] up to which a tree is taken apart into sequences


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
    if "packed" not in layout.plans:
        layout.plans["packed"] = _plan(layout, query.device)
    plan = layout.plans["packed"]
    q_THD, k_THD, v_THD = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    outputs = []
    for places, count in plan.groups:
        def side_by_side(x_THD: Tensor, places: Tensor = places, count: int = count) -> Tensor:  # → [count, H, L, D]
            return x_THD.index_select(0, places).unflatten(0, (count, -1)).transpose(1, 2)
        out = _attend(side_by_side(q_THD), side_by_side(k_THD), side_by_side(v_THD), 0, scaling, dropout, sliding_window)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    for tree in plan.trees:
        part = slice(tree.start, tree.start + tree.length)
        outputs.append(_tree(tree, query[:, :, part], key[:, :, part], value[:, :, part], scaling, dropout,
                             sliding_window))
    if len(outputs) == 1 and plan.order is None:
        return outputs[0][None], None
    joined = torch.cat(outputs)
    return (joined if plan.order is None else joined.index_select(0, plan.order))[None], None


@dataclass(frozen=True, slots=True)
class _Plan:
    """How a row is attended to: groups of sequences (the place of each position, how many sequences), long trees with
    several branches, and where each of the row's positions stands in the outputs laid end to end (None: in place)."""

    groups: list[tuple[Tensor, int]]
    trees: list[Tree]
    order: Tensor | None


@dataclass(frozen=True, slots=True)
class _Sequence:
    """A causal sequence: where its positions stand in the row, and from which of them on its outputs are used."""

    places: Tensor
    first: int

    @classmethod
    def of(cls, tree: Tree) -> "list[_Sequence]":
        """The sequences [stem, branch] of a tree; the stem's outputs are taken from the first of them."""
        stem, found, start = torch.arange(tree.start, tree.start + tree.stem), [], tree.start + tree.stem
        for number, length in enumerate(tree.branches):
            places = torch.cat([stem, torch.arange(start, start + length)])
            if len(places) and (length or not number):
                found.append(cls(places, tree.stem if number else 0))
            start += length
        return found


def _plan(layout: Layout, device: torch.device) -> _Plan:
    long = [tree for tree in layout.trees if len(tree.branches) > 1 and tree.stem + max(tree.branches) > SHORT]
    sequences = [sequence for tree in layout.trees if tree not in long for sequence in _Sequence.of(tree)]
    groups: list[list[_Sequence]] = []
    for sequence in sorted(sequences, key=lambda sequence: -len(sequence.places)):
        if not groups or len(sequence.places) < FILL * len(groups[-1][0].places):
            groups.append([])
        groups[-1].append(sequence)
    order = torch.empty(len(layout.documents_T), dtype=torch.long)
    placed, done = [], 0
    for group in groups:
        longest = len(group[0].places)
        rows = torch.empty(len(group), longest, dtype=torch.long)
        for row, sequence in enumerate(group):
            length, begin = len(sequence.places), done + row * longest
            rows[row, :length] = sequence.places
            rows[row, length:] = sequence.places[-1]  # after a sequence's end anything will do: its last token again
            order[sequence.places[sequence.first:]] = torch.arange(begin + sequence.first, begin + length)
        placed.append((rows.flatten().to(device), len(group)))
        done += longest * len(group)
    for tree in long:
        order[tree.start:tree.start + tree.length] = torch.arange(done, done + tree.length)
        done += tree.length
    in_place = done == len(order) and bool(torch.equal(order, torch.arange(len(order))))
    return _Plan(placed, long, None if in_place else order.to(device))


def _tree(tree: Tree, q: Tensor, k: Tensor, v: Tensor, scaling: float | None, dropout: float, window: int | None
          ) -> Tensor:
    """The output [L, H, D] of one long tree with several branches."""
    sizes = [tree.stem + tree.branches[0], *tree.branches[1:]]  # the stem rides with the first branch
    parts = []
    stem_k, stem_v = k[:, :, :tree.stem], v[:, :, :tree.stem]
    for number, (q_part, k_part, v_part) in enumerate(zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2))):
        if number and tree.stem:
            k_part, v_part = torch.cat([stem_k, k_part], 2), torch.cat([stem_v, v_part], 2)
        if q_part.shape[2]:
            parts.append(_attend(q_part, k_part, v_part, tree.stem if number else 0, scaling, dropout, window))
    return torch.cat(parts, 2)[0].transpose(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, past: int, scaling: float | None, dropout: float,
            window: int | None) -> Tensor:
    """Causal attention of queries that stand `past` positions after the first key."""
    half = torch.is_autocast_enabled("cpu") or v.dtype in (torch.bfloat16, torch.float16)
    if q.device.type == "cpu" and half and torch.is_grad_enabled() and k.shape[2] <= SHORT:
        with torch.autocast("cpu", enabled=False):  # torch's backward pass takes over twice as long in half precision there
            return _attend(q.float(), k.float(), v.float(), past, scaling, dropout, window).to(v.dtype)
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


def alike_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                    is_causal: bool | None = None, **options: Any) -> tuple[Tensor, None]:
    """transformers' attention, the same to the last bit in whichever row of a batch a sequence stands on a CPU.

    There each thread works on some rows in a buffer of its own, behind those of the threads before it, and the matrix
    kernels' sums depend on how a buffer is aligned. A buffer's size is a multiple of the number of queries, so the single
    one that there is for every new token is asked several times, and answers once; the width of a prompt is a multiple.
    Shapes as `packed_attention` has them, with any number of rows.
    """
    length = query.shape[2]
    if length == 1:
        query, is_causal = query.repeat(1, 1, QUERIES, 1), False  # it sees all keys that the mask leaves
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=is_causal, **options)
    return out[:, :length], None


def leave_packed(lm: PreTrainedModel) -> None:
    """Back to transformers' own attention, which takes masks instead of layouts; other kinds are left alone."""
    if lm.config._attn_implementation == NAME:
        lm.set_attn_implementation("sdpa" if lm._supports_sdpa else "eager")


AttentionInterface.register(NAME, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *args, **kwargs: None)
AttentionInterface.register(ALIKE, alike_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ALIKE, sdpa_mask)
