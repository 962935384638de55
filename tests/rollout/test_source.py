"""Rollouts: several answers to a prompt are branches of one example, and give what separate examples would give."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from invariants.trainings import NUM_IDS, STOP, tiny_root, tiny_scorer

from danlu.core.examples import Branch, Example
from danlu.models.root import ActorCritic, Root
from danlu.objectives.policy import PPO
from danlu.rollout.source import Answer, Estimator, Sampler, estimate, key


def sampler(num_generations: int, temperature: float = 1.0) -> Sampler:
    """A tiny policy with critic, judge and another model as its reference."""
    trained, judge, frozen = ActorCritic(tiny_root(), tiny_scorer()), tiny_scorer(), tiny_root()
    with torch.no_grad():
        for number, parameter in enumerate(judge.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
        for number, parameter in enumerate(frozen.parameters()):
            parameter.mul_(1 + 0.1 * (number % 3))
    trained.policy.num_ids = frozen.num_ids = NUM_IDS

    @contextmanager
    def reference() -> Iterator[Root]:
        yield frozen

    return Sampler(trained, judge, reference, [STOP], NUM_IDS, max_new_tokens=6, temperature=temperature,
                   device=torch.device("cpu"), micro_batch_tokens=64, batch_size=8, missing_eos_penalty=0.5,
                   num_generations=num_generations)


def prompts() -> list[Example]:
    return [Example([3 + place, 7, 9 + place][:2 + place % 2], (Branch(np.zeros(0, np.int32)),), id=f"p{place}")
            for place in range(3)]


def seed(place: int) -> int:
    return key(5, place)


def alone(answers: Sequence[Answer], sampler: Sampler) -> None:
    """Each answer's numbers against a sequence of its own."""
    for answer in answers:
        tokens = np.asarray(answer.completion.tokens)
        one = Example(answer.prompt.stem, (Branch(tokens),))
        policy, critic = sampler.trained.policy, sampler.trained.critic
        with torch.no_grad():
            for model in (policy, critic, sampler.reward):
                model.eval()
            batch = policy.batch([one])
            with sampler.reference() as frozen:
                reference = frozen.eval()(batch).logprobs_S
            score = float(sampler.reward(batch).scores_N[0]) - 0.5 * (not answer.completion.stopped)
            assert answer.score == pytest.approx(score, abs=1e-5)
            assert answer.logprobs == pytest.approx(policy(batch).logprobs_S.numpy(), abs=1e-5)
            assert answer.values == pytest.approx(critic(batch).values_S.numpy(), abs=1e-5)
            assert answer.ref_logprobs == pytest.approx(reference.numpy(), abs=1e-5)


def test_the_answers_to_a_prompt_are_those_of_as_many_single_prompts() -> None:
    many = sampler(4)
    together = many.answers(prompts(), seed)
    assert len(together) == 12 and len({tuple(answer.completion.tokens) for answer in together[:4]}) > 1
    alone(together, many)
    repeated = sampler(1).answers([prompt for prompt in prompts() for _ in range(4)], seed)
    assert [answer.completion.tokens for answer in repeated] == [answer.completion.tokens for answer in together]


def test_they_become_branches_of_one_example_whose_gradient_is_that_of_separate_ones() -> None:
    source = sampler(3)
    answers = source.answers(prompts(), seed)
    grown, metrics = estimate(answers, Estimator(kl_coef=0.1))
    assert [len(example.branches) for example in grown] == [3, 3, 3]
    assert metrics["rollout/num_prompts"] == 3 and metrics["rollout/num_answers"] == 9
    assert metrics["rollout/num_prompt_tokens"] == sum(len(prompt.stem) for prompt in prompts())
    apart = [Example(example.stem, (branch,)) for example in grown for branch in example.branches]
    found = []
    for examples in (grown, apart):
        source.trained.eval().zero_grad()  # without the dropout of training
        batch = source.trained.batch(examples)
        loss = PPO()(source.trained(batch), batch)
        loss.total.backward()
        found.append([loss.total.item(), *(float(parameter.grad.norm()) for parameter in source.trained.parameters()
                                           if parameter.grad is not None)])
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)


def test_rewards_are_the_score_less_the_divergence() -> None:
    source = sampler(2)
    answers = source.answers(prompts(), seed)
    examples, metrics = estimate(answers, Estimator(kl_coef=0.3, gamma=1.0, lam=1.0, whiten=False))
    for answer, branch in zip(answers, [branch for example in examples for branch in example.branches]):
        total = answer.score - 0.3 * answer.kl.sum()
        assert branch.columns["returns"][0] == pytest.approx(total, abs=1e-4)
        assert branch.columns["advantages"] == pytest.approx(branch.columns["returns"] - branch.columns["values"], abs=1e-5)
    assert metrics["rollout/reward"] == pytest.approx(np.mean([answer.score for answer in answers]))
    assert metrics["rollout/kl"] == pytest.approx(np.mean([answer.kl.sum() for answer in answers]))
