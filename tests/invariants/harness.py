"""Kills a program again and again until it gets through, and compares what it leaves with an uninterrupted run.

The program is a function without arguments. It runs in a forked child of a warm process, so that a trial costs no
imports; the process must never have run a backward pass itself, because torch's autograd does not survive a fork.
A kill is a number of seconds, after which the child gets SIGKILL, or a function that is called in the child before
the program and arranges for SIGKILL at a certain place (`die_before`, `die_after`).

    endings = run_until_done(lambda: train(folder), [0.3, die_before(checkpoint, "write_tensors", nth=2)])
    assert not differences(reference, folder)
"""

import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Target = Callable[[], None]
Kill = float | Callable[[], None] | None


class Failed(AssertionError):
    """The program ended with an error of its own, which no kill explains."""


def die() -> None:
    """SIGKILL to this very process: no handler, no flush, no finally."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def patch(owner: Any, name: str, make: Callable[[Callable], Callable]) -> Callable[[], None]:
    """A function that replaces `owner.name` by `make(original)`; to be called in the child only."""

    def arm() -> None:
        setattr(owner, name, make(getattr(owner, name)))

    return arm


def die_before(owner: Any, name: str, nth: int = 1, when: Callable[..., bool] | None = None) -> Callable[[], None]:
    """Dies at the beginning of the nth call of `owner.name` (of those whose arguments `when` accepts)."""
    return _die_at(owner, name, nth, when, before=True)


def die_after(owner: Any, name: str, nth: int = 1, when: Callable[..., bool] | None = None) -> Callable[[], None]:
    """Dies at the end of the nth call of `owner.name`."""
    return _die_at(owner, name, nth, when, before=False)


def _die_at(owner: Any, name: str, nth: int, when: Callable[..., bool] | None, before: bool) -> Callable[[], None]:
    def make(original: Callable) -> Callable:
        calls = 0

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            mine = when is None or when(*args, **kwargs)
            calls += mine
            if before and mine and calls == nth:
                die()
            result = original(*args, **kwargs)
            if not before and mine and calls == nth:
                die()
            return result

        return wrapped

    return patch(owner, name, make)


def run(target: Target, kill: Kill = None, arms: Sequence[Callable[[], None]] = ()) -> bool:
    """Runs the program in a child, with a kill or without. True: it was killed; False: it came to its end.

    Raises Failed with the child's traceback where it ended in any other way.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(target, [*arms, *([kill] if callable(kill) else [])], writer)
    os.close(writer)
    try:
        if isinstance(kill, float | int):
            finished, _, _ = select.select([reader], [], [], kill)  # readable as soon as the child is gone
            if not finished:
                os.kill(child, signal.SIGKILL)
        said = b""
        while part := os.read(reader, 1 << 16):
            said += part
    finally:
        os.close(reader)
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if status != 0:
        raise Failed(said.decode(errors="replace") or f"the child ended with status {status}")
    return False


def _child(target: Target, arms: Sequence[Callable[[], None]], writer: int) -> None:
    code = 1
    try:
        for arm in arms:
            arm()
        target()
        code = 0
    except BaseException:
        os.write(writer, traceback.format_exc().encode()[-60000:])
    finally:
        os._exit(code)


def run_until_done(target: Target, kills: Sequence[Kill], arms: Sequence[Callable[[], None]] = (),
                   check: Callable[[], None] = lambda: None) -> list[bool]:
    """Runs the program once for each kill, and again until it ends. Says for each kill whether it struck.

    `check` is called after each kill and raises where what lies on the disk is not as it has to be.
    """
    struck = []
    for kill in kills:
        struck.append(run(target, kill, arms))
        if not struck[-1]:
            return struck
        check()
    killed = run(target, None, arms)
    assert not killed, "nothing was to kill the last run"
    return struck


def differences(left: Path, right: Path, names: Sequence[str] | None = None) -> list[str]:
    """The files (of `names`, else all) that are not byte for byte the same below two folders."""
    found = []
    for name in names if names is not None else sorted({*_files(left), *_files(right)}):
        a, b = left / name, right / name
        if not a.is_file() or not b.is_file() or a.read_bytes() != b.read_bytes():
            found.append(name)
    return found


def _files(folder: Path) -> Iterator[str]:
    return (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def flip_byte(path: Path, place: float = 0.5) -> None:
    """Inverts one bit of the byte at a relative place of a file."""
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(min(size - 1, int(size * place)))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x10]))


@contextmanager
def seconds() -> Iterator[Callable[[], float]]:
    """Measures what happens inside: `with seconds() as passed: …; passed()`."""
    begin = time.perf_counter()
    yield lambda: time.perf_counter() - begin
