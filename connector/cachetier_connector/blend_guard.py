"""The guard: a share of the blended requests is computed again in full once they have ended, to compare the answers.

vLLM keeps the blocks of a request that is checked. First the last token of its prompt is computed again over the
blended KV, which gives the blended distribution of the next token; then all tokens from the first reused one on are
computed in place, piece by piece, in steps that blend nothing. Their blocks have private hashes (`make_private`), so
nobody else sees them change. One request is checked at a time; others drawn meanwhile are not, and a check that takes
too long is given up, for its blocks are wanted. Everything here runs on the scheduler's thread; the pieces themselves
are the `Blender`'s.
"""

import dataclasses
import logging
import random
import time
from collections import deque

from cachetier_blend.plan import Run, cut_runs
from cachetier_connector.facts import EngineFacts
from cachetier_connector.plan import CheckOp, Verdict, tokens_to_bytes
from cachetier_connector.requests import TrackedRequest

PIECE_TOKENS = 512
HOLD_MAX_S = 30.0
RECENT = 20
AGREED_SHARE_MIN = 0.8
WARNING_INTERVAL_S = 60.0
# What vLLM calls the end of a request whose blocks are as its last step left them.
NORMAL_ENDS = ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED", "FINISHED_REPETITION")

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class _Check:
    """A request that is checked: what is left to be computed of its prompt, and since when its blocks are kept."""

    request_id: str
    tokens: list[int]
    block_ids: list[int]
    ops: deque[tuple[Run, str]]
    since_s: float


class BlendGuard:
    """Chooses the requests that are checked, one at a time, and hands out the work."""

    def __init__(self, facts: EngineFacts) -> None:
        self._share = facts.config.blend_guard
        self._piece_tokens = min(PIECE_TOKENS, facts.pass_tokens_max)
        self._check: _Check | None = None
        self._ended: list[str] = []
        self._agreed: deque[bool] = deque(maxlen=RECENT)
        self._next_warning_s = 0.0

    def begin(self, tracked: TrackedRequest) -> bool:
        """Choose whether to check a request that has just ended; if so, vLLM must keep its blocks.

        They are kept until `take_ended` has named it and the workers have reported it.
        """
        request = tracked.request
        if self._check is not None or not tracked.is_blended or request.status.name not in NORMAL_ENDS:
            return False
        tokens, first = list(request.prompt_token_ids), tracked.exact_end
        assert first is not None
        if first >= len(tokens) or random.random() >= self._share:  # the former: only its own output was reused
            return False
        pieces = cut_runs([Run(first, len(tokens))], self._piece_tokens, 1)
        ops = deque([(Run(len(tokens) - 1, len(tokens)), "blended"), *((run, "") for [run] in pieces)])
        ops[-1] = (ops[-1][0], "full")
        self._check = _Check(tracked.id, tokens, tracked.block_ids, ops, time.monotonic())
        return True

    def next_op(self, *, is_free: bool) -> CheckOp | None:
        """Return what all ranks compute in this step; `is_free`: they blend nothing in it."""
        check = self._check
        if check is None:
            return None
        if time.monotonic() - check.since_s > HOLD_MAX_S:
            self.drop()
            return None
        if not is_free:
            return None
        run, answer = check.ops.popleft()
        if not check.ops:  # the workers wait for the answer, so the blocks are free once they report this step
            self.drop()
        return CheckOp(
            request_id=check.request_id,
            start=run.start,
            tokens=tokens_to_bytes(check.tokens[run.start : run.end]),
            block_ids=check.block_ids,
            answer=answer,
        )

    def drop(self) -> None:
        """Give the blocks of the request that is checked back, whether or not the check is complete."""
        if self._check is not None:
            self._ended.append(self._check.request_id)
            self._check = None

    def take_ended(self) -> list[str]:
        """Return the requests whose blocks are not needed any more, since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def learn(self, verdict: Verdict) -> None:
        """Learn what a check has found, and warn of blending that changes too many answers."""
        self._agreed.append(verdict.agrees)
        num_agreed, now = sum(self._agreed), time.monotonic()
        if len(self._agreed) < RECENT or num_agreed >= AGREED_SHARE_MIN * RECENT or now < self._next_warning_s:
            return
        self._next_warning_s = now + WARNING_INTERVAL_S
        log.warning(
            "cachetier: of the last %d blended requests that were computed again in full, only %d would go on with the "
            'same token: ask for "select": "query" with a larger "budget", or switch blending off for such prompts',
            RECENT,
            num_agreed,
        )
