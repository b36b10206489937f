"""What the store knows, in one place, with the one lock that guards it.

Locking design: `Books.lock` guards every table and counter in `Books`. Whoever holds it does bookkeeping only: look-ups
on disk, reads, writes and waiting happen without it. `DiskPins` has a small lock of its own, taken last.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from cachetier.core.errors import ProtocolError
from cachetier.core.keys import TOKEN_BYTES, ChainHasher, contents_of
from cachetier.core.messages import MAX_CHUNKS, Report
from cachetier.storage.arena import Arena
from cachetier.storage.disk import DiskTier
from cachetier.store.change_log import ChangeLog
from cachetier.store.direct import DirectReaders
from cachetier.store.disk_pins import DiskPins
from cachetier.store.document_table import DocumentTable
from cachetier.store.engine_table import EngineTable
from cachetier.store.gpu_tier import GpuTier
from cachetier.store.host import HostTable
from cachetier.store.leases import LeaseTable
from cachetier.store.namespaces import NamespaceTable
from cachetier.store.promises import PromiseTable
from cachetier.store.stats import (
    BlendChecks,
    Counters,
    EngineSpeeds,
    MovedBytes,
    RequestCounts,
    Stats,
    TierBytes,
    TierSizes,
    TokenCounts,
)
from cachetier.store.wait_table import WaitTable

SALT_LENGTH_MAX = 1024
EXTRA_BYTES_MAX = 1024


@dataclass(frozen=True, slots=True)
class Books:
    """The tables of a store. `disk` is None when there is no disk tier."""

    chunk_tokens: int
    clock: Callable[[], float]
    hasher: ChainHasher
    table: HostTable
    gpu: GpuTier
    leases: LeaseTable
    namespaces: NamespaceTable
    disk: DiskTier | None
    documents: DocumentTable
    changes: ChangeLog
    lock: threading.Lock = field(default_factory=threading.Lock)
    disk_pins: DiskPins = field(default_factory=DiskPins)
    direct: DirectReaders = field(default_factory=DirectReaders)
    engines: EngineTable = field(default_factory=EngineTable)
    promises: PromiseTable = field(default_factory=PromiseTable)
    waits: WaitTable = field(default_factory=WaitTable)
    counters: Counters = field(default_factory=Counters)
    tokens: TokenCounts = field(default_factory=TokenCounts)
    requests: RequestCounts = field(default_factory=RequestCounts)
    blend: BlendChecks = field(default_factory=BlendChecks)
    speeds: EngineSpeeds = field(default_factory=EngineSpeeds)
    remote_bytes: MovedBytes = field(default_factory=MovedBytes)

    def contents(self, tokens: bytes, extras: list[tuple[int, bytes]], salt: str) -> list[bytes]:
        """Return the contents of the complete chunks in a message.

        Raises:
            ProtocolError: as `check_tokens`, or an extra is impossible.
        """
        self.check_tokens(tokens, salt)
        by_number = dict(extras)
        if len(by_number) != len(extras):
            raise ProtocolError("two extras for one chunk")
        for number, extra in extras:
            if number < 0 or len(extra) > EXTRA_BYTES_MAX:
                raise ProtocolError(f"extra of chunk {number} with {len(extra)} bytes; at most {EXTRA_BYTES_MAX}")
        return contents_of(tokens, self.chunk_tokens, by_number)

    def check_tokens(self, tokens: bytes, salt: str) -> None:
        """Refuse what no prompt can be.

        Raises:
            ProtocolError: the tokens are not int32, there are too many chunks, or the salt is too long.
        """
        if len(tokens) % TOKEN_BYTES:
            raise ProtocolError(f"tokens has {len(tokens)} bytes, no multiple of {TOKEN_BYTES}")
        if len(tokens) > MAX_CHUNKS * self.chunk_tokens * TOKEN_BYTES:
            raise ProtocolError(f"more than {MAX_CHUNKS} chunks")
        if len(salt) > SALT_LENGTH_MAX:
            raise ProtocolError(f"the salt is longer than {SALT_LENGTH_MAX} characters")

    def note_report(self, message: Report) -> None:
        """Add counters that only an engine knows (lock held)."""
        self.counters.stores_dropped += max(message.stores_dropped, 0)
        self.counters.loads_failed += max(message.loads_failed, 0)
        self.counters.matches_late += max(message.matches_late, 0)
        self.speeds.prefill = message.prefill_tokens_per_s or self.speeds.prefill
        self.speeds.load = message.load_tokens_per_s or self.speeds.load
        self.requests.blended += max(message.requests_blended, 0)
        self.tokens.blend.loaded += max(message.blend_loaded_tokens, 0)
        self.tokens.blend.computed += max(message.blend_computed_tokens, 0)
        self.blend.checked += max(message.blends_checked, 0)
        self.blend.agreed += max(message.blends_agreed, 0)
        self.blend.kl += max(message.blends_kl, 0.0)

    def snapshot(
        self,
        arena: Arena,
        *,
        instance: str,
        uptime_s: float,
        flush_backlog_bytes: int,
        disk_bytes_per_s: float,
        remote_bytes_per_s: float,
        is_remote_available: bool,
    ) -> Stats:
        """Return all counters and gauges as they are now (lock held)."""
        disk, table, gpu, tokens = self.disk, self.table, self.gpu, self.tokens
        num_durable = disk.num_chunks if disk else 0
        return Stats(
            instance=instance,
            uptime_s=uptime_s,
            tokens=TokenCounts(
                tokens.queried,
                msgspec.structs.replace(tokens.hit),
                tokens.stored,
                tokens.waited,
                msgspec.structs.replace(tokens.blend),
            ),
            requests=msgspec.structs.replace(self.requests),
            blend=msgspec.structs.replace(self.blend),
            documents=len(self.documents),
            bytes=TierSizes(
                TierBytes(gpu.used_bytes, gpu.limit_bytes),
                TierBytes(arena.used_bytes, arena.data_bytes),
                TierBytes(disk.used_bytes, disk.limit_bytes) if disk else TierBytes(),
                msgspec.structs.replace(self.remote_bytes),
            ),
            chunks=table.num_host_only + num_durable,
            chunks_gpu=gpu.num_copies,
            chunks_host=table.num_ready,
            chunks_durable=num_durable,
            chunks_pending=table.num_pending,
            leases=self.leases.num_leases,
            sessions=self.leases.num_sessions,
            namespaces=len(self.namespaces),
            flush_backlog_bytes=flush_backlog_bytes,
            gpu_filled=gpu.num_filled,
            gpu_evicted=gpu.num_evicted,
            disk_bytes_per_s=disk_bytes_per_s,
            remote_bytes_per_s=remote_bytes_per_s,
            remote_available=int(is_remote_available),
            tokens_per_s=EngineSpeeds(self.speeds.prefill, self.speeds.load),
            host_evicted=table.num_evicted,
            disk=msgspec.structs.asdict(disk.counters) if disk else {},
            **msgspec.structs.asdict(self.counters),
        )
