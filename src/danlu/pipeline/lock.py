"""The lock that keeps two processes out of one run, and the note that says who holds it.

    with hold(Path("runs/quickstart")):
        ...
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from danlu.core.errors import ConfigError

LOCK = ".lock"
HOLDER = ".lock.pid"  # beside the lock, because a locked file cannot be read everywhere


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Holds a folder's lock. The system frees it when the process ends, however it ends.

    Raises ConfigError at once, naming the process, where another one holds it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise ConfigError(f"another danlu run is working on {folder}{_holder(folder)}",
                          hint="Wait until it ends, or stop it first.") from None
    except OSError as error:
        raise ConfigError(f"cannot be written to: {error.strerror}", where=str(folder),
                          hint="--runs names the folder for everything that is made.") from None
    try:
        (folder / HOLDER).write_text(f"{os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def _holder(folder: Path) -> str:
    try:
        process = (folder / HOLDER).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""  # it has only just begun, or is about to end
    return f" (process {process})" if process else ""
