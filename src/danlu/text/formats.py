"""From rows, as people publish them, to Dialogues: one function for every format, and a reason for every refused row.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}
    {"instruction": "…", "input": "…", "output": "…", "system": "…", "history": [["…", "…"]]}
    {"prompt": "…", "query": "…", "response": "…" or ["…", …], "history": [["…", "…"]], "system": "…"}

`read_dialogues` reads files of such rows, and YAML files of `conversations:` (lists of turns, the user's first).
`read_records` is the reading itself, whatever the rows become; `preferences` reads by it too.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from danlu.core.errors import ConfigError, DataError
from danlu.core.ledger import Ledger
from danlu.core.records import Dialogue, Message, Preference, Prompt
from danlu.text.files import DATA_SUFFIXES, YAML_SUFFIXES, Located, locate
from danlu.text.rows import MARKUP, MAX_REFUSED, Gate, kind_of, read_values, refuse_value

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
STRING = "tag:yaml.org,2002:str"
Record = TypeVar("Record", Dialogue, Preference, Prompt)


class BadRow(Exception):
    """A row that gives no record. `kind` is the reason that is counted, `reason` the same with its details."""

    def __init__(self, kind: str, details: str = "") -> None:
        self.kind = kind
        self.reason = f"{kind}: {details}" if details else kind
        super().__init__(self.reason)


def to_dialogue(row: dict[str, Any], where: str, source: str, category: str = "chat") -> Dialogue:
    """The dialogue of one row; `where` becomes its id. Raises BadRow where the row cannot be meant."""
    if "messages" in row:
        messages = _learned(row["messages"], "role", "content")
    elif "conversations" in row:
        messages = _learned(row["conversations"], "from", "value")
        system = text_of(row, "system")
        if messages[0].role != "system":
            messages = [*opening(None, system), *messages]
    elif "instruction" in row or "prompt" in row:
        prompt, answer, history, said = construct(row)
        messages = [*opening(history, said), Message("user", prompt), Message("assistant", answer)]
    else:
        raise unknown_shape(row)
    return Dialogue(tuple(messages), source, where, category)


def unknown_shape(row: dict[str, Any]) -> BadRow:
    """The error for a row that has none of the keys by which a shape is known."""
    keys = ", ".join(str(key)[:40] for key in list(row)[:8]) or "none"
    return BadRow("unknown shape", f"keys found: {keys}")


def construct(row: dict[str, Any]) -> tuple[str, str, list[tuple[str, str]] | None, str | None]:
    """(prompt, answer, history, system) of an alpaca row or a prompt/response row.

    The prompt is `instruction` and `input`, or `prompt` and `query`, joined by a line end where both are there; of
    several answers the first counts; history and system are None where they are absent or empty.
    """
    first, second, answer = ("instruction", "input", "output") if "instruction" in row else (
        "prompt", "query", "response")
    return joined(row, first, second), _answer(row, answer), history_of(row), text_of(row, "system") or None


def joined(row: dict[str, Any], *names: str) -> str:
    """The texts of these fields with a line end between them, blank ones left out. BadRow where nothing is left."""
    prompt = "\n".join(part for part in (text_of(row, name) for name in names) if part.strip())
    if not prompt:
        raise BadRow("empty prompt")
    return prompt


def text_of(row: dict[str, Any], name: str) -> str:
    """The field's text; "" where it is absent or null."""
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow("wrong type", f"“{name}” is not a text but {kind_of(value)}")
    return value


def _answer(row: dict[str, Any], name: str) -> str:
    if name not in row:
        raise BadRow("no answer", f"the field “{name}” is missing")
    value = row[name]
    if isinstance(value, list):
        if not value:
            raise BadRow("empty answer")
        value = value[0]
    if value is not None and not isinstance(value, str):
        raise BadRow("wrong type", f"“{name}” is not a text but {kind_of(value)}")
    if not value or not value.strip():
        raise BadRow("empty answer")
    return value


def history_of(row: dict[str, Any]) -> list[tuple[str, str]] | None:
    """The earlier pairs of question and answer; None where there are none."""
    value = row.get("history")
    if not value and (value is None or isinstance(value, list | str)):
        return None
    if not isinstance(value, list):
        raise BadRow("wrong type", f"“history” is not a list but {kind_of(value)}")
    pairs = []
    for pair in value:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise BadRow("wrong type", "“history” holds something that is no pair of texts")
        if not pair[0].strip() or not pair[1].strip():
            raise BadRow("empty turn in the history")
        pairs.append((pair[0], pair[1]))
    return pairs


def opening(history: list[tuple[str, str]] | None, system: str | None) -> list[Message]:
    """What comes before a row's own turns: the system's text, unless it is blank, and the earlier pairs."""
    messages = [Message("system", system)] if system and system.strip() else []
    for question, reply in history or []:
        messages += [Message("user", question), Message("assistant", reply)]
    return messages


def _learned(turns: Any, role_key: str, content_key: str) -> list[Message]:
    """The turns of a dialogue that is trained on: it has an answer, and no answer a weight of its own."""
    messages = read_turns(turns, role_key, content_key)
    for number, turn in enumerate(turns, 1):
        if ROLES[turn[role_key].strip().lower()] == "assistant" and \
                any(turn.get(key, 1) != 1 for key in ("weight", "loss_weight")):
            raise BadRow("weight on a turn", f"turn {number}: an answer is learned whole or not at all")
    if not any(message.role == "assistant" for message in messages):
        raise BadRow("no assistant turn")
    return messages


def read_turns(turns: Any, role_key: str, content_key: str) -> list[Message]:
    """The messages of a list of objects; a blank system turn is left out, other blank ones are refused."""
    if not isinstance(turns, list):
        raise BadRow("wrong type", f"the turns are not a list but {kind_of(turns)}")
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise BadRow("wrong type", f"turn {number} is not an object but {kind_of(turn)}")
        role = turn.get(role_key)
        if not isinstance(role, str):
            raise BadRow("wrong type", f"turn {number} has no “{role_key}”")
        known = ROLES.get(role.strip().lower())
        if known is None:
            raise BadRow("unknown role", f"“{role[:40]}”")
        content = _content(turn.get(content_key), number)
        if known == "system" and number > 1:
            raise BadRow("system turn that is not the first")
        if content.strip():
            messages.append(Message(known, content))
        elif known != "system":
            raise BadRow("empty answer" if known == "assistant" else "empty prompt", f"turn {number}")
    return messages


def _content(value: Any, number: int) -> str:
    """A text, or a list of parts `{"type": "text", "text" or "value": "…"}`."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise BadRow("wrong type", f"the content of turn {number} is not a text but {kind_of(value)}")
    texts = []
    for part in value:
        text = (part.get("text", part.get("value")) if isinstance(part, dict) and part.get("type") == "text" else None)
        if not isinstance(text, str):
            raise BadRow("content that is no text", f"turn {number}")
        texts.append(text)
    return "".join(texts)


def read_dialogues(path: str, base: Path, ledger: Ledger, *, category: str = "chat", strict: bool = False,
                   max_refused: float = MAX_REFUSED) -> Iterator[Dialogue]:
    """The dialogues of a file, a folder, a glob or `package:NAME/path`, counted at the station `read:<path>`.

    Rows that come in are rows of the files in raw bytes (of YAML: turns); rows that go out are dialogues in bytes of
    their turns' text. Raises ConfigError if nothing is there, DataError at the first refused row (`strict`) or if more
    than `max_refused` of the rows are refused.
    """
    gate = Gate(f"read:{path}", ledger, strict, max_refused)
    yield from read_records(path, base, gate, category, Rows("dialogues", to_dialogue, lambda dialogue: dialogue))


@dataclass(frozen=True, slots=True)
class Rows(Generic[Record]):
    """What rows become.

    name           what people call the records
    convert        the record of (row, where, source, category); raises BadRow
    from_dialogue  the record of a conversation in YAML, of as many bytes; None: YAML is not read
    """

    name: str
    convert: Callable[[dict[str, Any], str, str, str], Record]
    from_dialogue: Callable[[Dialogue], Record] | None = None


def read_records(path: str, base: Path, gate: Gate, category: str, rows: Rows[Record]) -> Iterator[Record]:
    """The records of a file, a folder, a glob or `package:NAME/path`, counted and refused at the gate."""
    suffixes = DATA_SUFFIXES + (YAML_SUFFIXES if rows.from_dialogue else ())
    for located in locate(path, base, suffixes):
        suffix = located.path.suffix.lower()
        if suffix in DATA_SUFFIXES:
            yield from _read_data(located, gate, category, rows.convert)
        elif suffix in suffixes and rows.from_dialogue:
            yield from map(rows.from_dialogue, _read_yaml(located, gate, category))
        else:
            raise ConfigError(f"“{located.label}” is not a file of {rows.name}",
                              hint=f"{rows.name.capitalize()} are read from {', '.join(suffixes)}.")
    gate.finish()


def _read_data(located: Located, gate: Gate, category: str,
               convert: Callable[[dict[str, Any], str, str, str], Record]) -> Iterator[Record]:
    for value in read_values(located, gate):
        if not isinstance(value.value, dict):
            kind = kind_of(value.value)
            refuse_value(gate, value, f"not an object but {kind}")
            continue
        try:
            record = convert(value.value, value.where, located.label, category)
        except BadRow as error:
            refuse_value(gate, value, error.reason, kind=error.kind)
            continue
        gate.give(record.num_bytes, value.bytes)
        yield record


def _read_yaml(located: Located, gate: Gate, category: str) -> Iterator[Dialogue]:
    """Conversations: the user's turn first, then answer and question by turns; whole pairs are kept."""
    root, size = _compose(located, gate)
    conversations = _entry(root, "conversations")
    if root is not None and not isinstance(conversations, SequenceNode):
        gate.take(rows=1)
        gate.refuse(f"{located.label}:1", "no list of “conversations”")
    written = 0
    for node in conversations.value if isinstance(conversations, SequenceNode) else []:
        messages = _turns(node, located.label, gate)
        if messages:
            dialogue = Dialogue(tuple(messages), located.label, f"{located.label}:{node.start_mark.line + 1}", category)
            written += dialogue.num_bytes
            gate.station.give(rows=1, bytes=dialogue.num_bytes)
            yield dialogue
    if size > written:
        gate.station.drop(MARKUP, bytes=size - written)
    elif written > size:  # anchors: a text written once and used often
        gate.station.add("repeated by anchors", bytes=written - size)


def _compose(located: Located, gate: Gate) -> tuple[Node | None, int]:
    """The YAML as nodes, which know their lines and hold plain strings: nothing is constructed. (None, 0) if broken."""
    try:
        raw = located.path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(located.path)) from error
    gate.take(bytes=len(raw))
    reason, line = "not UTF-8", 1
    try:
        return YAML(typ="safe", pure=True).compose(raw.decode("utf-8-sig")), len(raw)
    except UnicodeDecodeError as error:
        line = raw[:error.start].count(b"\n") + 1
    except MarkedYAMLError as error:
        reason = f"bad YAML: {error.problem}"
        line = error.problem_mark.line + 1 if error.problem_mark else 1
    except (YAMLError, ValueError, RecursionError) as error:
        reason = f"bad YAML: {error}"
    gate.take(rows=1)
    gate.refuse(f"{located.label}:{line}", reason, bytes=len(raw), kind=reason.partition(":")[0])
    return None, 0


def _entry(node: Node | None, name: str) -> Node | None:
    if isinstance(node, MappingNode):
        for key, value in node.value:
            if isinstance(key, ScalarNode) and key.value == name:
                return value
    return None


def _turns(node: Node, label: str, gate: Gate) -> list[Message]:
    """The whole pairs before the first turn that is no text; every turn is counted as a row."""
    line = node.start_mark.line + 1
    if not isinstance(node, SequenceNode):
        gate.take(rows=1)
        gate.refuse(f"{label}:{line}", "a conversation that is no list of turns", str(node.value))
        return []
    texts: list[str] = []
    gate.take(rows=len(node.value))
    for number, item in enumerate(node.value):
        if not isinstance(item, ScalarNode) or item.tag != STRING or not item.value.strip():
            kind = "empty turn" if isinstance(item, ScalarNode) and item.tag == STRING else "a turn that is no text"
            gate.refuse(f"{label}:{item.start_mark.line + 1}", kind, str(item.value))
            left = len(node.value) - number - 1
            if left:
                gate.station.drop("after a refused turn", rows=left)
            break
        texts.append(item.value)
    if len(texts) % 2:
        gate.station.drop("odd last turn", rows=1)
        texts.pop()
    if texts:
        gate.station.drop("joined into a dialogue", rows=len(texts) - 1)
    return [Message("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)]
