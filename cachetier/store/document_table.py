"""The registered documents in memory: tenant by tenant, by id and by fingerprint.

Pure bookkeeping; the caller holds the store's lock. What `with_fingerprint` and `all` return never changes.
"""

import secrets
from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable
from operator import attrgetter

from cachetier.core.errors import ProtocolError
from cachetier.core.keys import ChainKey
from cachetier.storage.documents import DocumentFile, StoredDocument, record_bytes

DOCUMENTS_MAX = 1_000_000
MEMORY_BYTES_MAX = 256 << 20  # of registrations when there is no file that bounds them
VERSION_OF_NONE = 1

_keys = attrgetter("keys")


class Tenant:
    """The documents of one namespace and salt.

    Attributes:
        by_id: in the order of their registration.
        by_fingerprint: those with one fingerprint in the order of their keys, so that those which begin alike are
            neighbours.
        fingerprints: the keys of `by_fingerprint`, ascending.
        version: another one after every change of `fingerprints`.
    """

    __slots__ = ("by_fingerprint", "by_id", "fingerprints", "version")

    def __init__(self) -> None:
        self.by_id: dict[str, StoredDocument] = {}
        self.by_fingerprint: dict[int, tuple[StoredDocument, ...]] = {}
        self.fingerprints = array("Q")
        self.version = 0


class DocumentTable:
    """All registered documents.

    Attributes:
        used_bytes: what their records take in a file.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._tenants: dict[ChainKey, Tenant] = {}
        self._num_documents = self.used_bytes = 0
        self._last_version = VERSION_OF_NONE + secrets.randbits(52)  # unlike those of an earlier run of the server

    @classmethod
    def open(cls, file: DocumentFile | None) -> "DocumentTable":
        """Make the table of what `file` remembers, and which it can keep.

        Raises:
            OSError: it cannot be read.
        """
        if file is None:
            return cls(MEMORY_BYTES_MAX)
        table = cls(file.living_bytes_max)
        table._recall(file.open())
        return table

    def __len__(self) -> int:
        return self._num_documents

    def add(self, document: StoredDocument) -> bool:
        """Register a document, replacing the tenant's one of its id; False: it is registered like that already.

        Raises:
            ProtocolError: status 409, there is no room for it.
        """
        tenant = self._tenants.get(document.tenant)
        old = tenant.by_id.get(document.id) if tenant else None
        if old and (old.keys, old.fingerprint, old.num_tokens) == (
            document.keys, document.fingerprint, document.num_tokens,
        ):  # fmt: skip
            return False
        used_bytes = self.used_bytes + record_bytes(document) - (record_bytes(old) if old else 0)
        if used_bytes > self._limit_bytes or (old is None and self._num_documents >= DOCUMENTS_MAX):
            raise ProtocolError(
                f"no room for document {document.id!r}: {self._num_documents} of at most {DOCUMENTS_MAX} documents are "
                f"registered and use {self.used_bytes} of {self._limit_bytes} bytes; remove some, or raise disk_bytes",
                status=409,
            )
        if old:
            self._take_out(old)
        tenant = self._tenant(document.tenant)
        tenant.by_id[document.id] = document
        alike = list(tenant.by_fingerprint.get(document.fingerprint, ()))
        if not alike:
            insort(tenant.fingerprints, document.fingerprint)
            tenant.version = self._next_version()
        insort(alike, document, key=_keys)
        tenant.by_fingerprint[document.fingerprint] = tuple(alike)
        self._count(document, 1)
        return True

    def remove(self, document_id: str) -> list[StoredDocument]:
        """Forget every tenant's document of that id; return them."""
        removed = [tenant.by_id[document_id] for tenant in self._tenants.values() if document_id in tenant.by_id]
        for document in removed:
            self._take_out(document)
        return removed

    def with_fingerprint(self, root: ChainKey, fingerprint: int) -> tuple[StoredDocument, ...]:
        """Return a tenant's documents that begin with such tokens, in the order of their keys."""
        tenant = self._tenants.get(root)
        return tenant.by_fingerprint.get(fingerprint, ()) if tenant else ()

    def fingerprints(self, root: ChainKey) -> "tuple[int, array[int]]":
        """Return version and fingerprints (ascending, distinct) of a tenant's documents."""
        tenant = self._tenants.get(root)
        return (tenant.version, tenant.fingerprints) if tenant else (VERSION_OF_NONE, array("Q"))

    def all(self) -> list[StoredDocument]:
        """Return all documents, tenant by tenant, in the order of their registration."""
        return [document for tenant in self._tenants.values() for document in tenant.by_id.values()]

    def check_integrity(self) -> None:
        """Raise AssertionError if the tables contradict each other."""
        documents = self.all()
        assert len(documents) == self._num_documents <= DOCUMENTS_MAX
        assert sum(map(record_bytes, documents)) == self.used_bytes
        for root, tenant in self._tenants.items():
            assert tenant.by_id, "a tenant without documents"
            assert list(tenant.fingerprints) == sorted(tenant.by_fingerprint), "the fingerprints are not those in use"
            found = [document for alike in tenant.by_fingerprint.values() for document in alike]
            assert {id(each) for each in found} == {id(each) for each in tenant.by_id.values()}
            assert len(found) == len(tenant.by_id)
            for fingerprint, alike in tenant.by_fingerprint.items():
                assert list(alike) == sorted(alike, key=_keys), "documents are not in the order of their keys"
                assert all((each.tenant, each.fingerprint) == (root, fingerprint) and each.keys for each in alike)

    def _recall(self, documents: Iterable[StoredDocument]) -> None:
        grouped: dict[tuple[ChainKey, int], list[StoredDocument]] = {}
        for document in documents:
            self._tenant(document.tenant).by_id[document.id] = document
            grouped.setdefault((document.tenant, document.fingerprint), []).append(document)
            self._count(document, 1)
        for (root, fingerprint), alike in grouped.items():
            self._tenants[root].by_fingerprint[fingerprint] = tuple(sorted(alike, key=_keys))
        for tenant in self._tenants.values():
            tenant.fingerprints = array("Q", sorted(tenant.by_fingerprint))
            tenant.version = self._next_version()

    def _take_out(self, document: StoredDocument) -> None:
        tenant = self._tenants[document.tenant]
        del tenant.by_id[document.id]
        rest = tuple(each for each in tenant.by_fingerprint[document.fingerprint] if each is not document)
        if rest:
            tenant.by_fingerprint[document.fingerprint] = rest
        else:
            del tenant.by_fingerprint[document.fingerprint]
            del tenant.fingerprints[bisect_left(tenant.fingerprints, document.fingerprint)]
            tenant.version = self._next_version()
        if not tenant.by_id:
            del self._tenants[document.tenant]
        self._count(document, -1)

    def _tenant(self, root: ChainKey) -> Tenant:
        tenant = self._tenants.get(root)
        if tenant is None:
            tenant = self._tenants[root] = Tenant()
        return tenant

    def _count(self, document: StoredDocument, sign: int) -> None:
        self._num_documents += sign
        self.used_bytes += sign * record_bytes(document)

    def _next_version(self) -> int:
        self._last_version += 1
        return self._last_version
