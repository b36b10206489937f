"""The registered documents a data directory knows: an append-only file of checksummed records, `documents.log`.

A record is a registration or, with no chunks, the removal of one (docs/format.md has the bytes). The newest record of a
tenant and id counts. A damaged record is left out and costs what it says; the next one is found by its magic. What has
no use is left behind when the file is written anew: at open after damage or when more than half of it is dead, and
when it has reached its limit. One thread at a time.
"""

import logging
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import xxhash

from cachetier.core.keys import ChainKey, NamespaceId
from cachetier.storage.file_layer import FileLayer, read_file, replace_file

FILE_NAME = "documents.log"
_MAGIC = b"CTDOCREC"
# Magic, checksum; bytes of the record, bytes of the id, sequence number, time of the registration, tenant, namespace,
# fingerprint, tokens, bytes of the keys, bytes of the first chunk's tokens, zero.
_HEADER = struct.Struct("<8sQIIQd16s16sQIIII")
_COVERED_FROM = 16
_ALIGNMENT = 8
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A registered document.

    Attributes:
        tenant: parent of its first chunk: what namespace and salt make of it.
        namespace: whose KV it is.
        id: its name, unlike that of the tenant's others.
        num_tokens: its length when it was registered.
        keys: chain keys of its complete chunks, 16 bytes each; none: the document was removed.
        fingerprint: of its first chunk's tokens.
        first_tokens: these, little-endian int32.
        registered_at_s: seconds since 1970.
    """

    tenant: ChainKey
    namespace: NamespaceId
    id: str
    num_tokens: int
    keys: bytes
    fingerprint: int
    first_tokens: bytes
    registered_at_s: float

    def removed(self) -> "StoredDocument":
        """Return what is written when it is removed."""
        return replace(self, keys=b"", first_tokens=b"")


def record_bytes(document: StoredDocument) -> int:
    """Return the size of its record."""
    return _padded(_HEADER.size + len(document.id.encode()) + len(document.keys) + len(document.first_tokens))


class DocumentFile:
    """The file. What it keeps must not exceed three quarters of its limit: then writing it anew makes room."""

    def __init__(self, folder: str, files: FileLayer, limit_bytes: int) -> None:
        self._path = os.path.join(folder, FILE_NAME)
        self._files = files
        self._limit_bytes = limit_bytes
        self._tail = self._last_sequence = 0

    @property
    def living_bytes_max(self) -> int:
        """Most bytes of records that it can keep."""
        return self._limit_bytes * 3 // 4

    def open(self) -> list[StoredDocument]:
        """Return the registered documents, in the order of their registration.

        Should they exceed the limit, which may have become smaller, those registered longest ago are forgotten.

        Raises:
            OSError: the file cannot be read.
        """
        data = read_file(self._files, self._path)
        living: dict[tuple[ChainKey, str], StoredDocument] = {}
        read_bytes = 0
        for start, end, sequence, document in _records(data):
            if sequence <= self._last_sequence:
                continue  # left over from a write that failed, and was followed by another at the same place
            read_bytes += end - start
            self._tail, self._last_sequence = end, sequence
            living.pop((document.tenant, document.id), None)
            if document.keys:
                living[document.tenant, document.id] = document
        is_damaged = read_bytes < len(data)
        if is_damaged:
            _log.warning("%s: %d bytes are torn or damaged and left out", self._path, len(data) - read_bytes)
        documents, living_bytes = self._within_limit(list(living.values()))
        if is_damaged or 2 * living_bytes < len(data):
            self._tidy(documents)
        return documents

    def append(self, changes: Sequence[StoredDocument]) -> bool:
        """Write registrations and removals, durably; False: there is no room, `rewrite` makes some.

        Raises:
            OSError: they could not be written.
        """
        data = self._packed(changes)
        if self._tail + len(data) > self._limit_bytes:
            return False
        if not self._tail:
            replace_file(self._files, self._path, data)
        else:
            descriptor = self._files.open(self._path)
            try:
                self._files.pwritev(descriptor, [data], self._tail)
                self._files.fdatasync(descriptor)
            finally:
                self._files.close(descriptor)
        self._tail += len(data)
        return True

    def rewrite(self, documents: Iterable[StoredDocument]) -> None:
        """Write the file anew with `documents` alone.

        Raises:
            OSError: it could not be written; the file stays as it is.
        """
        data = self._packed(documents)
        replace_file(self._files, self._path, data)
        self._tail = len(data)

    def _within_limit(self, documents: list[StoredDocument]) -> tuple[list[StoredDocument], int]:
        """Return the newest documents that the limit has room for, and the bytes of their records."""
        size = sum(map(record_bytes, documents))
        num_forgotten = 0
        while size > self.living_bytes_max:
            size -= record_bytes(documents[num_forgotten])
            num_forgotten += 1
        if num_forgotten:
            _log.warning("%s: no room for %d documents, which are forgotten", self._path, num_forgotten)
        return documents[num_forgotten:], size

    def _tidy(self, documents: list[StoredDocument]) -> None:
        try:
            self.rewrite(documents)
        except OSError as error:
            _log.warning("%s stays as long as it is for now: %s", self._path, error)

    def _packed(self, documents: Iterable[StoredDocument]) -> bytes:
        packed = []
        for document in documents:
            self._last_sequence += 1
            packed.append(_pack(document, self._last_sequence))
        return b"".join(packed)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _pack(document: StoredDocument, sequence: int) -> bytes:
    text = document.id.encode()
    size = record_bytes(document)
    header = _HEADER.pack(
        _MAGIC,
        0,
        size,
        len(text),
        sequence,
        document.registered_at_s,
        document.tenant,
        document.namespace,
        document.fingerprint,
        document.num_tokens,
        len(document.keys),
        len(document.first_tokens),
        0,
    )
    body = header[_COVERED_FROM:] + text + document.keys + document.first_tokens
    covered = body.ljust(size - _COVERED_FROM, b"\0")
    return _MAGIC + xxhash.xxh64_intdigest(covered).to_bytes(8, "little") + covered


def _records(data: bytes) -> Iterator[tuple[int, int, int, StoredDocument]]:
    """Yield where each intact record starts and ends, its sequence number, and what it says."""
    view = memoryview(data)
    start = data.find(_MAGIC)
    while start >= 0:
        found = _parse(view, start)
        if found:
            yield start, *found
        start = data.find(_MAGIC, found[0] if found else start + 1)


def _parse(view: memoryview, start: int) -> tuple[int, int, StoredDocument] | None:
    """Return where the record at `start` ends, its sequence number and what it says; None: it is not intact."""
    if len(view) - start < _HEADER.size:
        return None
    _, checksum, size, id_bytes, sequence, *rest, num_tokens, keys_bytes, first_bytes, _ = _HEADER.unpack_from(
        view, start
    )
    registered_at_s, tenant, namespace, fingerprint = rest
    end, id_start = start + size, start + _HEADER.size
    keys_start = id_start + id_bytes
    first_start = keys_start + keys_bytes
    if size != _padded(first_start + first_bytes - start) or end > len(view):
        return None
    if xxhash.xxh64_intdigest(view[start + _COVERED_FROM : end]) != checksum:
        return None
    document = StoredDocument(
        tenant=ChainKey(tenant),
        namespace=NamespaceId(namespace),
        id=bytes(view[id_start:keys_start]).decode(),
        num_tokens=num_tokens,
        keys=bytes(view[keys_start:first_start]),
        fingerprint=fingerprint,
        first_tokens=bytes(view[first_start : first_start + first_bytes]),
        registered_at_s=registered_at_s,
    )
    return end, sequence, document
