"""What the scheduler half remembers of each request. Owned by vLLM's scheduler thread, except where noted."""

import dataclasses
import logging
import threading
import time
from typing import Any, NamedTuple

from cachetier.core.messages import MatchReply
from cachetier_blend.plan import BlendPlan
from cachetier_connector.break_even import Choice
from cachetier_connector.wishes import Wishes

log = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class MatchTicket:
    """A match under way. The link thread fills it and sets `done` last; the scheduler thread has it from then on.

    Attributes:
        namespace: of the request's model and adapter; empty while unknown.
        tokens: what was matched, little-endian int32.
        extras: digests of the request's multimodal inputs by chunk.
        chunk_tokens: tokens a chunk.
        reply: what is held, None if the server could not tell; the scheduler thread follows the news.
        replied_s: when that was so.
        num_held: chunks that were held when the server answered first.
        wait_number: what the server calls its wait for more; 0: it has none.
        news: the latest reply to the match after the first, None while there is none. The waiter's thread sets it.
        is_lost: no more news will come. The waiter's thread sets it.
        choice: what of it is worth loading; the scheduler thread decides when vLLM first asks.
        arena_path, instance: the arena that the reply's frames lie in.
        is_abandoned: set by the scheduler thread: nothing will be loaded, a lease that still comes is to be given back.
        is_released: the lease was given back or has expired.
        documents: what was found beyond the held prefix, if it was looked for, ascending.
    """

    since_s: float = dataclasses.field(default_factory=time.monotonic)
    namespace: bytes = b""
    tokens: bytes = b""
    extras: list[tuple[int, bytes]] = dataclasses.field(default_factory=list)
    chunk_tokens: int = 0
    reply: MatchReply | None = None
    replied_s: float = 0.0
    num_held: int = 0
    wait_number: int = 0
    news: MatchReply | None = None
    is_lost: bool = False
    choice: Choice | None = None
    arena_path: str = ""
    instance: str = ""
    done: threading.Event = dataclasses.field(default_factory=threading.Event)
    is_abandoned: bool = False
    is_released: bool = False
    documents: "list[FoundDocument]" = dataclasses.field(default_factory=list)


class FoundDocument(NamedTuple):
    """A registered document in a prompt: its id, the prompt's token with which it begins, and what of it is held."""

    document: str
    offset: int
    ticket: MatchTicket


@dataclasses.dataclass(slots=True)
class TrackedRequest:
    """One request of the engine.

    Attributes:
        request: vLLM's.
        wishes: what the request asks of cachetier.
        may_load, may_store, may_blend: what role, request and circumstances allow.
        promises: others may wait for what will be stored of its prompt.
        waits_for_promised: it waits for what others promise.
        ticket: the latest match, None before the first and when another is needed.
        block_ids: the block table as far as it is known.
        computed_end: tokens whose KV is computed once every step scheduled so far has run.
        matched_from: tokens that vLLM held itself when it last asked what can be loaded beyond them.
        next_chunk: the first chunk that has not been handed to the workers and is not known to be held.
        loading: tokens `[start, end)` being loaded, None when no load is under way.
        load_s: how long the slowest rank's load took.
        planned_s, loaded_s: when the latest load was planned; when its end was known, 0 once it is scheduled.
        failed_at: first token that the load under way could not bring, None while there is none.
        has_stores: chunks in the blocks that it has now were handed to the workers.
        is_finished: vLLM is done with it, except for a load under way.
        blend: what is loaded and computed if the next or present load is a blend.
        is_blended: its blocks hold what was loaded and computed in a blend that is complete.
        exact_end: KV from this token on may be approximate, and is not stored; None: all is exact.
    """

    request: Any
    wishes: Wishes
    may_load: bool
    may_store: bool
    may_blend: bool = False
    promises: bool = False
    waits_for_promised: bool = False
    ticket: MatchTicket | None = None
    block_ids: list[int] = dataclasses.field(default_factory=list)
    computed_end: int = 0
    matched_from: int = 0
    next_chunk: int = 0
    loading: tuple[int, int] | None = None
    load_s: float = 0.0
    planned_s: float = 0.0
    loaded_s: float = 0.0
    failed_at: int | None = None
    has_stores: bool = False
    is_finished: bool = False
    blend: BlendPlan | None = None
    is_blended: bool = False
    exact_end: int | None = None

    @property
    def id(self) -> str:
        """vLLM's id of the request."""
        return str(self.request.request_id)


def log_times(tracked: TrackedRequest, ticket: MatchTicket) -> None:
    """Say what became of the time of a request that was loaded and is now scheduled for the first time."""
    times_s = (ticket.replied_s, tracked.planned_s, tracked.loaded_s, time.monotonic())
    log.debug(
        "cachetier: request %s: matched %.2f ms, planned %.2f ms, loaded %.2f ms, scheduled %.2f ms after it arrived",
        tracked.id,
        *(1000 * (each_s - ticket.since_s) for each_s in times_s),
    )
