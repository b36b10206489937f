"""Answers the messages about documents: registers them, tells which of them stand in a prompt, lists them.

Runs on the caller's thread. The table is guarded by the store's lock; hashing a prompt happens without it. With a disk
tier, registrations and removals are written by the flush thread, a group at a time: like KV, what was registered within
the last moments may be gone after a power failure.

Locking design: `_unsaved` too is guarded by the store's lock; the flush thread alone writes the file.
"""

import logging
import time
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from cachetier.core.document_messages import (
    CANDIDATES_MAX,
    DOCUMENT_ID_LENGTH_MAX,
    DOCUMENT_TOKENS_MIN,
    LISTED_MAX,
    DocumentInfo,
    DocumentRun,
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
from cachetier.core.errors import ProtocolError
from cachetier.core.keys import KEY_BYTES, TOKEN_BYTES, ChainKey, NamespaceId
from cachetier.core.messages import Match
from cachetier.storage.documents import DocumentFile, StoredDocument
from cachetier.store.books import Books
from cachetier.store.chunk import ChunkState
from cachetier.store.flush import Flusher
from cachetier.store.matching import Matcher

LISTED_CHUNKS_MAX = 1 << 14  # looked up for one reply to ListDocuments

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """A registered document in a prompt: its first `num_chunks` chunks stand there from token `offset` on."""

    offset: int
    document: StoredDocument
    num_chunks: int


class Documents:
    """The registered documents. Without a file they live in memory only."""

    def __init__(self, books: Books, matcher: Matcher, flusher: Flusher | None, file: DocumentFile | None) -> None:
        """Answer from `books.documents`, writing changes to `file`, which needs a flusher."""
        self._books = books
        self._table = books.documents
        self._matcher = matcher
        self._flusher = flusher
        self._file = file
        self._unsaved: list[StoredDocument] = []

    def register(self, message: RegisterDocument) -> RegisterDocumentReply:
        """Register a document; 400 for an impossible one, 409 when there is no room."""
        books = self._books
        _check(message)
        contents = books.contents(message.tokens, [], message.salt)
        root = self._root(message)
        if len(contents) * books.chunk_tokens < DOCUMENT_TOKENS_MIN:
            return RegisterDocumentReply(num_chunks=0)
        document = StoredDocument(
            tenant=root,
            namespace=NamespaceId(message.namespace),
            id=message.document,
            num_tokens=len(message.tokens) // TOKEN_BYTES,
            keys=b"".join(books.hasher.chain(root, contents)),
            fingerprint=message.fingerprint,
            first_tokens=contents[0],
            registered_at_s=time.time(),
        )
        with books.lock:
            if self._table.add(document):
                self._save_soon([document])
        return RegisterDocumentReply(num_chunks=len(contents))

    def sync(self, message: SyncDocuments) -> SyncDocumentsReply:
        """Give the fingerprints of a tenant's documents, if they have changed."""
        root = self._root(message)
        with self._books.lock:
            version, fingerprints = self._table.fingerprints(root)
            is_newest = version == message.version
            return SyncDocumentsReply(version=version, fingerprints=None if is_newest else fingerprints.tobytes())

    def match(self, message: MatchDocuments) -> MatchDocumentsReply:
        """Find registered documents in a prompt and lease what is held of them.

        Candidates only say where to look: a document is claimed as far as its chain keys are those of the prompt's
        tokens from that offset on, never beyond its own end, and of that what `Store.match` finds held, which compares
        tokens. Of documents that begin alike the one with most in common counts; one that begins inside another, found
        before it, does not. 400 for candidates outside the prompt or not in ascending order.
        """
        chunk_tokens = self._books.chunk_tokens
        runs = []
        for found in self._find(message):
            end = found.offset + found.num_chunks * chunk_tokens
            part = Match(
                session=message.session,
                namespace=message.namespace,
                tokens=message.tokens[found.offset * TOKEN_BYTES : end * TOKEN_BYTES],
                salt=message.salt,
                lease=message.lease,
                reads_pools=message.reads_pools,
            )
            match = self._matcher.match(part, is_counted=False)
            num_held = match.num_chunks * chunk_tokens
            if message.lease and (num_held < DOCUMENT_TOKENS_MIN or found.offset + num_held <= message.start):
                self._give_back(message.session, match.lease)
                continue
            num_tokens = found.num_chunks * chunk_tokens
            runs.append(
                DocumentRun(offset=found.offset, document=found.document.id, num_tokens=num_tokens, match=match)
            )
        return MatchDocumentsReply(runs=runs)

    def listing(self, message: ListDocuments) -> ListDocumentsReply:
        """List documents, and how much of them is held. Looks many chunks up on disk: not for the event loop."""
        with self._books.lock:
            documents = self._table.all()
        listed: list[DocumentInfo] = []
        num_chunks = 0
        for document in documents[max(message.skip, 0) :][:LISTED_MAX]:
            listed.append(self._describe(document))
            num_chunks += listed[-1].num_chunks
            if num_chunks >= LISTED_CHUNKS_MAX:
                break
        return ListDocumentsReply(documents=listed, num_documents=len(documents))

    def remove(self, message: RemoveDocument) -> RemoveDocumentReply:
        """Forget the documents of an id."""
        with self._books.lock:
            removed = self._table.remove(message.document)
            self._save_soon([document.removed() for document in removed])
        return RemoveDocumentReply(removed=len(removed))

    def _root(self, message: RegisterDocument | SyncDocuments | MatchDocuments) -> ChainKey:
        """Return the parent of the tenant's first chunks.

        Raises:
            ProtocolError: status 404, the session or the namespace is unknown.
        """
        books = self._books
        books.check_tokens(b"", message.salt)
        with books.lock:
            books.leases.session(message.session, books.clock())
            namespace = books.namespaces.get(message.namespace)
        return books.hasher.root(namespace.id, message.salt)

    def _find(self, message: MatchDocuments) -> list[Found]:
        """Return the documents in a prompt that end after `start`, ascending, none reaching into another."""
        books, chunk_tokens = self._books, self._books.chunk_tokens
        books.check_tokens(message.tokens, message.salt)
        _check_candidates(message)
        root = self._root(message)
        with books.lock:
            alike = [self._table.with_fingerprint(root, fingerprint) for _, fingerprint in message.candidates]
        found = []
        end = 0
        for (offset, _), documents in zip(message.candidates, alike, strict=True):
            if offset < end or not documents:
                continue
            longest = self._longest(documents, root, message.tokens, offset)
            num_tokens = longest.num_chunks * chunk_tokens
            if num_tokens >= DOCUMENT_TOKENS_MIN:
                end = offset + num_tokens
                if end > message.start:
                    found.append(longest)
        return found

    def _longest(self, documents: Sequence[StoredDocument], root: ChainKey, tokens: bytes, offset: int) -> Found:
        """Return which of `documents`, given in the order of their keys, has most leading chunks at `offset`.

        Chunk by chunk, those that still agree are a range of them. Tokens are hashed no further than they agree.
        """
        extend, chunk_bytes = self._books.hasher.extend, self._books.chunk_tokens * TOKEN_BYTES
        agreeing, num_chunks, key = range(len(documents)), 0, root
        for start in range(offset * TOKEN_BYTES, len(tokens) - chunk_bytes + 1, chunk_bytes):
            key = extend(key, tokens[start : start + chunk_bytes])
            still = _with_key(documents, agreeing, num_chunks, key)
            if not still:
                break
            agreeing = still
            num_chunks += 1
        return Found(offset, documents[agreeing.start], num_chunks)

    def _give_back(self, session_id: int, lease_id: int) -> None:
        """End the lease of a match that is of no use."""
        books = self._books
        with books.lock:
            lease = books.leases.get(books.leases.session(session_id, books.clock()), lease_id)
            if lease is not None:
                books.leases.end(lease)
                self._matcher.release_read(lease, may_fill=False)

    def _describe(self, document: StoredDocument) -> DocumentInfo:
        books = self._books
        keys = [ChainKey(document.keys[at : at + KEY_BYTES]) for at in range(0, len(document.keys), KEY_BYTES)]
        with books.lock:
            model = books.namespaces.model_of(document.namespace)
            chunks = [books.table.chunks.get(key) for key in keys]
            num_in_memory = sum(chunk is not None and chunk.state is ChunkState.READY for chunk in chunks)
        return DocumentInfo(
            document=document.id,
            model=model,
            num_tokens=document.num_tokens,
            num_chunks=len(keys),
            host_chunks=num_in_memory,
            disk_chunks=sum(books.disk.lookup(key) is not None for key in keys) if books.disk else 0,
            registered_at_s=document.registered_at_s,
            namespace=document.namespace,
            fingerprint=document.fingerprint,
            first_tokens=document.first_tokens,
        )

    def _save_soon(self, changes: Sequence[StoredDocument]) -> None:
        """Have the flush thread write changes (lock held)."""
        if self._flusher is None or not changes:
            return
        if not self._unsaved:
            self._flusher.run_soon(self._save)
        self._unsaved += changes

    def _save(self) -> None:
        """Write what was not written yet; on the flush thread."""
        assert self._file is not None
        with self._books.lock:
            changes, self._unsaved = self._unsaved, []
        try:
            if not self._file.append(changes):
                with self._books.lock:
                    documents = self._table.all()
                self._file.rewrite(documents)
        except OSError as error:
            _log.warning("%d changes of documents are lost at the next restart: %s", len(changes), error)


def _with_key(documents: Sequence[StoredDocument], among: range, number: int, key: ChainKey) -> range:
    """Return those of `among`, documents whose first `number` keys are equal, that have `key` next."""
    part = slice(number * KEY_BYTES, (number + 1) * KEY_BYTES)
    if len(among) == 1:
        return among if documents[among.start].keys[part] == key else range(0)

    def next_key(document: StoredDocument) -> bytes:
        return document.keys[part]

    wanted = bytes(key)
    first = bisect_left(documents, wanted, among.start, among.stop, key=next_key)
    return range(first, bisect_right(documents, wanted, first, among.stop, key=next_key))


def _check(message: RegisterDocument) -> None:
    if not 1 <= len(message.document) <= DOCUMENT_ID_LENGTH_MAX or not message.document.isprintable():
        raise ProtocolError(f"a document's id has 1 to {DOCUMENT_ID_LENGTH_MAX} printable characters")
    if not 0 <= message.fingerprint < 1 << 64:
        raise ProtocolError("the fingerprint is no unsigned 64-bit number")


def _check_candidates(message: MatchDocuments) -> None:
    if len(message.candidates) > CANDIDATES_MAX:
        raise ProtocolError(f"{len(message.candidates)} candidates; at most {CANDIDATES_MAX}")
    num_tokens, last = len(message.tokens) // TOKEN_BYTES, -1
    for offset, _ in message.candidates:
        if not last < offset < num_tokens:
            raise ProtocolError(f"candidate at {offset}: not ascending, or not within the {num_tokens} tokens")
        last = offset
