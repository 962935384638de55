"""Direct preference optimization: worked numbers, NumPy's formula, and no trace of how a step is cut or padded."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import VOCAB, make_root

from danlu.core.examples import Branch, Example
from danlu.data.batch import Batch
from danlu.objectives.pair_losses import Terms
from danlu.objectives.preference import DPO

OBJECTIVES: list[dict[str, Any]] = [
    {}, {"beta": 0.5}, {"rpo_alpha": 0.5}, {"beta": 2.0, "rpo_alpha": 1.5, "rpo_form": "scaled"}]


def dpo(beta: float = 0.1, **options: Any) -> DPO:
    return DPO(Terms(beta), **options)


def pairs(count: int, seed: int = 0) -> list[Example]:
    """Prompts with a chosen and a rejected answer, ragged and partly weighted 0, in two categories, with a reference."""
    rng = np.random.default_rng(seed)

    def answer() -> Branch:
        length = rng.integers(1, 9)
        return Branch(rng.integers(0, VOCAB, length), rng.choice([0.0, 1.0, 1.0, 0.5], length),
                      {"ref_logprobs": -rng.exponential(2.0, length)})

    return [Example(rng.integers(0, VOCAB, rng.integers(1, 9)), (answer(), answer()), "s", "ab"[number % 2])
            for number in range(count)]


def one_pair(chosen: list[float], rejected: list[float]) -> Batch:
    """A pair whose reference gives these log-probabilities."""
    return Batch.pack([Example([1], (Branch([2] * len(chosen), None, {"ref_logprobs": chosen}),
                                     Branch([3] * len(rejected), None, {"ref_logprobs": rejected})))])


def reading_of(values: Any) -> SimpleNamespace:
    return SimpleNamespace(logprobs_S=torch.as_tensor(values, dtype=torch.float64).clone().requires_grad_())


@pytest.mark.parametrize(("options", "expected"), [
    ({}, 0.693147), ({"beta": 5.0}, 0.693147),
    ({"rpo_alpha": 0.5}, 1.443147), ({"rpo_alpha": 0.5, "rpo_form": "scaled"}, 1.846574),
])
def test_worked_numbers_where_policy_and_reference_agree(options: dict[str, Any], expected: float) -> None:
    """Of the chosen answer's two tokens the mean log-probability is −1.5."""
    batch = one_pair([-1.0, -2.0], [-3.0, -0.25, -7.0])
    loss = dpo(**options)(reading_of(batch.columns["ref_logprobs"]), batch)
    assert loss.total.item() == pytest.approx(expected, abs=1e-6)
    assert float(loss.metrics["rewards/accuracies"]) == 0.5
    assert not any(float(loss.metrics[f"rewards/{name}"]) for name in ("margins", "chosen", "rejected"))
    assert float(loss.metrics["logps/chosen"]) == -3.0 and float(loss.metrics["logps/rejected"]) == -10.25


def test_a_worked_pair_that_has_moved_apart() -> None:
    """β = 0.1, log-ratios 2 + 1 and −4: rewards 0.3 and −0.4, loss −log σ(0.7) = 0.403186."""
    batch = one_pair([-3.0, -2.0], [-1.0])
    loss = DPO()(reading_of([-1.0, -1.0, -5.0]), batch)
    assert loss.total.item() == pytest.approx(0.403186, abs=1e-6)
    expected = {"rewards/chosen": 0.3, "rewards/rejected": -0.4, "rewards/margins": 0.7, "rewards/accuracies": 1.0}
    assert {name: float(loss.metrics[name]) for name in expected} == pytest.approx(expected)


def plain(batch: Batch, logprobs: np.ndarray, beta: float = 0.1, rpo_alpha: float | None = None,
          rpo_form: str = "additive") -> dict[str, float]:
    """The objective once more, site by site in NumPy."""
    pairs_seen = len(batch.branch_example_N) // 2
    logp, ref, weights = (np.zeros(2 * pairs_seen) for _ in range(3))
    for site, branch in enumerate(batch.site_branch_S.tolist()):
        weight = float(batch.site_weight_S[site])
        logp[branch] += weight * logprobs[site]
        ref[branch] += weight * float(batch.columns["ref_logprobs"][site])
        weights[branch] += weight
    found: dict[str, float] = {}

    def add(name: str, value: float) -> None:
        found[name] = found.get(name, 0.0) + value

    for pair in range(pairs_seen):
        c, r = 2 * pair, 2 * pair + 1
        chosen, rejected = beta * (logp[c] - ref[c]), beta * (logp[r] - ref[r])
        loss = float(np.logaddexp(0.0, rejected - chosen))
        if rpo_alpha is not None:
            nll = -logp[c] / weights[c] if weights[c] else 0.0
            loss = loss + rpo_alpha * nll if rpo_form == "additive" else rpo_alpha * loss + nll
        accuracy = 1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0
        category = batch.categories[int(batch.branch_category_N[c])]
        for name, value in {"total": loss, "rewards/accuracies": accuracy, "rewards/margins": chosen - rejected,
                            "rewards/chosen": chosen, "rewards/rejected": rejected, "logps/chosen": logp[c],
                            "logps/rejected": logp[r],
                            f"loss/{category}": loss, f"count/loss/{category}": 1.0,
                            f"rewards/accuracies/{category}": accuracy,
                            f"count/rewards/accuracies/{category}": 1.0}.items():
            add(name, value)
    return found


@given(st.integers(0, 2 ** 32 - 1), st.integers(1, 6), st.sampled_from(OBJECTIVES), st.floats(0.01, 50))
@settings(deadline=None, max_examples=60)
def test_equals_numpys_formula(seed: int, count: int, options: dict[str, Any], scale: float) -> None:
    batch = Batch.pack(pairs(count, seed))
    logprobs = -np.random.default_rng(seed).exponential(scale, batch.num_sites)
    objective = dpo(**options)
    loss = objective(reading_of(logprobs), batch)
    assert objective.count(batch) == count and objective.coefficients(batch) is None
    assert loss.total.requires_grad
    assert all(value.dtype == torch.float64 and not value.requires_grad for value in loss.metrics.values())
    found = {name: value.item() for name, value in {"total": loss.total, **loss.metrics}.items()}
    assert found == pytest.approx(plain(batch, logprobs, **options), rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("options", OBJECTIVES)
def test_gradient_equals_autograds_of_the_plain_formula(options: dict[str, Any]) -> None:
    batch = Batch.pack(pairs(5, seed=3))
    reading = reading_of(-np.random.default_rng(1).exponential(2.0, batch.num_sites))
    dpo(**options)(reading, batch).total.backward()
    logp_S = reading.logprobs_S.detach().clone().requires_grad_()
    beta, alpha = options.get("beta", 0.1), options.get("rpo_alpha")
    total = torch.zeros((), dtype=torch.float64)
    for pair in range(5):
        chosen, rejected = (batch.site_branch_S == 2 * pair, batch.site_branch_S == 2 * pair + 1)
        weight, ref = batch.site_weight_S.double(), batch.columns["ref_logprobs"].double()
        ratio = [(weight * (logp_S - ref))[own].sum() for own in (chosen, rejected)]
        loss = torch.log(1 + torch.exp(-beta * (ratio[0] - ratio[1])))
        if alpha is not None:
            mean = (weight * logp_S)[chosen].sum() / weight[chosen].sum()
            loss = alpha * loss - mean if options.get("rpo_form") == "scaled" else loss - alpha * mean
        total = total + loss
    total.backward()
    assert torch.allclose(reading.logprobs_S.grad, logp_S.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("margin", [1e4, -1e4, 1e8, -1e8])
def test_extreme_margins_stay_finite(margin: float) -> None:
    """Far on the right side nothing pushes any more; far on the wrong side the push is β, never more."""
    reading = SimpleNamespace(logprobs_S=torch.tensor([margin, 0.0], requires_grad=True))
    loss = dpo(0.5)(reading, one_pair([0.0], [0.0])).total
    loss.backward()
    assert loss.item() == max(0.0, -0.5 * margin)
    assert reading.logprobs_S.grad.tolist() == ([0.0, 0.0] if margin > 0 else [-0.5, 0.5])


def test_long_answers_keep_their_difference() -> None:
    """4,000 tokens of −1.1 nats against a reference of −1.1001: the log-ratio is 0.4 in spite of float32 inputs."""
    batch = one_pair([-1.1001] * 4000, [-1.1] * 4000)
    logprobs = torch.full((8000,), -1.1).requires_grad_()
    margin = dpo(1.0)(SimpleNamespace(logprobs_S=logprobs), batch).metrics["rewards/margins"]
    assert float(margin) == pytest.approx(4000 * (float(np.float32(-1.1)) - float(np.float32(-1.1001))), abs=1e-9)


@pytest.mark.parametrize("options", OBJECTIVES)
def test_neither_cutting_nor_padding_changes_a_sum(options: dict[str, Any]) -> None:
    root, plain_root, examples = make_root("llama"), make_root("llama", probe=False), pairs(7)
    objective = dpo(**options)

    def sums(batches: list[Batch], root: torch.nn.Module) -> dict[str, float]:
        found: dict[str, float] = {}
        for batch in batches:
            loss = objective(root(batch), batch)
            for name, value in {"total": loss.total, **loss.metrics}.items():
                found[name] = found.get(name, 0.0) + value.item()
            found["count"] = found.get("count", 0.0) + objective.count(batch)
        return found

    packed = sums([Batch.pack(examples)], root)
    assert packed["count"] == 7
    assert sums([Batch.pad(examples)], plain_root) == pytest.approx(packed, rel=1e-7)
    assert sums([Batch.pad(examples[:2]), Batch.pad(examples[2:])], plain_root) == pytest.approx(packed, rel=1e-7)
    assert sums([Batch.pack([example]) for example in examples], root) == pytest.approx(packed, rel=1e-7)


def test_answers_without_a_site() -> None:
    """An answer of which nothing is learned has a log-ratio and a likelihood term of 0; its partner still learns."""
    batch = Batch.pack([Example([1], (Branch([2, 3], [0.0, 0.0], {"ref_logprobs": [-1.0, -1.0]}),
                                      Branch([4], None, {"ref_logprobs": [-1.0]})))])
    reading = reading_of([-1.0])
    loss = DPO(rpo_alpha=1.0)(reading, batch).total
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2)) and reading.logprobs_S.grad.tolist() == [pytest.approx(0.05)]


def test_nothing_to_learn_still_carries_the_graph() -> None:
    batch = Batch.pack(pairs(3)).without_targets()
    logprobs = torch.zeros(4, requires_grad=True)
    loss = DPO(rpo_alpha=1.0)(SimpleNamespace(logprobs_S=logprobs[:0]), batch)
    loss.total.backward()
    assert loss.total.item() == 0 and DPO().count(batch) == 0 and logprobs.grad.tolist() == [0.0] * 4


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(AssertionError, match="none of sigmoid"):
        DPO(losses={"sigmoyd": 1.0})
    with pytest.raises(AssertionError):
        DPO(rpo_form="other")
    batch = Batch.pack(pairs(2))
    batch = replace(batch, branch_example_N=torch.tensor([0, 0, 0, 1]))
    with pytest.raises(AssertionError, match="chosen and a rejected"):
        DPO().count(batch)
