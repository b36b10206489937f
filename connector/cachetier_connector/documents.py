"""Registered documents as an engine sees them: finds them in prompts, registers what it has computed.

Belongs to the link thread of the scheduler half. It keeps a copy of the fingerprints of each tenant's documents, so
that the server is only asked about prompts in which one of them may stand.
"""

import logging
import time
from collections import OrderedDict

import numpy as np

from cachetier.core.document_messages import (
    CANDIDATES_MAX,
    DOCUMENT_TOKENS_MIN,
    DocumentRun,
    MatchDocuments,
    RegisterDocument,
    SyncDocuments,
)
from cachetier_blend.finding import FingerprintSet, fingerprints
from cachetier_connector.link import ServerLink

TENANTS_MAX = 64
NOTICE_INTERVAL_S = 60.0

log = logging.getLogger(__name__)


class Documents:
    """Finds and registers documents over a link."""

    def __init__(self, link: ServerLink, timeout_s: float, *, reads_pools: bool) -> None:
        """Know nothing yet.

        Args:
            link: the thread's.
            timeout_s: how long a call may take before the server counts as dead.
            reads_pools: whether the engine can use copies in device memory.
        """
        self._link, self._timeout_s, self._reads_pools = link, timeout_s, reads_pools
        self._instance, self._next_notice_s = "", 0.0
        self._known: OrderedDict[tuple[bytes, str], tuple[int, FingerprintSet]] = OrderedDict()

    def find(
        self, namespace: bytes, salt: str, tokens: bytes, start: int, chunk_tokens: int, request_id: str
    ) -> list[DocumentRun]:
        """Return the documents in a prompt that reach beyond token `start`, with a lease on each."""
        known = self._sync(namespace, salt)
        if not known:
            return []
        candidates = known.candidates(_as_array(tokens), chunk_tokens)
        if not candidates:
            self._tell_of_miss(request_id, len(known))
            return []
        reply = self._link.call(
            lambda session: MatchDocuments(
                session=session,
                namespace=namespace,
                tokens=tokens,
                candidates=candidates[:CANDIDATES_MAX],
                salt=salt,
                start=start,
                reads_pools=self._reads_pools,
            ),
            self._timeout_s,
        )
        if reply is None:
            return []
        if not reply.runs and candidates[0][0] >= start:  # else it stands in the prefix, which is better
            self._tell_of_miss(request_id, len(known))
        runs: list[DocumentRun] = reply.runs
        return runs

    def register(self, namespace: bytes, salt: str, document: str, tokens: bytes, chunk_tokens: int) -> None:
        """Register a prompt that was computed alone as a document."""
        prints = fingerprints(_as_array(tokens), chunk_tokens)
        if not len(prints) or len(tokens) < DOCUMENT_TOKENS_MIN * 4:
            log.warning(
                "cachetier: document %r is shorter than %d tokens: not registered", document, DOCUMENT_TOKENS_MIN
            )
            return
        reply = self._link.call(
            lambda session: RegisterDocument(
                session=session,
                namespace=namespace,
                document=document,
                tokens=tokens,
                fingerprint=int(prints[0]),
                salt=salt,
            ),
            self._timeout_s,
        )
        if reply is None:
            log.warning("cachetier: document %r could not be registered; send it again", document)

    def _sync(self, namespace: bytes, salt: str) -> FingerprintSet | None:
        """Return the fingerprints of a tenant's documents, None: the server does not say."""
        server = self._link.server
        if server is None:
            return None
        if server.instance != self._instance:  # versions mean nothing to another run of the server
            self._instance, self._known = server.instance, OrderedDict()
        version, known = self._known.get((namespace, salt), (0, FingerprintSet(b"")))
        reply = self._link.call(
            lambda session: SyncDocuments(session=session, namespace=namespace, salt=salt, version=version),
            self._timeout_s,
        )
        if reply is None:
            return None
        if reply.fingerprints is not None:
            known = FingerprintSet(reply.fingerprints)
        self._known[namespace, salt] = reply.version, known
        self._known.move_to_end((namespace, salt))
        if len(self._known) > TENANTS_MAX:
            self._known.popitem(last=False)
        return known

    def _tell_of_miss(self, request_id: str, num_registered: int) -> None:
        """Say, not too often, that a prompt has none of its tenant's documents: it may be built the wrong way."""
        if (now_s := time.monotonic()) >= self._next_notice_s:
            self._next_notice_s = now_s + NOTICE_INTERVAL_S
            log.warning(
                "cachetier: found 0 of %d registered documents in request %s; `cachetier explain` tells why",
                num_registered,
                request_id,
            )


def _as_array(tokens: bytes) -> "np.ndarray[tuple[int], np.dtype[np.int32]]":
    return np.frombuffer(tokens, np.int32)
