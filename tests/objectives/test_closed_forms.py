"""Where the optimum is known in closed form, DPO and PPO both find it.

One prompt, K answers of one token each with rewards r, a reference policy π_ref and a penalty β: the policy that maximises
E[r] − β·KL(π ‖ π_ref) is π*(a) = π_ref(a)·exp(r(a)/β) / Z (arXiv:2305.18290, eq. 4). The policy here is a table of K
logits; objectives, batches and advantages are the real ones.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from danlu.core.examples import Branch, Example
from danlu.data.batch import Batch
from danlu.objectives.pair_losses import Terms
from danlu.objectives.policy import PPO
from danlu.objectives.preference import DPO
from danlu.objectives.reward import Pairwise
from danlu.rollout.advantages import gae, token_rewards

# Rewards are logarithms of whole numbers: answer i is preferred to j in s_i of s_i + s_j comparisons, and 120 comparisons
# of each two answers hold these shares exactly.
STRENGTHS, COMPARISONS = (1, 3, 5, 7), 120
K = len(STRENGTHS)
REWARDS = torch.tensor(STRENGTHS, dtype=torch.float64).log()
REFERENCE = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
PROMPT = K  # the token that stands for the state


class Table(nn.Module):
    """A policy that is a table of logits, starting as the reference, and a critic that is one number."""

    def __init__(self) -> None:
        super().__init__()
        self.logits_K = nn.Parameter(REFERENCE.log())
        self.value = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def policy(self) -> Tensor:
        return self.logits_K.detach().softmax(0)

    def forward(self, batch: Batch) -> SimpleNamespace:
        return SimpleNamespace(logprobs_S=self.logits_K.log_softmax(0)[batch.site_target_S],
                               values_S=self.value.expand(batch.num_sites),
                               scores_N=self.logits_K[batch.input_ids_BT.flatten()[batch.end_index_N]])


def optimum(beta: float) -> Tensor:
    return (REFERENCE.log() + REWARDS / beta).softmax(0)


def total_variation(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().sum()) / 2


def comparisons() -> Batch:
    """Every ordered pair of answers as often as Bradley and Terry's model says, 120 for each two answers."""
    def answer(action: int) -> Branch:
        return Branch([action], None, {"ref_logprobs": [math.log(REFERENCE[action])]})

    examples = []
    for i in range(K):
        for j in range(K):
            times, rest = divmod(COMPARISONS * STRENGTHS[i], STRENGTHS[i] + STRENGTHS[j])
            assert rest == 0
            examples += [Example([PROMPT], (answer(i), answer(j)))] * (times if i != j else 0)
    return Batch.pack(examples)


def minimise(objective: DPO | Pairwise, table: Table) -> None:
    batch = comparisons()
    optimizer = torch.optim.LBFGS([table.logits_K], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(table(batch), batch).total / objective.count(batch)
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_dpo_finds_the_optimum(beta: float) -> None:
    table = Table()
    assert total_variation(table.policy(), optimum(beta)) > 0.2
    minimise(DPO(Terms(beta)), table)
    assert total_variation(table.policy(), optimum(beta)) < 1e-4


def test_a_reward_model_finds_the_rewards() -> None:
    """Scores are free to shift by a number; centred, each pair's sum is pulled to 0 and the order stays."""
    table = Table()
    minimise(Pairwise(), table)
    scores = table.logits_K.detach()
    assert (scores - scores.mean()).tolist() == pytest.approx((REWARDS - REWARDS.mean()).tolist(), abs=1e-4)
    centred = Table()
    minimise(Pairwise(center_rewards_coefficient=0.01), centred)
    assert abs(float(centred.logits_K.detach().mean())) < 1e-3 and centred.logits_K.argsort().tolist() == [0, 1, 2, 3]


def rollout(table: Table, actions: list[int], weights: list[float], beta: float) -> Batch:
    """Answers of the table's present policy, with the rewards, advantages and returns that follow from them."""
    with torch.no_grad():
        logprobs, value = table.logits_K.log_softmax(0), table.value.item()
    examples = []
    for action, weight in zip(actions, weights, strict=True):
        logprob = logprobs[action].item()
        rewards = token_rewards(REWARDS[action].item(), [logprob - math.log(REFERENCE[action])], beta)
        advantages, returns = gae(rewards, [value], gamma=1.0, lam=0.95)
        columns = {"old_logprobs": [logprob], "values": [value], "advantages": advantages, "returns": returns}
        examples.append(Example([PROMPT], (Branch([action], [weight], columns),)))
    return Batch.pack(examples)


def improve(table: Table, batch: Batch, optimizer: torch.optim.Optimizer, epochs: int = 4) -> None:
    objective = PPO(cliprange=0.2, cliprange_value=0.5, vf_coef=1.0)
    for _ in range(epochs):
        optimizer.zero_grad()
        (objective(table(batch), batch).total / objective.count(batch)).backward()
        optimizer.step()


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_ppo_finds_the_optimum_in_expectation(beta: float) -> None:
    """Every answer once, weighted by its present probability: the expectation itself, without whitening."""
    table = Table()
    optimizer = torch.optim.SGD(table.parameters(), lr=0.5)
    for _ in range(150):
        improve(table, rollout(table, list(range(K)), table.policy().tolist(), beta), optimizer)
    assert total_variation(table.policy(), optimum(beta)) < 1e-3
    # what is left is the same for every answer: E[r] − β·KL, which the critic has learned
    expected = float(beta * (REFERENCE.log() + REWARDS / beta).logsumexp(0))
    assert float(table.value.detach()) == pytest.approx(expected, abs=1e-3)


def test_ppo_finds_the_optimum_from_samples() -> None:
    """Answers drawn from the present policy, each with the same weight, and steps that become smaller."""
    table, generator, beta, rounds = Table(), torch.Generator().manual_seed(0), 0.5, 150
    optimizer = torch.optim.SGD(table.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: max(0.02, 1 - number / rounds))
    for _ in range(rounds):
        actions = torch.multinomial(table.policy(), 256, replacement=True, generator=generator).tolist()
        improve(table, rollout(table, actions, [1.0] * len(actions), beta), optimizer)
        schedule.step()
    assert total_variation(table.policy(), optimum(beta)) < 0.02


def test_without_the_penalty_ppo_goes_to_the_best_answer() -> None:
    """The closed form's limit β → 0; that the penalty is what holds the policy back above."""
    table = Table()
    optimizer = torch.optim.SGD(table.parameters(), lr=0.5)
    for _ in range(150):
        improve(table, rollout(table, list(range(K)), table.policy().tolist(), 0.0), optimizer)
    assert table.policy().argmax() == K - 1 and float(table.policy()[K - 1]) > 0.95
