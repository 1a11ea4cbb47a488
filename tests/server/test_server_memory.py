"""Free memory that the server gives back to the system."""

import asyncio
import os
import platform
from pathlib import Path

import pytest

from snoopi_rt.server import memory


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep memory in other ways")
def test_what_is_freed_between_blocks_in_use_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[bytes | None] = [bytes([1]) * 60_000 for _ in range(2000)]
    for i in range(0, len(blocks), 2):
        blocks[i] = None
    kept = resident()
    monkeypatch.setattr(memory, "SECONDS", 0.01)

    async def served() -> None:
        trimming = asyncio.create_task(memory.keep_trimming())
        await asyncio.sleep(0.5)
        trimming.cancel()

    asyncio.run(served())
    assert kept - resident() > 40e6  # of 60 MB


def test_another_c_library_ends_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    assert memory.trim() is None
    asyncio.run(asyncio.wait_for(memory.keep_trimming(), 5))
