"""Requests with documents in them, as the scheduler half knows them: for tests without a server."""

from cachetier.core.config import ConnectorConfig
from cachetier.core.layout import Shard
from cachetier.core.messages import TIER_HOST, MatchReply
from cachetier_connector.facts import EngineFacts
from cachetier_connector.requests import FoundDocument, MatchTicket, TrackedRequest
from cachetier_connector.wishes import Wishes
from tests.connector.engines import FakeRequest
from tests.connector.servers import BLOCK, CHUNK, LAYOUT, tokens_of

HASH_BYTES = 8


def facts_of(*, blend: str = "request", **changes) -> EngineFacts:
    """Return the facts of an engine that blends."""
    config = ConnectorConfig(server="unix:/nowhere", blend=blend, **changes.pop("settings", {}))
    fields = {
        "engine": "e",
        "name": "engine",
        "role": "both",
        "block_tokens": BLOCK,
        "layout": LAYOUT,
        "tiling": [Shard(0, 2, 0, 2)],
        "device": "cpu",
        "tensor_parallel": 1,
        "pipeline_parallel": 1,
        "pass_tokens_max": 1024,
        "pass_runs_max": 16,
        "blend_refusal": "",
    }
    return EngineFacts(config=config, **(fields | changes))


def reply_of(num_tokens: int, lease: int = 1, first_frame: int = 0) -> MatchReply:
    """Return a reply that holds the complete chunks of `num_tokens` tokens; frames are numbered."""
    num_chunks = num_tokens // CHUNK
    return MatchReply(
        lease=lease,
        num_chunks=num_chunks,
        keys=bytes(16 * num_chunks),
        tiers=bytes([TIER_HOST] * num_chunks),
        tilings=[[Shard(0, 2, 0, 2)]],
        tiling_of=bytes(num_chunks),
        frames=list(range(first_frame, first_frame + num_chunks)),
        checksums=list(range(num_chunks)),
        num_pending=0,
    )


def request_of(name: str, num_tokens: int, **attributes) -> FakeRequest:
    """Return a request with a hash for each of its complete blocks."""
    hashes = [bytes([number]) * HASH_BYTES for number in range(num_tokens // BLOCK)]
    return FakeRequest(name, tokens_of(sum(map(ord, name)), num_tokens), block_hashes=hashes, **attributes)


def tracked_of(
    name: str,
    num_tokens: int,
    documents: list[tuple[int, int]],
    wishes: Wishes = Wishes(blend=True),  # noqa: B008 (it is a value)
    prefix: int = 0,
) -> TrackedRequest:
    """Return a request of `num_tokens` tokens in which `documents`, (offset, tokens held), were found behind `prefix`
    tokens that are held exactly. The frames of document n count from `1000 * (n + 1)`."""
    found = [
        FoundDocument(f"d{number}", offset, MatchTicket(chunk_tokens=CHUNK, reply=reply_of(held, 2 + number, frame)))
        for number, (offset, held) in enumerate(documents)
        for frame in [1000 * (number + 1)]
    ]
    return TrackedRequest(
        request=request_of(name, num_tokens),
        wishes=wishes,
        may_load=True,
        may_store=True,
        may_blend=True,
        ticket=MatchTicket(chunk_tokens=CHUNK, reply=reply_of(prefix), documents=found),
        block_ids=list(range(100, 100 + -(-num_tokens // BLOCK))),
    )
