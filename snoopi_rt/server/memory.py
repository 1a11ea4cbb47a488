"""Free memory, given back to the system while a server runs.

glibc keeps what is freed between blocks that are in use. In a server whose threads encode images of all sizes that grows by megabytes a
minute, although the server holds no more than before.
"""

import asyncio
import ctypes
from collections.abc import Callable
from contextlib import suppress

SECONDS = 30.0
"""Between two trims, each of which takes some milliseconds."""


def trim() -> Callable[[int], int] | None:
    """The C library's malloc_trim, which gives whole free pages back; None if it has none, as on macOS, Windows and musl."""
    with suppress(OSError, AttributeError, TypeError):
        return ctypes.CDLL(None).malloc_trim
    return None


async def keep_trimming() -> None:
    """Gives free memory back again and again, if the C library can."""
    if (malloc_trim := trim()) is None:
        return
    while True:
        await asyncio.sleep(SECONDS)
        await asyncio.to_thread(malloc_trim, 0)
