"""From rows, as people publish them, to Preferences and to Prompts, with a reason for every refused row.

    {"prompt": "…" or [{"role": "user", "content": "…"}], "chosen": …, "rejected": …, "system": "…", "history": […]}
    {"conversations" or "messages": […], "chosen": …, "rejected": …}
    {"instruction": "…", "input": "…", "chosen": …, "rejected": …}        or "output": ["chosen", "rejected"]
    {"question": "…", "response_chosen": "…", "response_rejected": "…"}
    {"prompt": "…", "query": "…", "response": ["chosen", "rejected"]}
    {"chosen": …, "rejected": …}    two whole dialogues that differ in the last answer: messages, or one text of turns
                                    that begin with “Human:” and “Assistant:”

An answer is a text, an object of one turn, or a list of one text or of turns, of which the last is the assistant's.
What a reference model said of the two may stand beside them: `ref_chosen_logps` and `ref_rejected_logps`.

A Prompt needs no answers: any row of a dialogue gives one, which ends with the last question.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from danlu.core.ledger import Ledger
from danlu.core.records import Dialogue, Message, Preference, Prompt
from danlu.text.formats import BadRow, Rows, history_of, joined, opening, read_records, read_turns, text_of, unknown_shape
from danlu.text.rows import MAX_REFUSED, Gate, kind_of

PAIRS = (("chosen", "rejected"), ("response_chosen", "response_rejected"))
LISTS = ("response", "output")  # fields whose first two answers are a pair
ANSWERS = ("answer", *LISTS)  # fields of the answer that is known to be right
LOGPS = tuple((f"ref_{side}_logps", f"reference_{side}_logps") for side in ("chosen", "rejected"))
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def to_preference(row: dict[str, Any], where: str, source: str, category: str = "preference") -> Preference:
    """The preference of one row; `where` becomes its id. Raises BadRow where the row cannot be meant."""
    prompt = _prompt(row)
    chosen, rejected = (_answered(value, name, whole=prompt is None) for name, value in _pair(row))
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("the answers differ before the last turn")
    messages = _before(prompt or [], chosen[:-1])
    if not messages:
        raise BadRow("no prompt")
    if messages[-1].role != "user":
        raise BadRow("the prompt does not end with the user's turn")
    better, worse = chosen[-1].content, rejected[-1].content
    if better.strip() == worse.strip():
        raise BadRow("chosen and rejected are equal")
    return Preference(tuple(messages), better, worse, source, where, category, _logps(row))


def to_prompt(row: dict[str, Any], where: str, source: str, category: str = "prompt") -> Prompt:
    """The prompt of one row, up to the user's last turn. Raises BadRow where there is none.

    The answer is the field `answer`, `response` or `output`, or else the assistant's turn at the end; "" where neither is
    there. It is never a part of the prompt.
    """
    turns = _prompt(row)
    if turns is None:
        raise unknown_shape(row)
    answer = _known_answer(row)
    if turns and turns[-1].role == "assistant":
        answer = answer or turns[-1].content
    while turns and turns[-1].role != "user":
        turns.pop()
    if not turns:
        raise BadRow("no prompt")
    return Prompt(tuple(turns), answer, source, where, category)


def read_preferences(path: str, base: Path, ledger: Ledger, *, category: str = "preference", strict: bool = False,
                     max_refused: float = MAX_REFUSED) -> Iterator[Preference]:
    """The preferences of a file, a folder, a glob or `package:NAME/path`, counted at the station `read:<path>`.

    Rows come in as raw bytes and go out as preferences in bytes of their turns and both answers. Raises ConfigError if
    nothing is there, DataError at the first refused row (`strict`) or if more than `max_refused` are refused.
    """
    gate = Gate(f"read:{path}", ledger, strict, max_refused)
    yield from read_records(path, base, gate, category, Rows("preferences", to_preference))


def read_prompts(path: str, base: Path, ledger: Ledger, *, category: str = "prompt", strict: bool = False,
                 max_refused: float = MAX_REFUSED) -> Iterator[Prompt]:
    """The prompts of a file, a folder, a glob or `package:NAME/path`, counted as `read_preferences` counts.

    A conversation in YAML gives its last question, with the turns before it.
    """
    gate = Gate(f"read:{path}", ledger, strict, max_refused)
    yield from read_records(path, base, gate, category, Rows("prompts", to_prompt, _last_question))


def _last_question(dialogue: Dialogue) -> Prompt:
    *messages, answer = dialogue.messages
    return Prompt(tuple(messages), answer.content, dialogue.source, dialogue.id, dialogue.category)


def _prompt(row: dict[str, Any]) -> list[Message] | None:
    """The turns of the field that holds the prompt, after the system's text and the history; None: no such field.

    A prompt of its own goes before a list of turns: where both are there, the list is the dialogue with its answer.
    """
    there = {name for name, value in row.items() if value is not None}
    if "instruction" in there:
        turns = [Message("user", joined(row, "instruction", "input"))]
    elif isinstance(row.get("prompt"), list):
        if text_of(row, "query").strip():
            raise BadRow("wrong type", "“prompt” is a list of turns, to which no “query” can be joined")
        turns = _turns(row["prompt"])
    elif there & {"prompt", "query"}:
        turns = [Message("user", joined(row, "prompt", "query"))]
    elif "question" in there:
        turns = [Message("user", joined(row, "question"))]
    elif there & {"messages", "conversations"}:
        turns = _turns(row["messages" if "messages" in there else "conversations"])
    else:
        return None
    if not turns:
        raise BadRow("empty prompt")
    system, history = text_of(row, "system"), history_of(row)
    own, turns = _parted(turns)
    return [*(own or opening(None, system)), *opening(history, None), *turns]


def _turns(value: Any) -> list[Message]:
    """Turns with the keys `from` and `value`, or else `role` and `content`."""
    named = isinstance(value, list) and any(isinstance(turn, dict) and "from" in turn for turn in value)
    return read_turns(value, *(("from", "value") if named else ("role", "content")))


def _parted(turns: list[Message]) -> tuple[list[Message], list[Message]]:
    """The system's turn, if there is one, and the others."""
    count = int(bool(turns) and turns[0].role == "system")
    return turns[:count], turns[count:]


def _pair(row: dict[str, Any]) -> list[tuple[str, Any]]:
    """(field, value) of the better and of the worse answer."""
    for names in PAIRS:
        missing = [name for name in names if name not in row]
        if len(missing) == 1:
            raise BadRow("only one answer", f"the field “{missing[0]}” is missing")
        if not missing:
            return [(name, row[name]) for name in names]
    for name in LISTS:
        if name not in row:
            continue
        value = row[name]
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            raise BadRow("empty answer")
        if isinstance(value, str) or (isinstance(value, list) and len(value) == 1):
            raise BadRow("only one answer")
        if not isinstance(value, list):
            raise BadRow("wrong type", f"“{name}” is not a list but {kind_of(value)}")
        return [(name, value[0]), (name, value[1])]
    raise unknown_shape(row)


def _answered(value: Any, name: str, whole: bool) -> list[Message]:
    """Turns of which the last is an answer. `whole`: a text may be a whole dialogue."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        raise BadRow("empty answer")
    if isinstance(value, str):
        if not whole or not _SPEAKER.match(value.lstrip()):
            return [Message("assistant", value)]
        turns = _spoken(value)
    elif isinstance(value, dict | list):
        turns = _turns([value] if isinstance(value, dict) else value)
    else:
        raise BadRow("wrong type", f"“{name}” is not a text but {kind_of(value)}")
    if not turns or turns[-1].role != "assistant":
        raise BadRow("the answer is not the assistant's")
    return turns


def _spoken(text: str) -> list[Message]:
    """The turns of a text whose paragraphs begin with “Human:” or “Assistant:” where the speaker changes."""
    _, *parts = _SPEAKER.split(text.strip())
    turns = [{"role": role, "content": content.strip()} for role, content in zip(parts[::2], parts[1::2], strict=True)]
    return read_turns(turns, "role", "content")


def _before(prompt: list[Message], shared: list[Message]) -> list[Message]:
    """The prompt and the turns that both answers share before the last; these may repeat the prompt or go on from it."""
    system, asked = _parted(prompt)
    own, turns = _parted(shared)
    if turns[:len(asked)] == asked:
        asked = []
    elif turns and turns[0].role == "user":
        raise BadRow("the answers begin with another prompt")
    return [*(own or system), *asked, *turns]


def _logps(row: dict[str, Any]) -> tuple[float, float] | None:
    """What a reference model said of the chosen and of the rejected answer, where the row tells it."""
    found = []
    for names in LOGPS:
        for name in names:
            value = row.get(name)
            if value is None or value == "":  # an empty cell of a CSV
                continue
            if isinstance(value, str):  # a cell of a CSV
                value = _number(value, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise BadRow("wrong type", f"“{name}” is not a number but {kind_of(value)}")
            if not abs(value) <= 1e30:  # it is kept as a float32
                raise BadRow("log-probability that is not finite", f"“{name}”")
            found.append(float(value))
            break
    if len(found) == 1:
        raise BadRow("only one reference log-probability")
    return (found[0], found[1]) if found else None


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise BadRow("wrong type", f"“{name}” is not a number but a string") from None


def _known_answer(row: dict[str, Any]) -> str:
    """The right answer, as far as it is a text; of several the first."""
    for name in ANSWERS:
        value = row.get(name)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str) and value.strip():
            return value
    return ""
