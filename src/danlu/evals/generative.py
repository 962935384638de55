"""Exact match on tasks, and answers to look at: prompts under the chat template, decoded greedily, scored by the task.

A base model that never saw a dialogue gets the same template, so that what fine-tuning brought can be read off. With a
temperature the answers are drawn, as reinforcement learning draws them.

    questions = ask("task:skills", seed=0, count=200)
    answerer = Answerer(loaded.lm, loaded.tokenizer, max_new_tokens=32)
    answers = answerer.answer([question.messages for question in questions])
    rows = skill_rows("chat", [question.scored(answer) for question, answer in zip(questions, answers)])
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from danlu.core.errors import DataError
from danlu.core.examples import Branch, Example
from danlu.core.records import Message, Prompt
from danlu.evals.figures import SkillRow
from danlu.evals.statistics import wilson_interval
from danlu.models.generate import Completion, generate, max_positions, stop_ids_of
from danlu.tasks import Task, task
from danlu.tokens.chat import Chat
from danlu.tokens.codec import num_ids

ALL_TASKS = "all tasks"


@dataclass(frozen=True, slots=True)
class Scored:
    """One question, what the model answered, and the task's verdict: 1.0 for an exact answer."""

    question: "Question"
    completion: str
    score: float


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out prompt and the task that knows what is right."""

    prompt: Prompt
    task: Task

    @property
    def messages(self) -> tuple[Message, ...]:
        """What is asked."""
        return self.prompt.messages

    @property
    def name(self) -> str:
        """The task that the prompt comes from, also where a mixture of tasks gave it: `reverse`."""
        return self.prompt.source.removeprefix("task:")

    def scored(self, completion: str) -> Scored:
        """The verdict on an answer."""
        return Scored(self, completion, self.task.score(self.prompt, completion))


def ask(name: str, seed: int, count: int) -> list[Question]:
    """Up to `count` held-out prompts of a task. Raises ConfigError for an unknown one."""
    asked = task(name)
    return [Question(prompt, asked) for prompt in asked.prompts("heldout", seed, count)]


@dataclass(frozen=True, slots=True, eq=False)
class Said:
    """One answer: what was asked, its tokens under the chat template, what the model went on with, and that as text."""

    messages: tuple[Message, ...]
    prompt: Sequence[int]
    completion: Completion
    text: str

    @property
    def example(self) -> Example:
        """The prompt as a stem, the answer as a branch whose every token counts."""
        return Example(np.asarray(self.prompt), (Branch(np.asarray(self.completion.tokens)),))


class Answerer:
    """A model with its chat template that answers messages.

    Raises ConfigError where the tokenizer has no chat template that danlu can read.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, *, max_new_tokens: int, batch_size: int = 64) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.chat = Chat(tokenizer, stop_ids_of(model))
        self.unasked: frozenset[int] = frozenset()  # places of the last call's dialogues that could not be asked

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        """The prompt's tokens; none where the template refuses the dialogue."""
        try:
            return self.chat.prompt_ids(messages)
        except DataError:
            return []

    def answer(self, dialogues: Sequence[Sequence[Message]],
               progress: Callable[[int], None] = lambda done: None) -> list[str]:
        """The text of one greedy answer each; "" for a prompt in `unasked`."""
        return ["" if said is None else said.text for said in self.say(dialogues, progress)]

    def say(self, dialogues: Sequence[Sequence[Message]], progress: Callable[[int], None] = lambda done: None, *,
            temperature: float = 0.0, seeds: Sequence[int] | None = None) -> list[Said | None]:
        """One answer each, drawn with a seed each where there is a temperature.

        None for a prompt in `unasked`: it leaves no room for an answer, or the template refuses it.
        """
        seeds = range(len(dialogues)) if seeds is None else seeds
        prompts = [self._prompt(messages) for messages in dialogues]
        limit = max_positions(self.model)
        fitting = [number for number, prompt in enumerate(prompts)
                   if prompt and (limit is None or len(prompt) + self.max_new_tokens <= limit)]
        self.unasked = frozenset(range(len(prompts))) - set(fitting)
        fitting.sort(key=lambda number: len(prompts[number]))
        answers: list[Said | None] = [None] * len(prompts)
        for start in range(0, len(fitting), self.batch_size):
            chosen = fitting[start:start + self.batch_size]
            made = generate(self.model, [prompts[number] for number in chosen], max_new_tokens=self.max_new_tokens,
                            stop_ids=self.chat.stop_ids, pad_id=0, batch_size=self.batch_size,
                            num_ids=num_ids(self.tokenizer), temperature=temperature,
                            seeds=[seeds[number] for number in chosen])
            for number, completion in zip(chosen, made, strict=True):
                text = self.tokenizer.decode(completion.answer, skip_special_tokens=True,
                                             clean_up_tokenization_spaces=False)
                answers[number] = Said(tuple(dialogues[number]), prompts[number], completion, text)
            progress(start + len(chosen))
        return answers


def skill_rows(model: str, scored: Sequence[Scored]) -> list[SkillRow]:
    """The share of right answers for each task (by the prompts' sources) and, for more than one, over all."""
    groups: dict[str, list[float]] = {}
    for item in scored:
        groups.setdefault(item.question.name, []).append(item.score)
    if len(groups) > 1:
        groups = dict(sorted(groups.items())) | {ALL_TASKS: [item.score for item in scored]}
    rows = []
    for name, scores in groups.items():
        low, high = wilson_interval(sum(scores), len(scores)) or (0.0, 1.0)
        rows.append(SkillRow(name, model, sum(scores) / len(scores), low, high, len(scores)))
    return rows


def spread(questions: Sequence[Question], count: int) -> list[int]:
    """The places of `count` questions to show: one of each task in turn; sorted by task."""
    groups: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        groups.setdefault(question.name, []).append(place)
    turns = max((len(places) for places in groups.values()), default=0)
    chosen = [places[turn] for turn in range(turns) for _, places in sorted(groups.items()) if turn < len(places)]
    return sorted(chosen[:count], key=lambda place: (questions[place].name, place))


def shown(messages: Sequence[Message]) -> str:
    """A prompt as a reader of the report sees it; roles are written where there is more than one message."""
    if len(messages) == 1:
        return messages[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in messages)
