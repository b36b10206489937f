"""The messages about documents: see `cachetier.core.messages` for all others, and for the rules.

An engine that has computed a text alone, from position 0, registers it; engines keep a copy of the fingerprints of a
tenant's documents, look for them in prompts, and ask what of the documents that they found is held.
"""

from cachetier.core.message_base import Message
from cachetier.core.messages import MatchReply

DOCUMENT_TOKENS_MIN = 128  # less is not worth a load and the tokens recomputed around it
DOCUMENT_ID_LENGTH_MAX = 256
CANDIDATES_MAX = 4096
LISTED_MAX = 1000
FINGERPRINT_BYTES = 8


class RegisterDocument(Message, frozen=True):
    """Make a document known whose KV this engine computed alone and stores under ordinary chain keys.

    The same tenant's document of the same id is replaced.

    Attributes:
        salt: whose document it is: only prompts with the same salt find it.
        document: its id, 1 to 256 printable characters.
        tokens: all of it, little-endian int32; an incomplete last chunk is not registered.
        fingerprint: unsigned 64-bit rolling hash of its first `chunk_tokens` tokens.
    """

    session: int
    namespace: bytes
    document: str
    tokens: bytes
    fingerprint: int
    salt: str = ""


class RegisterDocumentReply(Message, frozen=True):
    """How many chunks of the document can be found; 0: it is too short (`DOCUMENT_TOKENS_MIN`) and not registered."""

    num_chunks: int


class SyncDocuments(Message, frozen=True):
    """Ask for the fingerprints of the documents of a namespace and salt.

    Attributes:
        version: of the fingerprints that the asker has, 0: none.
    """

    session: int
    namespace: bytes
    salt: str = ""
    version: int = 0


class SyncDocumentsReply(Message, frozen=True):
    """Attributes:

    version: of `fingerprints`; it means nothing to another run of the server.
    fingerprints: all of them, 8 bytes each, little-endian, ascending, distinct; None: the asker's are the newest.
    """

    version: int
    fingerprints: bytes | None = None


class MatchDocuments(Message, frozen=True):
    """Ask which registered documents stand in a prompt, and what of them is held; lease it.

    Attributes:
        tokens: the prompt, little-endian int32.
        candidates: (offset in tokens, fingerprint of the `chunk_tokens` tokens from there on), by ascending offset.
        start: tokens before it are held already: documents that end at or before it are of no interest.
        lease: False only asks: nothing is leased, promoted or counted.
        reads_pools: see `Match`.
    """

    session: int
    namespace: bytes
    tokens: bytes
    candidates: list[tuple[int, int]]
    salt: str = ""
    start: int = 0
    lease: bool = True
    reads_pools: bool = False


class DocumentRun(Message, frozen=True):
    """A document that stands in a prompt.

    Attributes:
        offset: the prompt's token with which it begins.
        document: its id.
        num_tokens: how many of its tokens follow there, in complete chunks.
        match: what is held of them, as if they were a prompt; its lease is this run's alone.
    """

    offset: int
    document: str
    num_tokens: int
    match: MatchReply


class MatchDocumentsReply(Message, frozen=True):
    """The documents found: ascending, none reaching into another, at least `DOCUMENT_TOKENS_MIN` tokens held of each.

    Without a lease also those of which less is held.
    """

    runs: list[DocumentRun]


class ListDocuments(Message, frozen=True):
    """Ask for the registered documents of all tenants, at most `LISTED_MAX` a reply.

    Attributes:
        skip: leave out so many, in the order of their registration.
    """

    skip: int = 0


class DocumentInfo(Message, frozen=True):
    """A registered document.

    Attributes:
        document: its id.
        model: name of the model whose KV it is; empty: that model's namespace is not known any more.
        num_tokens: its length when it was registered.
        num_chunks: complete chunks of it.
        host_chunks: how many of them host memory holds.
        disk_chunks: how many of them the disk holds; a chunk can be in both.
        registered_at_s: seconds since 1970.
        namespace: whose KV it is.
        fingerprint: see `RegisterDocument`.
        first_tokens: its first chunk, little-endian int32: with it one can look for the document without a fingerprint.
    """

    document: str
    model: str
    num_tokens: int
    num_chunks: int
    host_chunks: int
    disk_chunks: int
    registered_at_s: float
    namespace: bytes
    fingerprint: int
    first_tokens: bytes


class ListDocumentsReply(Message, frozen=True):
    """Attributes:

    documents: in the order of their registration.
    num_documents: how many there are in all.
    """

    documents: list[DocumentInfo]
    num_documents: int


class RemoveDocument(Message, frozen=True):
    """Forget every tenant's document of this id; its KV stays, as a prompt's would, until it is evicted."""

    document: str


class RemoveDocumentReply(Message, frozen=True):
    """How many documents were forgotten."""

    removed: int
