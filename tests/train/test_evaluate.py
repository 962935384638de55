"""Evaluation: the mean over learned tokens, whatever the micro-batches, also where memory runs out."""

import numpy as np
import pytest
import torch
from small import VOCAB, ragged_examples, tiny_root

from danlu.core.errors import DataError
from danlu.data.store import ExampleStore, write_examples
from danlu.objectives.language import Language
from danlu.train.evaluate import held_out_loss
from danlu.train.parallel import World


@pytest.fixture()
def store(tmp_path) -> ExampleStore:
    write_examples(tmp_path, ragged_examples(9), VOCAB)
    return ExampleStore(tmp_path)


def evaluate(root, store: ExampleStore, tokens: int) -> dict[str, float]:
    with torch.no_grad():
        return dict(held_out_loss(store, Language(), World(), tokens)(root.eval()))


def test_is_the_mean_over_learned_tokens_of_each_example_alone(store) -> None:
    root = tiny_root()
    total = weight = 0.0
    for example in store:
        with torch.no_grad():
            batch = root.eval().batch([example])
            total -= float((batch.site_weight_S * root(batch).logprobs_S).sum())
        weight += float(batch.site_weight_S.sum())
    assert evaluate(root, store, 30)["eval_loss"] == pytest.approx(total / weight, rel=1e-6)


def test_does_not_depend_on_micro_batches(store) -> None:
    root = tiny_root()
    found = [evaluate(root, store, tokens) for tokens in (1, 30, 10_000)]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)


class Exhausted(torch.nn.Module):
    """A root that runs out of memory on more than so many tokens."""

    def __init__(self, root, tokens: int) -> None:
        super().__init__()
        self.root, self.tokens, self.refused, self.packs = root, tokens, 0, root.packs

    def batch(self, examples: list):
        return self.root.batch(examples)

    def forward(self, batch, coefficients_S=None):
        if batch.num_tokens > self.tokens:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return self.root(batch, coefficients_S)


def test_a_micro_batch_that_does_not_fit_is_taken_in_halves(store) -> None:
    root = tiny_root()
    small = Exhausted(root, int(max(store.lengths)))
    assert evaluate(small, store, 10_000) == pytest.approx(evaluate(root, store, 10_000), rel=1e-6)
    assert small.refused > 1


def test_an_example_that_does_not_fit_alone_is_named(store) -> None:
    longest = int(np.argmax(store.lengths))
    with pytest.raises(DataError, match="memory ran out while evaluating") as caught:
        evaluate(Exhausted(tiny_root(), int(store.lengths[longest]) - 1), store, 10_000)
    assert caught.value.hint and caught.value.where == (store.id(longest) or None)
