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
class Preference:
    """A prompt (its last turn is the user's) and two answers to it, of which the first is preferred.

    ref_logps  what a reference model said of chosen and rejected, each summed over its tokens in nats; None: unknown
    """

    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    source: str
    id: str
    category: str = "preference"
    ref_logps: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request. `answer` is what a Task's scorer holds to be right; "" where nothing is known to be."""

    messages: tuple[Message, ...]
    answer: str
    source: str
    id: str
    category: str = "task"
