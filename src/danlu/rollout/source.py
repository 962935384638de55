"""Rollouts: the policy in training answers prompts, the answers are judged, and become the examples of the next steps.

A rollout is a pure function of (weights, seed, rollout index). Its prompts come from a Loader, every answer is drawn from
a generator of its own, and each pass over the answers has an order of its own. So a training that is killed anywhere
between two rollouts goes on to the same bits: it is taken up at the beginning of the rollout, which is made again.

    source = RolloutSource(prompts, sampler, seed=1, num_passes=4, num_mini_batches=2)
    source.batch(0).examples       # stems and answers with old_logprobs, values, advantages, returns
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from danlu.core.errors import DataError
from danlu.core.examples import Branch, Example
from danlu.data.loader import Loader, StepBatch
from danlu.models.generate import Completion, generate
from danlu.models.reading import read_each
from danlu.models.root import ActorCritic, Root, ScoreRoot
from danlu.rollout.advantages import explained_variance, gae, token_rewards, whiten

SAMPLING, ORDER, HELD_OUT = 1, 2, 3  # purposes of random numbers


@dataclass(frozen=True, slots=True)
class Estimator:
    """How answers become advantages: the penalty for leaving the reference, and generalised advantage estimation."""

    kl_coef: float = 0.05
    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """One sampled answer and what everybody thinks of it; arrays are float64, one number per token.

    score  the reward model's, less the penalty for an answer that was cut
    """

    prompt: Example
    completion: Completion
    score: float
    ref_logprobs: np.ndarray
    values: np.ndarray

    @property
    def logprobs(self) -> np.ndarray:
        return np.asarray(self.completion.logprobs, np.float64)

    @property
    def kl(self) -> np.ndarray:
        """log π(token) − log π_ref(token): in the mean over answers the divergence from the reference."""
        return self.logprobs - self.ref_logprobs


@dataclass(slots=True)
class Sampler:
    """The models of a rollout. `reference` opens a context in which the reference can be called.

    temperature  of the sampling; policy and reference are read at the same one, so that ratios and penalties are those of
                 the distribution that answers
    num_ids      ids from here on are never sampled (a vocabulary may be padded beyond its tokenizer)
    missing_eos_penalty  taken off the score of an answer that does not end by itself
    num_generations      answers to each prompt
    """

    trained: ActorCritic
    reward: ScoreRoot
    reference: Callable[[], AbstractContextManager[Root]]
    stop_ids: Sequence[int]
    num_ids: int
    max_new_tokens: int
    temperature: float
    device: torch.device
    micro_batch_tokens: int
    batch_size: int
    missing_eos_penalty: float
    num_generations: int = 1

    def answers(self, prompts: Sequence[Example], seed: Callable[[int], int]) -> list[Answer]:
        """`num_generations` answers for each prompt, one prompt after the other: sampled, scored, and read by reference and
        critic. A prompt's answers are branches of one example, so everybody reads the prompt once.

        seed  gives the random seed of the first, second, … answer
        """
        policy, each = self.trained.policy, self.num_generations
        requests = [prompt.stem.tolist() for prompt in prompts for _ in range(each)]
        with torch.autocast(self.device.type, policy.autocast, enabled=policy.autocast is not None):
            made = generate(policy.lm, requests, pad_id=0, max_new_tokens=self.max_new_tokens, stop_ids=self.stop_ids,
                            num_ids=self.num_ids, temperature=self.temperature, batch_size=self.batch_size,
                            seeds=[seed(place) for place in range(len(requests))])
        examples = [tree(prompt, [Branch(np.asarray(completion.tokens)) for completion in made[place:place + each]])
                    for prompt, place in zip(prompts, range(0, len(made), each))]
        scores = self._read(self.reward, examples, "scores_N")
        values = self._read(self.trained.critic, examples, "values_S")
        with self.reference() as reference:
            reference_logprobs = self._read(reference, examples, "logprobs_S")
        penalties = [0.0 if completion.stopped else self.missing_eos_penalty for completion in made]
        return [Answer(prompts[place // each], completion, float(score[0]) - penalty, logprobs, value)
                for place, (completion, score, penalty, logprobs, value) in
                enumerate(zip(made, scores, penalties, reference_logprobs, values, strict=True))]

    def _read(self, root: Any, examples: Sequence[Example], what: str) -> list[np.ndarray]:
        """One array for each answer."""
        found = read_each(root, examples, what, self.device, self.micro_batch_tokens)
        sizes = [1 if what.endswith("_N") else len(branch.tokens) for example in examples for branch in example.branches]
        return np.split(np.concatenate(found), np.cumsum(sizes)[:-1])


def tree(prompt: Example, branches: Sequence[Branch]) -> Example:
    """A prompt with answers as its branches."""
    return Example(prompt.stem, tuple(branches), prompt.source, prompt.category, prompt.id)


def estimate(answers: Sequence[Answer], settings: Estimator) -> tuple[list[Example], dict[str, float]]:
    """The answers as examples with the columns of a policy objective, and what is to be logged of them; neighbours that
    answer the same prompt are branches of one example.

    The reward of a token is −β·KL, with the score added at the last one; advantages are whitened over all tokens.
    """
    advantages, returns = [], []
    for answer in answers:
        _require_finite(answer)
        rewards = token_rewards(answer.score, answer.kl, settings.kl_coef)
        found = gae(rewards, answer.values, settings.gamma, settings.lam)
        advantages.append(found[0])
        returns.append(found[1])
    used = whiten(advantages) if settings.whiten else advantages
    grown: list[tuple[Example, list[Branch]]] = []
    for answer, advantage, value in zip(answers, used, returns):
        columns = {"old_logprobs": answer.logprobs, "values": answer.values, "advantages": advantage, "returns": value}
        if not grown or grown[-1][0] is not answer.prompt:
            grown.append((answer.prompt, []))
        tokens = np.asarray(answer.completion.tokens)
        grown[-1][1].append(Branch(tokens, np.ones(len(tokens)), columns))
    examples = [tree(prompt, branches) for prompt, branches in grown]
    joined, values = np.concatenate(returns), np.concatenate([answer.values for answer in answers])
    return examples, summary(answers) | {
        "rollout/return": float(joined.mean()), "rollout/value": float(values.mean()),
        "rollout/advantage_std": float(np.concatenate(advantages).std()),
        "rollout/explained_variance": explained_variance(joined, values)}


def _require_finite(answer: Answer) -> None:
    for who, values in (("the reward model's score", answer.score), ("the critic's value", answer.values),
                        ("the policy's log-probability", answer.logprobs),
                        ("the reference's log-probability", answer.ref_logprobs)):
        if not np.isfinite(values).all():
            raise DataError(f"{who} of an answer is not a finite number", where=answer.prompt.id or None,
                            hint="Lower learning_rate, or look at that model.")


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """What is to be known of a set of answers: scores, divergence from the reference (nats per answer), lengths."""
    scores = np.array([answer.score for answer in answers])
    lengths = np.array([len(answer.completion.tokens) for answer in answers])
    logprobs = np.concatenate([answer.logprobs for answer in answers])
    prompts = {id(answer.prompt): answer.prompt for answer in answers}.values()
    return {
        "rollout/reward": float(scores.mean()), "rollout/reward_std": float(scores.std()),
        "rollout/kl": float(np.mean([answer.kl.sum() for answer in answers])),
        "rollout/entropy": float(-logprobs.mean()),
        "rollout/length": float(lengths.mean()),
        "rollout/num_answers": len(answers),
        "rollout/num_prompts": len(prompts),
        "rollout/num_prompt_tokens": sum(len(prompt.stem) for prompt in prompts),
        "rollout/num_answer_tokens": int(lengths.sum()),
        "rollout/num_unfinished": sum(not answer.completion.stopped for answer in answers),
    }


@dataclass(slots=True)
class RolloutSource:
    """Where a policy's training takes its examples from, in the Trainer's terms.

    prompts           gives the prompts of rollout 0, 1, 2, …
    num_passes        passes over the answers of one rollout (PPO epochs)
    num_mini_batches  optimizer steps in one pass
    """

    prompts: Loader
    sampler: Sampler
    estimator: Estimator
    seed: int
    num_passes: int
    num_mini_batches: int
    _made: tuple[int, StepBatch] | None = field(default=None, init=False)

    @property
    def stride(self) -> int:
        """Optimizer steps of one rollout; a training can be taken up again between rollouts only."""
        return self.num_passes * self.num_mini_batches

    def num_steps(self, num_epochs: float) -> int:
        """Optimizer steps that so many passes over the prompts take."""
        return self.prompts.num_steps(num_epochs) * self.stride

    def batch(self, step: int) -> StepBatch:
        """The mini-batch of an optimizer step; at the first step of a rollout its answers are made."""
        number, place = divmod(step, self.stride)
        if self._made is None or self._made[0] != number:
            assert place == 0, "a rollout is made with the weights at its beginning"
            self._made = (number, self.make(number))
        rollout = self._made[1]
        turn, mini = divmod(place, self.num_mini_batches)
        order = _generator(self.seed, ORDER, number, turn).permutation(len(rollout.examples))
        # The last prompts of an epoch may be fewer than the mini-batches; then each is one of them, some more than once.
        parts = np.array_split(order, min(self.num_mini_batches, len(order)))
        chosen = parts[mini % len(parts)]
        return StepBatch(rollout.epoch, rollout.indices[chosen], [rollout.examples[index] for index in chosen],
                         rollout.metrics if place == 0 else {})

    def _prompts(self, number: int) -> StepBatch:
        """The prompts of a rollout; the few that end an epoch are filled up with some of the next rollout's, for a rollout
        of one prompt would be learned as hard as one of many."""
        found = self.prompts.batch(number)
        missing = (self.prompts.size or 0) - len(found.examples)
        if missing <= 0 or len(self.prompts.store) < (self.prompts.size or 0):
            return found
        more = self.prompts.batch(number + 1)
        return StepBatch(found.epoch, np.concatenate([found.indices, more.indices[:missing]]),
                         [*found.examples, *more.examples[:missing]])

    def make(self, number: int) -> StepBatch:
        """A whole rollout."""
        prompts = self._prompts(number)
        answers = self.sampler.answers(prompts.examples, partial(key, self.seed, SAMPLING, number))
        examples, metrics = estimate(answers, self.estimator)
        return StepBatch(prompts.epoch, prompts.indices, examples, metrics)


def held_out_reward(sampler: Sampler, prompts: Sequence[Example], seed: int, at_once: int
                    ) -> Callable[[Any], Mapping[str, float]]:
    """An evaluation for the Trainer: the mean score of answers to held-out prompts, always with the same random numbers.

    `eval_loss` is the negative score, so that the best model is the one with the highest.
    """
    def seeds_from(first: int) -> Callable[[int], int]:
        return lambda place: key(seed, HELD_OUT, first + place)

    def evaluate(_: Any) -> Mapping[str, float]:
        answers: list[Answer] = []
        for start in range(0, len(prompts), at_once):
            seeds = seeds_from(start * sampler.num_generations)  # how many are answered at once changes no answer
            answers += sampler.answers(prompts[start:start + at_once], seeds)
        found = summary(answers)
        return {"eval_loss": -found["rollout/reward"],
                **{name.replace("rollout/", "eval_"): found[name] for name in ("rollout/reward", "rollout/kl",
                                                                               "rollout/length")}}

    return evaluate


def key(*parts: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _generator(*parts: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(parts)))
