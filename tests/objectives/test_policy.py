"""Proximal policy optimization: worked numbers, a plain double loop in NumPy, extremes, and no trace of padding."""

import math
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
from danlu.objectives.policy import LIMIT, PPO
from danlu.rollout.advantages import gae, token_rewards, whiten

COLUMNS = ("old_logprobs", "advantages", "returns", "values")


def sites(old: Any, advantages: Any = None, returns: Any = None, values: Any = None, weights: Any = None) -> Batch:
    """One answer with these columns; what is not given is 0."""
    zeros = [0.0] * len(old)
    columns = dict(zip(COLUMNS, (old, advantages or zeros, returns or zeros, values or zeros), strict=True))
    return Batch.pack([Example([1], (Branch([2] * len(old), weights, columns),))])


def reading_of(logprobs: Any, values: Any = None, dtype: torch.dtype = torch.float64) -> SimpleNamespace:
    def leaf(numbers: Any) -> torch.Tensor:
        return torch.as_tensor(numbers).to(dtype).clone().requires_grad_()

    return SimpleNamespace(logprobs_S=leaf(logprobs), values_S=None if values is None else leaf(values))


def answers(count: int, seed: int = 0) -> list[Example]:
    """Ragged answers with every column, some tokens without a weight."""
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        length = rng.integers(1, 9)
        columns = {"old_logprobs": -rng.exponential(2.0, length), **{name: rng.normal(size=length) for name in COLUMNS[1:]}}
        branch = Branch(rng.integers(0, VOCAB, length), rng.choice([0.0, 1.0, 1.0, 0.5], length), columns)
        examples.append(Example(rng.integers(0, VOCAB, rng.integers(1, 9)), (branch,)))
    return examples


def plain(batch: Batch, logprobs: Any, values: Any, cliprange: float = 0.2, cliprange_value: float = 0.2,
          vf_coef: float = 0.1) -> dict[str, float]:
    """The objective once more, token by token."""
    found = dict.fromkeys(("total", "policy_loss", "value_loss", "ratio", "clip_fraction", "value_clip_fraction",
                           "approx_kl"), 0.0)
    for s in range(batch.num_sites):
        old, advantage, target, before = (float(batch.columns[name][s]) for name in COLUMNS)
        weight, ratio = float(batch.site_weight_S[s]), math.exp(logprobs[s] - old)
        inside = min(max(ratio, 1 - cliprange), 1 + cliprange)
        policy = -min(advantage * ratio, advantage * inside)
        near = min(max(values[s], before - cliprange_value), before + cliprange_value)
        value = 0.5 * max((values[s] - target) ** 2, (near - target) ** 2)
        found["total"] += weight * (policy + vf_coef * value)
        found["policy_loss"] += weight * policy
        found["value_loss"] += weight * value
        found["ratio"] += weight * ratio
        found["clip_fraction"] += weight * (advantage * inside < advantage * ratio)
        found["value_clip_fraction"] += weight * ((near - target) ** 2 > (values[s] - target) ** 2)
        found["approx_kl"] += weight * (ratio - 1 - math.log(ratio))
    return found


@pytest.mark.parametrize(("advantage", "ratio", "expected", "clipped"), [
    (1.0, 1.5, -1.2, 1), (-1.0, 1.5, 1.5, 0), (1.0, 0.5, -0.5, 0), (-1.0, 0.5, 0.8, 1), (2.0, 1.1, -2.2, 0),
])
def test_worked_policy_losses(advantage: float, ratio: float, expected: float, clipped: int) -> None:
    """Clipping takes away what would be gained beyond the bound, and never what is lost."""
    reading = reading_of([math.log(ratio)])
    loss = PPO()(reading, sites([0.0], [advantage]))
    loss.total.backward()
    assert loss.total.item() == pytest.approx(expected) and float(loss.metrics["clip_fraction"]) == clipped
    assert reading.logprobs_S.grad.item() == pytest.approx(0.0 if clipped else -advantage * ratio)


@pytest.mark.parametrize(("value", "expected", "slope"), [(1.0, 1.62, 0.0), (0.1, 1.805, -1.9), (-1.0, 4.5, -3.0)])
def test_worked_value_losses(value: float, expected: float, slope: float) -> None:
    """The old value is 0, the return 2, the range 0.2."""
    reading = reading_of([0.0], [value])
    loss = PPO(vf_coef=0.5)(reading, sites([0.0], returns=[2.0]))
    loss.total.backward()
    assert float(loss.metrics["value_loss"]) == pytest.approx(expected)
    assert loss.total.item() == pytest.approx(0.5 * expected)
    assert reading.values_S.grad.item() == pytest.approx(0.5 * slope)


@given(st.integers(0, 2 ** 32 - 1), st.integers(1, 5), st.floats(0.01, 3), st.floats(0.05, 0.5), st.floats(0.05, 2))
@settings(deadline=None, max_examples=60)
def test_equals_a_plain_double_loop(seed: int, count: int, spread: float, cliprange: float, vf_coef: float) -> None:
    batch = Batch.pack(answers(count, seed))
    rng = np.random.default_rng(seed)
    logprobs = batch.columns["old_logprobs"].double().numpy() + rng.normal(0, spread, batch.num_sites)
    values = rng.normal(size=batch.num_sites)
    objective = PPO(cliprange, 0.3, vf_coef)
    loss = objective(reading_of(logprobs, values), batch)
    assert objective.count(batch) == float(batch.site_weight_S.sum()) and objective.coefficients(batch) is None
    assert all(value.dtype == torch.float64 and not value.requires_grad for value in loss.metrics.values())
    found = {name: value.item() for name, value in {"total": loss.total, **loss.metrics}.items()}
    assert found == pytest.approx(plain(batch, logprobs, values, cliprange, 0.3, vf_coef), rel=1e-9, abs=1e-9)


def test_the_whole_road_from_scores_to_the_loss() -> None:
    """Scores and divergences of ragged answers to rewards, advantages, whitening and the loss, all in double loops."""
    rng = np.random.default_rng(8)
    lengths, beta, gamma, lam = [1, 4, 7, 2], 0.3, 0.9, 0.8
    scores = rng.normal(size=4)
    kls, values, old = ([rng.normal(size=n).astype(np.float32) for n in lengths] for _ in range(3))
    estimated = [gae(token_rewards(scores[i], kls[i], beta), values[i], gamma, lam) for i in range(4)]
    advantages = whiten([advantage for advantage, _ in estimated])
    batch = Batch.pack([Example([1], (Branch([2] * n, None, {
        "old_logprobs": old[i], "advantages": advantages[i], "returns": estimated[i][1], "values": values[i]}),))
        for i, n in enumerate(lengths)])
    logprobs, new_values = rng.normal(size=14), rng.normal(size=14)
    loss = PPO()(reading_of(logprobs, new_values), batch)

    raw: list[list[float]] = []
    for i, n in enumerate(lengths):
        rewards = [-beta * float(kls[i][t]) + (scores[i] if t == n - 1 else 0.0) for t in range(n)]
        ahead = [float(v) for v in values[i]] + [0.0]
        raw.append([sum((gamma * lam) ** (u - t) * (rewards[u] + gamma * ahead[u + 1] - ahead[u]) for u in range(t, n))
                    for t in range(n)])
    everything = [advantage for answer in raw for advantage in answer]
    mean = sum(everything) / len(everything)
    deviation = math.sqrt(sum((advantage - mean) ** 2 for advantage in everything) / len(everything))
    total, s = 0.0, 0
    for i, n in enumerate(lengths):
        for t in range(n):
            ratio, advantage = math.exp(logprobs[s] - float(old[i][t])), (raw[i][t] - mean) / deviation
            target, before = raw[i][t] + float(values[i][t]), float(values[i][t])
            near = min(max(new_values[s], before - 0.2), before + 0.2)
            total += max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2))
            total += 0.1 * 0.5 * max((new_values[s] - target) ** 2, (near - target) ** 2)
            s += 1
    assert loss.total.item() == pytest.approx(total, rel=1e-6)  # the columns are float32


def test_gradient_equals_autograds_of_the_plain_formula() -> None:
    batch = Batch.pack(answers(20, seed=2))
    rng = np.random.default_rng(3)
    reading = reading_of(batch.columns["old_logprobs"].double().numpy() + rng.normal(0, 0.5, batch.num_sites),
                         rng.normal(size=batch.num_sites))
    PPO(vf_coef=0.7)(reading, batch).total.backward()
    logp, value = (tensor.detach().clone().requires_grad_() for tensor in (reading.logprobs_S, reading.values_S))
    old, advantage, target, before = (batch.columns[name].double() for name in COLUMNS)
    ratio = (logp - old).exp()
    worse = torch.where(advantage > 0, ratio > 1.2, ratio < 0.8)  # beyond the bound on the side that gains
    policy = torch.where(worse, 0.0, -advantage * ratio)
    outside = (value - before).abs() > 0.2
    near = before + 0.2 * (value - before).sign()
    flat = outside & ((near - target).abs() > (value - target).abs())
    squares = torch.where(flat, 0.0, (value - target) ** 2)
    (batch.site_weight_S.double() * (policy + 0.7 * 0.5 * squares)).sum().backward()
    assert 0 < int(worse.sum()) < batch.num_sites and 0 < int(flat.sum()) < batch.num_sites
    assert torch.allclose(reading.logprobs_S.grad, logp.grad, rtol=1e-10, atol=1e-12)
    assert torch.allclose(reading.values_S.grad, value.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [LIMIT - 0.1, LIMIT + 0.1, 89.0, 710.0, 1e4])
def test_extreme_ratios_stay_finite(shift: float, dtype: torch.dtype) -> None:
    """Of four tokens (far above and far below, gaining and losing) only one has a gradient, and it is a large one."""
    reading = reading_of([shift, shift, -shift, -shift], [1e4] * 4, dtype)
    loss = PPO()(reading, sites([0.0] * 4, [2.0, -2.0, 2.0, -2.0]))
    loss.total.backward()
    assert all(math.isfinite(value.item()) for value in (loss.total, *loss.metrics.values()))
    assert torch.isfinite(reading.values_S.grad).all()
    gain_up, loss_up, gain_down, loss_down = reading.logprobs_S.grad.tolist()
    assert gain_up == 0 and loss_down == 0 and -1e-7 < gain_down <= 0
    assert loss_up == pytest.approx(2 * math.exp(min(shift, LIMIT)), rel=1e-5)


def test_an_advantage_of_nothing_asks_for_nothing() -> None:
    reading = reading_of([1e4, -1e4, 0.0])
    PPO()(reading, sites([0.0] * 3)).total.backward()
    assert reading.logprobs_S.grad.tolist() == [0.0, 0.0, 0.0]


def test_the_first_look_finds_nothing_changed() -> None:
    """Policy and critic are what they were: ratio 1, nothing clipped, no divergence, and a loss of −A."""
    batch = Batch.pack(answers(6))
    objective, count = PPO(vf_coef=0.0), PPO().count(batch)
    loss = objective(reading_of(batch.columns["old_logprobs"], batch.columns["values"]), batch)
    means = {name: float(value) / count for name, value in loss.metrics.items()}
    assert {name: means[name] for name in ("ratio", "clip_fraction", "value_clip_fraction", "approx_kl")} == \
        {"ratio": 1.0, "clip_fraction": 0.0, "value_clip_fraction": 0.0, "approx_kl": 0.0}
    expected = -(batch.site_weight_S.double() * batch.columns["advantages"].double()).sum()
    assert loss.total.item() == pytest.approx(float(expected))


def test_without_a_critic_there_is_no_value_loss() -> None:
    batch = Batch.pack(answers(4))
    loss = PPO()(reading_of(batch.columns["old_logprobs"] + 0.1), batch)
    assert not {"value_loss", "value_clip_fraction"} & loss.metrics.keys()
    assert loss.total.item() == float(loss.metrics["policy_loss"])


def test_approx_kl_is_the_divergence_in_expectation() -> None:
    """Over five tokens, each weighted by its old probability."""
    rng = np.random.default_rng(0)
    old, new = (torch.tensor(rng.normal(size=5)).log_softmax(0) for _ in range(2))
    exact = float((old.exp() * (old - new)).sum())
    loss = PPO()(reading_of(new), sites(old.tolist(), weights=old.exp().tolist()))
    assert exact > 0.1 and float(loss.metrics["approx_kl"]) == pytest.approx(exact, rel=1e-6)


def test_neither_cutting_nor_padding_changes_a_sum() -> None:
    root, plain_root, examples = make_root("llama"), make_root("llama", probe=False), answers(7)
    head = torch.randn(root.lm.config.hidden_size, dtype=torch.float64)

    def sums(batches: list[Batch], root: torch.nn.Module) -> dict[str, float]:
        found: dict[str, float] = {}
        for batch in batches:
            reading = SimpleNamespace(logprobs_S=root(batch).logprobs_S,
                                      values_S=root.hidden(batch)[batch.site_index_S] @ head)
            loss = PPO()(reading, batch)
            for name, value in {"total": loss.total, **loss.metrics}.items():
                found[name] = found.get(name, 0.0) + value.item()
            found["count"] = found.get("count", 0.0) + PPO().count(batch)
        return found

    packed = sums([Batch.pack(examples)], root)
    assert sums([Batch.pad(examples)], plain_root) == pytest.approx(packed, rel=1e-7)
    assert sums([Batch.pad(examples[:3]), Batch.pad(examples[3:])], plain_root) == pytest.approx(packed, rel=1e-7)
    assert sums([Batch.pack([example]) for example in examples], root) == pytest.approx(packed, rel=1e-7)


def test_nothing_to_learn_still_carries_the_graph() -> None:
    batch = Batch.pack(answers(3)).without_targets()
    both = torch.zeros(4, requires_grad=True)
    loss = PPO()(SimpleNamespace(logprobs_S=both[:0], values_S=both[:0]), batch)
    loss.total.backward()
    assert loss.total.item() == 0 and PPO().count(batch) == 0 and both.grad.tolist() == [0.0] * 4
