"""Documentation of installed packages as text: docstrings read from source with `ast`, without importing anything.

One module gives one document: every docstring in the order of the source, blank lines between them. The standard
library's help topics (`pydoc_data.topics`) are a dictionary in a module and give one document a topic.
"""

import ast
import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from danlu.core.errors import DataError
from danlu.text.rows import Gate

TOPICS = "pydoc_data.topics"
CODE = "code around the docstrings"


@dataclass(frozen=True, slots=True)
class ModuleText:
    """The text of one module (or of one help topic); `id` is its dotted name."""

    id: str
    text: str


def read_module(name: str, path: Path, gate: Gate) -> Iterator[ModuleText]:
    """The documents of one module. Takes the file as one row; a file that cannot be parsed is refused."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from error
    gate.take(rows=1, bytes=len(raw))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's source
            tree = ast.parse(raw)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = error.lineno if isinstance(error, SyntaxError) and error.lineno else 1
        gate.refuse(f"{name}:{line}", f"not Python: {type(error).__name__}: {error}", bytes=len(raw), kind="not Python")
        return
    texts = _topics(tree) if name == TOPICS else _docstrings(tree, name)
    texts = [text for text in texts if _is_encodable(text)]
    if not texts:
        gate.station.drop("no docstrings", rows=1, bytes=len(raw))
        return
    gate.split("topics in one module", len(texts) - 1)
    written = sum(len(text.text.encode()) for text in texts)
    gate.station.give(rows=len(texts), bytes=written)
    if written <= len(raw):
        gate.station.drop(CODE, bytes=len(raw) - written)
    else:
        gate.station.add("blank lines", bytes=written - len(raw))
    yield from texts


def _docstrings(tree: ast.Module, name: str) -> list[ModuleText]:
    parts: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = (ast.get_docstring(node, clean=True) or "").strip()
            if text:
                parts.append(text)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
                visit(child)

    with contextlib.suppress(RecursionError):  # generated source nested hundreds deep: keep what was found
        visit(tree)
    return [ModuleText(name, "\n\n".join(parts) + "\n")] if parts else []


def _topics(tree: ast.Module) -> list[ModuleText]:
    """One text a topic from `topics = {'name': 'text', …}`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and any(
                isinstance(target, ast.Name) and target.id == "topics" for target in node.targets):
            topics = ast.literal_eval(node.value)
            return [ModuleText(f"{TOPICS}#{topic}", text) for topic, text in sorted(topics.items())
                    if isinstance(topic, str) and isinstance(text, str) and text.strip()]
    return []


def _is_encodable(item: ModuleText) -> bool:
    try:
        item.text.encode()
    except UnicodeEncodeError:  # a docstring with half of a surrogate pair
        return False
    return True
