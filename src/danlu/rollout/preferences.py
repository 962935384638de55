"""Preferences against a model's own mistakes: what it answers wrongly is the better rejected answer.

A rejected answer that somebody thought up teaches a judge what nobody says. One that the model itself samples, and the
task's scorer refuses, is a mistake that will come up again.

    for record in sampled_preferences(loaded, TASKS["skills"], records, stop_ids, seed=1): …
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from danlu.core.errors import DataError
from danlu.core.records import Preference, Prompt
from danlu.models.generate import generate, max_positions, stop_ids_of
from danlu.tasks import Task
from danlu.tokens.chat import Chat
from danlu.tokens.codec import num_ids

SAMPLED = "sampled"
AT_ONCE = 256  # answers


def sampled_preferences(loaded: Any, task: Task, records: Sequence[Preference], seed: int, max_new_tokens: int
                        ) -> Iterator[Preference]:
    """The records of a task's prompts; where the model's answer at temperature 1 is wrong, it is the rejected one.

    Such a record gets the category `sampled`. Every prompt is asked once, with a random seed of its own; a record stays as
    it is where the answer is right, empty, does not end, or leaves no room.
    """
    chat = Chat(loaded.tokenizer, stop_ids_of(loaded.lm))
    limit = max_positions(loaded.lm)
    for start in range(0, len(records), AT_ONCE):
        part = records[start:start + AT_ONCE]
        asked = [(place, ids) for place, record in enumerate(part, start) if (ids := _prompt_ids(chat, record))
                 and (limit is None or len(ids) + max_new_tokens <= limit)]
        made = generate(loaded.lm, [ids for _, ids in asked], max_new_tokens=max_new_tokens, stop_ids=chat.stop_ids,
                        pad_id=0, num_ids=num_ids(loaded.tokenizer), temperature=1.0, batch_size=AT_ONCE,
                        seeds=[_key(seed, place) for place, _ in asked])
        said = {place: loaded.tokenizer.decode(answer.answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                for (place, _), answer in zip(asked, made) if answer.stopped}
        for place, record in enumerate(part, start):
            wrong = said.get(place, "")
            prompt = Prompt(record.messages, record.chosen, record.source, record.id)
            usable = wrong.strip() and wrong.strip() != record.chosen.strip() and task.score(prompt, wrong) == 0
            yield replace(record, rejected=wrong, category=SAMPLED) if usable else record


def _prompt_ids(chat: Chat, record: Preference) -> list[int]:
    """The prompt's tokens; none where the template refuses it."""
    try:
        return chat.prompt_ids(record.messages, record.tools)
    except DataError:
        return []


def _key(seed: int, place: int) -> int:
    return (seed * 1_000_003 + place) & (2**63 - 1)
