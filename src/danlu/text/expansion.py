"""How far a compressed file may expand: a few kilobytes can hold terabytes, and nobody should read them to the end.

Text shrinks to between a third and a twentieth, logs and tables that repeat themselves to a hundredth; a file that was
made to be a bomb to a thousandth (gzip) or less. So a file may expand to MAX_RATIO times its size and FREE_BYTES more. What
lies behind is not read and stands in the ledger as one refused row with its place; what came before stays.

    with Bounded(gzip.open(path), limit_of(path.stat().st_size)) as file: ...       # read raises Expanded
"""

import io
from typing import Any

MAX_RATIO = 200
FREE_BYTES = 64 << 20
TOO_LARGE = "compressed data that expand too far"  # the reason in the ledger


class Expanded(OSError):
    """A compressed file holds more bytes than it may."""


class Bounded(io.RawIOBase):
    """The bytes of another stream; reading more than `limit` of them raises Expanded."""

    def __init__(self, file: Any, limit: int) -> None:
        self.file, self.limit, self.left = file, limit, limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size: int = self.file.readinto(buffer)
        self.left -= size
        if self.left < 0:
            raise Expanded(f"the compressed file holds more than {self.limit:,} bytes, too many for its size")
        return size

    def close(self) -> None:
        self.file.close()
        super().close()


def limit_of(size: int, limit: int | None = None) -> int:
    """The bytes to which a compressed file of that size may expand; `limit`: no more than these, whatever its size."""
    own = FREE_BYTES + MAX_RATIO * size
    return own if limit is None else min(own, limit)
