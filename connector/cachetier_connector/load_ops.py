"""From a matched request to what the workers load: pure functions of the scheduler half."""

from cachetier.core.messages import LATE_TIERS
from cachetier_connector.break_even import Choice, Hit
from cachetier_connector.plan import LoadOp, chunks_to_load, split_by_tier
from cachetier_connector.requests import MatchTicket, TrackedRequest


def load_op(
    tracked: TrackedRequest, ticket: MatchTicket, start: int, end: int, *, shift: int = 0, part: int | None = None
) -> LoadOp:
    """Return the load of tokens `[start, end)` of a request from what `ticket` holds.

    Args:
        tracked: the request; its block table must be known.
        ticket: of the prompt, or of a document in it.
        start, end: positions in the prompt.
        shift: position in the prompt of what `ticket` matched.
        part: see `LoadOp`.
    """
    assert ticket.reply is not None
    first_chunk, chunks = chunks_to_load(ticket.reply, start - shift, end - shift, ticket.chunk_tokens)
    return LoadOp(
        request_id=tracked.id,
        start=start,
        end=end,
        chunk_tokens=ticket.chunk_tokens,
        first_chunk=first_chunk,
        chunks=chunks,
        tilings=ticket.reply.tilings,
        block_ids=tracked.block_ids,
        arena_path=ticket.arena_path,
        instance=ticket.instance,
        pools=ticket.reply.pools,
        fill=ticket.reply.fill,
        segments=ticket.reply.segments,
        patience_s=ticket.choice.patience_s if ticket.choice else None,
        shift=shift,
        part=part,
    )


def blend_loads(tracked: TrackedRequest, start: int) -> list[LoadOp]:
    """Return the loads of a blended request from token `start` on: the rest of its exact prefix, then its documents."""
    plan, ticket = tracked.blend, tracked.ticket
    assert plan is not None
    assert ticket is not None
    loads, exact_end = [], exact_end_of(tracked)
    if exact_end > start:
        loads.append(load_op(tracked, ticket, start, exact_end, part=0))
    for load in plan.loads:
        found = ticket.documents[load.document]
        loads.append(load_op(tracked, found.ticket, load.start, load.end, shift=found.offset, part=len(loads)))
    return loads


def exact_end_of(tracked: TrackedRequest) -> int:
    """Return where the exact prefix of a blended request ends: there its first run begins."""
    plan = tracked.blend
    assert plan is not None
    return min([plan.approximate_from, *(run.start for run in plan.computes)])


def tiers_of_load(tracked: TrackedRequest, start: int, end: int) -> dict[int, int]:
    """Return how many of the tokens `[start, end)` come from which tier as a part of the prefix."""
    ticket = tracked.ticket
    if ticket is None or ticket.reply is None:
        return {}
    if tracked.blend is not None:
        end = min(end, exact_end_of(tracked))
    return split_by_tier(ticket.reply, start, end, ticket.chunk_tokens)


def documents_as_hit(ticket: MatchTicket, now_s: float) -> Hit:
    """Return what is held of all documents in a prompt as one hit, as if they were all of it and nothing else.

    They are read from disk one after the other, in the order in which they stand in the prompt.
    """
    replies = [found.ticket.reply for found in ticket.documents if found.ticket.reply is not None]
    is_timed = all(reply.ready_in_s for reply in replies if any(tier in reply.tiers for tier in LATE_TIERS))
    return Hit(
        num_tokens=sum(reply.num_chunks for reply in replies) * ticket.chunk_tokens + 1,
        num_computed=0,
        chunk_tokens=ticket.chunk_tokens,
        tiers=b"".join(reply.tiers for reply in replies),
        ready_in_s=[each for reply in replies for each in reply.ready_in_s] if is_timed else [],
        elapsed_s=0.0 if any(reply.segments for reply in replies) else now_s - ticket.replied_s,
    )


def share_choice(ticket: MatchTicket, choice: Choice) -> list[MatchTicket]:
    """Say of each document in a prompt what of it is to be loaded; return those of which it is less than is held."""
    left, cut = choice.num_chunks, []
    for found in ticket.documents:
        assert found.ticket.reply is not None
        num_chunks = min(left, found.ticket.reply.num_chunks)
        left -= num_chunks
        found.ticket.choice = Choice(num_chunks, choice.patience_s)
        if num_chunks < found.ticket.reply.num_chunks:
            cut.append(found.ticket)
    return cut
