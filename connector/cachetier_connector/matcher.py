"""The scheduler half's link thread: matches, releases and renewals, so that vLLM's scheduler never waits for them.

Locking design: jobs travel through one bounded queue. A `MatchTicket` is written by this thread until it sets
`done`, and only read by the scheduler's thread after that; the flags `is_abandoned` and `is_released` are decided
under `_ticket_lock`, so that exactly one side gives a lease back.
"""

import logging
import queue
import threading
import time
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from cachetier.core.keys import ModelIdentity
from cachetier.core.layout import KVLayout
from cachetier.core.messages import (
    TIER_DISK,
    TIER_GPU,
    TIER_HOST,
    TIER_REMOTE,
    LeaseUse,
    Match,
    Release,
    Renew,
    Report,
    Trim,
    Wait,
)
from cachetier.core.wait_messages import EndPromise
from cachetier_connector.documents import Documents
from cachetier_connector.facts import adapter_of, inputs_of
from cachetier_connector.fingerprint import fingerprint_folder
from cachetier_connector.link import ServerLink
from cachetier_connector.plan import extras_of, tokens_to_bytes
from cachetier_connector.requests import FoundDocument, MatchTicket, TrackedRequest
from cachetier_connector.waiter import Waiter

USES = {TIER_HOST: "host_tokens", TIER_DISK: "disk_tokens", TIER_GPU: "gpu_tokens", TIER_REMOTE: "remote_tokens"}
MAX_JOBS = 4096
IDLE_S = 0.1
RELEASE_TIMEOUT_S = 1.0
# A match is at most so many calls, which fail by themselves if the server does not answer in time. In a process that
# takes in many long prompts at once this thread hardly runs, and reads answers late.
CALLS_MAX = 4
TURN_DEADLINES = 20  # a ticket waits for so many deadlines while those before it are answered

log = logging.getLogger(__name__)


class Matcher:
    """Carries out the scheduler half's conversation with the server on a thread of its own."""

    def __init__(
        self,
        link: ServerLink,
        identity: ModelIdentity,
        layout: KVLayout,
        max_blocking_s: float,
        *,
        reads_pools: bool = False,
        waiter: Waiter | None = None,
        storing_s: float = 2.0,
        chore: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the thread.

        Args:
            link: used by the thread alone from now on.
            identity: of the model without an adapter.
            layout: of its KV cache group.
            max_blocking_s: how long a call of a match may take before the server counts as dead.
            reads_pools: whether the engine can use copies in device memory.
            waiter: brings news of chunks that are not held yet, None: nothing is waited for.
            storing_s: how long a chunk may take from the step that computes it until it is stored.
            chore: what else is to be done on the thread, called after every job and every `IDLE_S` at least.
        """
        self._link, self._identity, self._layout = link, identity, layout
        self._max_blocking_s, self._reads_pools, self._chore = max_blocking_s, reads_pools, chore
        self._waiter, self._storing_s = waiter, storing_s
        self._release_s = max(RELEASE_TIMEOUT_S, max_blocking_s)
        self._documents = Documents(link, max_blocking_s, reads_pools=reads_pools)
        self._jobs: queue.Queue[Callable[[], object]] = queue.Queue(MAX_JOBS)
        self._ticket_lock = threading.Lock()
        self._leased: dict[int, MatchTicket] = {}
        self._adapters: dict[tuple[str, str, int], ModelIdentity | None] = {}
        self._is_stopping, self._answered_s = False, 0.0
        self._thread = threading.Thread(target=self._run, name="cachetier-matcher", daemon=True)
        self._thread.start()

    @property
    def is_up(self) -> bool:
        """Whether the server answers."""
        return self._link.is_up

    def match(self, tracked: TrackedRequest) -> MatchTicket:
        """Start a match of all tokens that `tracked` has now. Never blocks; done at once when the server is dead."""
        ticket = MatchTicket()
        if not (self._link.is_up and self._submit(lambda: self._match(tracked, ticket))):
            ticket.done.set()
        return ticket

    def is_late(self, ticket: MatchTicket) -> bool:
        """Tell whether nobody should wait for `ticket` any longer.

        That is so when nothing was answered for as long as all calls of a match may take; requests that arrive together
        have their turn one after the other, within limits.
        """
        now, limit_s = time.monotonic(), self._max_blocking_s
        silent_since_s = max(ticket.since_s, self._answered_s)
        return now - silent_since_s >= CALLS_MAX * limit_s or now - ticket.since_s >= TURN_DEADLINES * limit_s

    def release(
        self,
        ticket: MatchTicket,
        used: Mapping[int, int] | None = None,
        *,
        num_waited: int = 0,
        num_stored: int = 0,
    ) -> None:
        """Give back what `ticket` holds or will hold, its documents included, and end what it promised.

        Never blocks; idempotent.

        Args:
            ticket: of the match.
            used: how many tokens of it were used, by tier.
            num_waited: how many of these were waited for.
            num_stored: leading chunks that were handed over to be stored: what else was promised will not come.
        """
        was_released = ticket.is_released
        if uses := self._end(ticket, used or {}, num_waited):
            self._submit(lambda: self._release(ticket.instance, uses))
        if not was_released and ticket.reply is not None and ticket.reply.promise:
            self._submit(lambda: self._end_promise(ticket, num_stored))

    def trim(self, ticket: MatchTicket, num_chunks: int) -> None:
        """Say that only the first `num_chunks` chunks that `ticket` holds will be loaded, and no more. Never blocks."""
        if self._waiter is not None:
            self._waiter.remove(ticket)
        self._submit(lambda: self._trim(ticket, num_chunks))

    def report_rates(self, prefill_tokens_per_s: float, load_tokens_per_s: float) -> None:
        """Tell the server what the engine has measured, for people to see; 0: nothing yet."""
        self._submit(
            lambda: self._link.call(
                lambda session: Report(
                    session=session,
                    prefill_tokens_per_s=prefill_tokens_per_s,
                    load_tokens_per_s=load_tokens_per_s,
                ),
                self._release_s,
            )
        )

    def report_blend(self, num_loaded: int, num_computed: int) -> None:
        """Count a blended request, and how many of its tokens came from documents and were computed by passes."""
        self._submit(
            lambda: self._link.call(
                lambda session: Report(
                    session=session,
                    requests_blended=1,
                    blend_loaded_tokens=num_loaded,
                    blend_computed_tokens=num_computed,
                ),
                self._release_s,
            )
        )

    def report_check(self, kl: float, *, agrees: bool) -> None:
        """Count a blended request that was computed again in full, and how far the answers were apart."""
        self._submit(
            lambda: self._link.call(
                lambda session: Report(session=session, blends_checked=1, blends_agreed=int(agrees), blends_kl=kl),
                self._release_s,
            )
        )

    def register_document(self, tracked: TrackedRequest, ticket: MatchTicket) -> None:
        """Register the prompt of a request that has ended, and was matched by `ticket`, as a document. Never blocks."""
        request = tracked.request
        tokens, salt = tokens_to_bytes(request.prompt_token_ids), request.cache_salt or ""
        if ticket.namespace:
            args = (ticket.namespace, salt, tracked.wishes.document, tokens, ticket.chunk_tokens)
            self._submit(lambda: self._documents.register(*args))

    def report_failed_load(self) -> None:
        """Count a load that did not bring all it promised."""
        self._submit(lambda: self._link.call(lambda session: Report(session=session, loads_failed=1), self._release_s))

    def give_up(self, ticket: MatchTicket) -> None:
        """Release a ticket that is late, and count it."""
        self.release(ticket)
        self._submit(lambda: self._link.call(lambda session: Report(session=session, matches_late=1), self._release_s))

    def start_generation(self, generation: int) -> None:
        """From now on, matches belong to weights of another generation."""
        self._identity = msgspec.structs.replace(self._identity, generation=generation)
        self._adapters = {}

    def stop(self) -> None:
        """Carry out what is queued, close the session and end the thread, the waiter's too."""
        if self._waiter is not None:
            self._waiter.stop()
        self._is_stopping = True
        self._thread.join(self._release_s + self._max_blocking_s)

    def _submit(self, job: Callable[[], object]) -> bool:
        try:
            self._jobs.put_nowait(job)
            return True
        except queue.Full:  # a lease that is not given back expires
            return False

    def _run(self) -> None:
        next_renewal_s = 0.0
        while True:
            try:
                job = self._jobs.get(timeout=IDLE_S)
            except queue.Empty:
                if self._is_stopping:
                    break
                job = self._link.probe
            try:
                job()
                self._answered_s = now = time.monotonic()
                if now >= next_renewal_s and self._link.server:
                    next_renewal_s = now + self._link.server.lease_ttl_s / 3
                    self._renew()
                self._chore()
            except Exception:
                log.exception("cachetier: a job of the matcher failed")
        self._link.close()

    def _match(self, tracked: TrackedRequest, ticket: MatchTicket) -> None:
        try:
            server, request = self._link.server, tracked.request
            identity = self._identity_for(adapter_of(request))
            if server is None or identity is None:
                return
            namespace = self._link.namespace(identity, [self._layout], self._max_blocking_s)
            if namespace is None:
                return
            ticket.extras = extras_of(inputs_of(request), server.chunk_tokens)
            tokens = (array("i", request.prompt_token_ids) + array("i", list(request.output_token_ids))).tobytes()
            reply = self._link.call(
                lambda session: Match(
                    session=session,
                    namespace=namespace,
                    tokens=tokens,
                    salt=request.cache_salt or "",
                    extras=ticket.extras,
                    lease=tracked.may_load and not ticket.is_abandoned,
                    reads_pools=self._reads_pools,
                    promise=tracked.promises,
                    wait=self._wait_of(tracked, ticket),
                ),
                self._max_blocking_s,
            )
            with self._ticket_lock:
                ticket.namespace, ticket.tokens, ticket.chunk_tokens = namespace, tokens, server.chunk_tokens
                ticket.arena_path, ticket.instance = server.arena_path, server.instance
                ticket.reply, ticket.replied_s = reply, time.monotonic()
                ticket.num_held = reply.num_chunks if reply is not None else 0
            if self._waiter is not None and ticket.wait_number:
                self._waiter.begin() if reply is not None and reply.num_pending else self._waiter.remove(ticket)
            if reply is not None and reply.lease:
                self._leased[reply.lease] = ticket
            if reply is not None and tracked.may_blend and not ticket.is_abandoned:
                ticket.documents = self._find_documents(ticket, request)
        finally:
            ticket.done.set()
            if ticket.is_abandoned:
                self.release(ticket)

    def _wait_of(self, tracked: TrackedRequest, ticket: MatchTicket) -> Wait | None:
        if self._waiter is None or not tracked.may_load or ticket.is_abandoned:
            return None
        return Wait(
            number=self._waiter.add(ticket),
            for_promised=tracked.waits_for_promised,
            prefill=tracked.wishes.prefill,
        )

    def _find_documents(self, ticket: MatchTicket, request: Any) -> list[FoundDocument]:
        assert ticket.reply is not None
        found = []
        salt, start = request.cache_salt or "", ticket.reply.num_chunks * ticket.chunk_tokens
        runs = self._documents.find(
            ticket.namespace, salt, ticket.tokens, start, ticket.chunk_tokens, str(request.request_id)
        )
        for run in runs:
            of_run = MatchTicket(
                namespace=ticket.namespace,
                chunk_tokens=ticket.chunk_tokens,
                reply=run.match,
                arena_path=ticket.arena_path,
                instance=ticket.instance,
            )
            self._leased[run.match.lease] = of_run
            found.append(FoundDocument(run.document, run.offset, of_run))
        return found

    def _identity_for(self, adapter: tuple[str, str, int] | None) -> ModelIdentity | None:
        if adapter is None:
            return self._identity
        if adapter not in self._adapters:
            name, path, _ = adapter
            try:
                text = f"{name}|{fingerprint_folder(Path(path))}"
                self._adapters[adapter] = msgspec.structs.replace(self._identity, adapter=text)
            except OSError as error:
                log.warning("cachetier: requests with adapter %s are not cached: cannot read %s: %s", name, path, error)
                self._adapters[adapter] = None
        return self._adapters[adapter]

    def _end(self, ticket: MatchTicket, used: Mapping[int, int], num_waited: int = 0) -> list[LeaseUse]:
        """Mark a ticket and its documents' as given back; return the leases that have to be."""
        uses = [use for found in ticket.documents for use in self._end(found.ticket, {})]
        if self._waiter is not None:
            self._waiter.remove(ticket)
        with self._ticket_lock:
            ticket.is_abandoned = True
            if ticket.reply is None or ticket.is_released:
                return uses
            ticket.is_released = True
        if lease := ticket.reply.lease:
            by_tier = {name: used.get(tier, 0) for tier, name in USES.items()}
            uses.append(LeaseUse(lease=lease, waited_tokens=num_waited, **by_tier))
        return uses

    def _release(self, instance: str, uses: list[LeaseUse]) -> None:
        if self._link.server is None or self._link.server.instance != instance:
            return  # that server is gone, and its leases with it
        for use in uses:
            self._leased.pop(use.lease, None)
        self._link.call(lambda session: Release(session=session, uses=uses), self._release_s)

    def _end_promise(self, ticket: MatchTicket, num_chunks: int) -> None:
        if self._link.server is None or self._link.server.instance != ticket.instance or ticket.reply is None:
            return
        promise, within_s = ticket.reply.promise, self._storing_s
        self._link.call(
            lambda session: EndPromise(session=session, promise=promise, num_chunks=num_chunks, within_s=within_s),
            self._release_s,
        )

    def _trim(self, ticket: MatchTicket, num_chunks: int) -> None:
        if self._link.server is None or self._link.server.instance != ticket.instance or ticket.reply is None:
            return
        lease = ticket.reply.lease
        self._link.call(lambda session: Trim(session=session, lease=lease, num_chunks=num_chunks), self._release_s)

    def _renew(self) -> None:
        if not self._leased:
            return
        leases = list(self._leased)
        reply = self._link.call(lambda session: Renew(session=session, leases=leases), self._release_s)
        for lease in reply.expired if reply is not None else leases:
            with self._ticket_lock:
                self._leased.pop(lease).is_released = True
