"""An Example is a stem and its branches: the one shape of training data for every objective.

The stem is the tokens that every branch shares (a prompt); a branch is one continuation with a weight per token
(0 = context, 1 = learn it). A document or a dialogue is an empty stem and one branch, a preference one stem and two
branches, a group of samples one stem and many. The parts can never be torn apart, and the stem is computed once.

    Example(stem=[11, 12, 13], branches=(Branch([21, 2]), Branch([31, 32, 2])))
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

ORIGINAL = "original"  # a column: the token that a model is to say at this very place, where another stands (masked text)
SEGMENT = "segment"  # a column: which of two texts a token is of, for encoders that are told (`token_type_ids`)


def _int32(tokens: object) -> np.ndarray:
    return np.ascontiguousarray(tokens, dtype=np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """One continuation of the stem.

    tokens   int32 [n]
    weights  float32 [n]; how much each token's log-probability counts. Default: 1 for every token.
    columns  float32 [n] each, by name: what other models said of these tokens (`ref_logprobs`, `advantages`, …)
    """

    tokens: np.ndarray
    weights: np.ndarray = None  # type: ignore[assignment]  # never seen: filled below
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", _int32(self.tokens))
        weights = np.ones(len(self.tokens), np.float32) if self.weights is None else self.weights
        object.__setattr__(self, "weights", np.ascontiguousarray(weights, dtype=np.float32))
        columns = {name: np.ascontiguousarray(column, dtype=np.float32) for name, column in self.columns.items()}
        object.__setattr__(self, "columns", columns)
        assert self.weights.shape == self.tokens.shape, "one weight per token"
        assert all(column.shape == self.tokens.shape for column in columns.values()), "one value per token and column"


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A stem, its branches, and where they came from."""

    stem: np.ndarray
    branches: tuple[Branch, ...]
    source: str = ""
    category: str = ""
    id: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stem", _int32(self.stem))
        object.__setattr__(self, "branches", tuple(self.branches))
        assert self.branches, "an example has at least one branch"

    @property
    def num_tokens(self) -> int:
        """Tokens that a packed forward pass computes: the stem once and every branch."""
        return len(self.stem) + sum(len(branch.tokens) for branch in self.branches)

    @property
    def num_targets(self) -> int:
        """Tokens with a weight that something predicts: the very first token of an example has no predecessor, but where
        an original stands beside each token, every one is predicted at its own place."""
        total = self.num_weighted
        if len(self.stem) == 0:
            total -= sum(1 for branch in self.branches
                         if len(branch.weights) and branch.weights[0] != 0 and ORIGINAL not in branch.columns)
        return total

    @property
    def num_weighted(self) -> int:
        """Tokens with a weight."""
        return sum(int(np.count_nonzero(branch.weights)) for branch in self.branches)


Noise = Callable[[Example, np.random.Generator], Example]  # a corruption: the generator alone decides what it does
