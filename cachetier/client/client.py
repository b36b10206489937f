"""Calls to the server: one message out, one reply back, within a deadline. One thread at a time."""

from typing import Any, overload

import msgspec

from cachetier.client.connection import Connection, Reply, request_bytes
from cachetier.core.codec import PATH_OF, REPLY_OF, decode, encode
from cachetier.core.document_messages import (
    ListDocuments,
    ListDocumentsReply,
    MatchDocuments,
    MatchDocumentsReply,
    RegisterDocument,
    RegisterDocumentReply,
    RemoveDocument,
    RemoveDocumentReply,
    SyncDocuments,
    SyncDocumentsReply,
)
from cachetier.core.engine_messages import (
    AnnounceEngine,
    AnnounceEngineReply,
    ListEngines,
    ListEnginesReply,
    SetRole,
    SetRoleReply,
)
from cachetier.core.errors import ProtocolError, UnavailableError
from cachetier.core.event_messages import FollowChanges, FollowChangesReply
from cachetier.core.message_base import Message
from cachetier.core.messages import (
    Commit,
    CommitReply,
    Empty,
    Invalidate,
    Match,
    MatchReply,
    OpenSession,
    OpenSessionReply,
    ReadsDirectly,
    RegisterNamespace,
    RegisterNamespaceReply,
    Release,
    Renew,
    RenewReply,
    Report,
    Reserve,
    ReserveReply,
)
from cachetier.core.pool_messages import CheckPools, CheckPoolsReply, CommitPool, OfferPool

# Sent again these would count twice, end a lease twice or skip what the lost reply told; a repeated match or reserve
# costs a lease that expires.
NOT_IDEMPOTENT = frozenset({Commit, Report, FollowChanges})


class Client:
    """A connection to the server at `socket_path`. Nothing is sent before the first call.

    Not thread-safe: one instance a thread. Do not carry an instance across a fork.
    """

    def __init__(self, socket_path: str) -> None:
        self._connection = Connection(socket_path)

    @property
    def socket_path(self) -> str:
        """Path of the server's Unix socket."""
        return self._connection.socket_path

    @overload
    def call(self, message: OpenSession, timeout_s: float) -> OpenSessionReply: ...
    @overload
    def call(self, message: RegisterNamespace, timeout_s: float) -> RegisterNamespaceReply: ...
    @overload
    def call(self, message: Match, timeout_s: float) -> MatchReply: ...
    @overload
    def call(self, message: Renew, timeout_s: float) -> RenewReply: ...
    @overload
    def call(self, message: Reserve, timeout_s: float) -> ReserveReply: ...
    @overload
    def call(self, message: Commit, timeout_s: float) -> CommitReply: ...
    @overload
    def call(self, message: CheckPools, timeout_s: float) -> CheckPoolsReply: ...
    @overload
    def call(self, message: RegisterDocument, timeout_s: float) -> RegisterDocumentReply: ...
    @overload
    def call(self, message: SyncDocuments, timeout_s: float) -> SyncDocumentsReply: ...
    @overload
    def call(self, message: MatchDocuments, timeout_s: float) -> MatchDocumentsReply: ...
    @overload
    def call(self, message: ListDocuments, timeout_s: float) -> ListDocumentsReply: ...
    @overload
    def call(self, message: RemoveDocument, timeout_s: float) -> RemoveDocumentReply: ...
    @overload
    def call(self, message: AnnounceEngine, timeout_s: float) -> AnnounceEngineReply: ...
    @overload
    def call(self, message: ListEngines, timeout_s: float) -> ListEnginesReply: ...
    @overload
    def call(self, message: SetRole, timeout_s: float) -> SetRoleReply: ...
    @overload
    def call(self, message: FollowChanges, timeout_s: float) -> FollowChangesReply: ...
    @overload
    def call(
        self, message: Release | Invalidate | Report | ReadsDirectly | OfferPool | CommitPool, timeout_s: float
    ) -> Empty: ...
    @overload
    def call(self, message: Message, timeout_s: float) -> Message: ...
    def call(self, message: Message, timeout_s: float) -> Message:
        """Send `message` and return the reply that `REPLY_OF` names for it.

        Blocks for `timeout_s` at most, also when the server is stopped or hangs.

        Raises:
            UnavailableError: no server, no answer in time, or the server failed.
            ProtocolError: the server refuses the message; `status` 404 means an unknown session or namespace, as
                after a restart of the server.
        """
        kind = type(message)
        request = request_bytes("POST", PATH_OF[kind], encode(message))
        reply = self._connection.exchange(request, timeout_s, is_idempotent=kind not in NOT_IDEMPOTENT)
        if reply.status != 200:
            raise _error_of(reply)
        return decode(REPLY_OF[kind], reply.body)

    def get(self, path: str, timeout_s: float) -> bytes:
        """Return the body at `path`, such as "/v1/stats" or "/metrics".

        Raises:
            UnavailableError, ProtocolError: as `call`.
        """
        reply = self._connection.exchange(request_bytes("GET", path), timeout_s, is_idempotent=True)
        if reply.status != 200:
            raise _error_of(reply)
        return reply.body

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def _error_of(reply: Reply) -> ProtocolError | UnavailableError:
    try:
        body: Any = msgspec.json.decode(reply.body)
        text = str(body["error"])
    except (msgspec.DecodeError, KeyError, TypeError):
        text = f"HTTP status {reply.status}"
    if 400 <= reply.status < 500:
        return ProtocolError(text, reply.status)
    return UnavailableError(f"cachetier server: {text}")
