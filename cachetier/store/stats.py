"""What the store counts, and how it is shown: `cachetier stats`, `/metrics` and the tests read this struct.

Counters only grow while the server runs; gauges are taken when `Store.stats` is called. Salts and keys never appear.
"""

import msgspec


class HitTokens(msgspec.Struct):
    """Tokens that engines loaded and used, by the tier that held them at the match."""

    gpu: int = 0
    host: int = 0
    disk: int = 0
    remote: int = 0


class BlendTokens(msgspec.Struct):
    """Tokens of blended requests: loaded from documents, and computed before the end of the last of these."""

    loaded: int = 0
    computed: int = 0


class TokenCounts(msgspec.Struct):
    """Counters of tokens.

    Attributes:
        queried: tokens in complete chunks of prompts that asked for a lease.
        hit: tokens that were then loaded and used (reported with the release).
        stored: tokens of chunks that became ready by a commit.
        waited: those of `hit` in chunks that were not held yet, but pending or promised, when the request was matched.
        blend: what engines report of prompts in which they found documents; not part of `queried` and `hit`.
    """

    queried: int = 0
    hit: HitTokens = msgspec.field(default_factory=HitTokens)
    stored: int = 0
    waited: int = 0
    blend: BlendTokens = msgspec.field(default_factory=BlendTokens)


class RequestCounts(msgspec.Struct):
    """Counters of requests: `blended` are those that loaded documents from the middle of their prompts."""

    blended: int = 0


class BlendChecks(msgspec.Struct):
    """Counters of blended requests whose prompts engines computed again in full (the guard).

    Attributes:
        checked: such requests.
        agreed: those of them for which both ways choose the same next token.
        kl: sum of the Kullback-Leibler divergences between the two distributions of it, in nats.
    """

    checked: int = 0
    agreed: int = 0
    kl: float = 0.0


class TierBytes(msgspec.Struct):
    """Bytes that a tier uses and the most that it may use."""

    used: int = 0
    limit: int = 0


class MovedBytes(msgspec.Struct):
    """Bytes of frames that this server has put into the remote store and got from there."""

    put: int = 0
    got: int = 0


class TierSizes(msgspec.Struct):
    """Sizes of the tiers; of the remote one, which belongs to nobody, what went there and came from there."""

    gpu: TierBytes = msgspec.field(default_factory=TierBytes)
    host: TierBytes = msgspec.field(default_factory=TierBytes)
    disk: TierBytes = msgspec.field(default_factory=TierBytes)
    remote: MovedBytes = msgspec.field(default_factory=MovedBytes)


class EngineSpeeds(msgspec.Struct):
    """Tokens a second, as the engine that told last has measured it; 0 while none has.

    Attributes:
        prefill: computing a prompt, of the length that it last had to decide about.
        load: loading from host memory.
    """

    prefill: float = 0.0
    load: float = 0.0


class Counters(msgspec.Struct):
    """Counters that only grow; owned by the store, guarded by its lock.

    Attributes:
        checksum_failures: chunks that a reader reported as damaged.
        stores_dropped: chunks that were not stored: no room, quota used up, or given up by the engine.
        loads_failed: requests that engines recomputed after a failed load.
        matches_late: requests that engines computed since their match was not answered in time.
        hits_cut: hits of which engines computed a part, or all, because that was faster than loading it.
        tokens_cut: tokens of these parts.
        promoted: chunks read from disk into the arena.
        promotions_failed: chunks whose reading failed.
        promotions_skipped: chunks that nobody leased any more when their turn came.
        flushed: chunks written to disk.
        flushes_failed: chunks that the disk tier did not take.
        flushes_dropped: chunks that stayed in host memory alone because the backlog was full.
        leases_expired: leases that ended because nobody renewed or released them, or because their session died.
        remote_failures: calls to the remote store that failed or took too long.
        remote_puts_dropped: chunks that were not put there: it was left alone or full, or the queue was full.
    """

    checksum_failures: int = 0
    stores_dropped: int = 0
    loads_failed: int = 0
    matches_late: int = 0
    hits_cut: int = 0
    tokens_cut: int = 0
    promoted: int = 0
    promotions_failed: int = 0
    promotions_skipped: int = 0
    flushed: int = 0
    flushes_failed: int = 0
    flushes_dropped: int = 0
    leases_expired: int = 0
    remote_failures: int = 0
    remote_puts_dropped: int = 0


class Stats(msgspec.Struct):
    """A snapshot; `msgspec.json.encode` gives the nested JSON of `cachetier stats --json`.

    Attributes:
        instance: random id of this run of the server.
        uptime_s: since the store opened.
        tokens: counters of tokens.
        requests: counters of requests.
        blend: what checks of blended requests found.
        bytes: sizes of the tiers.
        chunks: distinct chunks held, in any tier.
        chunks_gpu: chunks with a copy in an engine's pool.
        chunks_host: chunks ready in host memory.
        chunks_durable: chunks on disk that survive a crash.
        chunks_pending: chunks being stored.
        leases: live leases.
        sessions: open sessions.
        namespaces: known models.
        documents: registered documents.
        flush_backlog_bytes: bytes waiting to be written.
        gpu_filled: copies that were made in pools.
        gpu_evicted: copies that made room for others.
        disk_bytes_per_s: how fast the disk gave chunks lately; 0 while nothing was read.
        remote_bytes_per_s: the same for the remote store.
        remote_available: 1 while the remote store is used, 0 while there is none or it is left alone.
        tokens_per_s: how fast engines compute and load.
        host_evicted: chunks that left the host tier to make room.
        checksum_failures: see `Counters`, like all that follow.
        disk: counters of the disk tier (write_errors, read_errors, dropped, carried, reclaimed_segments).
    """

    instance: str
    uptime_s: float
    tokens: TokenCounts
    requests: RequestCounts
    blend: BlendChecks
    bytes: TierSizes
    chunks: int
    chunks_gpu: int
    chunks_host: int
    chunks_durable: int
    chunks_pending: int
    leases: int
    sessions: int
    namespaces: int
    documents: int
    flush_backlog_bytes: int
    disk_bytes_per_s: float
    remote_bytes_per_s: float
    remote_available: int
    tokens_per_s: EngineSpeeds
    checksum_failures: int
    stores_dropped: int
    loads_failed: int
    matches_late: int
    hits_cut: int
    tokens_cut: int
    gpu_filled: int
    gpu_evicted: int
    host_evicted: int
    promoted: int
    promotions_failed: int
    promotions_skipped: int
    flushed: int
    flushes_failed: int
    flushes_dropped: int
    leases_expired: int
    remote_failures: int
    remote_puts_dropped: int
    disk: dict[str, int]
