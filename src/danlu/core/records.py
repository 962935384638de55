"""Records: one item as people write it, before any tokenizer has seen it.

`source` names where it came from as the user would (a file name, `package:NAME/path`, `task:NAME`), `category` is the
label by which losses and shares are reported, and `id` finds it again: `file:line` or a chapter or module name.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """A piece of running text."""

    text: str
    source: str
    id: str
    category: str = "text"

    @property
    def num_bytes(self) -> int:
        """Of what it says, in UTF-8."""
        return len(self.text.encode())


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a dialogue; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


def bytes_of(messages: Sequence[Message], *answers: str) -> int:
    """The bytes of turns, and of answers that stand beside them, in UTF-8."""
    return sum(len(message.content.encode()) for message in messages) + sum(len(answer.encode()) for answer in answers)


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Turns in order; the assistant's are what a model learns."""

    messages: tuple[Message, ...]
    source: str
    id: str
    category: str = "chat"

    @property
    def num_bytes(self) -> int:
        """Of what is said, in UTF-8."""
        return bytes_of(self.messages)


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

    @property
    def num_bytes(self) -> int:
        """Of the prompt and both answers, in UTF-8."""
        return bytes_of(self.messages, self.chosen, self.rejected)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request. `answer` is what a Task's scorer holds to be right; "" where nothing is known to be."""

    messages: tuple[Message, ...]
    answer: str
    source: str
    id: str
    category: str = "task"

    @property
    def num_bytes(self) -> int:
        """Of the prompt and the answer that is known, in UTF-8."""
        return bytes_of(self.messages, self.answer)
