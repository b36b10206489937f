"""Documents: what is registered is found wherever it stands, and nothing else ever is."""

import itertools
from functools import partial

import msgspec
import pytest

from cachetier.core.document_messages import CANDIDATES_MAX, RegisterDocument
from cachetier.core.errors import ProtocolError
from cachetier.core.messages import TIER_DISK, TIER_HOST, Invalidate
from tests.store.chunks import BIG, CHUNK_TOKENS
from tests.store.engines import keys_of, tokens_of
from tests.store.shelves import CHUNK_BYTES, Shelf, fingerprint_of, text_of

NO_DISK = {"disk_bytes": 0}


def chunks(seed: object, num_chunks: int) -> bytes:
    return text_of(seed, num_chunks * CHUNK_TOKENS)


def packed(fingerprints: set[int]) -> bytes:
    return b"".join(each.to_bytes(8, "little") for each in sorted(fingerprints))


@pytest.fixture
def shelf(open_store):
    return Shelf(open_store(**NO_DISK))


class TestFinding:
    @pytest.mark.parametrize("gap", [0, 1, 7, 16, 33])
    def test_documents_are_found_in_every_order_at_any_offset(self, shelf, gap):
        texts = {name: chunks(name, number) for name, number in (("a", 8), ("b", 10), ("c", 13))}
        for name, text in texts.items():
            assert shelf.register(name, text) == len(text) // CHUNK_BYTES
        for order in itertools.permutations(texts):
            prompt, wanted = text_of("instructions", gap), []
            for name in order:
                wanted.append((name, len(prompt) // 4, len(texts[name]) // CHUNK_BYTES))
                prompt += texts[name] + text_of(f"after {name}", gap)
            assert shelf.places(prompt + text_of("question", 20)) == wanted

    def test_each_run_is_an_ordinary_match_with_a_lease_of_its_own(self, shelf):
        text = chunks("a", 9)
        shelf.register("a", text)
        first, second = shelf.find(text + text_of("between", 5) + text)
        assert (first.offset, first.num_tokens) == (0, 9 * CHUNK_TOKENS)
        assert (second.offset, second.num_tokens) == (9 * CHUNK_TOKENS + 5, 9 * CHUNK_TOKENS)
        assert first.match.lease != second.match.lease
        assert first.match.tiers == second.match.tiers == bytes([TIER_HOST]) * 9
        assert first.match.keys == shelf.match(text, lease=False).keys
        assert shelf.store.stats().leases == 2
        shelf.release(first.match)
        assert shelf.check(second.match, wait=False) == [True] * 9

    @pytest.mark.parametrize("names", ["ab", "ba"])
    def test_of_documents_that_begin_alike_the_one_with_most_in_common_counts(self, shelf, names):
        shared, texts = chunks("shared", 9), {}
        for name in names:
            texts[name] = shared + chunks(name, 6)
            shelf.register(name, texts[name])
        filler = text_of("filler", 3)
        assert shelf.places(filler + texts["a"] + filler + texts["b"]) == [("a", 3, 15), ("b", 6 + 15 * 16, 15)]
        ((name, *place),) = shelf.places(shared + chunks("another", 6))
        assert name in texts
        assert place == [0, 9]
        assert shelf.places(texts["b"][: 12 * CHUNK_BYTES]) == [("b", 0, 12)]

    def test_a_document_that_is_another_ones_beginning_does_not_hide_it(self, shelf):
        long = chunks("long", 12)
        for name, length in (("ten", 10), ("long", 12), ("nine", 9)):
            shelf.register(name, long[: length * CHUNK_BYTES])
        assert shelf.places(long + text_of("q", 9)) == [("long", 0, 12)]
        assert shelf.places(long[: 10 * CHUNK_BYTES] + text_of("q", 40)) == [("ten", 0, 10)]

    def test_of_documents_that_overlap_the_first_is_found_whole(self, shelf):
        text = chunks("both", 20)
        shelf.register("front", text[: 12 * CHUNK_BYTES])
        shelf.register("back", text[8 * CHUNK_BYTES :])
        shelf.register("inside", text[CHUNK_BYTES : 10 * CHUNK_BYTES])
        assert shelf.places(text_of("x", 2) + text) == [("front", 2, 12)]
        assert shelf.places(text[4:]) == [("inside", 15, 9)], "the first candidate stands after its own first token"
        shelf.remove("front")
        shelf.remove("inside")
        assert shelf.places(text) == [("back", 128, 12)]

    def test_a_document_cut_short_in_the_prompt_is_found_as_far_as_it_stands_there(self, shelf):
        text = chunks("a", 12)
        shelf.register("a", text)
        assert shelf.places(text_of("x", 3) + text[: 10 * CHUNK_BYTES + 40]) == [("a", 3, 10)]
        assert shelf.places(text_of("x", 3) + text[: 9 * CHUNK_BYTES] + text_of("y", 99)) == [("a", 3, 9)]
        assert shelf.places(text[: 8 * CHUNK_BYTES - 4] + text_of("y", 99)) == [], "127 tokens are not worth it"

    def test_nothing_is_claimed_beyond_the_documents_end_though_the_tier_holds_it(self, shelf):
        """Isolation: KV that continues a document belongs to somebody's conversation."""
        text, conversation = chunks("a", 9), chunks("a conversation", 6)
        shelf.put(text + conversation)
        shelf.register("a", text)
        assert shelf.load(text + conversation) == 15
        prompt = text_of("x", 5) + text + conversation
        (run,) = shelf.find(prompt)
        assert (run.offset, run.num_tokens, run.match.num_chunks) == (5, 9 * CHUNK_TOKENS, 9)
        assert run.match.keys == shelf.match(text, lease=False).keys
        assert shelf.find(text_of("x", 5) + conversation, [(5, fingerprint_of(text))]) == []

    def test_an_incomplete_last_chunk_is_not_part_of_the_document(self, shelf):
        text = text_of("a", 9 * CHUNK_TOKENS + 9)
        shelf.put(text + text_of("more", 7))
        assert shelf.register("a", text, put=False) == 9
        assert shelf.places(text + text_of("more", 30)) == [("a", 0, 9)]

    def test_salts_and_models_do_not_see_each_others_documents(self, open_store):
        store = open_store(**NO_DISK)
        shelf, other = Shelf(store), Shelf(store, "other", model="other")
        text = chunks("a", 9)
        shelf.register("a", text, salt="tenant")
        other.put(text)
        shelf.put(text)
        shelf.put(text, salt="another")
        assert shelf.places(text, salt="tenant") == [("a", 0, 9)]
        for salt in ("", "another"):
            assert shelf.places(text, salt=salt) == []
            assert shelf.sync(salt=salt).fingerprints == b""
        assert other.find(text, shelf.candidates(text), salt="tenant") == []

    def test_what_ends_before_the_start_is_left_out(self, shelf):
        text = chunks("a", 9)
        shelf.register("a", text)
        prompt = text + text
        end = 9 * CHUNK_TOKENS
        for start, wanted in ((end - 1, [0, end]), (end, [end]), (2 * end - 1, [end]), (2 * end, [])):
            assert [offset for _, offset, _ in shelf.places(prompt, start=start)] == wanted
        assert [run.offset for run in shelf.find(prompt, start=end, lease=False)] == [end]
        assert shelf.store.stats().leases == 0

    def test_without_a_lease_nothing_is_leased_promoted_or_counted(self, open_store):
        text = chunks("a", 9)
        shelf = Shelf(open_store())
        shelf.register("a", text)
        shelf.register("never stored", chunks("b", 8), put=False)
        shelf.store.flush(20)
        shelf = Shelf(open_store())
        shelf.fingerprints = {fingerprint_of(text), fingerprint_of(chunks("b", 8))}
        first, second = shelf.find(text + chunks("b", 8), lease=False)
        assert (first.document, first.match.tiers, first.match.lease) == ("a", bytes([TIER_DISK]) * 9, 0)
        assert (second.document, second.num_tokens, second.match.num_chunks) == ("never stored", 128, 0)
        stats = shelf.store.stats()
        assert (stats.leases, stats.promoted, stats.tokens.queried) == (0, 0, 0)

    def test_matched_documents_are_no_queried_tokens(self, shelf):
        text = chunks("a", 9)
        shelf.register("a", text)
        assert shelf.places(text) == [("a", 0, 9)]
        assert shelf.store.stats().tokens.queried == 0


class TestWhatIsGone:
    def test_a_document_whose_kv_is_evicted_is_not_found_but_stays_registered(self, open_store):
        shelf = Shelf(open_store(**NO_DISK), layout=BIG)
        text = chunks("a", 9)
        shelf.register("a", text)
        for number in range(100, 130):
            shelf.put(tokens_of(number))
        assert shelf.places(text) == []
        assert shelf.listing().documents[0].host_chunks < 8
        shelf.put(text)
        assert shelf.places(text) == [("a", 0, 9)]

    @pytest.mark.parametrize(("gone", "held"), [(11, 11), (8, 8), (7, 0), (0, 0)])
    def test_a_missing_chunk_ends_the_run_and_too_short_a_run_is_given_back(self, shelf, gone, held):
        text = chunks("a", 12)
        shelf.register("a", text)
        key = keys_of(shelf.match(text, lease=False))[gone]
        shelf.store.invalidate(Invalidate(session=shelf.sessions[0], keys=key))
        assert shelf.places(text_of("x", 1) + text) == ([("a", 1, held)] if held else [])
        assert shelf.store.stats().leases == 0

    def test_documents_on_disk_are_found_after_a_restart(self, open_store):
        texts = {name: chunks(name, 10) for name in "abc"}
        shelf = Shelf(open_store())
        for name, text in texts.items():
            shelf.register(name, text, salt="tenant")
        before = shelf.listing().documents
        shelf = Shelf(open_store())
        shelf.fingerprints = {fingerprint_of(text) for text in texts.values()}
        after = shelf.listing().documents
        assert [msgspec.structs.replace(each, host_chunks=10, disk_chunks=0) for each in after] == [
            msgspec.structs.replace(each, host_chunks=10, disk_chunks=0) for each in before
        ]
        assert [(each.host_chunks, each.disk_chunks, each.model) for each in after] == [(0, 10, "model")] * 3
        assert shelf.sync(salt="tenant").fingerprints == packed(shelf.fingerprints)
        prompt = text_of("x", 9) + texts["c"] + texts["a"]
        runs = shelf.find(prompt, salt="tenant")
        assert [run.match.tiers for run in runs] == [bytes([TIER_DISK]) * 10] * 2
        assert shelf.places(prompt, salt="tenant") == [("c", 9, 10), ("a", 169, 10)]

    def test_without_a_disk_tier_documents_end_with_the_server(self, open_store):
        shelf = Shelf(open_store(**NO_DISK))
        shelf.register("a", chunks("a", 9))
        assert open_store(**NO_DISK).stats().documents == 0


class TestLies:
    @pytest.mark.parametrize(
        "candidates",
        [
            [(0, -1)],
            [(0, 1), (1, 2**64)],
            [(0, 1), (10, 2**63)],
            [(299, 1)],
        ],
        ids=["negative", "too large", "unknown", "in the last token"],
    )
    def test_wrong_fingerprints_find_nothing(self, shelf, candidates):
        shelf.register("a", chunks("a", 9))
        assert shelf.find(text_of("x", 300), candidates) == []

    def test_a_registered_fingerprint_at_the_wrong_offset_finds_nothing(self, shelf):
        text = chunks("a", 9)
        shelf.register("a", text)
        prompt = text_of("x", 50) + text + text_of("y", 50)
        lies = [(offset, fingerprint_of(text)) for offset in range(len(prompt) // 4) if offset != 50]
        assert shelf.find(prompt, lies) == []
        truth = sorted([*lies, (50, fingerprint_of(text))])
        assert [run.offset for run in shelf.find(prompt, truth)] == [50]

    def test_a_document_under_a_false_fingerprint_is_found_only_where_it_stands(self, shelf):
        text, other = chunks("a", 9), chunks("b", 9)
        message = RegisterDocument(
            session=shelf.sessions[0], namespace=shelf.namespace, document="a", tokens=text,
            fingerprint=fingerprint_of(other),
        )  # fmt: skip
        shelf.store.documents.register(message)
        shelf.put(text + other)
        shelf.put(other)
        assert shelf.find(other, [(0, fingerprint_of(other))]) == []
        assert len(shelf.find(other + text, [(9 * CHUNK_TOKENS, fingerprint_of(other))])) == 1

    @pytest.mark.parametrize(
        ("candidates", "text"),
        [
            ([(300, 1)], "not within the 300 tokens"),
            ([(-1, 1)], "not within"),
            ([(5, 1), (4, 1)], "not ascending"),
            ([(5, 1), (5, 2)], "not ascending"),
            ([(0, 1)] * (CANDIDATES_MAX + 1), "at most 4096"),
        ],
    )
    def test_impossible_candidates_are_refused(self, shelf, candidates, text):
        with pytest.raises(ProtocolError, match=text) as caught:
            shelf.find(text_of("x", 300), candidates)
        assert caught.value.status == 400

    @pytest.mark.parametrize("document", ["", "x" * 257, "a\nb", "\0", "\x7f", "\u202e"])
    def test_impossible_ids_are_refused(self, shelf, document):
        with pytest.raises(ProtocolError, match="printable"):
            shelf.register(document, chunks("a", 9))

    @pytest.mark.parametrize("fingerprint", [-1, 2**64])
    def test_impossible_fingerprints_are_refused(self, shelf, fingerprint):
        message = RegisterDocument(
            session=shelf.sessions[0], namespace=shelf.namespace, document="a", tokens=b"", fingerprint=fingerprint
        )
        with pytest.raises(ProtocolError, match="64-bit"):
            shelf.store.documents.register(message)

    def test_unknown_sessions_and_namespaces_are_404(self, shelf):
        for field in ("sessions", "namespace"):
            stranger = Shelf(shelf.store)
            setattr(stranger, field, {"sessions": [1], "namespace": b"?" * 16}[field])
            for call in (stranger.sync, partial(stranger.find, b""), partial(stranger.register, "a", b"", put=False)):
                with pytest.raises(ProtocolError) as caught:
                    call()
                assert caught.value.status == 404
