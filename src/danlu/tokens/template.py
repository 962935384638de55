"""Chat templates in a sandbox: the same text as transformers renders, with limits on time, memory and size.

A checkpoint's template is a program that somebody else wrote. It runs in jinja2's immutable sandbox with the names that
transformers gives to it (`raise_exception`, `strftime_now`, `tojson`, the tags `break`, `continue` and `generation`),
and it is stopped when it works for too long, makes too much or writes too much (`danlu.tokens.sandbox` says how).

    template = Template(source, name="smollm2", variables={"eos_token": "</s>"})
    text = template.render([{"role": "user", "content": "hi"}], add_generation_prompt=True)
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.exceptions import SecurityError

from danlu.core.errors import ConfigError
from danlu.tokens.sandbox import Sandbox

MAX_SECONDS = 5.0
MAX_CHARACTERS = 1_000_000  # that a template may write beyond what the messages hold
MAX_COPIES = 16  # how often it may write the messages' text
MAX_MADE = 20_000_000  # characters that it may make on the way, beyond copies of what the messages hold

# The date that templates see: a date of today would give other training data tomorrow.
FIXED_DATE = datetime(2024, 7, 26)

# What a template can raise when the messages are not what it expects.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)


class Template:
    """One compiled chat template.

    name       for messages to people
    variables  the special tokens by their names (`bos_token`, `eos_token`, …)
    now        the clock that `strftime_now` reads; a fixed date unless given
    """

    def __init__(self, source: str, name: str, variables: Mapping[str, str],
                 now: Callable[[], datetime] | None = None) -> None:
        self.name = name
        self.variables = dict(variables)
        self.sandbox = Sandbox(now or (lambda: FIXED_DATE))
        try:
            self.compiled = self.sandbox.from_string(source)
        except TemplateSyntaxError as error:
            raise ConfigError(f"no valid Jinja template: {error.message} (line {error.lineno})", where=name) from None

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False,
               tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The text of a dialogue. Raises one of TEMPLATE_ERRORS where the template refuses or breaks."""
        said = sum(len(message["content"]) + len(message.get("reasoning_content", "")) for message in messages)
        said += sum(len(str(made)) for made in (*tools, *(message.get("tool_calls", "") for message in messages)))
        limit = MAX_CHARACTERS + MAX_COPIES * said
        # Every sum makes a copy, and a template that collects the dialogue in a variable makes one for each message.
        self.sandbox.begin(MAX_SECONDS, limit, MAX_MADE + (2 * MAX_COPIES + len(messages)) * said)
        parts, size = [], 0
        for part in self.compiled.generate(messages=list(messages), tools=list(tools) or None, documents=None,
                                           add_generation_prompt=add_generation_prompt, **self.variables):
            parts.append(part)
            size += len(part)
            if size > limit:
                raise SecurityError(f"it writes more than {limit:,} characters")
        return "".join(parts)
