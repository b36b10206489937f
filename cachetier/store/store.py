"""The store: the facade through which the service asks for everything.

Signatures are final; bodies follow.
"""

import time
from collections.abc import Callable

from cachetier.core.config import ServerConfig
from cachetier.core.messages import (
    Commit,
    CommitReply,
    Empty,
    Invalidate,
    Match,
    MatchReply,
    OpenSession,
    OpenSessionReply,
    RegisterNamespace,
    RegisterNamespaceReply,
    Release,
    Renew,
    RenewReply,
    Report,
    Reserve,
    ReserveReply,
)
from cachetier.store.stats import Stats


class Store:
    """The tier's decisions: what is held where, who may read it, what goes. Synchronous and thread-safe.

    Every method may be called from any thread. Those that answer messages are short (no I/O beyond look-ups in the
    index); `flush` and `close` block and belong on a thread of their own.

    Raises:
        StorageError: from the constructor, when the data directory or the arena cannot be used.
        ProtocolError: from the methods that answer messages: status 404 for an unknown session or namespace, 400 for
            an impossible request, 409 where the request contradicts what is known.
    """

    def __init__(self, config: ServerConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        raise NotImplementedError

    @property
    def instance(self) -> str:
        """Random id of this run, as in `OpenSessionReply.instance`."""
        raise NotImplementedError

    def open_session(self, message: OpenSession) -> OpenSessionReply: ...

    def close_session(self, session: int) -> None:
        """End a session: its leases are given back, chunks that it was storing are dropped. Unknown: ignored."""

    def register_namespace(self, message: RegisterNamespace) -> RegisterNamespaceReply: ...

    def match(self, message: Match) -> MatchReply: ...

    def release(self, message: Release) -> Empty: ...

    def renew(self, message: Renew) -> RenewReply: ...

    def reserve(self, message: Reserve) -> ReserveReply: ...

    def commit(self, message: Commit) -> CommitReply: ...

    def invalidate(self, message: Invalidate) -> Empty: ...

    def report(self, message: Report) -> Empty: ...

    def stats(self) -> Stats: ...

    def expire(self) -> None:
        """End leases whose time is over and sessions that gave no sign of life; call it about once a second."""

    def flush(self, timeout_s: float | None = None) -> bool:
        """Block until everything committed before the call is durable (or was refused by the disk tier).

        Returns False when `timeout_s` passed first.
        """

    def check_integrity(self) -> None:
        """Raise AssertionError if the books contradict each other, the arena or the disk tier."""

    def close(self, flush_timeout_s: float = 8.0) -> None:
        """Flush for at most `flush_timeout_s`, stop the threads, close the tiers. Idempotent."""
