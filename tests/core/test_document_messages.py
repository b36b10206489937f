"""Messages about documents: what is left out means what an old or lazy asker would want, and limits are stated once."""

import msgspec
import pytest

from cachetier.core.codec import REPLY_OF, decode, encode
from cachetier.core.document_messages import (
    DocumentRun,
    MatchDocuments,
    MatchDocumentsReply,
    RegisterDocument,
    SyncDocuments,
    SyncDocumentsReply,
)
from cachetier.core.errors import ProtocolError
from cachetier.core.messages import MatchReply

NOTHING_HELD = MatchReply(
    lease=0, num_chunks=0, keys=b"", tiers=b"", tilings=[], tiling_of=b"", frames=[], checksums=[], num_pending=0
)


@pytest.mark.parametrize("fingerprint", [0, 2**63, 2**64 - 1])
def test_fingerprints_use_all_of_their_64_bits(fingerprint: int) -> None:
    register = RegisterDocument(session=1, namespace=b"n", document="d", tokens=b"", fingerprint=fingerprint)
    assert decode(RegisterDocument, encode(register)).fingerprint == fingerprint
    match = MatchDocuments(session=1, namespace=b"n", tokens=b"", candidates=[(3, fingerprint)])
    assert decode(MatchDocuments, encode(match)).candidates == [(3, fingerprint)]


@pytest.mark.parametrize("candidate", [[], [1], [1, 2, 3], [1, "2"], [1, None], [1, 2**64], [1.5, 2], 7])
def test_a_candidate_is_two_numbers(candidate: object) -> None:
    fields = {"session": 1, "namespace": b"n", "tokens": b"", "candidates": [candidate]}
    try:
        body = msgspec.msgpack.encode(fields)
    except OverflowError:
        return  # what cannot be encoded cannot arrive
    with pytest.raises(ProtocolError, match="MatchDocuments"):
        decode(MatchDocuments, body)


def test_a_match_leases_and_looks_everywhere_unless_told_otherwise() -> None:
    match = MatchDocuments(session=1, namespace=b"n", tokens=b"", candidates=[])
    assert (match.lease, match.start, match.salt, match.reads_pools) == (True, 0, "", False)
    assert SyncDocuments(session=1, namespace=b"n").version == 0


def test_no_fingerprints_and_no_news_are_told_apart() -> None:
    for fingerprints in (None, b""):
        reply = SyncDocumentsReply(version=7, fingerprints=fingerprints)
        assert decode(REPLY_OF[SyncDocuments], encode(reply)) == reply


def test_a_run_carries_an_ordinary_match() -> None:
    run = DocumentRun(offset=3, document="d", num_tokens=128, match=NOTHING_HELD)
    reply = MatchDocumentsReply(runs=[run])
    assert decode(MatchDocumentsReply, encode(reply)).runs[0].match == NOTHING_HELD
