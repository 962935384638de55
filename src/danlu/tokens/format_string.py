"""A template as people write one by hand: a format string over the columns of a table.

    form = FormatString("问题:{question}\n答案:{answer}")
    form.messages({"question": "1+1=", "answer": "2"})      # what is asked, and what is learned

The last placeholder is what is learned, or those that are named. What stands before an answer is a user's turn, the answer
an assistant's; text behind the last answer is learned with it, because a model has to write it before it may stop. With one
column in the question the saved chat template writes the text around it, so that a chat asks as the training did; with
more the question is what the user writes.
"""

from collections.abc import Iterable, Mapping, Sequence
from string import Formatter
from typing import Any

from danlu.core.errors import ConfigError, DataError, nearest
from danlu.core.records import Message


class FormatString:
    """A parsed format string; `{{` and `}}` are braces.

    answers  the placeholders that are learned; default: the last one

    Raises ConfigError where the text or the names cannot be meant.
    """

    def __init__(self, text: str, answers: Sequence[str] | None = None) -> None:
        self.text = text
        *self.parts, (self.tail, _) = _parse(text)  # (text before it, placeholder), and the text behind the last one
        self.columns = list(dict.fromkeys(name for _, name in self.parts))
        if not self.columns:
            raise ConfigError(f"the format string {text!r} has no {{column}}", key="template")
        last = self.parts[-1][1]
        self.answers = [last] if answers is None else list(answers)
        for name in self.answers:
            if name not in self.columns:
                raise ConfigError(f"the format string has no placeholder “{name}”", key="answer",
                                  hint=_hint(name, self.columns))
        if last not in self.answers:
            raise ConfigError(f"the placeholder “{last}” stands behind the last answer, where nothing reads it",
                              key="answer", hint="Put the answer at the end of the format string.")
        # One question and one answer: the chat template can write what stands around the question.
        self.framed = [name in self.answers for _, name in self.parts] == [False, True]

    def check_columns(self, columns: Iterable[str], where: str) -> None:
        """Raises ConfigError for a placeholder that is no column of the data."""
        known = list(columns)
        for name in self.columns:
            if name not in known:
                raise ConfigError(f"the data have no column “{name}”, which the template names", where=where,
                                  key="template", hint=_hint(name, known))

    def messages(self, row: Mapping[str, Any]) -> tuple[Message, ...]:
        """The row's turns. Raises DataError where a column is missing or no text, or an answer is empty."""
        values = [_text(row, name) for _, name in self.parts]
        if self.framed:
            asked, answer = values
            return Message("user", asked), Message("assistant", _answer(answer) + self.tail)
        messages: list[Message] = []
        asked = ""
        for number, ((text, name), value) in enumerate(zip(self.parts, values), 1):
            asked += text
            if name not in self.answers:
                asked += value
                continue
            if asked:
                messages.append(Message("user", asked))
            asked = ""
            messages.append(Message("assistant", _answer(value) + (self.tail if number == len(self.parts) else "")))
        return tuple(messages)

    def jinja(self) -> str:
        """The chat template that writes these turns."""
        before, between = (self.parts[0][0], self.parts[1][0]) if self.framed else ("", "")
        asked = " + ".join([*([literal(before)] if before else []), "message['content']",
                            *([literal(between)] if between else [])])
        return ("{{- bos_token }}\n{%- for message in messages %}\n    {%- if message['role'] == 'assistant' %}\n"
                "        {{- message['content'] + eos_token }}\n    {%- elif message['role'] == 'user' %}\n"
                f"        {{{{- {asked} }}}}\n    {{%- else %}}\n"
                "        {{- raise_exception('there is no place for a turn of ' + message['role']) }}\n    {%- endif %}\n"
                "{%- endfor %}\n")


def literal(text: str) -> str:
    """A text as a constant in Jinja."""
    for char, written in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(char, written)
    return f'"{text}"'


def _parse(text: str) -> list[tuple[str, str]]:
    """(text, placeholder) by turns; the last one is (text, "")."""
    parts, before = [], ""
    try:
        for written, name, spec, conversion in Formatter().parse(text):
            before += written
            if name is None:
                continue
            if not name or spec or conversion or not name.replace("-", "_").replace(" ", "_").isidentifier():
                shown = (name or "") + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
                raise ConfigError(f"the placeholder {{{shown}}} of the format string is no column's name", key="template",
                                  hint="Write {column}; a brace that is meant as text is written twice.")
            parts.append((before, name))
            before = ""
    except ValueError as error:
        raise ConfigError(f"the format string {text!r} cannot be read: {error}", key="template",
                          hint="A brace that is meant as text is written twice: {{ and }}.") from None
    return [*parts, (before, "")]


def _text(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        raise DataError(f"no column “{name}”")
    value = row[name]
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):  # also True and False
        return str(value)
    raise DataError(f"the column “{name}” is no text")


def _answer(value: str) -> str:
    if not value.strip():
        raise DataError("empty answer")
    return value


def _hint(name: str, known: Sequence[str]) -> str:
    close = nearest(name, known)
    return (f"Did you mean {{{close}}}? " if close else "") + f"There is {', '.join(known)}."
