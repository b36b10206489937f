"""The half of the connector that lives in vLLM's scheduler: decides what each request loads and stores.

Everything here runs on the scheduler's thread and never waits: conversation with the server is the `Matcher`'s. A
request is matched when it arrives; a chunk is handed to the workers as soon as its tokens are known and the steps
scheduled so far compute its KV, decoded tokens included; a chunk that is complete when its request ends is taken at
the start of the next step, before a forward pass can overwrite the blocks that vLLM has taken back. Where stores read
the blocks later than that, vLLM is asked to keep them until all workers have let go of them.
"""

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from cachetier.core.keys import ModelIdentity
from cachetier.core.messages import TIER_HOST
from cachetier_connector.blend_guard import BlendGuard
from cachetier_connector.blend_schedule import BlendSchedule
from cachetier_connector.break_even import BreakEven, Hit
from cachetier_connector.facts import EngineFacts, is_addressable, may_read
from cachetier_connector.hand_over import HandOver
from cachetier_connector.kv_events import TierEvents
from cachetier_connector.link import ServerLink
from cachetier_connector.load_ops import blend_loads, documents_as_hit, share_choice, tiers_of_load
from cachetier_connector.matcher import Matcher
from cachetier_connector.plan import StepPlan, Verdict, first_failed_token, loadable_end
from cachetier_connector.prefill_rate import work_of
from cachetier_connector.requests import MatchTicket, TrackedRequest, log_times
from cachetier_connector.role_keeper import RoleKeeper
from cachetier_connector.store_ops import store_ops
from cachetier_connector.waiter import Waiter
from cachetier_connector.wishes import wishes_of

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

# vLLM sleeps for 1 ms before it asks again when it has nothing to compute; most matches take less.
IDLE_WAIT_S = 0.003

log = logging.getLogger(__name__)


class SchedulerHalf:
    """Decides; the workers do.

    Attributes:
        events: what routers are to be told of the tier.
    """

    def __init__(self, facts: EngineFacts, identity: ModelIdentity, find_socket: Callable[[], str]) -> None:
        """Start the conversation with the server.

        Args:
            facts: of the engine.
            identity: of its model.
            find_socket: returns the path of the server's socket; may start a server, and raises if that fails.
        """
        self._facts = facts
        self._requests: dict[str, TrackedRequest] = {}
        self._break_even, self._step = BreakEven(), 0
        self._blends, self._guard = BlendSchedule(facts), BlendGuard(facts)
        config = facts.config
        self._hand_over = HandOver(config.wait_deadline_ms / 1000, config.load_deadline_ms / 1000)
        self._plan = StepPlan()
        self._may_wait = True
        self._socket_path = ""

        def find_and_remember() -> str:
            self._socket_path = find_socket()
            return self._socket_path

        self._link = ServerLink("scheduler", facts.engine, find_and_remember)
        self._connect()
        self._role = RoleKeeper(self._link, facts, identity)
        self.events = TierEvents(ServerLink("events", facts.engine, lambda: self._socket_path), facts, identity)
        self.events.start()
        match_deadline_s = config.match_deadline_ms / 1000
        self._matcher = Matcher(
            self._link,
            identity,
            facts.layout,
            match_deadline_s,
            reads_pools=facts.device == "cuda",
            waiter=Waiter(ServerLink("waiter", facts.engine, lambda: self._socket_path), match_deadline_s),
            storing_s=2 * config.store_deadline_ms / 1000,
            chore=self._role.tend,
        )

    def _connect(self) -> None:
        if not self._facts.config.server:
            self._link.connect()  # a private server that does not start is an error at start-up
        elif not self._link.probe():
            log.warning("cachetier: nothing is cached until there is a server at %s", self._facts.config.server)

    # Called by vLLM, in the order of a request's life.

    def on_new_request(self, request: "Request") -> None:
        """Start to match a request that has just arrived."""
        if not is_addressable(request):
            return
        wishes = wishes_of(request.kv_transfer_params)
        if wishes.complaint:
            log.warning("cachetier: request %s: %s", request.request_id, wishes.complaint)
        may_load = wishes.load and self._role.loads and may_read(request)
        may_store = wishes.store and self._role.stores
        tracked = TrackedRequest(
            request=request,
            wishes=wishes,
            may_load=may_load,
            may_store=may_store,
            may_blend=may_load and self._blends.wants(request, wishes),
            promises=may_store and self._role.promises,
            waits_for_promised=self._role.waits_for_promised,
        )
        if tracked.may_load or tracked.may_store:
            self._requests[tracked.id] = tracked
            tracked.ticket = self._matcher.match(tracked)

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        """Return how many tokens beyond `num_computed_tokens` can be loaded; None: what to load or store is unknown."""
        tracked = self._requests.get(request.request_id)
        if tracked is None or not (tracked.may_load or tracked.may_store):
            return 0, False
        if tracked.ticket is None or (tracked.ticket.is_released and tracked.may_load):
            tracked.ticket = self._matcher.match(tracked)
        ticket = tracked.ticket
        if not ticket.done.is_set() and not self._waited_for(ticket):
            if not self._matcher.is_late(ticket):
                return None, False
            self._matcher.give_up(ticket)
            tracked.may_load = False
            return 0, False
        if ticket.reply is None or not tracked.may_load:
            return 0, False
        tracked.matched_from, end = num_computed_tokens, 0
        if ticket.reply.lease:
            end = loadable_end(self._worth_loading(tracked, ticket), ticket.chunk_tokens, request.num_tokens)
        self._choose_documents(ticket)
        tracked.blend = self._blends.plan(tracked, max(end, num_computed_tokens))
        if tracked.blend is not None:
            end = tracked.blend.end
        return (end - num_computed_tokens, True) if end > num_computed_tokens else (0, False)

    def _waited_for(self, ticket: MatchTicket) -> bool:
        """Wait for a match that is nearly there, once a step and only while the engine has nothing to compute."""
        may_wait, self._may_wait = self._may_wait, False
        return may_wait and ticket.done.wait(IDLE_WAIT_S)

    def update_state_after_alloc(self, request: "Request", block_ids: list[int], num_external_tokens: int) -> None:
        """Plan the load of `num_external_tokens` into the blocks that the request now has.

        They start where the last match said; vLLM may want fewer than it was offered.
        """
        tracked = self._requests.get(request.request_id)
        if tracked is None or tracked.loading is not None:
            return
        ticket = tracked.ticket
        if not num_external_tokens:
            tracked.blend = None
            if ticket is not None and tracked.may_load:
                self._matcher.release(ticket)
            return
        assert ticket is not None
        start, end = tracked.matched_from, tracked.matched_from + num_external_tokens
        tracked.loading, tracked.failed_at, tracked.load_s = (start, end), None, 0.0
        tracked.planned_s = time.monotonic()
        tracked.block_ids, tracked.computed_end = list(block_ids), end
        if tracked.blend is None:
            self._plan.loads += self._hand_over.begin(tracked, ticket, start, end)
            return
        assert end == tracked.blend.end, "vLLM takes asynchronous loads whole or not at all"
        loads = blend_loads(tracked, start)
        self._plan.loads += loads
        self._blends.begin(tracked, start, loads)

    def tiers_of(self, request: "Request") -> dict[int, int]:
        """Return how many tokens of the load just planned come from which tier."""
        tracked = self._requests.get(request.request_id)
        if tracked is None or tracked.loading is None:
            return {}
        return tiers_of_load(tracked, *tracked.loading)

    def build_plan(self, output: "SchedulerOutput") -> StepPlan:
        """Return what the workers do in this step, and start the next plan."""
        self._follow(output)
        for request_id in output.num_scheduled_tokens:
            tracked = self._requests.get(request_id)
            if tracked is not None and tracked.may_store:
                self._plan.stores_after += store_ops(tracked, tracked.request.num_tokens, self._facts.block_tokens)
        self._plan.loads += self._hand_over.next_ops()
        self._plan.blends = self._blends.next_ops()
        self._plan.check = self._guard.next_op(is_free=not self._plan.blends)
        checked = self._guard.take_ended()
        self._plan.finished += checked
        self._plan.held += checked
        if self._facts.keeps_blocks:  # all of them: one that ended since is not tracked any more
            self._plan.preempted = list(output.preempted_req_ids or ())
        plan, self._plan = self._plan, StepPlan()
        self._may_wait = not output.num_scheduled_tokens
        if output.num_scheduled_tokens:
            self._step += 1
            plan.step = self._step
            if not plan.blends and plan.check is None:  # else the step takes longer than its own work does
                self._break_even.prefill.begin(self._step, work_of(output), time.monotonic())
        plan.socket_path = self._socket_path
        return plan

    def learn(self, step: int, load_s: Mapping[str, float]) -> None:
        """Learn from the output of a step how long it took, and loads that ended meanwhile."""
        if step:
            self._break_even.prefill.end(step, time.monotonic())
        for request_id, seconds in load_s.items():
            if tracked := self._requests.get(request_id):
                tracked.load_s = max(tracked.load_s, seconds)

    def learn_of_blends(
        self, parts: Mapping[str, Mapping[int, Sequence[int]]], computed: Mapping[str, int], refusal: str
    ) -> None:
        """Learn how far ranks are with blended requests: see `BlendSchedule.learn`; `refusal`: why they blend none."""
        self._blends.refusal = self._blends.refusal or refusal
        for tracked in self._blends.learn(parts, computed):
            assert tracked.ticket is not None
            assert tracked.loading is not None
            if self._blends.failed(tracked):
                self._matcher.report_failed_load()
            self._matcher.release(tracked.ticket, tiers_of_load(tracked, *tracked.loading))

    def learn_of_check(self, verdict: Verdict) -> None:
        """Learn how far the answer to a blended request is from that of a full computation."""
        self._guard.learn(verdict)
        self._matcher.report_check(verdict.kl, agrees=verdict.agrees)

    def update_from_workers(self, finished_loading: Iterable[str], bad_blocks: set[int]) -> None:
        """Learn which loads ended, and which blocks they could not fill (perhaps in an earlier step)."""
        if bad_blocks:
            for tracked in self._requests.values():
                if tracked.loading is not None:  # its pieces end in any order
                    failed_at = first_failed_token(tracked.block_ids, bad_blocks, self._facts.block_tokens)
                    known = (at for at in (tracked.failed_at, failed_at) if at is not None)
                    tracked.failed_at = min(known, default=None)
        for request_id in finished_loading:
            loaded = self._requests.get(request_id)
            if loaded is not None and loaded.loading is not None:
                self._end_load(loaded, *loaded.loading)

    def request_finished(self, request: "Request") -> bool:
        """Hand over what is complete; tell whether vLLM must keep the request's blocks until the workers report it.

        While a load is under way they are vLLM's to keep until the load is reported, and nothing was stored from them.
        """
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            return False
        tracked.is_finished = True
        if tracked.may_store and tracked.loading is None:
            # The last token was sampled but, as far as is certain here, not computed.
            self._plan.stores_before += store_ops(tracked, request.num_tokens - 1, self._facts.block_tokens)
        must_keep = self._facts.keeps_blocks and tracked.has_stores and tracked.loading is None
        if tracked.wishes.document and tracked.ticket is not None:
            self._matcher.register_document(tracked, tracked.ticket)
        is_checked = self._guard.begin(tracked)
        if not is_checked:  # else when that is done
            self._plan.finished.append(tracked.id)
            self._plan.held += [tracked.id] if must_keep else []
        if tracked.loading is None:
            self._forget(tracked)
        return must_keep or is_checked

    def reset(self) -> None:
        """Start a new generation: the engine's weights may have changed."""
        for tracked in self._requests.values():
            tracked.may_load = tracked.may_store = tracked.is_blended = False
        self._guard.drop()
        self._hand_over.drop()
        generation = secrets.randbits(62)
        self._matcher.start_generation(generation)
        self.events.start_generation(generation)

    def stop(self) -> None:
        """Give all leases back and end the conversation."""
        self.events.stop()
        self._matcher.stop()

    # Internals.

    def _forget(self, tracked: TrackedRequest) -> None:
        if tracked.ticket is not None:
            self._matcher.release(tracked.ticket, num_stored=tracked.next_chunk)
        del self._requests[tracked.id]

    def _worth_loading(self, tracked: TrackedRequest, ticket: MatchTicket) -> int:
        """Return how many chunks of a hit to load, awaited ones included.

        What of the held ones is worth it is decided when vLLM first asks: waiting until then costs nothing.
        """
        reply, request = ticket.reply, tracked.request
        assert reply is not None
        if ticket.choice is None:
            hit = Hit(
                num_tokens=request.num_tokens,
                num_computed=tracked.matched_from,
                chunk_tokens=ticket.chunk_tokens,
                tiers=reply.tiers,
                ready_in_s=reply.ready_in_s,
                elapsed_s=0.0 if reply.segments else time.monotonic() - ticket.replied_s,  # the engine has not begun
            )
            ticket.choice = self._hand_over.choice(tracked, ticket) or self._break_even.choose(hit)
            if ticket.choice.num_chunks < reply.num_chunks or (reply.num_pending and ticket.documents):
                self._matcher.trim(ticket, ticket.choice.num_chunks)
            if rates := self._break_even.news(request.num_tokens, time.monotonic()):
                self._matcher.report_rates(*rates)
        return ticket.choice.num_chunks + self._hand_over.num_awaited(tracked, ticket)

    def _choose_documents(self, ticket: MatchTicket) -> None:
        """Decide, when vLLM first asks, what of the documents in a prompt is cheaper to load than to compute."""
        if ticket.documents and ticket.documents[0].ticket.choice is None:
            choice = self._break_even.choose(documents_as_hit(ticket, time.monotonic()))
            for cut in share_choice(ticket, choice):
                assert cut.choice is not None
                self._matcher.trim(cut, cut.choice.num_chunks)

    def _end_load(self, tracked: TrackedRequest, start: int, end: int) -> None:
        ticket, tracked.loaded_s = tracked.ticket, time.monotonic()
        assert ticket is not None
        assert ticket.reply is not None
        if tracked.failed_at is not None:
            end = max(start, tracked.failed_at)
            tracked.may_load = False  # or the same load would be tried again
            self._matcher.report_failed_load()
        tiers = tiers_of_load(tracked, start, end)
        num_waited = 0 if tracked.blend else max(0, end - max(start, ticket.num_held * ticket.chunk_tokens))
        if tracked.blend is not None:
            self._matcher.report_blend(*self._blends.end(tracked))
            tracked.is_blended = tracked.failed_at is None
            tracked.may_blend = False  # not again after a preemption: what follows it would depend on luck
        elif tracked.failed_at is None and tiers.keys() == {TIER_HOST} and not num_waited:
            self._break_even.load.learn(end - start, tracked.load_s)
        tracked.loading = tracked.blend = None
        self._matcher.release(ticket, tiers, num_waited=num_waited)
        if tracked.failed_at is not None:  # what was not there after all is worth storing
            num_chunks = min(ticket.reply.num_chunks, end // ticket.chunk_tokens)
            ticket.reply = msgspec.structs.replace(ticket.reply, num_chunks=num_chunks)
        if tracked.is_finished:
            self._forget(tracked)

    def _follow(self, output: "SchedulerOutput") -> None:
        """Follow block tables and computed tokens."""
        scheduled = output.num_scheduled_tokens
        for request_id in output.preempted_req_ids or ():
            if tracked := self._requests.get(request_id):  # its blocks are others' now
                tracked.block_ids, tracked.computed_end = [], 0
                tracked.has_stores = tracked.is_blended = False
                if self._facts.keeps_blocks:  # what is queued is dropped; what is held by then costs one message
                    tracked.next_chunk = 0
        for new in output.scheduled_new_reqs:
            if tracked := self._requests.get(new.req_id):
                tracked.block_ids = list(new.block_ids[0])
                tracked.computed_end = new.num_computed_tokens + scheduled[new.req_id]
                if tracked.loaded_s and tracked.ticket is not None:
                    log_times(tracked, tracked.ticket)
                    tracked.loaded_s = 0.0
        cached = output.scheduled_cached_reqs
        for request_id, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if tracked := self._requests.get(request_id):
                if request_id in cached.resumed_req_ids:
                    tracked.block_ids = list(blocks[0]) if blocks else []
                elif blocks:
                    tracked.block_ids.extend(blocks[0])
                tracked.computed_end = computed + scheduled[request_id]
