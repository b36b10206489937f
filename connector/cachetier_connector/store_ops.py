"""From what is computed of a request to what the workers store: pure functions of the scheduler half."""

from cachetier.core.keys import KEY_BYTES, TOKEN_BYTES
from cachetier_connector.plan import StoreOp, tokens_to_bytes
from cachetier_connector.requests import MatchTicket, TrackedRequest

MAX_CHUNKS_PER_OP = 256


def store_ops(tracked: TrackedRequest, num_known_tokens: int, block_tokens: int) -> list[StoreOp]:
    """Return ops for the chunks that are complete now and were not handed over; note that they are from now on.

    Args:
        tracked: the request.
        num_known_tokens: tokens that it has.
        block_tokens: tokens a block.
    """
    ticket = tracked.ticket
    if ticket is None or not ticket.done.is_set() or ticket.reply is None:
        return []
    exact_end = num_known_tokens if tracked.exact_end is None else tracked.exact_end
    end_chunk = min(num_known_tokens, tracked.computed_end, exact_end) // ticket.chunk_tokens
    if end_chunk <= tracked.next_chunk:
        return []
    first = max(tracked.next_chunk, ticket.reply.num_chunks)
    tracked.next_chunk = max(end_chunk, first)
    ops = []
    for start in range(first, end_chunk, MAX_CHUNKS_PER_OP):
        ops.append(_store_op(tracked, ticket, start, min(start + MAX_CHUNKS_PER_OP, end_chunk), block_tokens))
    tracked.has_stores |= bool(ops)
    return ops


def _store_op(tracked: TrackedRequest, ticket: MatchTicket, first: int, end: int, block_tokens: int) -> StoreOp:
    assert ticket.reply is not None
    chunk_tokens = ticket.chunk_tokens
    start_token, end_token = first * chunk_tokens, end * chunk_tokens
    tokens = ticket.tokens[start_token * TOKEN_BYTES : end_token * TOKEN_BYTES]
    if len(tokens) < (end_token - start_token) * TOKEN_BYTES:  # decoded since
        tokens = tokens_to_bytes(tracked.request.all_token_ids[start_token:end_token])
    keys = ticket.reply.keys
    parent: bytes | None = None
    if first * KEY_BYTES <= len(keys):
        parent = keys[(first - 1) * KEY_BYTES : first * KEY_BYTES] if first else b""
    return StoreOp(
        request_id=tracked.id,
        namespace=ticket.namespace,
        salt=tracked.request.cache_salt or "",
        parent=parent,
        chunk_tokens=chunk_tokens,
        position=first,
        tokens=tokens,
        extras=[(chunk - first, extra) for chunk, extra in ticket.extras if first <= chunk < end],
        block_ids=tracked.block_ids[start_token // block_tokens : -(-end_token // block_tokens)],
    )
