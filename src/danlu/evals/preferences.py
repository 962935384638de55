"""Which answer of a pair is preferred: by a judge's scores, or by a model's own log-probabilities.

What a model prefers is implicit: it prefers the answer that it gives the higher log-probability, summed over all of the
answer's tokens and the one that ends it. That is what direct preference optimisation changes, so it can be read off any
model, whether it was trained so or not.

    pairs = encode_pairs(loaded.tokenizer, records, limit=512)
    found = verdicts(pairs, model_values(loaded.root, pairs, device, 8192))
    rows = preference_rows("chat", "model", records, found)
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from danlu.core.errors import DataError
from danlu.core.examples import Example
from danlu.core.ledger import Ledger
from danlu.core.records import Preference
from danlu.evals.figures import ALL_PAIRS, PreferenceRow
from danlu.evals.statistics import mean_interval, wilson_interval
from danlu.models.reading import read_each
from danlu.models.root import Root, ScoreRoot
from danlu.tokens.chat import Chat
from danlu.tokens.encode import Encoder, check_chat
from danlu.tokens.pairs import PairEncoder

Values = Mapping[int, tuple[float, float]]  # of chosen and rejected, by the pair's place
Verdicts = Mapping[int, float]  # 1 where chosen is preferred, 0 where it is not, ½ for a tie; by the pair's place


def encode_pairs(tokenizer: Any, records: Sequence[Preference], *, limit: int, stop_ids: Collection[int] = ()
                 ) -> dict[int, Example]:
    """The pairs as Examples by their place among the records; without those that the template refuses, and those of
    more than `limit` tokens.

    stop_ids  further ids that end a turn, beside the tokenizer's own

    Raises ConfigError where the tokenizer has no chat template that shows where an answer ends.
    """
    encoder = Encoder(tokenizer, limit)
    encoder.chat = Chat(tokenizer, stop_ids, codec=encoder.codec)
    check_chat(encoder.chat, tokenizer.bos_token_id)
    numbered = (replace(record, id=str(place), ref_logps=None) for place, record in enumerate(records))
    return {int(example.id): example for example in PairEncoder(encoder, "drop").preferences(numbered, Ledger())}


def model_values(root: Root, pairs: Mapping[int, Example], device: torch.device, micro_batch_tokens: int
                 ) -> dict[int, tuple[float, float]]:
    """The log-probabilities of chosen and rejected in nats, each summed over the answer's tokens and its end of turn."""
    rows = read_each(root, list(pairs.values()), "logprobs_S", device, micro_batch_tokens)
    found = {}
    for (place, example), logprobs in zip(pairs.items(), rows, strict=True):
        num_chosen = np.count_nonzero(example.branches[0].weights)
        found[place] = (float(logprobs[:num_chosen].sum()), float(logprobs[num_chosen:].sum()))
    return found


def judge_values(root: ScoreRoot, pairs: Mapping[int, Example], device: torch.device, micro_batch_tokens: int
                 ) -> dict[int, tuple[float, float]]:
    """The judge's scores of chosen and rejected."""
    rows = read_each(root, list(pairs.values()), "scores_N", device, micro_batch_tokens)
    return {place: (float(scores[0]), float(scores[1])) for place, scores in zip(pairs, rows, strict=True)}


def verdicts(pairs: Mapping[int, Example], values: Values) -> dict[int, float]:
    """Who is preferred in each pair. Raises DataError where a value is not finite: it would decide at random."""
    found = {}
    for place, (chosen, rejected) in values.items():
        if not (math.isfinite(chosen) and math.isfinite(rejected)):
            raise DataError(f"the numbers that it gives to pair {place} are not finite")
        one, other = (branch.tokens for branch in pairs[place].branches)
        # Equal answers are a tie, whatever rounding makes of them.
        tie = chosen == rejected or np.array_equal(one, other)
        found[place] = 0.5 if tie else float(chosen > rejected)
    return found


def preference_rows(system: str, kind: str, records: Sequence[Preference], found: Verdicts, values: Values
                    ) -> list[PreferenceRow]:
    """The share of pairs of which the chosen answer is preferred, and the mean margin, by category and, for more than one,
    over all.

    A single category is called `all pairs`, for there it is all of them.
    """
    groups: dict[str, list[int]] = {}
    for place in sorted(found):
        groups.setdefault(records[place].category, []).append(place)
    groups = dict(sorted(groups.items())) if len(groups) > 1 else {}
    rows = []
    for category, places in (groups | {ALL_PAIRS: sorted(found)}).items():
        right = sum(found[place] for place in places)
        margins = [values[place][0] - values[place][1] for place in places]
        low, high = wilson_interval(right, len(places)) or (0.0, 1.0)
        rows.append(PreferenceRow(category, system, kind, right / max(1, len(places)), low, high, len(places),
                                  sum(margins) / max(1, len(places)), *(mean_interval(margins) or (None, None))))
    return rows
