"""Errors for people. The command line prints their one message without a traceback and exits with code 2.

`ConfigError` is about what the user wrote in a recipe or on the command line, `DataError` about what was found in a
file. Both say where, what is wrong and what to do. Broken invariants of our own are `assert`s, never these.
"""

import difflib
from collections.abc import Iterable


class DanluError(Exception):
    """The parent of every error that is meant to be read by the person at the terminal.

    `key` is the setting that it is about, for callers that know in which file it stands.
    """

    exit_code = 2

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None, key: str = "") -> None:
        self.where, self.message, self.hint, self.key = where, message, hint, key
        super().__init__("".join([f"{where}: " if where else "", message, f"\n  {hint}" if hint else ""]))


class ConfigError(DanluError):
    """Something in a recipe, a setting or a command cannot be meant."""


class DataError(DanluError):
    """Something in a file is not what it has to be."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to what was written, or None where nothing is close."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return found[0] if found else None
