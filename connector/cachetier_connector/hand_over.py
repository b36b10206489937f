"""Requests that load while their prompt is still being computed elsewhere: what is loaded when, and for how long.

vLLM asks once how much of a prompt will be loaded. Of a prompt whose chunks are partly held, and partly pending or
promised, the answer counts them all; what is held is loaded at once, and the rest piece by piece, in the steps after
the server has told the `Waiter` of it. The load counts as ended when its last piece has. A request that waits for too
long, or in vain, gives the rest up: that is a last piece that brings nothing, so that its blocks are reported as failed
and computed. Everything here runs on the scheduler's thread and waits for nothing.

A consumer waits for whatever is promised. An engine that could as well compute, one with role both, waits only for
chunks that are being stored already, which takes milliseconds.
"""

import dataclasses
import logging
import time

import msgspec

from cachetier_connector.break_even import Choice
from cachetier_connector.load_ops import load_op
from cachetier_connector.plan import HeldChunks, LoadOp
from cachetier_connector.requests import MatchTicket, TrackedRequest

NOTHING = HeldChunks(b"", b"", [], [])

log = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class _Load:
    """A load of tokens `[start, end)` of which those before `done_to` were handed to the workers."""

    tracked: TrackedRequest
    ticket: MatchTicket
    start: int
    done_to: int
    end: int
    is_void: bool = False


class HandOver:
    """Which requests wait, and what they load next."""

    def __init__(self, promised_deadline_s: float, pending_deadline_s: float) -> None:
        """Wait for nobody yet.

        Args:
            promised_deadline_s: without progress for so long, a request that waits for promised chunks gives up.
            pending_deadline_s: the same where only chunks that are being stored are waited for.
        """
        self._promised_deadline_s, self._pending_deadline_s = promised_deadline_s, pending_deadline_s
        self._loads: dict[str, _Load] = {}

    def choice(self, tracked: TrackedRequest, ticket: MatchTicket) -> Choice | None:
        """Return what a request loads that waits for promised chunks, None: it does not.

        It is there to decode what others prefill: everything that is held is loaded, however long that takes.
        """
        assert ticket.reply is not None
        if not tracked.waits_for_promised or not ticket.reply.num_pending or ticket.documents:
            return None
        return Choice(ticket.reply.num_chunks, self._promised_deadline_s)

    def num_awaited(self, tracked: TrackedRequest, ticket: MatchTicket) -> int:
        """Return how many chunks beyond those that are worth loading a match's request will wait for, as of now."""
        assert ticket.reply is not None
        assert ticket.choice is not None
        if ticket.documents or ticket.choice.num_chunks < ticket.num_held:
            return 0
        _catch_up(ticket)
        more = ticket.reply.num_chunks - ticket.choice.num_chunks
        return more if self._is_vain(tracked, ticket) else more + ticket.reply.num_pending

    def begin(self, tracked: TrackedRequest, ticket: MatchTicket, start: int, end: int) -> list[LoadOp]:
        """Return what is loaded now of tokens `[start, end)`; `next_ops` returns the rest."""
        assert ticket.reply is not None
        load = self._loads[tracked.id] = _Load(tracked, ticket, start, start, end)
        ops = self._next(load)
        if load.done_to == end:
            del self._loads[tracked.id]
        return ops

    def next_ops(self) -> list[LoadOp]:
        """Return what is loaded in the next step for those that wait."""
        ops = []
        for request_id, load in list(self._loads.items()):
            if _catch_up(load.ticket) or load.is_void or self._is_over(load):
                # The copies that a match orders are made by its first load.
                ops += [msgspec.structs.replace(op, fill=0) for op in self._next(load)]
            if load.done_to == load.end:
                del self._loads[request_id]
        return ops

    def drop(self) -> None:
        """Give up all loads that wait, what they have loaded included: it belongs to other weights."""
        for load in self._loads.values():
            load.is_void = True

    def _next(self, load: _Load) -> list[LoadOp]:
        """Return the loads of what has come to be held, and of nothing for the rest if it is not waited for."""
        tracked, ticket, ops = load.tracked, load.ticket, []
        assert ticket.reply is not None
        is_over = load.is_void or self._is_over(load)
        held_end = min(load.end, ticket.reply.num_chunks * ticket.chunk_tokens)
        if held_end > load.done_to and not (load.is_void or tracked.is_finished):
            op = load_op(tracked, ticket, load.done_to, held_end)
            ops.append(msgspec.structs.replace(op, is_last=held_end == load.end))
            load.done_to = held_end
        if is_over and load.done_to < load.end:
            if not tracked.is_finished:
                log.warning(
                    "cachetier: request %s waited in vain for chunks; computing from token %d", tracked.id, load.done_to
                )
            start = load.start if load.is_void else load.done_to
            ops.append(msgspec.structs.replace(load_op(tracked, ticket, start, load.end), chunks=NOTHING, fill=0))
            load.done_to = load.end
        return ops

    def _is_over(self, load: _Load) -> bool:
        """Tell whether nothing more is to be waited for: it was aborted, has failed already, or would be in vain."""
        tracked = load.tracked
        return tracked.is_finished or tracked.failed_at is not None or self._is_vain(tracked, load.ticket)

    def _is_vain(self, tracked: TrackedRequest, ticket: MatchTicket) -> bool:
        assert ticket.reply is not None
        if not ticket.reply.num_pending or ticket.is_lost or ticket.is_released:
            return True
        deadline_s = self._promised_deadline_s if tracked.waits_for_promised else self._pending_deadline_s
        return time.monotonic() - ticket.replied_s > deadline_s


def _catch_up(ticket: MatchTicket) -> bool:
    """Take the latest news of a match for its reply; tell whether there was any."""
    news = ticket.news
    if news is None or news is ticket.reply:
        return False
    ticket.reply, ticket.replied_s = news, time.monotonic()
    return True
