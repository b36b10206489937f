"""What the scheduler half remembers of each request. Owned by vLLM's scheduler thread, except where noted."""

import dataclasses
import threading
import time
from collections.abc import Mapping
from typing import Any

from cachetier.core.messages import MatchReply
from cachetier_connector.break_even import Choice


@dataclasses.dataclass(slots=True)
class MatchTicket:
    """A match under way. The link thread fills it and sets `done` last; the scheduler thread only reads it.

    Attributes:
        namespace: of the request's model and adapter; empty while unknown.
        tokens: what was matched, little-endian int32.
        extras: digests of the request's multimodal inputs by chunk.
        chunk_tokens: tokens a chunk.
        reply: what is held, None if the server could not tell.
        replied_s: when that was so.
        choice: what of it is worth loading; the scheduler thread decides when vLLM first asks.
        arena_path, instance: the arena that the reply's frames lie in.
        is_abandoned: set by the scheduler thread: nothing will be loaded, a lease that still comes is to be given back.
        is_released: the lease was given back or has expired.
    """

    since_s: float = dataclasses.field(default_factory=time.monotonic)
    namespace: bytes = b""
    tokens: bytes = b""
    extras: list[tuple[int, bytes]] = dataclasses.field(default_factory=list)
    chunk_tokens: int = 0
    reply: MatchReply | None = None
    replied_s: float = 0.0
    choice: Choice | None = None
    arena_path: str = ""
    instance: str = ""
    done: threading.Event = dataclasses.field(default_factory=threading.Event)
    is_abandoned: bool = False
    is_released: bool = False


@dataclasses.dataclass(slots=True)
class TrackedRequest:
    """One request of the engine.

    Attributes:
        request: vLLM's.
        may_load, may_store: what role, request and circumstances allow.
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
    """

    request: Any
    may_load: bool
    may_store: bool
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

    @property
    def id(self) -> str:
        """vLLM's id of the request."""
        return str(self.request.request_id)


def wishes_of(params: Mapping[str, Any] | None) -> tuple[bool, bool, str]:
    """Return what `kv_transfer_params={"cachetier": {"load": ..., "store": ...}}` asks for.

    Returns:
        Whether to load, whether to store, and what is wrong with the parameters (empty if nothing).
    """
    wishes = (params or {}).get("cachetier") or {}
    if not isinstance(wishes, Mapping):
        return True, True, f'kv_transfer_params["cachetier"] is {wishes!r}, not an object'
    unknown = sorted(set(wishes) - {"load", "store"})
    load, store = wishes.get("load", True), wishes.get("store", True)
    if unknown:
        return bool(load), bool(store), f'unknown in kv_transfer_params["cachetier"]: {unknown}; allowed: load, store'
    return bool(load), bool(store), ""
