"""The sandbox that chat templates run in: it stops what takes too long, and refuses a large value before it is made.

Jinja's own sandbox looks at calls only. Here the code that jinja compiles also tells the sandbox of every turn of a
loop, every sum, slice, list, filter and written value. Each of them is a look at the clock and a payment: what a
template makes, in characters, must stay within what it may make, and no single value may be larger than `largest`.
Since every value is bounded when it is made, so is all that can be done with it in one step.

    sandbox = Sandbox(now=lambda: FIXED_DATE)
    sandbox.begin(seconds=5.0, largest=1_000_000, in_all=20_000_000)
    sandbox.from_string(source).render(messages=messages)
"""

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import wraps
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.utils import Namespace
from markupsafe import Markup

MAX_RANGE = 10_000  # numbers of a range, and the widths, counts and digits that filters take
MAX_SUMS = 8  # that are made before they are paid for
MAX_BITS = 1 << 16  # of a whole number: the time of a division grows with their square
ENTRY = 8  # what an entry of a list counts, in characters

# Filters that no chat template needs and whose time or size no look at their arguments can tell.
REMOVED_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
COUNTED_FILTERS = ("batch", "center", "indent", "round", "slice")
PAID = (nodes.Add, nodes.Concat, nodes.Filter, nodes.Call)  # what has paid before it is written
DIRECTIVE = re.compile(r"%(?:\(.*?\))?[-+ #0]*(\*|\d+)?(?:\.(\*|\d+))?", re.DOTALL)  # of the operator %
NUMBER = re.compile(r"\d+")


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


class Payments(CodeGenerator):
    """Jinja's compiler, which puts a payment into every loop and around whatever makes a value."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        """A payment for each turn, for the text in the body, and for each item that the loop's `if` looks at."""
        size = 1 + sum(len(part.data) for part in node.find_all(nodes.TemplateData))
        size += sum(len(part.value) for part in node.find_all(nodes.Const) if isinstance(part.value, str))
        node.body.insert(0, nodes.ExprStmt(_payment(size, node.lineno), lineno=node.lineno))
        if node.test is not None:
            paid = nodes.Not(_payment(1, node.lineno), lineno=node.lineno)  # `spend` gives None
            node.test = nodes.And(paid, node.test, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_Call(self, node: nodes.Call, frame: Frame, forward_caller: bool = False) -> None:
        """A payment of `visit_For`, which needs no sandboxed call; or any call."""
        if isinstance(node.node, nodes.EnvironmentAttribute):
            self.write(f"environment.{node.node.name}({node.args[0].as_const()})")
        else:
            super().visit_Call(node, frame, forward_caller=forward_caller)

    def visit_Add(self, node: nodes.BinExpr, frame: Frame) -> None:
        """`a + b + c`: one payment for a few sums, whose parts are bounded."""
        parts: list[nodes.Expr] = []
        first: nodes.Expr = node
        while isinstance(first, nodes.Add) and len(parts) < MAX_SUMS:
            parts.append(first.right)
            first = first.left
        self.write("environment.paid(" + "(" * len(parts))
        self.visit(first, frame)
        for part in reversed(parts):
            self.write(" + ")
            self.visit(part, frame)
            self.write(")")
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """`a ~ b`."""
        self.write("environment.joined(context, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Filter(self, node: nodes.Filter, frame: Frame) -> None:
        """`a | f`."""
        self._paid(super().visit_Filter, node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        """`a[1:2]`; other items are there already."""
        if isinstance(node.arg, nodes.Slice):
            self._paid(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        """`[a, b]`; a list of constants is as long as the source says."""
        self._made(super().visit_List, node, node.items, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        """`(a, b)`, unless it is what a loop or a `set` assigns to."""
        self._made(super().visit_Tuple, node, node.items if node.ctx == "load" else [], frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        """`{'a': b}`."""
        self._made(super().visit_Dict, node, [pair.value for pair in node.items], frame)

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData | nodes.Const):
            raise nodes.Impossible  # jinja would work it out now, and nobody would pay
        return super()._output_child_to_const(node, frame, finalize)

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        super()._output_child_pre(node, frame, finalize)
        if not isinstance(node, PAID):
            self.write("environment.paid(")

    def _output_child_post(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        if not isinstance(node, PAID):
            self.write(")")
        super()._output_child_post(node, frame, finalize)

    def _made(self, visit: Callable[..., None], node: nodes.Node, items: Sequence[nodes.Node], frame: Frame) -> None:
        if all(isinstance(item, nodes.Const) for item in items):
            visit(node, frame)
        else:
            self._paid(visit, node, frame)

    def _paid(self, visit: Callable[..., None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.paid(")
        visit(node, frame)
        self.write(")")


def _payment(size: int, line: int) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute("spend"), [nodes.Const(size)], [], None, None, lineno=line)


class Sandbox(ImmutableSandboxedEnvironment):
    """The immutable sandbox with a clock and a purse."""

    intercepted_binops = frozenset({"*", "**", "%"})
    code_generator_class = Payments

    def __init__(self, now: Callable[[], datetime]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
        self.begin(5.0, 1_000_000, 20_000_000)
        for name in REMOVED_FILTERS:
            del self.filters[name]
        for name in (*COUNTED_FILTERS, "format", "join", "replace", "sum"):
            self.filters[name] = self._guarded(name, self.filters[name])
        self.filters["tojson"] = self._tojson
        del self.globals["lipsum"]
        self.globals["namespace"] = Names
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: now().strftime(form)
        self.globals["range"] = _range

    # The clock and the purse -------------------------------------------------------------------------------------

    def begin(self, seconds: float, largest: int, in_all: int) -> None:
        """Sets the clock and fills the purse: characters of the largest value, and of all that is made."""
        self.seconds, self.largest, self.in_all = seconds, largest, in_all
        self.deadline = time.monotonic() + seconds
        self.made = 0

    def spend(self, size: int) -> None:
        """A look at the clock and a payment. Raises SecurityError when the time or the purse is used up."""
        self.made += size
        if time.monotonic() > self.deadline:
            raise SecurityError(f"it works for more than {self.seconds:g} s")
        if self.made > self.in_all:
            raise SecurityError(f"it makes more than {self.in_all:,} characters")

    def require(self, size: int) -> None:
        """Refuses a value of that size before it is made."""
        if size > self.largest:
            raise SecurityError(f"it asks for a huge text or list, of {size:,} or more characters")

    def paid(self, value: Any) -> Any:
        """A value that the template made, after its payment."""
        if type(value) is str:  # the usual case, in few steps
            size = len(value)
            self.made += size
            if size > self.largest or self.made > self.in_all or time.monotonic() > self.deadline:
                self._pay(value)
        else:
            self._pay(value)
        return value

    def _pay(self, value: Any) -> None:
        if isinstance(value, list | tuple | dict | set):
            # What its entries hold is there already, but together they may be huge: [text, text, …].
            self.spend(ENTRY * len(value))
            self.require(_size(value, self.largest))
        else:
            size = _size(value, self.largest)
            self.require(size)
            self.spend(size)

    # What a template does ----------------------------------------------------------------------------------------

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Every call that a template makes; methods that can make much of little are looked at first."""
        self.spend(1)
        owner = getattr(function, "__self__", None) if isinstance(function, BuiltinMethodType | MethodType) else None
        if isinstance(owner, str | bytes | int):
            args = self._checked(owner, function.__name__, args, kwargs)
        return self.paid(super().call(context, function, *args, **kwargs))

    def _checked(self, owner: Any, name: str, args: tuple, kwargs: Mapping[str, Any]) -> tuple:
        """The arguments of a method of a text or number, which must not be huge."""
        width = max((x for x in (*args, *kwargs.values()) if isinstance(x, int)), default=0)
        if name in ("ljust", "rjust", "center", "zfill", "to_bytes"):
            self.require(width)
        elif name == "expandtabs":
            self.require(len(owner) + owner.count(owner[:0] + "\t" if isinstance(owner, str) else b"\t") * max(width, 8))
        elif name == "replace" and len(args) > 1 and all(isinstance(x, str | bytes) for x in args[:2]):
            self.require(len(owner) + owner.count(args[0]) * len(args[1]))
        elif name == "join" and args:
            items = list(args[0])
            self.require(len(owner) * len(items) + _size(items, self.largest))
            return (items, *args[1:])
        elif name == "translate":
            raise SecurityError("it calls translate, which chat templates have no use for")
        return args

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Products, powers and filled-in texts, refused where they would be huge."""
        if operator == "%" and type(left) is int:  # loop.index0 % 2
            return left % right
        if operator == "%" and isinstance(left, str | bytes):
            self._check_directives(left, right)
        elif operator in ("*", "**"):
            self._check_product(operator, left, right)
        return self.paid(self.binop_table[operator](left, right))

    def _check_product(self, operator: str, left: Any, right: Any) -> None:
        numbers = [x for x in (left, right) if isinstance(x, int | float)]
        if operator == "**" and any(abs(x) > 64 for x in numbers):
            raise SecurityError("it asks for a huge power")
        if len(numbers) == 1:
            other = right if numbers[0] is left else left
            if isinstance(other, str | bytes | list | tuple):
                self.require(int(numbers[0]) * max(1, len(other)))

    def _check_directives(self, text: str | bytes, values: Any) -> None:
        """Refuses `text % values` where it would be huge, or where its widths are given as values."""
        found = DIRECTIVE.findall(text.decode("latin-1") if isinstance(text, bytes) else text)
        widths = [width for pair in found for width in pair if width]
        if "*" in widths:
            raise SecurityError("it asks for a text with a computed width")
        entries = values.values() if isinstance(values, dict) else values if isinstance(values, tuple) else (values,)
        longest = max((_size(value, self.largest) for value in entries), default=0)
        self.require(len(text) + sum(int(width[:12]) for width in widths) + longest * len(found))

    def joined(self, context: Any, parts: Sequence[Any]) -> str:
        """`a ~ b`: the parts as one text."""
        self.require(sum(len(part) for part in parts if isinstance(part, str)))
        return self.paid((markup_join if context.eval_ctx.autoescape else str_join)(parts))

    def call_filter(self, *args: Any, **kwargs: Any) -> Any:
        """A filter that another filter calls, such as `map`."""
        return self.paid(super().call_filter(*args, **kwargs))

    def call_test(self, *args: Any, **kwargs: Any) -> Any:
        """A test that a filter calls, such as `select`."""
        self.spend(1)
        return super().call_test(*args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` with a formatter that pays for every field."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text = value.__self__
        formatter = MarkupFields(self, escape=text.escape) if isinstance(text, Markup) else Fields(self)

        @wraps(wrapped)
        def format_fields(*args: Any, **kwargs: Any) -> str:
            if value.__name__ == "format_map":
                args, kwargs = (), *args
            return type(text)(formatter.vformat(text, args, kwargs))

        return format_fields

    # Filters -----------------------------------------------------------------------------------------------------

    def _guarded(self, name: str, made: Callable[..., Any]) -> Callable[..., Any]:
        """A filter of jinja's that looks at its arguments first."""
        first = int(hasattr(made, "jinja_pass_arg"))  # what jinja hands over before the value

        @wraps(made)
        def filtered(*args: Any, **kwargs: Any) -> Any:
            value, *rest = args[first:]
            return made(*args[:first], self._check_filter(name, value, rest, kwargs), *rest, **kwargs)

        return filtered

    def _check_filter(self, name: str, value: Any, rest: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The value that the filter gets, unless its result would be huge."""
        given = [*rest, *kwargs.values()]
        if name in COUNTED_FILTERS:
            numbers = [abs(x) for x in given if isinstance(x, int | float)]
            if any(x > MAX_RANGE for x in numbers):
                raise SecurityError(f"it asks for {max(numbers):,} in the filter {name}")
            if name == "indent":
                widths = [*numbers, *(len(x) for x in given if isinstance(x, str)), 4]
                self.require(int(max(widths)) * (str(value).count("\n") + 1))
        elif name == "format":
            self._check_directives(str(value), dict(kwargs) or tuple(rest))
        elif name == "replace":
            old, new = (str(x) for x in (*given, "", "")[:2])
            self.require(len(str(value)) + str(value).count(old) * max(len(old), len(new)))
        elif name == "join":
            value = list(value)
            longest = max((len(x) for x in given if isinstance(x, str)), default=0)
            self.require(longest * len(value) + _size(value, self.largest))
        elif name == "sum" and any(isinstance(x, list | tuple) for x in given):
            raise SecurityError("it asks for a sum of lists")
        return value

    def _tojson(self, value: Any, ensure_ascii: bool = False, indent: int | str | None = None,
                separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
        if isinstance(indent, int) and indent > MAX_RANGE:
            raise SecurityError(f"it asks for an indent of {indent:,}")
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        if indent is None and separators is None:
            return encoder.encode(value)
        parts = []
        for part in encoder.iterencode(value):
            self.spend(len(part))
            parts.append(part)
        return "".join(parts)


class Names(Namespace):
    """Jinja's `namespace`. It can hold itself, so it is not written with what it holds."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Paying(SandboxedFormatter):
    """`str.format`, where every field is paid for."""

    _env: Sandbox

    def format_field(self, value: Any, format_spec: str) -> Any:
        """One field, whose width must not be huge."""
        for width in NUMBER.findall(format_spec):
            self._env.require(int(width[:12]))
        return self._env.paid(super().format_field(value, format_spec))


class Fields(_Paying):
    """For plain texts."""


class MarkupFields(_Paying, SandboxedEscapeFormatter):
    """For texts that jinja escapes."""


def _size(value: Any, limit: int) -> int:
    """Characters of a value with all that it holds, about as `str` writes it; the count ends beyond the limit."""
    if isinstance(value, str | bytes):
        return len(value)
    total, waiting = 0, [value]
    while waiting and total + len(waiting) <= limit:
        item = waiting.pop()
        total += ENTRY
        if isinstance(item, str | bytes):
            total += len(item)
        elif isinstance(item, dict):
            waiting += item.keys()
            waiting += item.values()
        elif isinstance(item, list | tuple | set | frozenset):
            waiting += item
        elif isinstance(item, int) and item.bit_length() > MAX_BITS:
            raise SecurityError("it asks for a huge number")
    return total + len(waiting)


def _range(*args: int) -> range:
    made = range(*args)
    if len(made) > MAX_RANGE:
        raise SecurityError(f"it asks for a range of {len(made)} numbers")
    return made


def _raise_exception(message: str) -> str:
    raise TemplateError(message)
