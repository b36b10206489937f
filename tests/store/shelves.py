"""Documents for tests: texts, their fingerprints, and an engine that registers them and looks for them."""

import random
import struct
from collections.abc import Sequence

import xxhash

from cachetier.core.document_messages import (
    DocumentRun,
    ListDocuments,
    ListDocumentsReply,
    MatchDocuments,
    RegisterDocument,
    RemoveDocument,
    SyncDocuments,
    SyncDocumentsReply,
)
from cachetier.core.keys import TOKEN_BYTES
from tests.store.chunks import CHUNK_TOKENS
from tests.store.engines import Engine

CHUNK_BYTES = CHUNK_TOKENS * TOKEN_BYTES


def text_of(seed: object, num_tokens: int) -> bytes:
    """Return the tokens of a random text."""
    rng = random.Random(repr(seed))
    return struct.pack(f"<{num_tokens}i", *(rng.randrange(32_000) for _ in range(num_tokens)))


def fingerprint_of(tokens: bytes) -> int:
    """Return what stands for the first chunk; any hash does."""
    return xxhash.xxh64_intdigest(tokens[:CHUNK_BYTES])


class Shelf(Engine):
    """An engine with documents; `fingerprints` are those that it looks for."""

    fingerprints: frozenset[int] = frozenset()

    def register(self, name: str, tokens: bytes, *, salt: str = "", put: bool = True) -> int:
        """Store the KV of a document (unless told not to `put` it) and register it; return its number of chunks."""
        if put:
            self.put(tokens, salt=salt)
        self.fingerprints |= {fingerprint_of(tokens)}
        message = RegisterDocument(
            session=self.sessions[0],
            namespace=self.namespace,
            salt=salt,
            document=name,
            tokens=tokens,
            fingerprint=fingerprint_of(tokens),
        )
        return self.store.documents.register(message).num_chunks

    def candidates(self, prompt: bytes) -> list[tuple[int, int]]:
        """Return where in the prompt a document may begin, as an engine finds them."""
        windows = ((at // TOKEN_BYTES, fingerprint_of(prompt[at:])) for at in range(0, len(prompt), TOKEN_BYTES))
        last = len(prompt) // TOKEN_BYTES - CHUNK_TOKENS
        return [(offset, each) for offset, each in windows if offset <= last and each in self.fingerprints]

    def find(
        self, prompt: bytes, candidates: Sequence[tuple[int, int]] | None = None, **settings: object
    ) -> list[DocumentRun]:
        """Match the documents of a prompt."""
        message = MatchDocuments(
            session=self.sessions[0],
            namespace=self.namespace,
            tokens=prompt,
            candidates=self.candidates(prompt) if candidates is None else list(candidates),
            **settings,  # type: ignore[arg-type]
        )
        return self.store.documents.match(message).runs

    def places(self, prompt: bytes, **settings: object) -> list[tuple[str, int, int]]:
        """Return document, offset and held chunks of each run, having checked bytes and leases."""
        runs = self.find(prompt, **settings)
        for run in runs:
            assert all(self.check(run.match)), "a chunk did not arrive"
            self.release(run.match)
        return [(run.document, run.offset, run.match.num_chunks) for run in runs]

    def sync(self, version: int = 0, salt: str = "") -> SyncDocumentsReply:
        """Ask for the fingerprints."""
        message = SyncDocuments(session=self.sessions[0], namespace=self.namespace, salt=salt, version=version)
        return self.store.documents.sync(message)

    def remove(self, name: str) -> int:
        """Remove the documents of an id; return how many there were."""
        return self.store.documents.remove(RemoveDocument(document=name)).removed

    def listing(self, skip: int = 0) -> ListDocumentsReply:
        """List the documents."""
        return self.store.documents.listing(ListDocuments(skip=skip))
