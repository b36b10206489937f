"""The remote tier as the store sees it: a store that other nodes use too, and when to leave it alone.

Owns the remote store, its breaker, the threads that put (`remote_puts`) and get (`remote_gets`), and the look-ups of
matches, which run on the caller's thread and wait for a thread of `CallPool` for as long as their deadline allows.

A hit is decided as on disk: the header of a value is compared with what the prompt says, token by token, and whoever
uses the bytes verifies them. A value that failed that is deleted, and not looked at again until it is gone.
"""

import logging
import time
from collections.abc import Callable
from functools import partial

from cachetier.core.config import ServerConfig
from cachetier.core.errors import ProtocolError
from cachetier.core.keys import TOKEN_BYTES
from cachetier.remote.base import FrameMemory, Head, Outcome, RemoteStore, key_of
from cachetier.remote.registry import open_remote
from cachetier.storage.arena import Arena
from cachetier.storage.records import DiskChunk, header_bytes_of, peek_header_bytes, unpack_header
from cachetier.store.books import EXTRA_BYTES_MAX, Books
from cachetier.store.breaker import Breaker
from cachetier.store.call_pool import CallPool
from cachetier.store.chunk import HostChunk
from cachetier.store.flush import Flusher
from cachetier.store.prompt import Prompt
from cachetier.store.remote_gets import Fetcher
from cachetier.store.remote_puts import Putter

PROBE_KEY = "cachetier/probe"
LOOK_UP_FIRST, LOOK_UP_CHUNKS = 8, 64  # most prompts that are not held here are held nowhere
LOOK_UP_THREADS = 8
QUEUE_SHARE = 4  # of the arena, whose frames cannot be evicted while they wait
BODY_BYTES_MAX = 2048  # of what is in a header besides tokens and extras: some 80 ranks
STOP_TIMEOUT_S = 0.5

MakeStore = Callable[[FrameMemory], RemoteStore]

log = logging.getLogger(__name__)


class RemoteTier:
    """What matches, commits and invalidations have to do with the remote store.

    Attributes:
        fetcher, putter: see there.
    """

    def __init__(
        self, config: ServerConfig, books: Books, flusher: Flusher | None, arena: Arena, make: MakeStore
    ) -> None:
        """Open the store; `start` begins to use it.

        Raises:
            ConfigError: the URL is impossible, or a package is missing.
        """
        self._url = config.remote
        self._deadline_s = config.remote_deadline_ms / 1000
        self._books = books
        self._head_bytes = header_bytes_of(BODY_BYTES_MAX + EXTRA_BYTES_MAX + config.chunk_tokens * TOKEN_BYTES)
        self._store = make(FrameMemory(arena.path, arena.file_bytes, arena.data_offset, arena.frame))
        self._breaker = Breaker(self._probe, self._tell)
        self._calls = CallPool("remote-look-up", LOOK_UP_THREADS)
        self.fetcher = Fetcher(books, self._store, self._breaker, flusher, arena.frame, config.io_threads)
        limit_bytes = min(config.remote_queue_bytes, arena.data_bytes // QUEUE_SHARE)
        self.putter = Putter(books, self._store, self._breaker, limit_bytes)

    def start(self) -> None:
        """Start the threads."""
        self._breaker.start()
        self.fetcher.start()
        self.putter.start()

    @property
    def is_available(self) -> bool:
        """Whether the remote store may be asked."""
        return not self._breaker.is_open

    def deadline_for(self, prompt: Prompt) -> float | None:
        """Return until when to ask for the rest of a prompt (time.monotonic); None: it is not to be asked for."""
        number = len(prompt.held)
        if self._breaker.is_open or number == len(prompt.keys):
            return None
        # A chunk in the table that the match did not take is being stored, or is of another prompt.
        return None if prompt.keys[number] in self._books.table.chunks else time.monotonic() + self._deadline_s

    def look_up(self, prompt: Prompt, deadline: float) -> dict[int, DiskChunk]:
        """Return what the remote store has of the prompt's next chunks, up to the first miss (lock not held)."""
        first = len(prompt.held)
        end = first + (LOOK_UP_CHUNKS if first >= LOOK_UP_FIRST else LOOK_UP_FIRST)
        keys = [key for key in prompt.keys[first:end] if not self.putter.is_forgotten(key)]
        timeout_s = deadline - time.monotonic()
        if not keys or keys[0] != prompt.keys[first] or timeout_s <= 0 or self._breaker.is_open:
            return {}
        names = [key_of(prompt.namespace.id, key) for key in keys]
        heads = self._calls.call(partial(self._store.read_heads, names, self._head_bytes), timeout_s)
        if heads is None or any(head.outcome is Outcome.FAILED for head in heads):
            self._note_failure()
            return {}
        rows: dict[int, DiskChunk] = {}
        for number, (key, head) in enumerate(zip(keys, heads, strict=True), first):
            row = _parse(head)
            if row is None or row.key != key or key != prompt.keys[number] or not prompt.has(number, row):
                break
            rows[number] = row
        return rows

    def take(self, prompt: Prompt, row: DiskChunk) -> HostChunk | None:
        """Give a chunk that `look_up` found frames and have it fetched (lock held); None: there is no room."""
        try:
            tiling = prompt.namespace.tiling(row.tiling)
        except ProtocolError:
            return None
        if tiling.object_bytes != row.object_bytes:
            return None
        chunk = self._books.table.add_to_fill(row, prompt.root, tiling, is_remote=True)
        if chunk is not None:
            self.fetcher.offer(chunk)
        return chunk

    def forget(self, chunk: HostChunk) -> None:
        """Delete a damaged chunk (lock held); until that is done it is not found."""
        self.putter.forget(chunk.namespace, chunk.key)

    def expire(self) -> None:
        """Give up what takes too long (lock held); call it about once a second."""
        self.fetcher.expire(time.monotonic())
        self.putter.expire()

    def stop(self) -> None:
        """End the threads, but for those that hang in a call, and close the store."""
        self._breaker.stop()
        self.putter.stop(STOP_TIMEOUT_S)
        self.fetcher.stop(STOP_TIMEOUT_S)
        self._calls.stop()
        self._store.close()

    def _probe(self) -> bool:
        [outcome] = self._store.exists([PROBE_KEY])
        return outcome is not Outcome.FAILED

    def _tell(self, is_open: bool) -> None:
        if is_open:
            log.warning("the remote store %s failed or is too slow: it is left alone until it answers", self._url)
        else:
            log.info("the remote store %s answers", self._url)
            self.putter.resume()

    def _note_failure(self) -> None:
        self._breaker.fail()
        with self._books.lock:
            self._books.counters.remote_failures += 1


def open_remote_tier(
    config: ServerConfig, books: Books, flusher: Flusher | None, arena: Arena, make: MakeStore | None
) -> RemoteTier | None:
    """Return the remote tier that is configured, started; None: there is none. `make` opens another than configured.

    Raises:
        ConfigError: the URL is impossible, or a package is missing.
    """
    if not config.remote and make is None:
        return None
    if make is None and not config.secret_file:
        log.warning(
            "remote without secret_file: this server finds nothing that servers with other data directories have "
            "stored; give all of them the same secret_file"
        )
    tier = RemoteTier(config, books, flusher, arena, make or partial(open_remote, config.remote))
    tier.start()
    return tier


def _parse(head: Head) -> DiskChunk | None:
    """Return what the first bytes of a value say, None: nothing that can be believed."""
    if head.outcome is not Outcome.DONE:
        return None
    size = peek_header_bytes(head.data)
    header = unpack_header(head.data[:size]) if 0 < size <= len(head.data) else None
    return header.chunk if header else None
