"""`cachetier doctor --remote URL`: can the store that nodes share be used from here, and how long does it take?"""

import os
import tempfile
import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

from cachetier.cli.doctor_checks import SHARED_MEMORY, Result, Status
from cachetier.core.config import MIB, ServerConfig
from cachetier.core.errors import CachetierError
from cachetier.remote.base import Extent, FrameMemory, Outcome, Place, RemoteStore, Value
from cachetier.remote.registry import open_remote
from cachetier.storage.arena import Arena

NAME = "remote store"
HEADER_BYTES = 4096
PROBE_BYTES = MIB
ARENA_BYTES = 4 * MIB
TIMES = 5

T = TypeVar("T")


def check_remote(url: str) -> Result:
    """Put a probe object, get it back, compare, delete it; a node of Mooncake's gives no memory meanwhile."""
    if urlsplit(url).scheme == "mooncake" and "segment_bytes" not in url:
        url += ("&" if urlsplit(url).query else "?") + "segment_bytes=0"
    try:
        with tempfile.TemporaryDirectory(dir=SHARED_MEMORY, prefix="cachetier-doctor-") as folder:
            arena = Arena.create(os.path.join(folder, "arena"), ARENA_BYTES, bytes(16))
            store = open_remote(url, FrameMemory(arena.path, arena.file_bytes, arena.data_offset, arena.frame))
            try:
                return _round_trips(store, arena)
            finally:
                store.close()
                arena.close()
    except (CachetierError, OSError) as error:
        return Result(Status.FAIL, NAME, str(error), "see docs/disaggregation.md")


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    """Return how many seconds `call` took, and what it returned."""
    start = time.perf_counter()
    answer = call()
    return time.perf_counter() - start, answer


def _round_trips(store: RemoteStore, arena: Arena) -> Result:
    """Measure; the first look-up, which connects, is not counted."""
    key, source, target = f"cachetier/doctor/{os.getpid()}", Extent(0, PROBE_BYTES), Extent(PROBE_BYTES, PROBE_BYTES)
    content, header = os.urandom(PROBE_BYTES), bytes(HEADER_BYTES)
    if store.exists([key]) == [Outcome.FAILED]:
        advice = "is the address right, the store running, and may this node use it? The lines above may say more"
        return Result(Status.FAIL, NAME, "does not answer", advice)
    arena.frame(*source)[:] = content
    put_s, put = _timed(lambda: store.put([Value(key, header, [source])]))
    if put == [Outcome.FULL]:
        advice = "start a server with --remote on a node first: it brings memory with it (segment_bytes)"
        return Result(Status.WARN, NAME, "answers, and has no room for a probe object", advice)
    look_up_s = min(_timed(lambda: store.read_heads([key], HEADER_BYTES))[0] for _ in range(TIMES))
    get_s, got = min(
        (_timed(lambda: store.get([Place(key, HEADER_BYTES, [target])])) for _ in range(TIMES)),
        key=lambda timed: timed[0],
    )
    store.delete([key])
    if put != [Outcome.DONE] or got != [Outcome.DONE] or arena.frame(*target) != content:
        return Result(Status.FAIL, NAME, "a probe object did not come back as it was put", "see the store's own log")
    speeds = f"puts {PROBE_BYTES / put_s / 1e9:.2f} GB/s, gets {PROBE_BYTES / get_s / 1e9:.2f} GB/s in one stream"
    text = f"a look-up takes {look_up_s * 1000:.1f} ms; {speeds}"
    if look_up_s * 1000 > ServerConfig().remote_deadline_ms / 2:
        return Result(Status.WARN, NAME, text, "hits will be missed: raise --remote-deadline-ms, and match_deadline_ms")
    return Result(Status.OK, NAME, text)
