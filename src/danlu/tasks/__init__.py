"""Families of tasks with exact answers: prompts to train on, prompts that are never trained on, and a scorer.

    TASKS["copy"].prompts("heldout", seed=0, count=50)      # `skills` is the mixture of all
    task_dialogues("skills", seed=0, count=25_000)          # what a recipe's `task:skills` trains on
    task_preferences("skills", seed=0, count=5000)          # the same prompts, each with the right and a worse answer
"""

from danlu.core.records import Dialogue, Preference
from danlu.tasks.pairs import made_preferences, preferences_of
from danlu.tasks.skills import FAMILIES
from danlu.tasks.task import Mixture, Split, Task, dialogues_of, find

TASKS: dict[str, Task] = {family.name: family for family in FAMILIES}
TASKS["skills"] = Mixture("skills", FAMILIES)

__all__ = ["TASKS", "Task", "made_preferences", "task", "task_dialogues", "task_preferences"]


def task(name: str) -> Task:
    """The task of that name, with or without `task:` before it. Raises ConfigError naming the nearest one."""
    return find(TASKS, name)


def task_dialogues(name: str, seed: int, count: int, split: Split = "train") -> list[Dialogue]:
    """Up to `count` dialogues of one split of a task; no problem is in both."""
    return dialogues_of(task(name), seed, count, split)


def task_preferences(name: str, seed: int, count: int, split: Split = "train") -> list[Preference]:
    """Up to `count` pairs of one split of a task, of the category `wrong` or `form`; no problem is in both splits."""
    return preferences_of(task(name), seed, count, split)
