"""What a policy is worth: answers drawn at temperature 1, their scores by a judge, and how far they leave a reference.

All models draw with the same random numbers, one generator a prompt, so that a difference between them is less of an
accident. The divergence is estimated from the answers themselves: Σ log π − log π_ref over an answer's tokens has the
Kullback-Leibler divergence of the two policies as its mean.

    answers = draw(answerer, questions, seed=0)
    answers.logprobs = token_logprobs(loaded.root, answers.said, device, 8192)
    row = reward_row("chat", answers)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from danlu.core.errors import DataError
from danlu.core.records import Message
from danlu.evals.figures import RewardRow
from danlu.evals.generative import Answerer, Question, Said
from danlu.evals.statistics import mean_interval, wilson_interval
from danlu.models.reading import read_each
from danlu.models.root import Root, ScoreRoot

SAMPLED = 4  # the purpose of these random numbers, beside those of a training with the same seed
TEMPERATURE = 1.0


@dataclass(slots=True)
class Drawn:
    """One model's answers to the prompts that it could be asked, and what was found out about each.

    exact         the task's verdict, 1.0 for an exact answer, for the answers to tasks (they come first)
    logprobs      of each token under the model itself, and under the reference; None: nobody was asked
    scores        the judge's; None: nobody was asked
    """

    said: list[Said]
    exact: list[float]
    logprobs: list[np.ndarray] | None = None
    ref_logprobs: list[np.ndarray] | None = None
    scores: list[float] | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(len(said.prompt) + len(said.completion.tokens) for said in self.said)

    @property
    def kl(self) -> list[float] | None:
        """Σ log π − log π_ref of each answer in nats; None where one of the two is not known."""
        if self.logprobs is None or self.ref_logprobs is None:
            return None
        return [float((own - other).sum()) for own, other in zip(self.logprobs, self.ref_logprobs, strict=True)]


def draw(answerer: Answerer, questions: Sequence[Question], seed: int,
         progress: Callable[[int], None] = lambda done: None, more: Sequence[Sequence[Message]] = ()) -> Drawn:
    """One answer for every prompt that leaves room for it, at temperature 1; `more` are prompts without a task."""
    asked = [*(question.messages for question in questions), *more]
    seeds = [int(np.random.SeedSequence([seed, SAMPLED, place]).generate_state(1, np.uint64)[0])
             for place in range(len(asked))]
    said = answerer.say(asked, progress, temperature=TEMPERATURE, seeds=seeds)
    exact = [question.scored(answer.text).score for question, answer in zip(questions, said) if answer is not None]
    return Drawn([answer for answer in said if answer is not None], exact)


def token_logprobs(root: Root, said: Sequence[Said], device: torch.device, micro_batch_tokens: int) -> list[np.ndarray]:
    """log p of each token of each answer under a model, in nats."""
    return read_each(root, [answer.example for answer in said], "logprobs_S", device, micro_batch_tokens)


def judge_scores(root: ScoreRoot, said: Sequence[Said], device: torch.device, micro_batch_tokens: int) -> list[float]:
    """The judge's score of each answer, read at its last token. Raises DataError where one is not finite."""
    rows = read_each(root, [answer.example for answer in said], "scores_N", device, micro_batch_tokens)
    scores = [float(row[0]) for row in rows]
    if not all(math.isfinite(score) for score in scores):
        raise DataError("the judge gives scores that are not finite")
    return scores


def reward_row(model: str, drawn: Drawn) -> RewardRow:
    """The means over one model's answers, which the judge has scored. Raises DataError where KL is not finite."""
    assert drawn.scores is not None, "the judge comes first"
    count, kl = len(drawn.said), drawn.kl
    if kl is not None and not all(map(math.isfinite, kl)):
        raise DataError(f"the log-probabilities of the answers of {model} are not finite")
    low, high = mean_interval(drawn.scores) or (None, None)
    kl_low, kl_high = (None if kl is None else mean_interval(kl)) or (None, None)
    exact = sum(drawn.exact) / len(drawn.exact) if drawn.exact else None
    exact_low, exact_high = wilson_interval(sum(drawn.exact), len(drawn.exact)) or (None, None)
    return RewardRow(
        model=model, score=sum(drawn.scores) / count, low=low, high=high,
        kl=None if kl is None else sum(kl) / count, kl_low=kl_low, kl_high=kl_high,
        exact=exact, exact_low=exact_low, exact_high=exact_high,
        ended=sum(said.completion.stopped for said in drawn.said) / count,
        length=sum(len(said.completion.tokens) for said in drawn.said) / count, num_answers=count)
