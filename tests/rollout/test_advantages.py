"""Rewards, generalised advantages and whitening against plain double loops, and where padding and residues would show."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.rollout.advantages import explained_variance, gae, token_rewards, whiten

NUMBERS = st.floats(-1e3, 1e3)
ANSWER = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=12)


def test_the_score_comes_with_the_last_token() -> None:
    kl = np.array([0.5, -1.0, 2.0], np.float32)
    assert token_rewards(3.0, kl, 0.1).tolist() == pytest.approx([-0.05, 0.1, 2.8])
    assert kl.tolist() == [0.5, -1.0, 2.0], "what was given is left as it was"
    assert token_rewards(3.0, [0.0], 0.1).tolist() == [3.0]
    with pytest.raises(AssertionError):
        token_rewards(3.0, [], 0.1)


@given(ANSWER, st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None)
def test_gae_equals_the_double_sum(answer: list[tuple[float, float]], gamma: float, lam: float) -> None:
    rewards, values = ([pair[which] for pair in answer] for which in (0, 1))
    advantages, returns = gae(rewards, values, gamma, lam)
    after = [*values[1:], 0.0]
    for t in range(len(answer)):
        expected = 0.0
        for u in range(t, len(answer)):
            expected += (gamma * lam) ** (u - t) * (rewards[u] + gamma * after[u] - values[u])
        assert advantages[t] == pytest.approx(expected, rel=1e-9, abs=1e-6)
        assert returns[t] == advantages[t] + values[t]


@given(st.integers(1, 30), st.floats(-100, 100), st.integers(0, 99))
def test_a_score_at_the_end_is_every_tokens_return(length: int, score: float, seed: int) -> None:
    """γ = λ = 1 and no penalty: whatever the critic believes, each token's return is the score."""
    values = np.random.default_rng(seed).normal(size=length)
    _, returns = gae(token_rewards(score, np.zeros(length), 0.05), values, 1.0, 1.0)
    assert returns == pytest.approx(np.full(length, score), abs=1e-9)


def test_one_step_ahead_and_discounted() -> None:
    """λ = 0 leaves δ_t alone; a perfect critic leaves no advantage."""
    advantages, _ = gae([0.0, 0.0, 1.0], [0.2, 0.5, 0.7], 0.9, 0.0)
    assert advantages.tolist() == pytest.approx([0.25, 0.13, 0.3])
    advantages, returns = gae([0.0, 0.0, 1.0], [0.81, 0.9, 1.0], 0.9, 0.95)
    assert advantages.tolist() == pytest.approx([0.0, 0.0, 0.0]) and returns.tolist() == pytest.approx([0.81, 0.9, 1.0])


def test_gae_of_an_answer_knows_nothing_of_its_neighbours_length() -> None:
    """A shorter answer's numbers are those of its own tokens; a padded recursion would have gone on past its end."""
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=5), rng.normal(size=5)
    alone, _ = gae(rewards, values, 0.9, 0.8)
    padded, _ = gae(np.append(rewards, [0.0] * 3), np.append(values, [0.0] * 3), 0.9, 0.8)
    assert padded[:5].tolist() == alone.tolist() and padded[5:].tolist() == [0.0] * 3


@given(st.lists(st.lists(NUMBERS, max_size=8), max_size=6))
@settings(deadline=None)
def test_whitened_over_all_tokens_together(answers: list[list[float]]) -> None:
    given_arrays = [np.array(answer) for answer in answers]
    flat = np.concatenate([np.zeros(0), *given_arrays])
    whitened = whiten(given_arrays)
    assert [len(array) for array in whitened] == [len(answer) for answer in answers]
    found = np.concatenate([np.zeros(0), *whitened])
    assert np.isfinite(found).all() and (np.abs(found) <= np.sqrt(max(len(found), 1)) + 1e-6).all()
    if len(flat) and np.ptp(flat) > 1e-3 * np.abs(flat).max():
        assert found.mean() == pytest.approx(0, abs=1e-9) and found.std() == pytest.approx(1, rel=1e-9)
        if np.abs(flat).max() > 1e-100:  # NumPy's own squares vanish below
            assert found == pytest.approx((flat - flat.mean()) / flat.std(), abs=1e-9)


def test_whitening_does_not_depend_on_how_tokens_are_grouped_or_padded() -> None:
    """Answers without a token add nothing, and one long answer whitens as the same tokens in several."""
    rng = np.random.default_rng(1)
    flat = rng.normal(2.0, 3.0, 10)
    whole = whiten([flat])[0]
    parts = whiten([flat[:3], np.zeros(0), flat[3:9], flat[9:], np.zeros(0)])
    assert np.concatenate(parts) == pytest.approx(whole, abs=1e-15)


@pytest.mark.parametrize("arrays", [
    [], [[]], [[], []], [[5.0]], [[0.0, 0.0]], [[0.1, 0.1, 0.1]], [[1e-30] * 3], [[1e6 + 1e-3, 1e6]],
    [list(np.full(5, 0.1) + np.array([0, 1e-17, 2e-17, 1e-9, 0]))], [[-7.3], [-7.3, -7.3]],
])
def test_no_token_one_token_and_equal_tokens_become_zero(arrays: list[list[float]]) -> None:
    """A residue of rounding is never blown up to a signal."""
    whitened = whiten(arrays)
    assert [len(array) for array in whitened] == [len(array) for array in arrays]
    assert not np.concatenate([np.zeros(0), *whitened]).any()


def test_two_tokens_become_one_and_minus_one() -> None:
    assert np.concatenate(whiten([[3.0], [1.0]])).tolist() == pytest.approx([1.0, -1.0])
    assert whiten([[1.7e308, -1.7e308]])[0].tolist() == [1.0, -1.0]


def test_small_but_real_differences_are_kept() -> None:
    assert whiten([[1e-12, -1e-12]])[0].tolist() == whiten([[5e-324, -5e-324]])[0].tolist() == [1.0, -1.0]
    assert whiten([[1.001, 1.0]])[0].tolist() == pytest.approx([1.0, -1.0])


def test_explained_variance() -> None:
    returns = np.array([1.0, 2.0, 4.0, 3.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(returns, returns + 7.0) == pytest.approx(1.0)
    assert explained_variance(returns, np.full(4, returns.mean())) == pytest.approx(0.0)
    assert explained_variance(returns, -returns) == pytest.approx(-3.0)
    assert explained_variance(returns, returns * 0.5) == pytest.approx(0.75)


@pytest.mark.parametrize("returns", [[], [2.0], [0.1, 0.1, 0.1], [0.0, 0.0]])
def test_returns_that_do_not_vary_have_nothing_to_explain(returns: list[float]) -> None:
    assert explained_variance(returns, np.arange(len(returns))) == 0.0
