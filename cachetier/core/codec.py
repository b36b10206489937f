"""How messages travel: where each request is sent, what answers it, and its encoding."""

from typing import TypeVar

import msgspec

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
from cachetier.core.errors import ProtocolError
from cachetier.core.event_messages import FollowChanges, FollowChangesReply
from cachetier.core.message_base import Message
from cachetier.core.messages import (
    API_VERSION,
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
    Trim,
)
from cachetier.core.pool_messages import CheckPools, CheckPoolsReply, CommitPool, OfferPool
from cachetier.core.wait_messages import AwaitChunks, AwaitChunksReply, EndPromise

REPLY_OF: dict[type[Message], type[Message]] = {
    OpenSession: OpenSessionReply,
    RegisterNamespace: RegisterNamespaceReply,
    Match: MatchReply,
    Trim: Empty,
    Release: Empty,
    Renew: RenewReply,
    Reserve: ReserveReply,
    Commit: CommitReply,
    Invalidate: Empty,
    Report: Empty,
    ReadsDirectly: Empty,
    OfferPool: Empty,
    CommitPool: Empty,
    CheckPools: CheckPoolsReply,
    AwaitChunks: AwaitChunksReply,
    EndPromise: Empty,
    RegisterDocument: RegisterDocumentReply,
    SyncDocuments: SyncDocumentsReply,
    MatchDocuments: MatchDocumentsReply,
    ListDocuments: ListDocumentsReply,
    RemoveDocument: RemoveDocumentReply,
    AnnounceEngine: AnnounceEngineReply,
    ListEngines: ListEnginesReply,
    SetRole: SetRoleReply,
    FollowChanges: FollowChangesReply,
}

PATH_OF: dict[type[Message], str] = {
    OpenSession: f"/v{API_VERSION}/session",
    RegisterNamespace: f"/v{API_VERSION}/namespace",
    Match: f"/v{API_VERSION}/match",
    Trim: f"/v{API_VERSION}/trim",
    Release: f"/v{API_VERSION}/release",
    Renew: f"/v{API_VERSION}/renew",
    Reserve: f"/v{API_VERSION}/reserve",
    Commit: f"/v{API_VERSION}/commit",
    Invalidate: f"/v{API_VERSION}/invalidate",
    Report: f"/v{API_VERSION}/report",
    ReadsDirectly: f"/v{API_VERSION}/reads-directly",
    OfferPool: f"/v{API_VERSION}/pool/offer",
    CommitPool: f"/v{API_VERSION}/pool/commit",
    CheckPools: f"/v{API_VERSION}/pool/check",
    AwaitChunks: f"/v{API_VERSION}/await",
    EndPromise: f"/v{API_VERSION}/promise/end",
    RegisterDocument: f"/v{API_VERSION}/documents/register",
    SyncDocuments: f"/v{API_VERSION}/documents/sync",
    MatchDocuments: f"/v{API_VERSION}/documents/match",
    ListDocuments: f"/v{API_VERSION}/documents/list",
    RemoveDocument: f"/v{API_VERSION}/documents/remove",
    AnnounceEngine: f"/v{API_VERSION}/engines/announce",
    ListEngines: f"/v{API_VERSION}/engines/list",
    SetRole: f"/v{API_VERSION}/engines/role",
    FollowChanges: f"/v{API_VERSION}/changes",
}

M = TypeVar("M", bound=Message)
_encoder = msgspec.msgpack.Encoder()
_decoders = {kind: msgspec.msgpack.Decoder(kind) for kind in {*REPLY_OF, *REPLY_OF.values()}}


def encode(message: Message) -> bytes:
    """Return the msgpack body of `message`."""
    return _encoder.encode(message)


def decode(kind: type[M], body: bytes) -> M:
    """Return the message of `kind` in `body`.

    Raises:
        ProtocolError: the body is not such a message; the text says where it differs.
    """
    try:
        return _decoders[kind].decode(body)  # type: ignore[return-value]
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"{kind.__name__}: {error}") from error
