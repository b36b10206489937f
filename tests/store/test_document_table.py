"""Registering, listing, removing and keeping documents: what is told to engines, and what is there after a restart."""

import logging
import threading
import time

import pytest

from cachetier.core.document_messages import LISTED_MAX
from cachetier.core.errors import ProtocolError
from cachetier.core.messages import Report
from cachetier.storage.documents import FILE_NAME
from cachetier.storage.file_layer import FileLayer
from cachetier.store.document_table import DocumentTable
from cachetier.store.store import Store
from tests.store.chunks import CHUNK_TOKENS
from tests.store.engines import make_config
from tests.store.shelves import CHUNK_BYTES, Shelf, fingerprint_of, text_of

NO_DISK = {"disk_bytes": 0}


def chunks(seed: object, num_chunks: int) -> bytes:
    return text_of(seed, num_chunks * CHUNK_TOKENS)


def packed(fingerprints: set[int]) -> bytes:
    return b"".join(each.to_bytes(8, "little") for each in sorted(fingerprints))


@pytest.fixture
def shelf(open_store):
    return Shelf(open_store(**NO_DISK))


class TestRegistering:
    def test_a_short_text_is_no_document(self, shelf):
        assert shelf.register("a", text_of("a", 127), put=False) == 0
        assert shelf.store.stats().documents == 0
        assert shelf.register("a", text_of("a", 128), put=False) == 8
        assert shelf.store.stats().documents == 1

    def test_the_same_id_again_replaces_the_tenants_document(self, shelf):
        old, new = chunks("old", 9), chunks("new", 10)
        shelf.register("a", old)
        shelf.register("a", old, salt="tenant")
        shelf.register("a", new)
        assert shelf.places(old) == []
        assert shelf.places(new) == [("a", 0, 10)]
        assert shelf.places(old, salt="tenant") == [("a", 0, 9)]
        assert shelf.store.stats().documents == 2

    def test_removing_forgets_every_tenants_document_and_keeps_its_kv(self, shelf):
        text = chunks("a", 9)
        for salt in ("", "tenant"):
            shelf.register("a", text, salt=salt)
        shelf.register("b", text)
        assert shelf.remove("a") == 2
        assert shelf.remove("a") == 0
        assert shelf.places(text) == [("b", 0, 9)]
        assert shelf.remove("b") == 1
        assert shelf.places(text) == shelf.places(text, salt="tenant") == []
        assert shelf.load(text) == shelf.load(text, salt="tenant") == 9

    def test_fingerprints_travel_when_they_changed_and_only_then(self, shelf):
        texts = {name: chunks(name, 9) for name in "abc"}
        empty = shelf.sync()
        assert empty.fingerprints == b""
        assert empty.version > 0
        assert shelf.sync(empty.version).fingerprints is None
        versions = {empty.version}
        for name, text in texts.items():
            shelf.register(name, text, put=False)
            reply = shelf.sync(max(versions))
            assert reply.fingerprints == packed(shelf.fingerprints)
            assert reply.version not in versions
            assert shelf.sync(reply.version).fingerprints is None
            versions.add(reply.version)
        shelf.register("d", texts["a"] + chunks("longer", 2), put=False)
        shelf.register("a", texts["a"], put=False)
        assert shelf.sync(reply.version).fingerprints is None, "another document with a known fingerprint is no news"
        for name in "abcd":
            shelf.remove(name)
        assert shelf.sync(reply.version) == empty

    def test_documents_are_listed_page_by_page_in_order(self, shelf):
        names = [f"document {number}" for number in range(LISTED_MAX + 5)]
        for name in names:
            shelf.register(name, chunks(name, 8), put=False)
        first, second = shelf.listing(), shelf.listing(LISTED_MAX)
        assert [each.document for each in (*first.documents, *second.documents)] == names
        assert first.num_documents == second.num_documents == len(names)
        assert shelf.listing(2**62).documents == []

    def test_the_listing_says_what_there_is(self, shelf):
        text = text_of("a", 9 * CHUNK_TOKENS + 5)
        shelf.register("a", text, put=False)
        shelf.put(text[: 5 * CHUNK_BYTES])
        (info,) = shelf.listing().documents
        assert (info.document, info.model, info.num_tokens, info.num_chunks) == ("a", "model", len(text) // 4, 9)
        assert (info.host_chunks, info.disk_chunks) == (5, 0)
        assert (info.namespace, info.fingerprint) == (shelf.namespace, fingerprint_of(text))
        assert info.first_tokens == text[:CHUNK_BYTES]
        assert abs(info.registered_at_s - time.time()) < 60

    def test_what_engines_report_of_blending_is_counted(self, shelf):
        for number in (1, 2, -5):
            report = Report(
                session=shelf.sessions[0], requests_blended=number, blend_loaded_tokens=10 * number,
                blend_computed_tokens=100 * number,
            )  # fmt: skip
            shelf.store.report(report)
        stats = shelf.store.stats()
        assert (stats.requests.blended, stats.tokens.blend.loaded, stats.tokens.blend.computed) == (3, 30, 300)


class TestKeeping:
    def test_removals_and_replacements_survive_a_restart(self, open_store):
        shelf = Shelf(open_store())
        for name in "abc":
            shelf.register(name, chunks(name, 9))
        shelf.register("b", chunks("new", 9))
        shelf.remove("a")
        shelf = Shelf(open_store())
        assert [each.document for each in shelf.listing().documents] == ["c", "b"]
        assert shelf.find(chunks("b", 9), [(0, fingerprint_of(chunks("b", 9)))]) == []
        assert len(shelf.find(chunks("new", 9), [(0, fingerprint_of(chunks("new", 9)))])) == 1

    def test_documents_that_begin_alike_are_told_apart_after_a_restart(self, open_store):
        shelf, shared = Shelf(open_store()), chunks("shared", 8)
        texts = {name: shared + chunks(name, 2) for name in "abcdef"}
        for name, text in texts.items():
            shelf.register(name, text)
        shelf = Shelf(open_store())
        shelf.fingerprints = frozenset({fingerprint_of(shared)})
        assert [shelf.places(text) for text in texts.values()] == [[(name, 0, 10)] for name in texts]

    def test_what_a_flush_waited_for_is_on_disk(self, open_store, tmp_path):
        shelf = Shelf(open_store())
        shelf.register("a", chunks("a", 9), put=False)
        assert shelf.store.flush(20)
        size = (tmp_path / "data" / FILE_NAME).stat().st_size
        shelf.register("a", chunks("a", 9), put=False)
        assert shelf.store.flush(20)
        assert (tmp_path / "data" / FILE_NAME).stat().st_size == size, "the same document again was written again"
        shelf.remove("a")
        assert shelf.store.flush(20)
        assert (tmp_path / "data" / FILE_NAME).stat().st_size > size

    def test_the_full_file_is_written_anew_and_the_table_never_outgrows_it(self, open_store, tmp_path):
        shelf = Shelf(open_store())
        for number in range(40):
            shelf.register("a", chunks(number, 1000), put=False)
            assert shelf.store.flush(20)
        assert (tmp_path / "data" / FILE_NAME).stat().st_size <= 256 << 10
        with pytest.raises(ProtocolError, match="no room") as caught:
            shelf.register("large", chunks("large", 12_000), put=False)
        assert caught.value.status == 409
        shelf = Shelf(open_store())
        (info,) = shelf.listing().documents
        assert info.first_tokens == chunks(39, 1000)[:CHUNK_BYTES]

    def test_no_more_documents_than_there_may_be(self, shelf, monkeypatch):
        monkeypatch.setattr("cachetier.store.document_table.DOCUMENTS_MAX", 2)
        for name in "aba":
            shelf.register(name, chunks(name, 9), put=False)
        with pytest.raises(ProtocolError, match="no room"):
            shelf.register("c", chunks("c", 9), put=False)
        shelf.register("a", chunks("new", 9), put=False)
        assert shelf.remove("b") == 1
        shelf.register("c", chunks("c", 9), put=False)
        assert isinstance(shelf.store._books.documents, DocumentTable)
        shelf.store._books.documents.check_integrity()

    def test_registering_and_matching_do_not_wait_for_the_disk(self, tmp_path, clock):
        files = SlowFiles()
        store = Store(make_config(tmp_path), clock=clock, files=files)
        shelf = Shelf(store)
        text = chunks("a", 9)
        shelf.register("a", text)
        assert files.is_writing.wait(20)
        shelf.register("b", chunks("b", 9))
        assert shelf.places(text + chunks("b", 9)) == [("a", 0, 9), ("b", 144, 9)]
        assert shelf.remove("a") == 1
        files.may_write.set()
        store.close()
        store = Store(make_config(tmp_path), clock=clock)
        assert [each.document for each in Shelf(store).listing().documents] == ["b"]
        store.close()

    def test_a_disk_that_fails_costs_what_it_did_not_take_and_no_call_fails(self, tmp_path, clock, caplog):
        files = SlowFiles()
        files.may_write.set()
        store = Store(make_config(tmp_path), clock=clock, files=files)
        shelf = Shelf(store)
        shelf.register("a", chunks("a", 9))
        store.flush(20)
        files.error = OSError("injected")
        with caplog.at_level(logging.WARNING):
            shelf.register("b", chunks("b", 9))
            store.flush(20)
        assert "lost at the next restart: injected" in caplog.text
        assert shelf.places(chunks("b", 9)) == [("b", 0, 9)]
        files.error = None
        shelf.register("c", chunks("c", 9))
        store.close()
        store = Store(make_config(tmp_path), clock=clock)
        assert [each.document for each in Shelf(store).listing().documents] == ["a", "c"]
        store.close()


class SlowFiles(FileLayer):
    """A disk on which writing documents waits for `may_write`, and then fails if there is an `error`."""

    def __init__(self) -> None:
        self.is_writing, self.may_write = threading.Event(), threading.Event()
        self.error: OSError | None = None
        self._documents: set[int] = set()

    def open(self, path, *, create=False, direct=False):
        descriptor = super().open(path, create=create, direct=direct)
        (self._documents.add if FILE_NAME in path else self._documents.discard)(descriptor)
        return descriptor

    def pwritev(self, descriptor, buffers, offset):
        if descriptor in self._documents:
            self.is_writing.set()
            assert self.may_write.wait(20)
            if self.error:
                raise self.error
        super().pwritev(descriptor, buffers, offset)
