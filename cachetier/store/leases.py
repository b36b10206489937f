"""Sessions and leases: who may read or fill which chunks, and until when.

Pure bookkeeping; the caller holds the store's lock. Functions that end leases return them, and the caller gives back
what they pinned.

A lease belongs to a session, expires unless it is renewed or released, and dies with its session. A session ends when
it is closed or when it gave no sign of life for SESSION_LEASE_TIMES lease times. Ids start at a random number, so an
id that a client kept from an earlier run of the server means nothing to this one.

An owner that was stopped (SIGSTOP) past the expiry of its write lease may still write into frames that belong to
somebody else by then, because the arena is mapped memory and nothing stands between. Nothing here can prevent that;
whoever reads such a frame finds that its page digests do not match, and the chunk is dropped (`Store.invalidate`).
"""

import secrets
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from cachetier.core.errors import ProtocolError
from cachetier.store.chunk import HostChunk
from cachetier.store.pools import PoolUse

SESSIONS_MAX = 4096
LEASES_MAX = 1 << 16
SESSION_LEASE_TIMES = 20


class Lease:
    """The right to read chunks, or to fill one object of each.

    Attributes:
        id: what messages name it by.
        session: its owner.
        chunks: what it pins.
        shard: which object of each chunk its owner fills; None for a lease to read.
        host_tokens, disk_tokens, gpu_tokens, remote_tokens: most tokens that its owner can have used, by tier.
        waited_tokens: how many of them were waited for.
        pool_use: which copies in device memory it names and what it orders there; None: nothing.
        expires_at: clock time.
    """

    __slots__ = (
        "chunks", "disk_tokens", "expires_at", "gpu_tokens", "host_tokens", "id", "pool_use", "remote_tokens",
        "session", "shard", "waited_tokens",
    )  # fmt: skip

    def __init__(self, id_: int, session: int, chunks: Sequence[HostChunk], shard: int | None) -> None:
        self.id = id_
        self.session = session
        self.chunks = chunks
        self.shard = shard
        self.host_tokens = self.disk_tokens = self.gpu_tokens = self.remote_tokens = self.waited_tokens = 0
        self.pool_use: PoolUse | None = None
        self.expires_at = 0.0


class Session:
    """A process that introduced itself."""

    __slots__ = ("client", "engine", "id", "leases", "pid", "seen_at")

    def __init__(self, id_: int, client: str, engine: str, pid: int) -> None:
        self.id = id_
        self.client = client
        self.engine = engine
        self.pid = pid
        self.leases: set[int] = set()
        self.seen_at = 0.0


class LeaseTable:
    """All sessions and leases. Both are kept in the order in which they end, so expiry looks at those that did."""

    def __init__(self, lease_ttl_s: float) -> None:
        self._lease_ttl_s = lease_ttl_s
        self._sessions: OrderedDict[int, Session] = OrderedDict()
        self._leases: OrderedDict[int, Lease] = OrderedDict()
        self._last_id = secrets.randbits(52)

    @property
    def num_sessions(self) -> int:
        """Open sessions."""
        return len(self._sessions)

    @property
    def num_leases(self) -> int:
        """Live leases."""
        return len(self._leases)

    @property
    def is_full(self) -> bool:
        """Whether `grant` would exceed the most leases there may be."""
        return len(self._leases) >= LEASES_MAX

    def leases(self) -> Iterable[Lease]:
        """Iterate over the live leases."""
        return self._leases.values()

    def open_session(self, client: str, engine: str, pid: int, now: float) -> Session:
        """Begin a session.

        Raises:
            ProtocolError: status 409, there are SESSIONS_MAX already.
        """
        if len(self._sessions) >= SESSIONS_MAX:
            raise ProtocolError(f"{SESSIONS_MAX} sessions are open already", status=409)
        session = Session(self._next_id(), client, engine, pid)
        session.seen_at = now
        self._sessions[session.id] = session
        return session

    def session(self, session_id: int, now: float) -> Session:
        """Return an open session, noting its sign of life.

        Raises:
            ProtocolError: status 404, there is none of that id (any more).
        """
        session = self._sessions.get(session_id)
        if session is None:
            raise ProtocolError(f"session {session_id} is not open", status=404)
        session.seen_at = now
        self._sessions.move_to_end(session_id)
        return session

    def is_open(self, session_id: int) -> bool:
        """Tell whether a session is open. No sign of life."""
        return session_id in self._sessions

    def close_session(self, session_id: int) -> list[Lease]:
        """End a session; return the leases that died with it. Unknown: nothing."""
        session = self._sessions.pop(session_id, None)
        return [self._leases.pop(lease) for lease in session.leases] if session else []

    def grant(
        self,
        session: Session,
        chunks: Sequence[HostChunk],
        now: float,
        *,
        shard: int | None = None,
    ) -> Lease:
        """Give `session` a lease on `chunks`, which the caller pinned; ask `is_full` first."""
        assert not self.is_full
        lease = Lease(self._next_id(), session.id, chunks, shard)
        lease.expires_at = now + self._lease_ttl_s
        self._leases[lease.id] = lease
        session.leases.add(lease.id)
        return lease

    def get(self, session: Session, lease_id: int) -> Lease | None:
        """Return a live lease of `session`; None: it has no such lease (any more)."""
        return self._leases[lease_id] if lease_id in session.leases else None

    def end(self, lease: Lease) -> None:
        """End a live lease."""
        del self._leases[lease.id]
        self._sessions[lease.session].leases.remove(lease.id)

    def renew(self, session: Session, lease_ids: Iterable[int], now: float) -> list[int]:
        """Extend leases of `session`; return the ids of those it does not have."""
        missing = []
        for lease_id in lease_ids:
            lease = self.get(session, lease_id)
            if lease is None:
                missing.append(lease_id)
            else:
                lease.expires_at = now + self._lease_ttl_s
                self._leases.move_to_end(lease_id)
        return missing

    def expire(self, now: float) -> list[Lease]:
        """End leases and sessions whose time is over; return the leases."""
        ended = []
        while self._leases and (lease := next(iter(self._leases.values()))).expires_at <= now:
            self.end(lease)
            ended.append(lease)
        silent_since = now - SESSION_LEASE_TIMES * self._lease_ttl_s
        while self._sessions and (session := next(iter(self._sessions.values()))).seen_at <= silent_since:
            ended += self.close_session(session.id)
        return ended

    def check_integrity(self) -> None:
        """Raise AssertionError if leases and sessions contradict each other."""
        owned = {lease for session in self._sessions.values() for lease in session.leases}
        assert owned == self._leases.keys(), "a lease without a session, or the reverse"
        expiries = [lease.expires_at for lease in self._leases.values()]
        assert expiries == sorted(expiries), "leases are not in the order of their expiry"

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id
