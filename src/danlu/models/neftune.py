"""NEFTune: noise on the embeddings while training (arXiv:2310.05914, algorithm 1), the same in packed and in padded rows.

    x′ = x + α/√(L·D)·ε,  ε uniform in (−1, 1) for each position and width

L is the number of tokens of the sequence that a token belongs to, never of the row that it is packed into: a document's own
length, its stem and its branch where there are several (for a stem that several branches share, with the longest of them).
Padding counts in no length. The noise comes from torch's global generator, which the training step seeds by (seed, step,
micro-batch) as it does for dropout, so that a resumed training draws the same. Evaluation has none.

    add_noise(root, 5.0)

Legend: B rows, T positions in a row, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from danlu.data.batch import Batch


class EmbeddingNoise:
    """A hook on the embeddings that adds noise while a batch is read in training mode."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self._lengths_BT: Tensor | None = None

    @contextmanager
    def reading(self, batch: Batch) -> Iterator[None]:
        """Lets the embeddings know which batch is read."""
        self._lengths_BT = lengths_of(batch)
        try:
            yield
        finally:
            self._lengths_BT = None

    def __call__(self, module: torch.nn.Module, _: Any, embedded_BTD: Tensor) -> Tensor:
        if not module.training or self._lengths_BT is None:
            return embedded_BTD
        noise_BTD = torch.empty_like(embedded_BTD).uniform_(-1.0, 1.0)
        scale_BT = self.alpha / (self._lengths_BT.to(embedded_BTD.dtype) * embedded_BTD.shape[-1]).sqrt()
        return embedded_BTD + noise_BTD * scale_BT[..., None]


def lengths_of(batch: Batch) -> Tensor:
    """For each position the number of tokens of its sequence, [B, T] int64; at least 1."""
    ids_BT = batch.input_ids_BT
    if batch.layout is None:
        assert batch.attention_mask_BT is not None, "a batch is packed or padded"
        return batch.attention_mask_BT.sum(1, keepdim=True).clamp(min=1).expand_as(ids_BT)
    lengths_T = torch.ones(ids_BT.shape[1], dtype=torch.long)
    for tree in batch.layout.trees:
        place = tree.start + tree.stem
        lengths_T[tree.start:place] = tree.stem + max(tree.branches, default=0)
        for branch in tree.branches:
            lengths_T[place:place + branch] = tree.stem + branch
            place += branch
    return lengths_T.to(ids_BT.device)[None]


def add_noise(root: Any, alpha: float | None) -> None:
    """Lets a root train with noise on its embeddings; None: without."""
    if alpha is not None:
        root.noise = EmbeddingNoise(alpha)
        root.lm.get_input_embeddings().register_forward_hook(root.noise)
