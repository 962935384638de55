"""The promises about pairs: packed, padded, alone, split or with stems apart, loss and gradient are the same."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import CONFIGS, VOCAB, exact_norms, make_root
from transformers import AutoModelForSequenceClassification

from danlu.core.examples import Branch, Example
from danlu.data.batch import Batch
from danlu.data.pack import micro_batches
from danlu.models.attention import leave_packed
from danlu.models.load import why_not_packed
from danlu.models.root import ScoreRoot
from danlu.objectives.pair_losses import Terms
from danlu.objectives.preference import DPO
from danlu.objectives.reward import Pairwise
from danlu.rollout.scoring import REFERENCE


def make_scorer(kind: str) -> ScoreRoot:
    """A random scorer in float64 whose attention and head matter."""
    torch.manual_seed(1)
    config = deepcopy(CONFIGS[kind])
    config.num_labels = 1
    lm = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    exact_norms(lm)
    root = ScoreRoot(lm.to(torch.float64))
    root.packs = why_not_packed(root) is None
    assert root.packs
    return root


# By name: the model and its objective.
CASES: dict[str, tuple[Any, Any]] = {
    "rm": (make_scorer("llama"), Pairwise(center_rewards_coefficient=0.1)),
    "rm-qwen3": (make_scorer("qwen3"), Pairwise()),
    "dpo": (make_root("llama"), DPO(Terms(0.3))),
    "dpo-qwen3": (make_root("qwen3"), DPO(rpo_alpha=0.5)),
}
Result = tuple[float, dict[str, torch.Tensor], dict[str, float]]


def random_pairs(seed: int, count: int) -> list[Example]:
    """Prompts with two answers each; some answers begin with tokens that are context only, as a cut stem leaves them."""
    rng = np.random.default_rng(seed)
    examples = []
    for number in range(count):
        branches = []
        for _ in range(2):
            length, unlearned = rng.integers(1, 12), rng.integers(0, 3) * (rng.random() < 0.3)
            weights = np.r_[np.zeros(unlearned), np.ones(length)]
            column = np.where(weights > 0, -rng.gamma(2.0, 2.0, len(weights)), 0.0)
            branches.append(Branch(rng.integers(0, VOCAB, len(weights)), weights, {REFERENCE: column}))
        stem = rng.integers(0, VOCAB, rng.integers(1, 12))
        examples.append(Example(stem, branches, "source", f"kind{number % 2}", str(number)))
    return examples


def apart(example: Example) -> Example:
    """The same pair without a shared stem: two sequences that repeat it."""
    def whole(branch: Branch) -> Branch:
        before = np.zeros(len(example.stem))
        columns = {name: np.r_[before, column] for name, column in branch.columns.items()}
        return Branch(np.r_[example.stem, branch.tokens], np.r_[before, branch.weights], columns)

    return Example([], [whole(branch) for branch in example.branches], example.source, example.category, example.id)


def result(case: str, batches: list[Batch]) -> Result:
    """Loss, gradient and metrics of one step over these micro-batches, divided once."""
    root, objective = CASES[case]
    root.zero_grad()
    count, loss, metrics = sum(objective.count(batch) for batch in batches), 0.0, dict[str, float]()
    for batch in batches:
        found = objective(root(batch, coefficients_S=objective.coefficients(batch)), batch)
        (found.total / count).backward()
        loss += float(found.total.detach()) / count
        for name, value in found.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + float(value)
    return loss, {name: p.grad.clone() for name, p in root.named_parameters() if p.grad is not None}, metrics


def padded(case: str, examples: list[Example]) -> Result:
    """The same in padded rows, one for each answer, with transformers' own attention."""
    root, _ = CASES[case]
    leave_packed(root.lm)
    try:
        return result(case, [Batch.pad(examples)])
    finally:
        root.lm.set_attn_implementation("danlu")


def assert_same(left: Result, right: Result, tolerance: float = 1e-8) -> None:
    assert left[0] == pytest.approx(right[0], rel=tolerance)
    assert left[1].keys() == right[1].keys() and len(left[1]) > 5
    largest = max(float(gradient.abs().max()) for gradient in left[1].values())
    for name, gradient in left[1].items():
        assert float((gradient - right[1][name]).abs().max()) < tolerance * largest, name
    assert left[2] == pytest.approx(right[2], rel=tolerance, abs=tolerance)


FORMS: dict[str, Callable[[str, list[Example]], Result]] = {
    "each pair alone": lambda case, examples: result(case, [Batch.pack([example]) for example in examples]),
    "padded rows": padded,
    "stems apart": lambda case, examples: result(case, [Batch.pack([apart(example) for example in examples])]),
    "the other way round": lambda case, examples: result(case, [Batch.pack(examples[::-1])]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_pairs_packed_equal_pairs_in_any_other_form(case: str, form: str) -> None:
    examples = random_pairs(5, 8)
    assert_same(result(case, [Batch.pack(examples)]), FORMS[form](case, examples))


@pytest.mark.parametrize("case", CASES)
def test_one_micro_batch_of_eight_equals_eight_of_one(case: str) -> None:
    examples = random_pairs(6, 8)
    one, eight = micro_batches(examples, 10_000), micro_batches(examples, 1)
    assert [len(group) for group in one] == [8] and [len(group) for group in eight] == [1] * 8
    assert_same(*(result(case, [Batch.pack(group) for group in groups]) for groups in (one, eight)))


@pytest.mark.parametrize("case", ["rm", "dpo"])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 7), budget=st.integers(1, 80))
def test_any_split_into_micro_batches_gives_one_result(case: str, seed: int, count: int, budget: int) -> None:
    examples = random_pairs(seed, count)
    split = [Batch.pack(group) for group in micro_batches(examples, budget)]
    assert_same(result(case, split), result(case, [Batch.pack(examples)]))


@pytest.mark.parametrize("case", CASES)
def test_a_filler_adds_nothing_and_has_a_gradient_of_zeros(case: str) -> None:
    """What a rank computes when it has no pairs left, while the others go on."""
    root, objective = CASES[case]
    batch = Batch.pack(random_pairs(7, 2)).without_targets()
    root.zero_grad()
    found = objective(root(batch, coefficients_S=objective.coefficients(batch)), batch)
    found.total.backward()
    assert objective.count(batch) == 0 and float(found.total.detach()) == 0
    assert all(p.grad is not None and not p.grad.any() for p in root.parameters())


def test_a_column_that_is_torn_from_its_tokens_is_noticed() -> None:
    """A planted bug: the reference's column of one answer under the other."""
    examples = random_pairs(5, 8)
    batch = Batch.pack(examples)
    before = result("dpo", [batch])
    batch.columns[REFERENCE] = batch.columns[REFERENCE].roll(1)
    with pytest.raises(AssertionError):
        assert_same(before, result("dpo", [batch]))
