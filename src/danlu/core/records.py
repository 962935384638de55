"""Records: one item as people write it, before any tokenizer has seen it.

`source` names where it came from as the user would (a file name, `package:NAME/path`, `task:NAME`), `category` is the
label by which losses and shares are reported, and `id` finds it again: `file:line` or a chapter or module name.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """A piece of running text."""

    text: str
    source: str
    id: str
    category: str = "text"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a dialogue; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Turns in order; the assistant's are what a model learns."""

    messages: tuple[Message, ...]
    source: str
    id: str
    category: str = "chat"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request with an answer that a Task's scorer can check."""

    messages: tuple[Message, ...]
    answer: str
    source: str
    id: str
    category: str = "task"
