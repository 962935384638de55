"""From a score per answer to advantages per token: rewards with a KL penalty, generalised advantages, whitening.

Everything here is NumPy in float64 and knows no padding: an answer is an array [n] of its n tokens, and a batch is a list
of such arrays.

    rewards = token_rewards(score, kl_per_token, kl_coef=0.05)
    advantages, returns = gae(rewards, values, gamma=1.0, lam=0.95)
    advantages = whiten([advantages, …])
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def token_rewards(score: float, kl_per_token: ArrayLike, kl_coef: float) -> np.ndarray:
    """r_t = −β·kl_t, with the answer's score added at its last token, [n] (InstructGPT, arXiv:2203.02155, eq. 2).

    kl_per_token  [n]; log π_old − log π_ref of each of the answer's tokens, or another estimate, in nats
    kl_coef       β, in units of the score per nat
    """
    rewards = -kl_coef * np.asarray(kl_per_token, np.float64)
    assert len(rewards), "an answer has a last token"
    rewards[-1] += score
    return rewards


def gae(rewards: ArrayLike, values: ArrayLike, gamma: float, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """(advantages, returns) of one answer, [n] each: A_t = Σ_l (γ·λ)^l·δ_{t+l} with δ_t = r_t + γ·V_{t+1} − V_t.

    Eq. 16 of arXiv:1506.02438, for an answer that ends: nothing comes after its last token, so V there is 0. The returns
    are A_t + V_t, what the critic learns. Rewards and values [n] are in units of the score.
    """
    rewards, values = np.asarray(rewards, np.float64), np.asarray(values, np.float64)
    assert rewards.shape == values.shape and rewards.ndim == 1, "one reward and one value per token"
    advantages = np.zeros_like(rewards)
    following = value_after = 0.0
    for t in reversed(range(len(rewards))):
        following = rewards[t] + gamma * value_after - values[t] + gamma * lam * following
        value_after = values[t]
        advantages[t] = following
    return advantages, advantages + values


def whiten(advantages: Sequence[ArrayLike]) -> list[np.ndarray]:
    """(A − mean) / standard deviation over all tokens of all answers together, in the shapes that were given.

    The result has mean 0 and standard deviation 1 over the tokens of the whole step, and no number in it is larger than
    √(number of tokens). Where all are equal but for rounding, and for no token or one, it is 0: dividing a residue by
    its own size would make noise as large as signal. The numbers are in standard deviations.
    """
    arrays = [np.asarray(array, np.float64) for array in advantages]
    flat = np.concatenate([array.ravel() for array in arrays]) if arrays else np.zeros(0)
    scale, deviation = _spread(flat)
    if deviation == 0:
        return [np.zeros_like(array) for array in arrays]
    mean = (flat / scale).mean()
    return [(array / scale - mean) / deviation for array in arrays]


def explained_variance(returns: ArrayLike, values: ArrayLike) -> float:
    """1 − Var(R − V) / Var(R): 1 for a critic that knows the returns, 0 for one that knows their mean, else below.

    returns, values  [n], over all tokens of a step, in units of the score. 0 where the returns do not vary.
    """
    returns, values = np.asarray(returns, np.float64), np.asarray(values, np.float64)
    assert returns.shape == values.shape, "one return and one value per token"
    scale, deviation = _spread(returns)
    return float(1 - (((returns - values) / scale).std() / deviation) ** 2) if deviation else 0.0


def _spread(values: np.ndarray) -> tuple[float, float]:
    """The largest |x|, and the standard deviation √(mean (x − mean)²) in units of it.

    The deviation is 0 where it is below float32's resolution: models give float32, so differences that small are
    rounding and no signal. In units of the largest no square overflows or vanishes.
    """
    largest = float(np.abs(values).max(initial=0.0))
    deviation = float((values / largest).std()) if largest else 0.0
    return largest, deviation if deviation > np.finfo(np.float32).eps else 0.0
