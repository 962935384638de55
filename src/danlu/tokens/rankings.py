"""Preferences and rankings to Examples for a reward model: one prompt, and its answers from the best to the worst.

A ranking of K answers is one stem and K branches, so the prompt is computed once for all of them. Where the data say by how
much a chosen answer is better, that stands in a column: on the answer's first learned token, 0 on all others.

    encoder = RankingEncoder(Encoder(tokenizer, cutoff_len=512), overlong="turns", margins=True)
    for example in encoder.preferences(records, ledger): …

Stations of the ledger are those of `PairEncoder`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from danlu.core.errors import DataError
from danlu.core.examples import Branch, Example
from danlu.core.ledger import Ledger
from danlu.core.records import Preference
from danlu.tokens.encode import Encoder
from danlu.tokens.pairs import Answered, Pair, PairEncoder, PairOverlong

MARGINS = "margins"


class RankingEncoder(PairEncoder):
    """Turns preferences and rankings into Examples for a reward model.

    margins  give every token a column `margins`; a pair whose margin is not known has 0, which the ledger says
    """

    def __init__(self, encoder: Encoder, overlong: PairOverlong = "turns", margins: bool = False) -> None:
        super().__init__(encoder, overlong)
        self.margins = margins
        self.num_known = 0

    def preferences(self, records: Iterable[Answered], ledger: Ledger) -> Iterator[Example]:
        """As `PairEncoder` does. Raises DataError where margins are wanted and no pair tells one."""
        found = None
        for found in super().preferences(records, ledger):
            yield found
        if self.margins and found is not None and not self.num_known:
            raise DataError("no pair of the data says by how much its chosen answer is better",
                            hint="Leave out margins, or give every row a number “margin”.")

    def _example(self, record: Answered, pair: Pair, whole: bool, ledger: Ledger) -> Example:
        example = super()._example(record, pair, whole, ledger)
        if not self.margins:
            return example
        margin = record.margin if isinstance(record, Preference) else None
        if margin is None:
            ledger.station("learn").note("pairs without a margin in the data, which take part with 0")
        self.num_known += margin is not None
        branches = []
        for place, branch in enumerate(example.branches):
            column = np.zeros(len(branch.tokens), np.float32)
            if place == 0 and margin is not None:
                column[np.flatnonzero(branch.weights)[0]] = margin
            branches.append(Branch(branch.tokens, branch.weights, {**branch.columns, MARGINS: column}))
        return replace(example, branches=tuple(branches))
