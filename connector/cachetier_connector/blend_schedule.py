"""The scheduler half's part in blending: which requests are blended, and what the workers compute for them, when.

A run can be computed once all ranks have loaded what stands before it. What a rank could not load joins what is to be
computed. Runs travel to the workers in as many steps as it takes, together with those of other requests as far as
`max_num_batched_tokens` and `max_num_seqs` allow: enough of them for a pass of its own, or the last, while later parts
are still being loaded. All ranks compute the same runs in the same step. Everything here runs on the scheduler's thread
and waits for nothing.
"""

import dataclasses
import logging
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cachetier_blend.plan import BlendPlan, DocumentHit, Run, cut_runs, merge, plan_blend, subtract
from cachetier_connector.facts import EngineFacts, is_plain_text
from cachetier_connector.plan import BlendOp, LoadOp, Selection, tokens_to_bytes
from cachetier_connector.requests import MatchTicket, TrackedRequest
from cachetier_connector.wishes import Wishes

if TYPE_CHECKING:
    from vllm.v1.request import Request

SINK_TOKENS = 16
# All tokens of a prompt as many runs took 1.25 times its prefill (design, section 2): with less to load, blending
# would be slower than none.
LOADED_SHARE_MIN = 0.25
# Fewer tokens take a pass hardly less time: its layers have to be launched and the weights to be read. Not even a
# request that is alone gains by more passes while it would wait for its loads anyway.
PASS_TOKENS_MIN = 256

log = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class _Blend:
    """A request whose parts are being loaded, or whose runs are being computed.

    Attributes:
        plan: what is loaded and computed.
        start: the first token that is loaded or computed.
        loads: the parts, by their number.
        reports: for each part, up to where the ranks that have reported loaded it.
        num_loaded: leading parts that all ranks have reported.
        runs: what is left to be computed, ascending; what parts lack is added when they are reported.
        is_done: the last run was handed to the workers.
        num_computed: tokens that passes have computed.
    """

    tracked: TrackedRequest
    plan: BlendPlan
    start: int
    loads: Sequence[LoadOp]
    reports: dict[int, list[int]]
    runs: list[Run]
    num_loaded: int = 0
    is_done: bool = False
    num_computed: int = 0

    @property
    def is_loaded(self) -> bool:
        """Whether all ranks have reported all parts."""
        return self.num_loaded == len(self.loads)

    def count_loaded(self, num_workers: int) -> None:
        """Add what the parts lack that are known to have ended on all ranks, in order, to what is to be computed."""
        while not self.is_loaded and len(self.reports[self.num_loaded]) == num_workers:
            missing = Run(min(self.reports[self.num_loaded]), self.loads[self.num_loaded].end)
            self.runs = merge([*self.runs, missing])
            self.num_loaded += 1

    def take(self, max_tokens: int, max_runs: int) -> list[Run] | None:
        """Return the next piece to compute and forget it; None: not yet. An empty one ends what lacks nothing."""
        runs = self.runs
        if not self.is_loaded:
            runs = subtract(runs, [Run(self.loads[self.num_loaded].start, self.plan.end)])
            is_enough = sum(run.end - run.start for run in runs) >= PASS_TOKENS_MIN or runs == self.runs
            if not runs or not is_enough:
                return None
        piece = next(iter(cut_runs(runs, max_tokens, max_runs)), [])
        self.runs = subtract(self.runs, piece)
        self.is_done = self.is_loaded and not self.runs
        return piece


class BlendSchedule:
    """Follows every blended request from its plan to its last run.

    Attributes:
        refusal: why nothing is blended; empty: nothing speaks against it.
    """

    def __init__(self, facts: EngineFacts) -> None:
        self._facts, self._config = facts, facts.config
        self._blends: dict[str, _Blend] = {}
        self.refusal = "" if self._config.blend == "off" else facts.blend_refusal
        if self.refusal:
            log.warning("cachetier: nothing is blended, only prefixes are loaded: %s", self.refusal)

    def wants(self, request: "Request", wishes: Wishes) -> bool:
        """Tell whether documents are to be looked for in the prompt of `request`."""
        if self._config.blend == "off":
            if wishes.blend:
                log.warning(
                    "cachetier: request %s wants to be blended, but this engine does not; start it with "
                    '"blend": "request" in kv_connector_extra_config',
                    request.request_id,
                )
            return False
        is_wanted = self._config.blend == "always" if wishes.blend is None else wishes.blend
        return is_wanted and not self.refusal and not wishes.document and is_plain_text(request)

    def plan(self, tracked: TrackedRequest, exact_end: int) -> BlendPlan | None:
        """Return what to load and compute beyond `exact_end`, None: it is not worth it."""
        ticket, num_tokens = tracked.ticket, tracked.request.num_tokens
        if not tracked.may_blend or ticket is None or not ticket.documents or self.refusal:
            return None
        hits = [DocumentHit(found.offset, num_held(found.ticket)) for found in ticket.documents]
        select = tracked.wishes.select or self._config.blend_select
        sink_tokens = 0 if select == "none" else SINK_TOKENS
        plan = plan_blend(exact_end=exact_end, documents=hits, num_tokens=num_tokens, sink_tokens=sink_tokens)
        if plan is None or _num_loaded(plan) < LOADED_SHARE_MIN * (plan.end - exact_end):
            return None
        if plan.approximate_from // self._facts.block_tokens >= num_tokens // self._facts.block_tokens:
            return None  # in the last, incomplete block, whose hash vLLM will make of exact ones: see `make_private`
        if select == "query" and plan.end < num_tokens - 1:  # the tokens that pay the attention must have KV
            computes = merge([*plan.computes, Run(plan.end, num_tokens - 1)])
            plan = dataclasses.replace(plan, computes=tuple(computes), end=num_tokens - 1)
        return plan

    def begin(self, tracked: TrackedRequest, start: int, loads: Sequence[LoadOp]) -> None:
        """Follow a request whose parts, `loads`, are handed to the workers in this step; see `make_private`."""
        assert tracked.blend is not None
        make_private(tracked.request, tracked.blend.approximate_from, self._facts.block_tokens)
        tracked.exact_end = tracked.blend.approximate_from
        reports: dict[int, list[int]] = {number: [] for number in range(len(loads))}
        self._blends[tracked.id] = _Blend(tracked, tracked.blend, start, loads, reports, list(tracked.blend.computes))

    def learn(
        self, parts: Mapping[str, Mapping[int, Sequence[int]]], computed: Mapping[str, int]
    ) -> list[TrackedRequest]:
        """Learn what ranks have loaded and computed.

        Args:
            parts: by request and part, up to which token ranks have loaded it, one number a rank.
            computed: how many tokens passes have computed, by request.

        Returns:
            The requests whose loads have ended with it on all ranks: what was leased for them is not read any more.
        """
        loaded = []
        for request_id, ends_of in parts.items():
            if blend := self._blends.get(request_id):
                for part, ends in ends_of.items():
                    blend.reports[part] += ends
                blend.count_loaded(self._facts.num_workers)
                if blend.is_loaded:
                    loaded.append(blend.tracked)
        for request_id, num_tokens in computed.items():
            if blend := self._blends.get(request_id):
                blend.num_computed += num_tokens
        return loaded

    def failed(self, tracked: TrackedRequest) -> bool:
        """Tell whether a part could not be loaded completely, once all ranks have reported."""
        blend = self._blends[tracked.id]
        return any(min(blend.reports[number]) < load.end for number, load in enumerate(blend.loads))

    def end(self, tracked: TrackedRequest) -> tuple[int, int]:
        """Forget a request whose blend is complete; return how many tokens it had loaded and computed."""
        blend = self._blends.pop(tracked.id)
        return _num_loaded(blend.plan), blend.num_computed

    def next_ops(self) -> list[BlendOp]:
        """Return what all ranks compute in this step."""
        ops: list[BlendOp] = []
        left_tokens, left_runs = self._facts.pass_tokens_max, self._facts.pass_runs_max
        for blend in self._blends.values():
            if blend.is_done:
                continue
            piece: list[Run] | None = None
            if blend.tracked.is_finished:  # aborted: once its loads have ended, the workers only have to report it
                if blend.is_loaded:
                    blend.runs, blend.is_done, piece = [], True, []
            elif not left_tokens or not left_runs:
                break
            else:
                piece = blend.take(left_tokens, left_runs)
            if piece is not None:
                left_tokens -= sum(run.end - run.start for run in piece)
                left_runs -= len(piece)
                ops.append(self._op(blend, piece))
        return ops

    def _op(self, blend: _Blend, runs: list[Run]) -> BlendOp:
        tracked = blend.tracked
        select = self._selection(blend) if blend.is_done and runs else None
        first = min([run.start for run in runs] + [start for start, _ in (select.loads if select else ())], default=0)
        end = runs[-1].end if runs else 0
        return BlendOp(
            request_id=tracked.id,
            runs=[(run.start, run.end) for run in runs],
            first_token=first,
            tokens=tokens_to_bytes(tracked.request.all_token_ids[first:end]),
            block_ids=tracked.block_ids,
            loaded_from=blend.start,
            is_last=blend.is_done,
            select=select,
        )

    def _selection(self, blend: _Blend) -> Selection | None:
        wishes, plan = blend.tracked.wishes, blend.plan
        budget = self._config.blend_budget if wishes.budget is None else wishes.budget
        if (wishes.select or self._config.blend_select) != "query" or plan.loads[-1].end == plan.end or not budget:
            return None
        return Selection(
            loads=[(load.start, load.end) for load in plan.loads],
            budget=budget,
            computed=[(run.start, run.end) for run in plan.computes if run.start > plan.approximate_from],
        )


def make_private(request: "Request", first_token: int, block_tokens: int) -> None:
    """Have nobody else find the blocks of `request` from the one with `first_token` on in vLLM's prefix cache.

    Their hashes become random; those of later blocks, which vLLM has yet to make, depend on the one before.
    """
    first = first_token // block_tokens  # hashes may stand for less than a block: then more of them become private
    for index in range(first, len(request.block_hashes)):
        request.block_hashes[index] = secrets.token_bytes(len(request.block_hashes[index]))


def num_held(ticket: MatchTicket) -> int:
    """Return how many leading tokens of a document are to be loaded; none if its lease has expired meanwhile."""
    assert ticket.reply is not None
    num_chunks = ticket.choice.num_chunks if ticket.choice else ticket.reply.num_chunks
    return 0 if ticket.is_released else num_chunks * ticket.chunk_tokens


def _num_loaded(plan: BlendPlan) -> int:
    return sum(load.end - load.start for load in plan.loads)
