"""Chat templates in a sandbox: the same text as transformers renders, with limits on time, steps and size.

A checkpoint's template is a program that somebody else wrote. It runs in jinja2's immutable sandbox with the names that
transformers gives to it (`raise_exception`, `strftime_now`, `tojson`, the tags `break`, `continue` and `generation`),
and it is stopped when it works for too long or writes too much.

    template = Template(source, name="smollm2", variables={"eos_token": "</s>"})
    text = template.render([{"role": "user", "content": "hi"}], add_generation_prompt=True)
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from danlu.core.errors import ConfigError

MAX_SECONDS = 5.0
MAX_CHARACTERS = 1_000_000  # that a template may write beyond what the messages hold
MAX_COPIES = 16  # how often it may write the messages' text
MAX_RANGE = 10_000

# The date that templates see: a date of today would give other training data tomorrow.
FIXED_DATE = datetime(2024, 7, 26)

# What a template can raise when the messages are not what it expects.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks what an assistant says; here it only renders its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """The body in a scope of its own, as transformers does it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class Sandbox(ImmutableSandboxedEnvironment):
    """The immutable sandbox with a deadline, looked at on every call and operation, and no huge products."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, now: Callable[[], datetime]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
        self.deadline = float("inf")
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: now().strftime(form)
        self.globals["range"] = _range

    def check_time(self) -> None:
        """Raises SecurityError when the template has worked for too long."""
        if time.monotonic() > self.deadline:
            raise SecurityError(f"it works for more than {MAX_SECONDS:g} s")

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Every call that a template makes, after a look at the clock."""
        self.check_time()
        return super().call(*args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Products and powers, refused where they would be huge."""
        self.check_time()
        sizes = [len(x) if isinstance(x, (str, list, tuple)) else abs(x) for x in (left, right)]
        if operator == "**" and max(sizes) > 64:
            raise SecurityError("it asks for a huge power")
        numbers = all(isinstance(x, (int, float)) for x in (left, right))
        if operator == "*" and not numbers and sizes[0] * sizes[1] > MAX_CHARACTERS:
            raise SecurityError("it asks for a huge repetition")
        return super().call_binop(context, operator, left, right)


def _range(*args: int) -> range:
    made = range(*args)
    if len(made) > MAX_RANGE:
        raise SecurityError(f"it asks for a range of {len(made)} numbers")
    return made


def _raise_exception(message: str) -> str:
    raise TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


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

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False) -> str:
        """The text of a dialogue. Raises one of TEMPLATE_ERRORS where the template refuses or breaks."""
        limit = MAX_CHARACTERS + MAX_COPIES * sum(len(message["content"]) for message in messages)
        self.sandbox.deadline = time.monotonic() + MAX_SECONDS
        parts, size = [], 0
        for part in self.compiled.generate(messages=list(messages), tools=None, documents=None,
                                           add_generation_prompt=add_generation_prompt, **self.variables):
            parts.append(part)
            size += len(part)
            if size > limit:
                raise SecurityError(f"it writes more than {limit:,} characters")
            self.sandbox.check_time()
        return "".join(parts)
