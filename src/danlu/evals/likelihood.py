"""Multiple choice and clozes by likelihood: which continuation is the most probable one, and whether it is right.

An item is one Example: what all its choices share is the stem and is computed once, each choice is a branch. A choice's
score is Σ log p over its tokens given the context: acc compares the sums, acc_norm the sums divided by the answers' UTF-8
bytes. A continuation's tokens are those of the whole text behind as many as the context alone has, as lm-evaluation-harness
counts them. A text begins as documents do in training (bos, or eos).

    items = read_items("arc_easy.jsonl", base, Ledger())
    found = score_items(loaded.root, loaded.tokenizer, items, shots=[], limit=2048)
    row = choice_row("arc_easy", "base", 0, items, found)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from danlu.core.errors import DataError
from danlu.core.examples import Branch, Example
from danlu.data.pack import micro_batches
from danlu.evals.choices import BETWEEN, Item
from danlu.evals.figures import ChoiceRow
from danlu.evals.perplexity import start_token
from danlu.evals.statistics import mean_interval, wilson_interval
from danlu.models.generate import evaluating
from danlu.models.root import Root
from danlu.tokens.codec import Codec


@dataclass(frozen=True, slots=True)
class ItemScore:
    """What a model says of one item.

    sums        Σ log p of each choice's continuation in nats
    right       the right one has the highest sum; of a cloze: every token of it is the most probable one
    norm_right  the right one has the highest sum per byte; None where the continuations do not differ
    cut         tokens that were left out at the beginning, because the model has no room for them
    """

    sums: tuple[float, ...]
    right: bool
    norm_right: bool | None
    cut: int = 0


def examples_of(item: Item, shots: Sequence[Item], num_shots: int) -> list[Item]:
    """The first examples of a question's subject; of all, if it has none."""
    return ([shot for shot in shots if shot.subject == item.subject] or list(shots))[:num_shots]


def prefix_of(item: Item, shots: Sequence[Item], num_shots: int, description: str = "") -> str:
    """What stands before a question: the description, and its examples.

    `{subject}` in the description is the item's subject in words.
    """
    parts = [description.replace("{subject}", item.subject.replace("_", " "))] if description else []
    return "".join(part + BETWEEN for part in [*parts, *(shot.solved for shot in examples_of(item, shots, num_shots))])


def encode_item(codec: Codec, item: Item, prefix: str, begin: int | None, limit: int | None) -> tuple[Example, int] | None:
    """The item as an Example, and how many tokens were cut off at its beginning; None where it cannot be asked.

    That is where a continuation alone is longer than the model's positions, and where nothing stands before it.
    """
    start = [] if begin is None else [begin]
    rows, scored = [], []
    for place in range(item.num_choices):
        context, continuation = item.pair(place)
        [before, whole] = codec.encode_plain([prefix + context, prefix + context + continuation])
        rows.append([*start, *whole.tolist()])
        scored.append(len(start) + min(len(before), len(whole) - 1))
    if min(scored) < 1:
        return None
    shared = min(scored)
    for row in rows[1:]:
        shared = next((at for at in range(shared) if row[at] != rows[0][at]), shared)
    longest = max(map(len, rows))
    cut = 0 if limit is None else max(0, longest - limit)
    if cut and cut + len(start) > min(shared, min(scored) - 1):
        return None
    branches = []
    for row, first in zip(rows, scored, strict=True):
        weights = np.zeros(len(row) - shared, np.float32)
        weights[first - shared:] = 1
        branches.append(Branch(np.array(row[shared:]), weights))
    stem = [*start, *rows[0][len(start) + cut:shared]] if cut else rows[0][:shared]
    return Example(np.array(stem), tuple(branches)), cut


def score_items(root: Root, tokenizer: Any, items: Sequence[Item], *, shots: Sequence[Item] = (), num_shots: int = 0,
                description: str = "", limit: int | None = None, micro_batch_tokens: int = 8192,
                progress: Callable[[int], None] = lambda done: None) -> dict[int, ItemScore]:
    """A score for each item that can be asked, by its place.

    limit  the most tokens that the model reads; longer questions lose their beginning, as lm-evaluation-harness does it

    Raises DataError where a model's numbers are not finite.
    """
    codec, begin = Codec(tokenizer), start_token(tokenizer)
    encoded = {}
    for place, item in enumerate(items):
        found = encode_item(codec, item, prefix_of(item, shots, num_shots, description), begin, limit)
        if found is not None:
            encoded[place] = found
    device = next(root.parameters()).device
    clozes = any(item.cloze for item in items)  # they need the most probable tokens
    waiting = iter(encoded.items())
    scores: dict[int, ItemScore] = {}
    with torch.no_grad(), evaluating(root):
        for group in micro_batches([example for example, _ in encoded.values()], micro_batch_tokens, padded=not root.packs):
            batch = root.batch(group).to(device)
            reading = root(batch, statistics=clozes)
            logprobs_S = reading.logprobs_S.double()
            hit_S = torch.zeros_like(logprobs_S) if reading.argmax_S is None else reading.argmax_S == batch.site_target_S
            values_S2 = torch.stack([logprobs_S, hit_S.double()], dim=1).cpu().numpy()
            ends = np.cumsum([np.count_nonzero(branch.weights) for example in group for branch in example.branches])
            rows = iter(np.split(values_S2, ends[:-1]))
            for example in group:
                place, (_, cut) = next(waiting)
                scores[place] = _item_score(items[place], [next(rows) for _ in example.branches], cut)
            progress(len(scores))
    return scores


def _item_score(item: Item, rows: Sequence[np.ndarray], cut: int) -> ItemScore:
    sums = [float(row[:, 0].sum()) for row in rows]
    if not all(map(math.isfinite, sums)):
        raise DataError("the model gives an answer no probability (its numbers are not finite)", where=item.id)
    if item.cloze:
        return ItemScore(tuple(sums), bool(rows[0][:, 1].all()), None, cut)
    norm_right = None
    if len(item.continuations) > 1:
        lengths = [len(text.strip().encode()) for text in item.continuations]
        norm_right = int(np.argmax(np.array(sums) / np.array(lengths))) == item.gold
    return ItemScore(tuple(sums), int(np.argmax(sums)) == item.gold, norm_right, cut)


def choice_row(benchmark: str, model: str, num_shots: int, items: Sequence[Item], found: Mapping[int, ItemScore],
               reference: Mapping[int, ItemScore] | None = None) -> ChoiceRow:
    """The shares over the items that were scored; with the reference's scores of the same items, the gain over it."""
    scores = [found[place] for place in sorted(found)]
    count = len(scores)
    asked = [items[place] for place in sorted(found)]
    right = [float(score.right) for score in scores]
    norm = [float(score.norm_right) for score in scores if score.norm_right is not None]
    low, high = wilson_interval(sum(right), count) or (0.0, 1.0)
    norm_low, norm_high = wilson_interval(sum(norm), len(norm)) or (None, None)
    clozes = [score.sums[0] for score, item in zip(scores, asked, strict=True) if item.cloze]
    chances = [1 / item.num_choices for item in asked if not item.cloze]
    gain = gain_low = gain_high = None
    if reference is not None:
        gains = [float(found[place].right) - float(reference[place].right) for place in sorted(found)]
        gain = sum(gains) / count
        gain_low, gain_high = mean_interval(gains) or (None, None)
    return ChoiceRow(
        benchmark, model, num_shots, sum(right) / count, low, high, sum(norm) / len(norm) if norm else None, norm_low,
        norm_high, count, chance=sum(chances) / len(chances) if chances else None,
        perplexity=math.exp(min(-sum(clozes) / len(clozes), 700.0)) if clozes else None, gain=gain, gain_low=gain_low,
        gain_high=gain_high)
