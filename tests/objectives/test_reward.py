"""The comparison loss of reward models: worked numbers, NumPy's formula, and no trace of how a step is cut or padded."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import VOCAB, make_root

from danlu.core.examples import Branch, Example
from danlu.data.batch import Batch
from danlu.objectives.reward import Pairwise

SCORES = st.lists(st.tuples(*[st.floats(-60, 60)] * 2), min_size=1, max_size=8)


def pairs(count: int, seed: int = 0) -> list[Example]:
    """Prompts with a chosen and a rejected answer, all of different lengths, in two categories."""
    rng = np.random.default_rng(seed)
    return [Example(rng.integers(0, VOCAB, rng.integers(1, 9)),
                    tuple(Branch(rng.integers(0, VOCAB, rng.integers(1, 9))) for _ in range(2)), "s", "ab"[number % 2])
            for number in range(count)]


def batch_of(scores: list[tuple[float, float]]) -> tuple[SimpleNamespace, Batch]:
    """Any batch with as many pairs, and a reading with these scores."""
    flat = torch.tensor(scores, dtype=torch.float64).flatten().requires_grad_()
    return SimpleNamespace(scores_N=flat), Batch.pack(pairs(len(scores)))


@pytest.mark.parametrize(("scores", "center", "expected"), [
    ([(1.0, 0.0)], 0.0, 0.313262),
    ([(2.5, 2.5)], 0.0, 0.693147),
    ([(1.0, 0.5), (0.0, 0.0)], 0.01, 0.474077 + 0.0225 + 0.693147),
])
def test_worked_numbers(scores: list[tuple[float, float]], center: float, expected: float) -> None:
    reading, batch = batch_of(scores)
    assert Pairwise(center)(reading, batch).total.item() == pytest.approx(expected, abs=1e-6)


@given(SCORES, st.sampled_from([0.0, 0.01, 1.0]))
@settings(deadline=None, max_examples=50)
def test_equals_numpys_formula(scores: list[tuple[float, float]], center: float) -> None:
    reading, batch = batch_of(scores)
    objective = Pairwise(center)
    loss = objective(reading, batch)
    chosen, rejected = np.asarray(scores, np.float64).T
    losses = np.log1p(np.exp(rejected - chosen)) + center * (chosen + rejected) ** 2
    accuracy = (chosen > rejected) + 0.5 * (chosen == rejected)
    expected = {"accuracy": accuracy.sum(), "margin": (chosen - rejected).sum(), "rewards/chosen": chosen.sum(),
                "rewards/rejected": rejected.sum()}
    for number, category in enumerate(batch.categories):
        own = slice(number, None, 2)
        expected |= {f"loss/{category}": losses[own].sum(), f"count/loss/{category}": len(losses[own]),
                     f"accuracy/{category}": accuracy[own].sum(), f"count/accuracy/{category}": len(losses[own])}
    assert objective.count(batch) == len(scores) and objective.coefficients(batch) is None
    assert loss.total.item() == pytest.approx(losses.sum(), rel=1e-12, abs=1e-12)
    assert loss.metrics.keys() == expected.keys()
    for name, value in loss.metrics.items():
        assert value.dtype == torch.float64 and not value.requires_grad
        assert float(value) == pytest.approx(expected[name], rel=1e-12, abs=1e-9), name


@given(SCORES)
@settings(deadline=None, max_examples=30)
def test_gradient_equals_the_formulas(scores: list[tuple[float, float]]) -> None:
    """∂/∂r_chosen of −log σ(d) is −σ(−d), of the rejected its opposite; c·s² adds 2·c·s to both."""
    reading, batch = batch_of(scores)
    Pairwise(0.5)(reading, batch).total.backward()
    chosen, rejected = np.asarray(scores, np.float64).T
    slope = 1 / (1 + np.exp(chosen - rejected))
    expected = np.stack([-slope + chosen + rejected, slope + chosen + rejected], 1).ravel()
    assert reading.scores_N.grad.numpy() == pytest.approx(expected, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("margin", [1e4, -1e4, 1e30, -1e30])
def test_extreme_scores_stay_finite(margin: float) -> None:
    scores = torch.tensor([margin, 0.0], requires_grad=True)
    loss = Pairwise()(SimpleNamespace(scores_N=scores), Batch.pack(pairs(1))).total
    loss.backward()
    assert loss.item() == max(0.0, -scores[0].item())
    assert scores.grad.tolist() == ([0.0, 0.0] if margin > 0 else [-1.0, 1.0])


def test_a_tie_counts_one_half() -> None:
    reading, batch = batch_of([(0.1, 0.1), (1.0, 0.0), (0.0, 1.0), (2.0, 1.0)])
    metrics = Pairwise()(reading, batch).metrics
    assert float(metrics["accuracy"]) == 2.5
    assert float(metrics["accuracy/a"]) == 0.5 and float(metrics["accuracy/b"]) == 2.0


def test_neither_cutting_nor_padding_changes_a_sum() -> None:
    """A linear head on the last hidden state of each branch: packed, padded and pair by pair."""
    root, examples = make_root("llama"), pairs(7)
    plain = make_root("llama", probe=False)
    head = torch.randn(root.lm.config.hidden_size, dtype=torch.float64)

    def sums(batches: list[Batch], root: torch.nn.Module) -> dict[str, float]:
        found: dict[str, float] = {}
        for batch in batches:
            scores_N = root.hidden(batch)[batch.end_index_N] @ head
            loss = Pairwise(0.1)(SimpleNamespace(scores_N=scores_N), batch)
            for name, value in {"total": loss.total, **loss.metrics}.items():
                found[name] = found.get(name, 0.0) + value.item()
            found["count"] = found.get("count", 0.0) + Pairwise().count(batch)
        return found

    packed = sums([Batch.pack(examples)], root)
    assert packed["count"] == 7 and 0 < packed["accuracy"] < 7
    assert sums([Batch.pad(examples)], plain) == pytest.approx(packed, rel=1e-7)
    assert sums([Batch.pad(examples[:2]), Batch.pad(examples[2:])], plain) == pytest.approx(packed, rel=1e-7)
    assert sums([Batch.pack([example]) for example in examples], root) == pytest.approx(packed, rel=1e-7)


def test_nothing_to_learn_still_carries_the_graph() -> None:
    batch = Batch.pack(pairs(3)).without_targets()
    scores = torch.zeros(6, requires_grad=True)
    loss = Pairwise(0.1)(SimpleNamespace(scores_N=scores[:0]), batch)
    loss.total.backward()
    assert loss.total.item() == 0 and Pairwise().count(batch) == 0 and scores.grad.tolist() == [0.0] * 6
    assert all(math.isfinite(float(value)) for value in loss.metrics.values())


@pytest.mark.parametrize("branches", [(1,), (3,), (1, 3)])
def test_other_than_two_branches_are_refused(branches: tuple[int, ...]) -> None:
    examples = [Example([1], tuple(Branch([2, 3]) for _ in range(count))) for count in branches]
    with pytest.raises(AssertionError, match="chosen and a rejected"):
        Pairwise().count(Batch.pack(examples))
