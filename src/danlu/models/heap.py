"""Memory that was freed and is wanted again: kept in the process, where that is glibc's choice.

glibc gets every block of more than 32 MB from the system and gives it back when it is freed. Tensors of such sizes come
and go many times a step, and each time the system fills their pages with zeros first.
"""

import ctypes
import os

# Options of mallopt(3), from glibc's malloc.h.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
STEP = 64 << 20  # bytes by which the heap grows


def keep_freed_memory() -> None:
    """Lets all blocks come from the heap, and the heap keep what is freed, until the process ends; once is enough.

    Nothing happens with another C library, or where MALLOC_MMAP_MAX_ is set in the environment (65536 is glibc's default).
    """
    if "MALLOC_MMAP_MAX_" in os.environ:
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS and musl, Windows
        return
    for option, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, -1), (TOP_PAD, STEP)):
        mallopt(option, value)
