"""The snapshot: the names that other programs rely on, and counts that agree with what happened."""

import msgspec

from cachetier.core.messages import Report
from cachetier.store.stats import BlendChecks
from tests.store.engines import Engine, tokens_of


def test_the_json_has_the_names_that_other_programs_rely_on(store):
    stats = msgspec.json.decode(msgspec.json.encode(store.stats()))
    blend = {"loaded": 0, "computed": 0}
    hit = {"gpu": 0, "host": 0, "disk": 0, "remote": 0}
    assert stats["tokens"] == {"queried": 0, "hit": hit, "stored": 0, "waited": 0, "blend": blend}
    assert stats["requests"] == {"blended": 0}
    assert stats["blend"] == {"checked": 0, "agreed": 0, "kl": 0.0}
    for tier in ("host", "disk"):
        assert stats["bytes"][tier]["used"] < stats["bytes"][tier]["limit"]
    for name in ("chunks", "chunks_durable", "leases", "checksum_failures", "stores_dropped", "documents"):
        assert stats[name] == 0


def test_a_chunk_in_two_tiers_counts_once(store):
    engine = Engine(store)
    engine.put(tokens_of(1, 2, 3))
    assert store.stats().chunks == 3
    store.flush(20)
    stats = store.stats()
    assert (stats.chunks, stats.chunks_host, stats.chunks_durable) == (3, 3, 3)


def test_what_engines_find_when_they_check_blended_requests_is_summed_up(store):
    [session] = Engine(store).sessions
    before = store.stats()
    for agrees, kl in ((1, 0.25), (0, 0.5)):
        store.report(Report(session=session, blends_checked=1, blends_agreed=agrees, blends_kl=kl))
    store.report(Report(session=session, blends_checked=-1, blends_agreed=-1, blends_kl=-1.0))
    assert store.stats().blend == BlendChecks(checked=2, agreed=1, kl=0.75)
    assert before.blend == BlendChecks()


def test_a_snapshot_does_not_change_afterwards(store):
    engine = Engine(store)
    before = store.stats()
    engine.put(tokens_of(1))
    engine.load(tokens_of(1))
    assert (before.tokens.queried, before.tokens.stored, before.chunks) == (0, 0, 0)
    assert store.stats().tokens.queried > 0
