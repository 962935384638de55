"""Tasks: problems with one exact answer each, put in several phrasings and two languages.

A problem is held out or trained on as a whole: the hash of its key decides, whatever the seed, so that no phrasing of a
held-out problem is ever trained on. About one problem in ten is held out. The key leaves out whatever does not change
the problem (a + b and b + a are one problem). Within one call no prompt comes twice. The prompts of a smaller call are
the first of a larger one where the task is one family; a mixture shuffles what its families give.
"""

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from danlu.core.errors import ConfigError, nearest
from danlu.core.records import Dialogue, Message, Prompt

Split = Literal["train", "heldout"]
HELD_OUT = 10  # one problem in so many
STALL = 20_000  # draws without a new problem after which a pool counts as exhausted


@dataclass(frozen=True, slots=True)
class Ask:
    """One phrasing of a problem, with the answer in the same language."""

    language: Literal["en", "zh"]
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Problem:
    """What is asked, however it is put; `key` is equal for problems that give each other away."""

    key: str
    asks: tuple[Ask, ...]


class Task(ABC):
    """Prompts with exact answers, split into problems to train on and problems held out."""

    name: str

    @abstractmethod
    def prompts(self, split: Split, seed: int, count: int) -> list[Prompt]:
        """Up to `count` different prompts; fewer where the task has no more."""

    def score(self, prompt: Prompt, completion: str) -> float:
        """1.0 where the completion is the answer, blanks around it aside; else 0.0."""
        return float(completion.strip() == prompt.answer.strip())


@dataclass(frozen=True)
class Family(Task):
    """A task with one kind of problem. `problems(generator)` yields them in random order, endlessly or all of them."""

    name: str
    problems: Callable[[random.Random], Iterator[Problem]]

    def split_of(self, problem: Problem) -> Split:
        """Where a problem belongs, for good: nothing but the task's name and the problem's key decides."""
        hashed = hashlib.blake2b(f"{self.name}\0{problem.key}".encode(), digest_size=8).digest()
        return "heldout" if int.from_bytes(hashed, "big") % HELD_OUT == 0 else "train"

    def prompts(self, split: Split, seed: int, count: int) -> list[Prompt]:
        """First one phrasing of every problem, then, where problems run out, a second one, and so on."""
        generator = random.Random(f"{self.name}/{seed}")
        found: dict[str, Prompt] = {}
        later: list[list[Ask]] = []
        for problem in self._fresh(generator):
            if len(found) >= count:
                break
            if self.split_of(problem) == split:
                first, *others = generator.sample(problem.asks, len(problem.asks))
                self._put(first, found)
                later.append(others)
        while any(later) and len(found) < count:
            for asks in later:
                if asks and len(found) < count:
                    self._put(asks.pop(0), found)
        return list(found.values())

    def _fresh(self, generator: random.Random) -> Iterator[Problem]:
        """Every problem once; ends where a long search brings nothing new."""
        seen: set[str] = set()
        stalled = 0
        for problem in self.problems(generator):
            if problem.key in seen:
                stalled += 1
                if stalled >= STALL:
                    return
                continue
            seen.add(problem.key)
            stalled = 0
            yield problem

    def _put(self, ask: Ask, found: dict[str, Prompt]) -> None:
        if ask.prompt not in found:
            hashed = hashlib.blake2b(ask.prompt.encode(), digest_size=4).hexdigest()
            found[ask.prompt] = Prompt((Message("user", ask.prompt),), ask.answer, f"task:{self.name}",
                                       f"{self.name}/{ask.language}/{hashed}")


@dataclass(frozen=True)
class Mixture(Task):
    """Several tasks in equal parts; where one has too few prompts, the others fill its place."""

    name: str
    parts: Sequence[Task]

    def prompts(self, split: Split, seed: int, count: int) -> list[Prompt]:
        """Up to `count` prompts of all parts, shuffled."""
        found: list[list[Prompt]] = [[] for _ in self.parts]
        open_parts = list(range(len(self.parts)))
        missing = count
        while missing and open_parts:
            for place, index in enumerate(open_parts):
                share = missing // len(open_parts) + (place < missing % len(open_parts))
                found[index] = self.parts[index].prompts(split, seed, len(found[index]) + share)
            left = count - sum(map(len, found))
            if left == missing:
                break
            # A part that gave less than it was asked for has no more.
            open_parts = [index for index in open_parts if self._has_more(index, split, seed, found)]
            missing = left
        mixed = [prompt for prompts in found for prompt in prompts]
        random.Random(f"{self.name}/{seed}/{split}").shuffle(mixed)
        return mixed

    def _has_more(self, index: int, split: Split, seed: int, found: list[list[Prompt]]) -> bool:
        return len(self.parts[index].prompts(split, seed, len(found[index]) + 1)) > len(found[index])


def find(tasks: Mapping[str, Task], name: str) -> Task:
    """The task of that name, with or without `task:` before it. Raises ConfigError naming the nearest one."""
    plain = name.removeprefix("task:")
    if plain not in tasks:
        close = nearest(plain, tasks)
        raise ConfigError(f"there is no task “{plain}”",
                          hint=f"Did you mean {close}?" if close else f"Tasks: {', '.join(sorted(tasks))}.")
    return tasks[plain]


def dialogues_of(task: Task, seed: int, count: int, split: Split = "train") -> list[Dialogue]:
    """Prompts with their answers as dialogues; asserts that training and held-out prompts are disjoint."""
    prompts = task.prompts(split, seed, count)
    other: Split = "heldout" if split == "train" else "train"
    others = {_asked(prompt) for prompt in task.prompts(other, seed, max(1, count // HELD_OUT))}
    assert not any(_asked(prompt) in others for prompt in prompts), "a held-out prompt is trained on"
    return [Dialogue((*prompt.messages, Message("assistant", prompt.answer)), prompt.source, prompt.id, prompt.category)
            for prompt in prompts]


def _asked(prompt: Prompt) -> str:
    return "\n".join(message.content for message in prompt.messages)
