"""Pairs of a right and a worse answer, made where nobody wrote a worse one.

    preferences_of(TASKS["skills"], seed=0, count=5000)     # a task's prompts; `task_preferences` takes its name
    made_preferences(dialogues, seed=0)                     # any dialogues

A task's worse answer is wrong in the right form (category `wrong`, about half) or out of form (`form`), so that
neither the form nor the answer alone gives the better one away. It depends on the task, the seed and the prompt alone. A
dialogue's worse answer is the answer to something else (`swapped`) or its own answer broken (`form`), by turns.
"""

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from danlu.core.records import Dialogue, Message, Preference, Prompt
from danlu.tasks.task import Mixture, Split, Task, dialogues_of
from danlu.tasks.words import ALL_WORDS, DIGITS, JOINT, Language
from danlu.text.clean import language

FORM_SHARE = 1 / 2  # of a task's pairs
POOL = 200  # prompts of a family, whose answers are wrong ones to its other prompts
WINDOW = 512  # dialogues at a time; answers are swapped within two of these windows
LONGEST_RUN, MOST_TIMES = 8, 3  # words that are repeated, and how often

_TEMPLATES: dict[Language, tuple[str, ...]] = {
    "en": ("The answer is {}.", "It is {}.", "Answer: {}", "I think the answer is {}.", "Sure! {}"),
    "zh": ("答案是{}。", "是{}。", "答案：{}", "我觉得答案是{}。", "好的，{}"),
}
_MARKS: dict[Language, tuple[str, ...]] = {"en": (".", "!", "!!!"), "zh": ("。", "！", "！！！")}
_OTHER: dict[Language, Language] = {"en": "zh", "zh": "en"}
_SPELLED: dict[Language, str] = {"en": " ", "zh": ""}  # between digits in words
_NUMBER = re.compile(r"\d+")
_BREAKS = re.compile(r"[\s,.:?!，、。：？！]+")

Pool = Mapping[tuple[str, Language], Sequence[str]]  # answers by source and language


def preferences_of(task: Task, seed: int, count: int, split: Split = "train") -> list[Preference]:
    """Pairs for up to `count` prompts of one split; fewer where nothing can be made that the scorer refuses."""
    pool = _pool(task, seed)
    found = []
    for dialogue in dialogues_of(task, seed, count, split):
        *asked, answer = dialogue.messages
        prompt = Prompt(tuple(asked), answer.content, dialogue.source, dialogue.id, dialogue.category)
        worse = _worse(task, prompt, pool, seed)
        if worse is not None:
            rejected, category = worse
            found.append(Preference(prompt.messages, prompt.answer, rejected, prompt.source, prompt.id, category))
    return found


def _pool(task: Task, seed: int) -> Pool:
    """The answers of a fixed number of training prompts of every family: no answer depends on how many are asked for."""
    found: dict[tuple[str, Language], dict[str, None]] = defaultdict(dict)
    for family in _families(task):
        for prompt in family.prompts("train", seed, POOL):
            found[prompt.source, _language(prompt)][prompt.answer] = None
    return {key: tuple(answers) for key, answers in found.items()}


def _families(task: Task) -> list[Task]:
    return [family for part in task.parts for family in _families(part)] if isinstance(task, Mixture) else [task]


def _language(prompt: Prompt) -> Language:
    return "zh" if language(prompt.messages[-1].content) == "zh" else "en"


def _worse(task: Task, prompt: Prompt, pool: Pool, seed: int) -> tuple[str, str] | None:
    """A worse answer and its category; None where the scorer takes everything that was tried."""
    generator = random.Random(f"pairs/{seed}/{prompt.source}/{prompt.messages[-1].content}")

    def drawn(kinds: list[list[str]], base: str) -> str | None:
        """A candidate that scores nothing: every kind is as likely, however many candidates it has."""
        for kind in generator.sample(kinds, len(kinds)):
            for candidate in generator.sample(kind, len(kind)):
                if candidate.strip() not in ("", base.strip()) and task.score(prompt, candidate) == 0:
                    return candidate
        return None

    wrong = drawn(_wrong(prompt, pool), prompt.answer)
    if wrong is not None and generator.random() >= FORM_SHARE:
        return wrong, "wrong"
    base = wrong if wrong is not None and generator.random() < 0.5 else prompt.answer
    broken = drawn(_out_of_form(prompt, base), base)
    if broken is not None:
        return broken, "form"
    return None if wrong is None else (wrong, "wrong")


def _wrong(prompt: Prompt, pool: Pool) -> list[list[str]]:
    """Kinds of wrong answers in the right form; candidates may still be right by accident."""
    asked, answer, spoken = prompt.messages[-1].content, prompt.answer, _language(prompt)
    others = [other for other in pool.get((prompt.source, spoken), ()) if other.isdigit() == answer.isdigit()]
    if answer.isascii() and answer.isdigit():
        near, in_prompt = _near(answer), _NUMBER.findall(asked)
    else:
        near = _edited(answer, spoken)
        in_prompt = [word for word in _BREAKS.split(asked) if word in ALL_WORDS[spoken] and answer in ALL_WORDS[spoken]]
    # Half of them are near misses; what stands in the prompt is among them (the other of two numbers, the last word for
    # the first). The other half answer something else, which is what a model that has not understood says.
    return [*near, in_prompt, *[others] * (len(near) + 1)]


def _near(answer: str) -> list[list[str]]:
    """Numbers that are off by 1 or 10, have one other digit or two digits swapped."""
    number = int(answer)
    changed = [answer[:place] + digit + answer[place + 1:] for place in range(len(answer)) for digit in "0123456789"]
    swapped = [answer[:place] + answer[place + 1] + answer[place] + answer[place + 2:] for place in range(len(answer) - 1)]
    kinds = [[str(number - 1), str(number + 1)], [str(number - 10), str(number + 10)], changed, swapped]
    return [[text for text in kind if text == "0" or text[0] not in "-0"] for kind in kinds]


def _edited(answer: str, spoken: Language) -> list[list[str]]:
    """Lists of words or digits in words, in another order, with another word, without one or with one twice."""
    for joint, vocabulary in ((JOINT[spoken], ALL_WORDS[spoken]), (_SPELLED[spoken], DIGITS[spoken])):
        words = answer.split(joint) if joint else list(answer)
        if not all(word in vocabulary for word in words):
            continue
        places = range(len(words))
        kinds = [[[*words[:place], word, *words[place + 1:]] for place in places for word in vocabulary]]
        if len(words) > 1:
            kinds.append([words[::-1], *([*words[:place], words[place + 1], words[place], *words[place + 2:]]
                                         for place in places[:-1])])
            kinds.append([words[:place] + words[place + 1:] for place in places])
            kinds.append([words[:place + 1] + words[place:] for place in places])
        return [[joint.join(found) for found in kind] for kind in kinds]
    return []


def _out_of_form(prompt: Prompt, answer: str) -> list[list[str]]:
    """Kinds of an answer in a form that nobody asked for."""
    asked, spoken = prompt.messages[-1].content, _language(prompt)
    return [
        [template.format(answer) for template in _TEMPLATES[spoken]],
        [template.format(answer) for template in _TEMPLATES[_OTHER[spoken]]],
        [f"{answer} {answer}", f"{answer}\n{answer}"],
        [f"{asked} {answer}", f"{asked}\n{answer}"],
        [answer + mark for mark in _MARKS[spoken]],
        [answer.upper()],
        [answer[:len(answer) // 2]],
    ]


@dataclass(frozen=True, slots=True)
class _Answered:
    """A dialogue up to its last answer; `language` is the answer's, as it is guessed."""

    dialogue: Dialogue
    messages: tuple[Message, ...]
    answer: str
    language: str


def made_preferences(dialogues: Iterable[Dialogue], seed: int) -> Iterator[Preference | None]:
    """One pair for every dialogue, in their order, with its last answer as the better one; the seed and the order decide.

    None stands for a dialogue of which none can be made, so that it can be counted: it has no answer to a user's turn, or
    its answer is of one character and there is no other answer to swap it for. Memory is bounded.
    """
    stream = iter(dialogues)
    number = 0
    before: list[_Answered | None] = []
    while window := [_answered(dialogue) for dialogue in islice(stream, WINDOW)]:
        others: dict[str, list[_Answered]] = defaultdict(list)
        for item in (*before, *window):
            if item is not None:
                others[item.language].append(item)
        for item in window:
            yield None if item is None else _pair(item, others[item.language], number, seed)
            number += 1
        before = window


def _answered(dialogue: Dialogue) -> _Answered | None:
    """The dialogue up to its last answer that follows a user's turn."""
    for place in range(len(dialogue.messages) - 1, 0, -1):
        turn = dialogue.messages[place]
        if turn.role == "assistant" and dialogue.messages[place - 1].role == "user":
            return _Answered(dialogue, dialogue.messages[:place], turn.content, language(turn.content))
    return None


def _pair(item: _Answered, others: Sequence[_Answered], number: int, seed: int) -> Preference | None:
    generator = random.Random(f"made/{seed}/{number}")
    swapped, broken = ("swapped", lambda: _swapped(item, others, generator)), ("form", lambda: _broken(item, generator))
    for category, make in (broken, swapped) if number % 2 else (swapped, broken):
        rejected = make()
        if rejected is not None:
            dialogue = item.dialogue
            return Preference(item.messages, item.answer, rejected, dialogue.source, dialogue.id, category)
    return None


def _swapped(item: _Answered, others: Sequence[_Answered], generator: random.Random) -> str | None:
    """Another answer, but not one to the same question: that would be as good."""
    start = generator.randrange(len(others))
    for step in range(len(others)):
        other = others[(start + step) % len(others)]
        if other.answer.strip() != item.answer.strip() and other.messages[-1].content != item.messages[-1].content:
            return other.answer
    return None


def _broken(item: _Answered, generator: random.Random) -> str | None:
    """The answer with its words shuffled, some of them repeated or its end cut off."""
    text = item.answer.strip()
    if len(text) < 2:
        return None
    chinese = item.language == "zh"
    spans = [found.span() for found in re.finditer(r"\S" if chinese else r"\S+", text)]
    gap = "" if chinese else " "
    for make in generator.sample((_shuffled, _repeated, _cut), 3):
        made = make(text, spans, gap, generator).strip()
        if made != text:
            return made
    return None


def _shuffled(text: str, spans: list[tuple[int, int]], gap: str, generator: random.Random) -> str:
    return gap.join(text[begin:end] for begin, end in generator.sample(spans, len(spans)))


def _repeated(text: str, spans: list[tuple[int, int]], gap: str, generator: random.Random) -> str:
    first = generator.randrange(len(spans))
    last = min(first + generator.randrange(LONGEST_RUN), len(spans) - 1)
    begin, end = spans[first][0], spans[last][1]
    return text[:end] + (gap + text[begin:end]) * generator.randint(1, MOST_TIMES) + text[end:]


def _cut(text: str, spans: list[tuple[int, int]], gap: str, generator: random.Random) -> str:
    return text[:generator.randint(max(1, len(text) // 3), max(1, 2 * len(text) // 3))]
